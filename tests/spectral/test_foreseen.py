"""The sizes of an edit, foreseen from small cores, beside those of the edit itself and of dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkpatch.spectral.edit import Decomposed, HeadError, edit_query
from qkpatch.spectral.factors import Factor
from qkpatch.spectral.foreseen import Foreseen
from qkpatch.spectral.product import QKProduct
from qkpatch.spectral.rule import Channel, EditRule, Select, Sums

D_HEAD, D_MODEL = 8, 40
RULES = [
    EditRule(channel, select, modes, alpha)
    for channel in Channel
    for select in Select
    for modes, alpha in ((1, 0.0), (2, 0.5), (3, 0.8))
    if select is not Select.subspace or channel is Channel.full
]


def weights(kind: str) -> tuple[Tensor, Tensor]:
    """W_Q and W_K of two heads, float64."""
    generator = torch.Generator().manual_seed(5)
    W_Q, W_K = (torch.randn(2, D_HEAD, D_MODEL, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "keys of low rank":
        W_K[:, 3:] = 0.5 * W_K[:, :1]
    if kind == "queries of low rank":
        W_Q[:, 5:] = W_Q[:, :3]
    if kind == "scaled":
        W_Q, W_K = W_Q * 1e20, W_K * 1e-30
    return W_Q, W_K


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def squared(M: Tensor) -> float:
    return float(M.square().sum())


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda r: f"{r.channel.value}-{r.select.value}-{r.modes}-{r.alpha}"
)
@pytest.mark.parametrize("kind", ["usual", "keys of low rank", "queries of low rank", "scaled"])
@pytest.mark.parametrize("roundoff", [0.0, 2.0**-9])
def test_what_is_foreseen_is_what_the_edit_does(rule: EditRule, kind: str, roundoff: float) -> None:
    W_Q, W_K = weights(kind)
    product = QKProduct(Factor(W_Q, roundoff), Factor(W_K, roundoff))
    edit = edit_query(product, rule, generators())
    found = Foreseen(Decomposed(product, rule.channel)).sums(rule, generators())
    for i, sums in enumerate(found):
        M, M_new = W_Q[i].T @ W_K[i], edit.W_Q[i].T @ W_K[i]
        expected = Sums(
            squared(edit.W_Q[i] - W_Q[i]), squared(W_Q[i]), squared(M) - squared(M_new), squared(M)
        )
        assert sums[:4] == pytest.approx(expected[:4], rel=1e-9, abs=1e-11 * expected.product)
        assert (sums.moved > 0) == (float(edit.size[i]) > 0)
        share = edit.realised_shares[i]
        assert (sums.reached / sums.wanted if sums.wanted else None) == (
            None if share is None else pytest.approx(share, rel=1e-9)
        )
        if rule.select is Select.shrink:
            dominant = edit_query(
                product, EditRule(rule.channel, Select.dominant, rule.modes, rule.alpha), generators()
            )
            assert sums.moved == pytest.approx(float(dominant.size[i]) ** 2, rel=1e-9)


@pytest.mark.parametrize("channel", Channel)
def test_in_the_full_channel_the_energy_is_that_of_the_modes(channel: Channel) -> None:
    W_Q, W_K = weights("usual")
    product = QKProduct(Factor(W_Q), Factor(W_K))
    sums = Foreseen(Decomposed(product, channel)).sums(
        EditRule(channel, Select.dominant, 2, 0.5), generators()
    )[0]
    spectrum = product.spectra(channel)[0]
    target = float((1 - 0.5**2) * spectrum.S[:2].square().sum())
    if channel is Channel.full:
        assert sums.removed == pytest.approx(target, rel=1e-12)
    else:  # what fixed keys do not let through of ΔM was to be put in, not out
        assert sums.removed > target


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda r: f"{r.channel.value}-{r.select.value}-{r.modes}-{r.alpha}"
)
def test_edits_derived_one_after_the_other_are_bit_for_bit_those_made_alone(rule: EditRule) -> None:
    W_Q, W_K = weights("usual")
    product = QKProduct(Factor(W_Q, 2.0**-9), Factor(W_K, 2.0**-9))
    known = Decomposed(product, rule.channel)
    for other in RULES:
        if other.channel is rule.channel:
            edit_query(product, other, generators(), known)
            Foreseen(known).sums(other, generators())
    alone = edit_query(QKProduct(Factor(W_Q, 2.0**-9), Factor(W_K, 2.0**-9)), rule, generators())
    derived = edit_query(product, rule, generators(), known)
    assert torch.equal(alone.W_Q, derived.W_Q)
    assert torch.equal(alone.size, derived.size)
    for one, other in ((alone.A, derived.A), (alone.directions, derived.directions)):
        assert (one is None and other is None) or torch.equal(one, other)


def test_a_shrink_that_cannot_be_names_its_head() -> None:
    W_Q, W_K = weights("usual")
    # The dominant symmetric edit is larger than W_Q where keys are far from what they would have to be.
    W_K[1] = torch.linalg.qr(W_K[1].T)[0].T
    W_K[1, 1:] *= 1e-4
    rule = EditRule(Channel.symmetric, Select.shrink, 8, 0.0)
    product = QKProduct(Factor(W_Q), Factor(W_K))
    with pytest.raises(HeadError) as edited:
        edit_query(product, rule, generators())
    with pytest.raises(HeadError) as foreseen:
        Foreseen(Decomposed(product, rule.channel)).sums(rule, generators())
    assert foreseen.value.index == edited.value.index == 1
    assert foreseen.value.what == edited.value.what
