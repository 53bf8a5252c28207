"""A family's own forward pass, watched where it calls its attention function; and what that function should get.

An attention implementation that records what it is given stands in for the family's, and the rotation is taken out.
What it should get follows from the stored weights: projections, norms and heads, written out once for all families.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import torch
import transformers
from edited_families import edited_head
from families import Case, Tensors, answer
from oracle import Matrix
from torch import Tensor, nn

RECORDING = "recording"  # the name of the attention implementation
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps")  # what text configs call the norms' epsilon


@dataclass(frozen=True)
class Seen:
    """What the attention function of one layer got and gave, one sequence of n tokens."""

    x: Matrix  # (n, d_model), what the projections read
    query: Matrix  # (H, n, d_head), not yet scaled
    key: Matrix  # (K, n, d_head)
    mask: Matrix  # (1, n, n), added to the scaled logits
    weights: Matrix  # (H, n, n)
    scaling: float
    softcap: float | None
    gainless: bool  # queries and keys are normed without gains, after RoPE
    sinks: Matrix | None  # (H, 1, 1), logits of no token, which take their share of each softmax

    def attention(self, logits: Matrix) -> Matrix:
        """The weights that the model should give to each token."""
        scaled = logits * self.scaling
        if self.softcap is not None:
            scaled = np.tanh(scaled / self.softcap) * self.softcap
        exponentials = np.exp(scaled + self.mask)
        taken = 0 if self.sinks is None else np.exp(self.sinks)
        return exponentials / (exponentials.sum(axis=-1, keepdims=True) + taken)


def record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The eager attention of the family's own module, remembered by the attention module."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output, weights = eager(module, query, key, value, mask, **options)
    if not hasattr(module, "x"):  # of another tower
        return output, weights
    mask = torch.zeros(1, 1, 1, 1) if mask is None else mask
    x, queries, keys, added, given = (t[0].double().numpy() for t in (module.x, query, key, mask, weights))
    by = getattr(module, "qk_scale_factor", 1)  # Muse, where queries are normed without gains
    queries = queries * (options["scaling"] / module.scaling) / by  # OPT scales them first, and then by 1
    softcap, gainless = options.get("softcap"), hasattr(module, "qk_norm")
    sinks = module.sinks.detach().double().numpy()[:, None, None] if hasattr(module, "sinks") else None
    module.seen = Seen(x, queries, keys, added, given, module.scaling * by, softcap, gainless, sinks)
    return output, weights


def remember_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What the attention module is called with, for ``record`` to find there."""
    module.x = args[0] if args else kwargs["hidden_states"]


def no_rotation(_module: nn.Module, _args: object, output: Any) -> Any:
    """Cosine 1 and sine 0, or the complex number 1, turn nothing, whichever coordinates the family pairs."""
    if isinstance(output, tuple):
        return torch.ones_like(output[0]), torch.zeros_like(output[1])
    return torch.ones_like(output) if output.is_complex() else output


def forward(case: Case, path: Path, stem: str) -> tuple[dict[int, Seen], Matrix]:
    """What each layer's attention saw, and the logits; ``stem`` is the stored name of an attention."""
    transformers.AttentionInterface.register(RECORDING, record)
    transformers.AttentionMaskInterface.register(RECORDING, transformers.masking_utils.eager_mask)
    model_class = getattr(transformers, case.model_class)
    model = model_class.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    model.config.get_text_config()._attn_implementation = RECORDING  # some vision towers take no other name
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(remember_input, with_kwargs=True)
        if "RotaryEmbedding" in type(module).__name__:
            module.register_forward_hook(no_rotation)
    with torch.no_grad():
        logits = answer(model(**case.inputs()))

    found = [(likeness(name, stem), m) for name, m in model.named_modules() if hasattr(m, "seen")]
    most = max(score for score, _ in found)  # encoders and cross-attention call the function, too
    chosen = [module for score, module in found if score == most]
    assert len({module.layer_idx for module in chosen}) == len(chosen)
    return {module.layer_idx: module.seen for module in chosen}, logits.double().numpy()


def likeness(name: str, other: str) -> int:
    """In how many last parts two names agree, whatever the layer."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1] or pair[0].isdigit(), pairs))


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm of queries or of keys, (heads, n, d_head)."""

    gain: Matrix  # (heads, 1, d_head)
    bias: Matrix  # the same
    eps: float
    centred: bool  # LayerNorm
    axes: tuple[int, ...]  # of the statistics: (-1,), or (0, -1) for all heads at once

    def centre(self, y: Matrix) -> Matrix:
        return y - y.mean(axis=-1, keepdims=True) if self.centred else y

    def size(self, y: Matrix) -> Matrix:
        """What it divides by, (heads, n, 1)."""
        squares = np.mean(self.centre(y) ** 2, axis=self.axes, keepdims=True)
        return np.broadcast_to(np.sqrt(squares + self.eps), (*y.shape[:-1], 1))

    def __call__(self, y: Matrix) -> Matrix:
        return self.centre(y) / self.size(y) * self.gain + self.bias


