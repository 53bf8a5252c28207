"""Theorems about the controls of an edit, in float64: random modes, a random subspace, a shrink."""

# ruff: noqa: F401 - a fixture that every test of a module has is imported

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from one_head import (
    _factored,
    alphas,
    close,
    directions,
    edited,
    either_half,
    every_channel,
    every_rule,
    factor,
    head,
    product,
    random,
    seeds,
    shapes,
    spectrum_of,
    theorem,
)

from qkpatch.errors import NumericalError, UsageError
from qkpatch.spectral.edit import edit_query, select_modes
from qkpatch.spectral.product import QKProduct
from qkpatch.spectral.rule import Channel, EditRule, Select


@every_channel
@theorem
@given(shape=shapes, seed=seeds, modes=st.integers(1, 4))
def test_random_modes_are_none_of_the_dominant_ones(
    channel: Channel, shape: tuple[int, int], seed: int, modes: int
) -> None:
    spectrum = spectrum_of(head(*shape, seed=seed), channel)

    def draw(select: Select) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return select_modes(spectrum, EditRule(channel, select, modes, 0.5), generator)

    drawn, dominant = draw(Select.random), draw(Select.dominant)
    assert not set(drawn) & set(dominant)
    assert len(set(drawn)) == min(len(dominant), spectrum.rank - len(dominant))
    assert all(0 <= j < spectrum.rank for j in drawn)
    assert list(drawn) == sorted(drawn)
    assert drawn == draw(Select.random)
    if channel is Channel.antisymmetric:
        assert {j ^ 1 for j in drawn} == set(drawn)


@pytest.mark.long
@every_rule
@theorem
@given(seed=seeds, energy=st.floats(0.01, 1))
def test_heads_that_are_computed_together_take_each_as_many_modes_as_by_itself(
    channel: Channel, select: Select, seed: int, energy: float
) -> None:
    heads = [head(4, 13, seed=seed + i) for i in range(3)]
    assume(all(np.linalg.cond(W_K) < 30 for _, W_K in heads))
    rule = EditRule(channel, select, 3, 0.95, energy=energy, min_modes=1)
    both = QKProduct(*(factor(torch.stack(weights)) for weights in zip(*heads, strict=True)))
    together = edit_query(both, rule, [torch.Generator().manual_seed(i) for i in range(3)])
    for i, W in enumerate(heads):
        alone = edit_query(product(W), rule, [torch.Generator().manual_seed(i)])
        assert together.indices[i] == alone.indices[0]
        assert together.counts[i] == alone.counts[0]
        assert close(together.W_Q[i], alone.W_Q[0])


@every_channel
def test_another_seed_draws_other_modes_until_each_has_been_drawn(channel: Channel) -> None:
    W = head(6, 20)
    draws = {edited(W, channel, Select.random, 2, seed=seed).indices for seed in range(100)}
    rest = range(2, spectrum_of(W, channel).rank)
    assert {j for draw in draws for j in draw} == set(rest)
    pairs = len(rest) // 2 if channel is Channel.antisymmetric else math.comb(len(rest), 2)
    assert len(draws) > 0.6 * min(pairs, 100)


@theorem
@given(shape=shapes, seed=seeds, r=st.integers(1, 4), alpha=alphas)
def test_the_subspace_control_projects_inside_the_row_space_of_the_query(
    shape: tuple[int, int], seed: int, r: int, alpha: float
) -> None:
    W = head(*shape, seed=seed)
    assume(np.linalg.cond(W[0]) < 1e4)
    edit = edited(W, select=Select.subspace, modes=r, alpha=alpha, seed=seed)
    G = directions(edit)
    P = W[0].pinverse() @ W[0]
    assert G.shape == (shape[1], min(r, *shape))
    assert close(G.T @ G, torch.eye(G.shape[1], dtype=torch.float64))
    assert close(P @ G, G)
    assert close(edit.W_Q - W[0], -(1 - alpha) * W[0] @ G @ G.T)


@pytest.mark.long
@pytest.mark.parametrize("dependent", [False, True], ids=["full rank", "equal rows"])
def test_the_subspace_is_uniform_over_the_row_space(dependent: bool) -> None:
    W_Q, W_K = head(5, 9)
    if dependent:
        W_Q[4] = W_Q[0]
    n, r, draws = 5 - dependent, 2, 2000
    bases = [
        directions(edited((W_Q, W_K), select=Select.subspace, modes=r, seed=seed)) for seed in range(draws)
    ]
    projectors = torch.stack([G @ G.T for G in bases])
    P = W_Q.pinverse() @ W_Q
    assert round(float(P.trace())) == n
    # Moments of |Gᵀ x|² for a unit vector x of the row space: it is Beta(r/2, (n − r)/2).
    x = P @ random(9, seed=1)
    x /= x.norm()
    shares = torch.einsum("i,bij,j->b", x, projectors, x)
    assert close(projectors.mean(0), P * r / n, digits=1)
    assert (projectors.mean(0) - P * r / n).abs().max() < 0.03
    assert (projectors[0] - P * r / n).abs().max() > 0.1
    assert float(shares.mean()) == pytest.approx(r / n, abs=0.02)
    assert float(shares.square().mean()) == pytest.approx(r * (r + 2) / (n * (n + 2)), abs=0.02)
    again = directions(edited((W_Q, W_K), select=Select.subspace, modes=r, seed=7))
    assert torch.equal(again, bases[7])


@either_half
def test_a_subspace_belongs_to_the_full_channel_only(channel: Channel) -> None:
    assert edited(head(), select=Select.subspace).W_Q.isfinite().all()
    with pytest.raises(UsageError):
        edited(head(), channel, Select.subspace)


@every_channel
@theorem
@given(seed=seeds, modes=st.integers(1, 3), alpha=st.floats(0, 0.9))
def test_shrink_only_scales_the_query_and_moves_it_as_far_as_the_dominant_edit(
    channel: Channel, seed: int, modes: int, alpha: float
) -> None:
    W = head(seed=seed)
    assume(np.linalg.cond(W[1]) < 30)
    reference = edited(W, channel, Select.dominant, modes, alpha).W_Q - W[0]
    assume(reference.norm() < W[0].norm())
    shrunk = edited(W, channel, Select.shrink, modes, alpha).W_Q
    factor = shrunk / W[0]
    assert float(factor.max() - factor.min()) < 1e-12
    assert 0 <= float(factor.mean()) < 1
    assert float((shrunk - W[0]).norm()) == pytest.approx(float(reference.norm()))
    assert not close(shrunk - W[0], reference, digits=1)


@theorem
@given(shape=shapes, seed=seeds)
def test_a_shrink_as_large_as_the_query_is_not_too_large(shape: tuple[int, int], seed: int) -> None:
    W = head(*shape, seed=seed)
    assume(np.linalg.cond(W[0]) < 1e3 and np.linalg.cond(W[1]) < 1e3)
    shrunk = edited(W, select=Select.shrink, modes=min(shape), alpha=0.0).W_Q
    assert shrunk.norm() < 1e-9 < W[0].norm()


def test_no_shrink_matches_an_edit_larger_than_the_query() -> None:
    W_Q, W_K = head()
    W_K[3] = W_K[2] + 1e-3 * W_K[3]  # keys that reach part of the change only by a huge query
    reference = edited((W_Q, W_K), Channel.symmetric).W_Q - W_Q
    assert reference.norm() > W_Q.norm()
    with pytest.raises(NumericalError):
        edited((W_Q, W_K), Channel.symmetric, Select.shrink)
