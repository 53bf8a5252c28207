"""The edited product read back from inside each family's own forward pass.

The model's own code says which rows are a head's, which key head it meets, what is a gate and what is normed; the dense
oracle and the weights of the source say what its queries, keys and attention weights should be.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from edited_families import CASES, edited, read_all, way
from families import same
from forward import Layer, Seen, forward, read_layer
from kinds import first_of_each
from oracle import Matrix

CLOSE = 1e-5  # of the largest element: the forward pass runs in float32
FAR = 1e-2  # a wrong mapping misses by more
MOVED = 5e-5  # by more than this, which is more than float32's noise, the edit moves the logits


def miss(actual: Matrix, expected: Matrix) -> Matrix:
    """Largest difference per head, relative to the head's largest element."""
    return np.abs(actual - expected).max(axis=(-2, -1)) / np.abs(expected).max(axis=(-2, -1))


def assert_agreement(seen: Seen, layer: Layer) -> None:
    """Queries, keys, their products, and the attention weights, where the model pairs the heads."""
    logits = layer.logits(seen.x)
    assert miss(seen.query, layer.query(seen.x)).max() < CLOSE
    assert miss(seen.key, layer.key(seen.x)).max() < CLOSE
    assert miss(seen.query @ seen.key[layer.group].transpose(0, 2, 1), logits).max() < CLOSE
    assert miss(seen.weights, seen.attention(logits)).max() < CLOSE


def wrong_layers(layer: Layer, others: Matrix | None) -> dict[str, Layer]:
    """What a tool that mistook the layout would have made of the layer."""
    rows = layer.Q[:, :, :-1]
    edited = layer.edited(rows, layer.weighted)
    wrong = {
        "no edit": layer,
        "the rows of another query head": replace(edited, Q=np.roll(edited.Q, 1, axis=0)),
    }
    if len(layer.K) > 1:
        wrong["an edit against another key head"] = layer.edited(rows, layer.regrouped().weighted)
    if layer.norms is not None:
        wrong["no norm in the model"] = replace(edited, norms=None)
        g_q, g_k = layer.norms[0].gain, layer.norms[1].gain[layer.group]
        if not np.all(g_q == 1):
            wrong["an edit without the gains"] = layer.edited(rows, layer.weigh(np.ones_like(g_q)))
        if not np.all(g_q == g_q[0]):
            gains = np.roll(g_q, 1, axis=0) * g_k
            wrong["an edit with another head's gains"] = layer.edited(rows, layer.weigh(gains))
        if layer.norms[0].centred:
            keys = layer.K[layer.group] * (g_q * g_k).transpose(0, 2, 1)
            wrong["an edit without the mean of the queries"] = layer.edited(rows, keys)
    if others is not None:
        gates = others.reshape(-1, *rows.shape[1:])[: len(rows)]
        wrong["other rows of the tensor, as those of gates"] = layer.edited(gates, layer.weighted)
    return wrong


# Classes whose attention is no call of transformers' attention functions, or gets more than one set's queries and keys.
ANOTHER_WAY = {
    "blip", "git", "falcon", "udop", "vision-encoder-decoder:TrOCR",
    "diffusion-gemma", "t5gemma2", "pix2struct", "pi0", "step3.7:more query heads",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Casting complex values")  # Llama 4's vision tower in bfloat16
@pytest.mark.parametrize("key", first_of_each((key for key in CASES if key not in ANOTHER_WAY), way))
def test_the_forward_pass_meets_the_edited_product(key: str) -> None:
    case, made = CASES[key], edited(key, CASES[key].original is not False)
    source, out = made.source, made.out
    config = case.config().get_text_config()

    tensors, patched = read_all(source), read_all(out)
    changed = next(name for name in tensors if not same(tensors[name], patched[name]))
    prefix, _, attention, query, _ = changed.rsplit(".", 4)  # …layers, 1, self_attn, q_proj, weight
    norms = made.manifest["recipe"]["tensors"]["norms"]

    before, logits_before = forward(case, source, f"{prefix}.0.{attention}")
    after, logits_after = forward(case, out, f"{prefix}.0.{attention}")
    possible = logits_before > np.finfo(np.float32).min  # Chameleon's model gives no image tokens
    assert miss(logits_after[possible][None], logits_before[possible][None]) > MOVED
    stored_in = (re.match(rf"{re.escape(prefix)}\.(\d+)\.{attention}\.{query}\.", name) for name in tensors)
    assert set(after) == {int(found[1]) for found in stored_in if found}
    for layer in set(range(case.edited[0])) & set(after):
        assert np.array_equal(after[layer].query, before[layer].query)

    own = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
    for layer, seen in after.items():
        if layer >= own:  # it takes the keys of an earlier layer, and is left alone
            assert any(np.array_equal(seen.key, after[earlier].key) for earlier in range(own))
            continue
        stem = f"{prefix}.{layer}.{attention}"
        stored = read_layer(case, tensors, stem, seen, norms, config)
        if layer not in case.edited:
            assert_agreement(seen, stored)
            continue
        expected = stored.edited(stored.Q[:, :, :-1], stored.weighted)
        assert_agreement(seen, expected)
        if len(stored.K) > 1:
            another = seen.attention(expected.regrouped().logits(seen.x))
            assert (miss(seen.weights, another) > FAR).all()
        others = None if case.kept is None else case.kept(tensors, stem).double().numpy()
        for what, wrong in wrong_layers(stored, others).items():
            assert (miss(seen.query, wrong.query(seen.x)) > FAR).all(), what
