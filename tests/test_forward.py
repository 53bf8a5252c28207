"""The edited product read back from inside each family's own forward pass.

An attention implementation that records what it is given stands in for the family's, and the rotation is taken out. So
the model's own code says which rows are a head's, which key head it meets, what is a gate and what is normed; the dense
oracle and the weights of the source say what its queries, keys and attention weights should be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import test_families
import torch
import transformers
from families import Case, Tensors
from oracle import Matrix
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

RECORDING = "recording"  # the name of the attention implementation
IDS = torch.arange(4, 12)[None]
CLOSE = 1e-5  # of the largest element: the forward pass runs in float32
FAR = 1e-2  # a wrong mapping misses by more


@dataclass(frozen=True)
class Seen:
    """What the attention function of one layer got and gave, one sequence of n tokens."""

    x: Matrix  # (n, d_model), what the projections read
    query: Matrix  # (H, n, d_head)
    key: Matrix  # (K, n, d_head)
    mask: Matrix  # (1, n, n), added to the scaled logits
    weights: Matrix  # (H, n, n)
    scaling: float
    softcap: float | None


def record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The eager attention of the family's own module, remembered by the attention module."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output, weights = eager(module, query, key, value, mask, **options)
    arrays = (tensor[0].double().numpy() for tensor in (module.x, query, key, mask, weights))
    module.seen = Seen(*arrays, scaling=options["scaling"], softcap=options.get("softcap"))
    return output, weights


AttentionInterface.register(RECORDING, record)
AttentionMaskInterface.register(RECORDING, eager_mask)


def remember_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What the attention module is called with, for ``record`` to find there."""
    module.x = args[0] if args else kwargs["hidden_states"]


def no_rotation(_module: nn.Module, _args: object, output: Any) -> Any:
    """Cosine 1 and sine 0 turn nothing, whichever coordinates the family pairs."""
    return (torch.ones_like(output[0]), torch.zeros_like(output[1])) if isinstance(output, tuple) else output


def forward(model_class: Any, path: Path) -> tuple[dict[int, Seen], Matrix]:
    """What each layer's attention saw, and the logits."""
    model = model_class.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    model.config.get_text_config()._attn_implementation = RECORDING  # some vision towers take no other name
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(remember_input, with_kwargs=True)
        if "RotaryEmbedding" in type(module).__name__:
            module.register_forward_hook(no_rotation)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    seen = [module for module in model.modules() if hasattr(module, "seen")]
    assert len({module.layer_idx for module in seen}) == len(seen)
    return {module.layer_idx: module.seen for module in seen}, logits.double().numpy()


def save_source(model_class: Any, config: Any, path: Path) -> None:
    """Norm gains and biases that matter, and queries and keys large enough for uneven attention."""
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.uniform_(-0.5, 0.5)
        elif any(projection in name for projection in ("q_proj", "k_proj", "qkv")):
            parameter.data *= 8
    model.to(torch.bfloat16).save_pretrained(path)