@dataclass(frozen=True)
class Layer:
    """One layer by its stored weights; the last column of a matrix is the bias, which meets a 1 in x."""

    Q: Matrix  # (H, d_head, d_model + 1)
    K: Matrix  # (K, d_head, d_model + 1), centred already where a LayerNorm centres it
    weighted: Matrix  # (H, d_head, d_model + 1), the keys of each query head, with the gains of both norms
    norms: tuple[Norm, Norm] | None

    @property
    def group(self) -> Matrix:
        """The key head of each query head."""
        return np.arange(len(self.Q)) * len(self.K) // len(self.Q)

    def edited(self, rows: Matrix, keys: Matrix) -> Layer:
        """The layer with ``rows`` (H, d_head, d_model) as queries, each edited against its ``keys`` and rounded."""
        edits = [edited_head(W_Q, W_K) for W_Q, W_K in zip(rows, keys[:, :, :-1], strict=True)]
        return replace(self, Q=np.dstack([oracle.round_to(np.stack(edits), "BF16"), self.Q[:, :, -1:]]))

    def weigh(self, gains: Matrix) -> Matrix:
        """The keys that query heads meet where the norms' gains are ``gains`` (H, 1, d_head)."""
        assert self.norms is not None
        return turned(self.norms[0].centre(gains * turned(self.K[self.group])))

    def regrouped(self) -> Layer:
        """Each query head with the key head of the next group."""
        heads = len(self.Q) // len(self.K)
        return replace(self, K=np.roll(self.K, -1, axis=0), weighted=np.roll(self.weighted, -heads, axis=0))

    def query(self, x: Matrix) -> Matrix:
        """What the attention function should get for queries, (H, n, d_head)."""
        y = with_one(x) @ turned(self.Q)
        return y if self.norms is None else self.norms[0](y)

    def key(self, x: Matrix) -> Matrix:
        """What the attention function should get for keys, (K, n, d_head)."""
        y = with_one(x) @ turned(self.K)
        return y if self.norms is None else self.norms[1](y)

    def logits(self, x: Matrix) -> Matrix:
        """x M xᵀ per query head, with M formed dense; over what the norms divide by, and with their biases."""
        ones = with_one(x)
        products = ones @ (turned(self.Q) @ self.weighted) @ ones.T
        if self.norms is None:
            return products
        query_norm, key_norm = self.norms
        size_q = query_norm.size(ones @ turned(self.Q))
        size_k = key_norm.size(ones @ turned(self.K))[self.group]
        b_q, b_k = query_norm.bias, key_norm.bias[self.group]
        of_biases = self.query(x) @ turned(b_k) + b_q @ turned(self.key(x)[self.group] - b_k)
        return products / (size_q @ turned(size_k)) + of_biases


def turned(y: Matrix) -> Matrix:
    return y.transpose(0, 2, 1)


def with_one(x: Matrix) -> Matrix:
    """Each token with the 1 that meets the bias."""
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


Declared = dict[str, Any] | None  # what the recipe says of the norms of queries and keys


def read_norm(tensors: Tensors, name: str, heads: int, d_head: int, eps: float, declared: Declared) -> Norm:
    """The norm of that name; stored gains are one for all heads, one for each, or one over all heads at once."""
    gain = tensors[name].double().numpy() + declared["plus_one"]
    bias = tensors.get(name.removesuffix("weight") + "bias", torch.zeros(gain.shape)).double().numpy()
    each = [np.broadcast_to(values.reshape(-1, 1, d_head), (heads, 1, d_head)) for values in (gain, bias)]
    at_once = declared["over"] != "head" and gain.size > d_head
    return Norm(*each, eps, declared["kind"] == "layer", (0, -1) if at_once else (-1,))


def read_layer(case: Case, tensors: Tensors, stem: str, seen: Seen, declared: Declared, config: Any) -> Layer:
    """The case's own split, used on the weights and on the biases as one more column.

    ``config`` is the language model's; the model itself says how many key heads there are.
    """
    H, (n_kv, _, d_head) = len(seen.query), seen.key.shape
    eps = next((getattr(config, name) for name in EPSILONS if hasattr(config, name)), 0.0)
    above = stem.rpartition(".")[0]
    names = [] if declared is None else [f"{above}.{declared[which]}" for which in ("query", "key")]
    names = [name for name in names if name in tensors]  # only some checkpoints of a family may have them
    norms = None
    if names:
        pairs = zip(names, (H, n_kv), strict=True)
        norms = tuple(read_norm(tensors, name, heads, d_head, eps, declared) for name, heads in pairs)
    elif seen.gainless:
        zeros = [np.zeros((heads, 1, d_head)) for heads in (H, n_kv)]
        norms = tuple(Norm(bias + 1, bias, eps, False, (-1,)) for bias in zeros)

    widened = dict(tensors)
    for name, W in tensors.items():
        if name.startswith(f"{stem}.") and W.ndim == 2 and name not in names:
            bias = tensors.get(name.removesuffix("weight") + "bias", torch.zeros(len(W)))
            widened[name] = torch.cat([W.double(), bias.double()[:, None]], dim=1)
    Q, weighted = (W.double().numpy() for W in case.heads(widened, stem))
    gainless = {name: torch.full_like(tensors[name], 1 - declared["plus_one"]) for name in names}
    K = case.heads(widened | gainless, stem)[1].double().numpy()
    # Where each head has gains of its own, a case tells the keys of each query head.
    return Layer(Q, K[:: len(K) // n_kv], np.repeat(weighted, H // len(weighted), axis=0), norms)