@dataclass(frozen=True)
class Layer:
    """One layer by its stored weights; the last column of a matrix is the bias, which meets a 1 in x."""

    Q: Matrix  # (H, d_head, d_model + 1)
    K: Matrix  # (K, d_head, d_model + 1)
    gains: tuple[Matrix, Matrix] | None  # of the query and the key norm
    eps: float

    @property
    def weighted(self) -> Matrix:
        """diag(g_q ⊙ g_k) W_K, or W_K without a norm."""
        return self.K if self.gains is None else self.K * (self.gains[0] * self.gains[1])[:, None]

    def group(self, shift: int = 0) -> list[int]:
        """The key head of each query head, or a neighbour of it."""
        H, K = len(self.Q), len(self.K)
        return [(h * K // H + shift) % K for h in range(H)]

    def edited(self, rows: Matrix, keys: Matrix, shift: int = 0) -> Layer:
        """The layer with ``rows`` (H, d_head, d_model) as queries, edited against ``keys`` and rounded."""
        pairs = zip(rows, keys[self.group(shift)][:, :, :-1], strict=True)
        edits = [test_families.edited_head(W_Q, W_K) for W_Q, W_K in pairs]
        return replace(self, Q=np.dstack([oracle.round_to(np.stack(edits), "BF16"), self.Q[:, :, -1:]]))

    def rms(self, y: Matrix) -> Matrix:
        """What the norm divides by, per head and token."""
        if self.gains is None:
            return np.ones((*y.shape[:-1], 1))
        return np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + self.eps)

    def query(self, x: Matrix) -> Matrix:
        """What the attention function should get for queries, (H, n, d_head)."""
        y = with_one(x) @ self.Q.transpose(0, 2, 1)
        return y / self.rms(y) * (1 if self.gains is None else self.gains[0])

    def key(self, x: Matrix) -> Matrix:
        """What the attention function should get for keys, (K, n, d_head)."""
        y = with_one(x) @ self.K.transpose(0, 2, 1)
        return y / self.rms(y) * (1 if self.gains is None else self.gains[1])

    def logits(self, x: Matrix, shift: int = 0) -> Matrix:
        """x M xᵀ per query head, with M formed dense, over what the norms divide by."""
        x, group = with_one(x), self.group(shift)
        rms_q, rms_k = (self.rms(x @ W.transpose(0, 2, 1)) for W in (self.Q, self.K[group]))
        M = self.Q.transpose(0, 2, 1) @ self.weighted[group]
        return (x @ M @ x.T) / (rms_q @ rms_k.transpose(0, 2, 1))


def with_one(x: Matrix) -> Matrix:
    """Each token with the 1 that meets the bias."""
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def read_layer(case: Case, tensors: Tensors, stem: str, norms: dict[str, Any] | None, eps: float) -> Layer:
    """The case's own split, used on the weights and on the biases as one more column."""
    gains = None
    if norms is not None:
        above = stem.rpartition(".")[0]
        stored = (tensors[f"{above}.{norms[which]}"].double().numpy() for which in ("query", "key"))
        gains = tuple(weight + norms["plus_one"] for weight in stored)
    widened = dict(tensors)
    for name, W in tensors.items():
        if name.startswith(f"{stem}.") and W.ndim == 2:
            bias = tensors.get(name.removesuffix("weight") + "bias", torch.zeros(len(W)))
            widened[name] = torch.cat([W.double(), bias.double()[:, None]], dim=1)
    Q, keys = (W.double().numpy() for W in case.heads(widened, stem))
    return Layer(Q, keys if gains is None else keys / (gains[0] * gains[1])[:, None], gains, eps)


def attention(seen: Seen, logits: Matrix) -> Matrix:
    """The weights that the model should give to each token."""
    scaled = logits * seen.scaling
    if seen.softcap is not None:
        scaled = np.tanh(scaled / seen.softcap) * seen.softcap
    exponentials = np.exp(scaled + seen.mask)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def miss(actual: Matrix, expected: Matrix) -> Matrix:
    """Largest difference per head, relative to the head's largest element."""
    return np.abs(actual - expected).max(axis=(-2, -1)) / np.abs(expected).max(axis=(-2, -1))


def assert_agreement(seen: Seen, layer: Layer) -> None:
    """Queries, keys, their products, and the attention weights, where the model pairs the heads."""
    logits = layer.logits(seen.x)
    assert miss(seen.query, layer.query(seen.x)).max() < CLOSE
    assert miss(seen.key, layer.key(seen.x)).max() < CLOSE
    assert miss(seen.query @ seen.key[layer.group()].transpose(0, 2, 1), logits).max() < CLOSE
    assert miss(seen.weights, attention(seen, logits)).max() < CLOSE


def wrong_layers(layer: Layer, others: Matrix | None) -> dict[str, Layer]:
    """What a tool that mistook the layout would have made of the layer."""
    rows = layer.Q[:, :, :-1]
    edited = layer.edited(rows, layer.weighted)
    wrong = {
        "no edit": layer,
        "an edit against another key head": layer.edited(rows, layer.weighted, shift=1),
        "the rows of another query head": replace(edited, Q=np.roll(edited.Q, 1, axis=0)),
    }
    if layer.gains is not None:
        wrong["an edit without the gains"] = layer.edited(rows, layer.K)
        wrong["no norm in the model"] = replace(edited, gains=None)
    if others is not None and others.shape == rows.shape:
        wrong["other rows of the tensor, as those of gates"] = layer.edited(others, layer.weighted)
    return wrong


@pytest.mark.parametrize("key", test_families.CASES)
def test_the_forward_pass_meets_the_edited_product(key: str, run: Callable[..., Any], tmp_path: Path) -> None:
    case = test_families.CASES[key]
    model_class, config = getattr(transformers, case.model_class), case.config()
    source, out = tmp_path / "source", tmp_path / "out"
    save_source(model_class, config, source)
    layers = f"{case.edited[0]}-{case.edited[-1]}"
    result = run("apply", source, "--layers", layers, "--modes", 2, "--alpha", 0, "-o", out)
    assert result.exit_code == 0, result.output

    tensors, patched = test_families.read_all(source), test_families.read_all(out)
    changed = next(name for name in tensors if not torch.equal(tensors[name], patched[name]))
    prefix, _, attention_name, _, _ = changed.rsplit(".", 4)  # …layers, 1, self_attn, q_proj, weight
    norms = json.loads((out / "qkpatch.json").read_text())["recipe"]["tensors"]["norms"]
    text = config.get_text_config()

    before, logits_before = forward(model_class, source)
    after, logits_after = forward(model_class, out)
    assert miss(logits_after, logits_before) > CLOSE
    assert set(after) == set(range(text.num_hidden_layers)) - set(case.skipped)
    for layer in range(case.edited[0]):
        assert np.array_equal(after[layer].query, before[layer].query)

    for layer, seen in after.items():
        stem = f"{prefix}.{layer}.{attention_name}"
        stored = read_layer(case, tensors, stem, norms, getattr(text, "rms_norm_eps", 0.0))
        if layer not in case.edited:
            assert_agreement(seen, stored)
            continue
        expected = stored.edited(stored.Q[:, :, :-1], stored.weighted)
        assert_agreement(seen, expected)
        another = attention(seen, expected.logits(seen.x, shift=1))
        assert (miss(seen.weights, another) > FAR).all()
        others = None if case.kept is None else case.kept(tensors, stem).double().numpy()
        for what, wrong in wrong_layers(stored, others).items():
            assert (miss(seen.query, wrong.query(seen.x)) > FAR).all(), what
