"""Theorems about the edit of one head, in float64. Each also checks that it was not true before the edit."""

# ruff: noqa: F401 - a fixture that every test of a module has is imported

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import build_tiny
from hypothesis import assume, given
from hypothesis import strategies as st
from one_head import (
    HALVES,
    QUARTER,
    RULES,
    Head,
    _factored,
    alphas,
    close,
    dense,
    directions,
    edit_as_is,
    edited,
    edited_and_rounded,
    either_half,
    every_channel,
    every_rule,
    head,
    head_of,
    modes_of,
    orthonormal,
    part,
    product,
    random,
    rank,
    rotation,
    seeds,
    shapes,
    spectrum_of,
    theorem,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import Result

from qkpatch.spectral.edit import edit_query, measure
from qkpatch.spectral.factors import Factor
from qkpatch.spectral.lazy import cached_property
from qkpatch.spectral.product import effective_rank, energy_share
from qkpatch.spectral.rounding import round_once
from qkpatch.spectral.rule import Channel, EditRule, Select


@theorem
@given(shape=shapes, seed=seeds, modes=st.integers(1, 6), alpha=alphas)
def test_the_edit_is_the_closed_form_of_the_scaled_product(
    shape: tuple[int, int], seed: int, modes: int, alpha: float
) -> None:
    W_Q, W_K = head(*shape, seed=seed)
    edit = edited((W_Q, W_K), modes=modes, alpha=alpha)
    assert edit.indices == tuple(range(min(modes, *shape)))
    whole = oracle.decompose(W_Q.numpy(), W_K.numpy(), "full")
    assume((whole.gap(edit.indices) or 1) > 1e-4 and np.linalg.cond(W_K) < 1e4)
    expected = oracle.edit(W_Q.numpy(), W_K.numpy(), "full", edit.indices, alpha, whole)
    assert close(edit.W_Q, torch.from_numpy(expected.W_Q))


@theorem
@given(shape=shapes, seed=seeds, modes=st.integers(1, 6), alpha=alphas)
def test_the_edited_product_has_the_scaled_singular_values_and_the_old_vectors(
    shape: tuple[int, int], seed: int, modes: int, alpha: float
) -> None:
    W = head(*shape, seed=seed)
    edit = edited(W, modes=modes, alpha=alpha)
    U, S, V = modes_of(W, Channel.full, range(edit.spectrum.rank))
    scaled = S.clone()
    scaled[list(edit.indices)] *= alpha
    M = edit.W_Q.T @ W[1]
    assert close(M, dense(U, scaled, V))
    values = torch.linalg.svdvals(M)[: len(scaled)]
    assert close(values, scaled.sort(descending=True).values)


def test_removed_directions_are_no_longer_read_so_that_removal_is_idempotent() -> None:
    W = head()
    edit = edited(W, modes=2, alpha=0.0)
    U = directions(edit)
    assert (W[0] @ U).norm(dim=0).min() > 0.1
    assert close(edit.W_Q @ U, torch.zeros(4, 2, dtype=torch.float64))
    assert close(edit.W_Q - edit.W_Q @ U @ U.T, edit.W_Q)
    assert [rank(W_Q.T @ W[1], 1.0) for W_Q in (W[0], edit.W_Q)] == [4, 2]


@every_channel
@theorem
@given(first=st.floats(0.75, 1), second=st.floats(0.75, 1), seed=seeds)
def test_scaling_twice_multiplies_the_factors(
    channel: Channel, first: float, second: float, seed: int
) -> None:
    # Two strong modes that stay the dominant ones, and keys of full rank that reach all of them.
    S = torch.tensor([9.0, 8.0, 0.3, 0.2], dtype=torch.float64)
    U = orthonormal(4, 4, seed)
    V = {
        Channel.full: orthonormal(4, 4, seed + 1),
        Channel.symmetric: U,
        Channel.antisymmetric: U @ torch.block_diag(QUARTER, QUARTER),
    }[channel]
    if channel is Channel.antisymmetric:
        S = torch.tensor([9.0, 9.0, 0.2, 0.2], dtype=torch.float64)
    W_Q, W_K = head_of(U, S, V, seed)
    once = edited((W_Q, W_K), channel, alpha=first * second)
    twice = edited((edited((W_Q, W_K), channel, alpha=first).W_Q, W_K), channel, alpha=second)
    assert close(twice.W_Q, once.W_Q)
    assert first * second > 0.999 or not close(once.W_Q, W_Q, digits=5)


@pytest.mark.parametrize("offset", [0, 1, 17, 4000])
def test_every_rope_offset_is_edited_by_the_same_projection(offset: int) -> None:
    W_Q, W_K = head(8, 20)
    edit = edited((W_Q, W_K), modes=3, alpha=0.25)
    U = directions(edit)
    M = W_Q.T @ rotation(8, offset) @ W_K
    assert offset == 0 or not close(M, W_Q.T @ W_K, digits=1)
    projected = M - 0.75 * U @ (U.T @ M)
    assert close(edit.W_Q.T @ rotation(8, offset) @ W_K, projected)
    assert not close(M, projected, digits=2)


# All rules.


@every_rule
def test_alpha_one_is_the_identity_bit_for_bit(channel: Channel, select: Select) -> None:
    W = head()
    assert torch.equal(edited(W, channel, select, alpha=1.0).W_Q, W[0])
    assert not close(edited(W, channel, select, alpha=0.9).W_Q, W[0], digits=3)


@every_rule
def test_keys_and_the_original_queries_stay_as_they_were(channel: Channel, select: Select) -> None:
    W_Q, W_K = head()
    copies = W_Q.clone(), W_K.clone()
    rule = EditRule(channel, select, 2, 0.5)
    edited_and_rounded((W_Q, W_K), rule, torch.bfloat16)
    assert torch.equal(W_Q, copies[0])
    assert torch.equal(W_K, copies[1])


@pytest.mark.parametrize(
    ("channel", "select"), [rule for rule in RULES if rule[1] is not Select.shrink], ids=lambda v: v.value
)
@theorem
@given(shape=shapes, seed=seeds, modes=st.integers(1, 4), alpha=st.floats(0, 0.9))
def test_the_change_of_the_query_has_at_most_the_rank_of_the_edit(
    channel: Channel, select: Select, shape: tuple[int, int], seed: int, modes: int, alpha: float
) -> None:
    W = head(*shape, seed=seed)
    assume(np.linalg.cond(W[1]) < 1e3)
    change = edited(W, channel, select, modes, alpha, seed).W_Q - W[0]
    r = modes + modes % 2 if channel is Channel.antisymmetric else modes
    assert rank(change, float(W[0].norm())) <= r
    if channel is Channel.full and select is not Select.random:
        assert rank(change, float(W[0].norm())) == min(r, *shape)


def _singular(W_Q: Tensor, W_K: Tensor) -> dict[str, Head]:
    """Heads whose query or key rows are linearly dependent."""

    def without(W: Tensor, *rows: int) -> Tensor:
        return W.index_fill(0, torch.tensor(rows), 0.0)

    def doubled(W: Tensor) -> Tensor:
        return W[[0, 0, 2, 3]]

    return {
        "zero key rows": (W_Q, without(W_K, 1, 3)),
        "equal key rows": (W_Q, doubled(W_K)),
        "zero query rows": (without(W_Q, 1, 3), W_K),
        "equal query rows": (doubled(W_Q), W_K),
        "both": (without(W_Q, 0), doubled(W_K)),
    }


@every_channel
@pytest.mark.parametrize("name", _singular(*head()))
@pytest.mark.parametrize("select", ["dominant", "bottom"])
def test_dependent_rows_are_no_obstacle(name: str, channel: Channel, select: str) -> None:
    W_Q, W_K = _singular(*head())[name]
    assert min(torch.linalg.matrix_rank(W_Q), torch.linalg.matrix_rank(W_K)) < 4
    edit = edited((W_Q, W_K), channel, Select(select), modes=2, alpha=0.25)
    exact = oracle.decompose(W_Q.numpy(), W_K.numpy(), channel.value)
    assert edit.spectrum.rank == len(exact.S)
    assert edit.indices == oracle.choose(exact, channel.value, select, 2)
    expected = oracle.edit(W_Q.numpy(), W_K.numpy(), channel.value, edit.indices, 0.25, exact)
    assert close(edit.W_Q, torch.from_numpy(expected.W_Q))
    assert edit.realised_share == (None if expected.realised is None else pytest.approx(expected.realised))
    assert not close(edit.W_Q, W_Q, digits=3)


def test_what_dead_key_rows_never_read_stays_in_the_query() -> None:
    W_Q, W_K = _singular(*head())["zero key rows"]
    U = directions(edited((W_Q, W_K), modes=1, alpha=0.5))
    assert not close((W_Q.T @ W_K @ W_K.pinverse()).T, W_Q, digits=1)  # M W_K⁺ alone forgets two rows
    assert close(edited((W_Q, W_K), modes=1, alpha=0.5).W_Q, W_Q - 0.5 * W_Q @ U @ U.T)


@every_rule
@pytest.mark.parametrize("dead", [0, 1], ids=["query", "key"])
def test_a_head_with_a_zero_product_has_no_modes_to_edit(channel: Channel, select: Select, dead: int) -> None:
    W_Q, W_K = (W * (i != dead) for i, W in enumerate(head()))
    edit = edited((W_Q, W_K), channel, select)
    assert edit.spectrum.rank == 0
    assert edit.indices == ()
    if select is not Select.subspace:  # which looks at the query alone
        assert torch.equal(edit.W_Q, W_Q)


@either_half
def test_a_product_without_this_half_has_no_modes_in_it(channel: Channel) -> None:
    _, W_K = head()
    W_Q = torch.block_diag(QUARTER, QUARTER) @ W_K if channel is Channel.symmetric else W_K.clone()
    other = next(half for half in HALVES if half is not channel)
    assert spectrum_of((W_Q, W_K), other).rank > 0
    assert spectrum_of((W_Q, W_K), channel).rank == 0


# Gauge.


@every_channel
@theorem
@given(seed=seeds)
def test_a_change_of_basis_inside_the_head_changes_nothing_else(channel: Channel, seed: int) -> None:
    W_Q, W_K = head(seed=seed)
    R = random(4, 4, seed=seed + 1) + 3 * torch.eye(4, dtype=torch.float64)
    assume(np.linalg.cond(R) < 100 and np.linalg.cond(W_K) < 100)
    turned = R @ W_Q, torch.linalg.inv(R).T @ W_K
    assert close(turned[0].T @ turned[1], W_Q.T @ W_K)
    assert not close(turned[0], W_Q, digits=1)
    one, other = edited((W_Q, W_K), channel), edited(turned, channel)
    assume((one.gap or 1) > 1e-4)
    U, turned_U = directions(one), directions(other)
    assert close(one.spectrum.S, other.spectrum.S)
    assert close(U @ U.T, turned_U @ turned_U.T)
    assert close(R @ one.W_Q, other.W_Q)


def test_a_degenerate_block_has_one_projector_and_no_vectors() -> None:
    d_model, eps = 10, 1e-9
    U, V = orthonormal(d_model, 4, 1), orthonormal(d_model, 4, 2)
    S = torch.tensor([5 + eps, 5, 1, 0.5], dtype=torch.float64)
    eighth = torch.eye(4, dtype=torch.float64)
    eighth[:2, :2] = torch.tensor([[1, -1], [1, 1]]) / torch.tensor(2.0, dtype=torch.float64).sqrt()
    one, other = head_of(U, S, V), head_of(U @ eighth, S, V @ eighth)
    assert close(one[0].T @ one[1], other[0].T @ other[1], digits=8)  # the same product but for eps

    first = [directions(edited(W, modes=1)) for W in (one, other)]
    assert not close(first[0] @ first[0].T, first[1] @ first[1].T, digits=1)
    gap = edited(one, modes=1).gap
    assert gap is not None
    assert gap < 1e-9

    block = [directions(edited(W, modes=2)) for W in (one, other)]
    assert close(block[0] @ block[0].T, block[1] @ block[1].T, digits=8)
    assert close(block[0] @ block[0].T, U[:, :2] @ U[:, :2].T, digits=8)
    assert edited(one, modes=2).gap == pytest.approx(0.8)


def test_equal_planes_of_the_antisymmetric_half_are_still_exact_pairs() -> None:
    S = torch.tensor([3.0, 3, 3, 3, 1, 1], dtype=torch.float64)
    B = orthonormal(9, 6, 3)
    W = head_of(B, S, B @ torch.block_diag(QUARTER, QUARTER, QUARTER))
    A = part(W, Channel.antisymmetric)
    U, found, V = modes_of(W, Channel.antisymmetric, range(6))
    assert spectrum_of(W, Channel.antisymmetric).rank == 6
    assert close(found, S)
    assert close(U.T @ U, torch.eye(6, dtype=torch.float64))
    assert close(dense(U, found, V), A)


@pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])
def test_swapping_two_heads_of_one_key_group_swaps_their_edits(
    channel: str, tmp_path: Path, run: Callable[..., Result]
) -> None:
    def stored(name: str, order: list[int]) -> Tensor:
        tiny = build_tiny(tmp_path / f"{name}-in")  # 4 query heads, 2 key heads
        file = tiny.path / "model.safetensors"
        tensors = load_file(file)
        q = tensors[tiny.name(1, "q")].view(4, tiny.d_head, -1)
        tensors[tiny.name(1, "q")] = q[order].reshape(4 * tiny.d_head, -1).contiguous()
        save_file(tensors, file, {"format": "pt"})
        result = run(
            "apply", tiny.path, "-o", tmp_path / name, "--layers", 1, "--modes", 2, "--channel", channel
        )
        assert result.exit_code == 0, result.output
        return load_file(tmp_path / name / "model.safetensors")[tiny.name(1, "q")].view(4, tiny.d_head, -1)

    plain = stored("plain", [0, 1, 2, 3])
    assert torch.equal(stored("within", [1, 0, 2, 3]), plain[[1, 0, 2, 3]])
    assert not torch.equal(stored("across", [0, 2, 1, 3]), plain[[0, 2, 1, 3]])


# Symmetric and antisymmetric channels.


@either_half
@theorem
@given(shape=shapes, seed=seeds)
def test_a_halfs_modes_sum_to_it_with_its_dense_values(
    channel: Channel, shape: tuple[int, int], seed: int
) -> None:
    W = head(*shape, seed=seed)
    spectrum = spectrum_of(W, channel)
    exact = oracle.decompose(W[0].numpy(), W[1].numpy(), channel.value)
    U, S, V = modes_of(W, channel, range(spectrum.rank))
    assert spectrum.rank == len(exact.S)
    assert close(dense(U, S, V), part(W, channel))
    assert close(U.T @ U, torch.eye(spectrum.rank, dtype=torch.float64))
    assert close(S.abs(), torch.from_numpy(np.abs(exact.S)))
    assert (spectrum.S.abs().diff() <= 0).all()
    if channel is Channel.symmetric:
        assert torch.equal(U, V)
        assert close(S.sort().values, torch.from_numpy(np.sort(exact.S)))


@theorem
@given(shape=shapes, seed=seeds, modes=st.integers(1, 5))
def test_antisymmetric_values_come_in_exact_pairs_and_an_odd_request_takes_a_whole_one(
    shape: tuple[int, int], seed: int, modes: int
) -> None:
    W = head(*shape, seed=seed)
    edit = edited(W, Channel.antisymmetric, modes=modes)
    S, available = edit.spectrum.S, edit.spectrum.rank
    assert available % 2 == 0
    assert torch.equal(S[0:available:2], S[1:available:2])
    assert edit.indices == tuple(range(min(modes + modes % 2, available)))
    A = part(W, Channel.antisymmetric)
    U = directions(edit)
    for x, y, s in zip(U.T[::2], U.T[1::2], S[: len(edit.indices) : 2], strict=True):
        assert close(torch.stack([A @ x, A @ y]).abs(), (s * torch.stack([y, x])).abs())


@either_half
@theorem
@given(seed=seeds, alpha=st.floats(0, 0.9), modes=st.integers(1, 5))
def test_the_realised_share_is_what_the_keys_let_through_of_the_change(
    channel: Channel, seed: int, alpha: float, modes: int
) -> None:
    W_Q, W_K = head(seed=seed)
    assume(np.linalg.cond(W_K) < 1e3)
    edit = edited((W_Q, W_K), channel, modes=modes, alpha=alpha)
    U, S, V = modes_of((W_Q, W_K), channel, edit.indices)
    wanted = (1 - alpha) * dense(U, S, V)  # ΔM
    reached = (edit.W_Q - W_Q).T @ W_K
    missed = float((reached + wanted).norm() / wanted.norm()) ** 2
    assert edit.realised_share == pytest.approx(1 - missed, abs=1e-9)
    P_K = W_K.pinverse() @ W_K
    shares = (P_K @ V).square().sum(0)
    assert edit.realised_share == pytest.approx(float(shares @ S**2 / S.square().sum()))
    assert 0.01 < edit.realised_share < 0.999
    # No other change of the query comes closer: what is left lies outside the keys' row space.
    assert close((reached + wanted) @ W_K.T, torch.zeros_like(W_Q.T))


@either_half
def test_keys_of_full_rank_let_everything_through(channel: Channel) -> None:
    W = head(6, 6)
    edit = edited(W, channel, alpha=0.25)
    assert edit.realised_share == pytest.approx(1)
    S = edit.spectrum.S.clone()
    S[:2] *= 0.25
    after = part((edit.W_Q, W[1]), channel)
    assert close(torch.linalg.svdvals(after), S.abs().sort(descending=True).values)
    assert not close(after, part(W, channel), digits=1)
    other = next(half for half in HALVES if half is not channel)
    assert close(part((edit.W_Q, W[1]), other), part(W, other))


@theorem
@given(shape=shapes, seed=seeds)
def test_the_norms_and_shares_of_a_product_are_those_of_the_dense_matrix(
    shape: tuple[int, int], seed: int
) -> None:
    W = head(*shape, seed=seed)
    M, found = W[0].T @ W[1], spectrum_of(W).S
    S = torch.linalg.svdvals(M)[: min(shape)]
    symmetric = float((part(W, Channel.symmetric).norm() / M.norm()) ** 2)
    assert spectrum_of(W).frobenius == pytest.approx(float(M.norm()))
    assert product(W).symmetric_shares() == pytest.approx([symmetric])
    assert close(found, S)
    assert energy_share(found, 1) == pytest.approx(float(S[0] ** 2 / M.norm() ** 2))
    p = S / S.sum()
    assert effective_rank(S) == pytest.approx(float(torch.exp(-(p * p.log()).sum())))


@theorem
@given(seed=seeds)
def test_the_symmetric_share_of_one_half_alone_is_zero_or_one(seed: int) -> None:
    _, W_K = head(seed=seed)
    for turn, expected in ((torch.block_diag(QUARTER, QUARTER), 0.0), (torch.eye(4).double(), 1.0)):
        (share,) = product((turn @ W_K, W_K)).symmetric_shares()
        assert share == pytest.approx(expected, abs=1e-12)
        assert 0 <= share <= 1


# Reports.


def test_without_rounding_the_gain_of_every_edited_mode_is_alpha() -> None:
    W = head(6, 20)
    for select in (Select.dominant, Select.random, Select.bottom, Select.subspace):
        edit = edit_as_is(W, Channel.full, select, modes=3, alpha=0.3)
        assert measure(product(W), edit, edit.W_Q)[0].gains == pytest.approx([0.3] * 3)
        assert measure(product(W), edit, W[0][None])[0].gains == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_adds_at_most_half_an_ulp_to_the_reported_gains(dtype: torch.dtype) -> None:
    W = tuple(w.to(dtype).double() for w in head(8, 32))
    rule = EditRule(Channel.full, Select.dominant, 3, 0.0)
    stored, report = edited_and_rounded((W[0], W[1]), rule, dtype)
    assert stored.dtype == dtype
    gains = torch.tensor(report.gains)
    assert 0 < gains.abs().max() < torch.finfo(dtype).eps
    assert all(a >= b for a, b in pairwise(report.values_after))
    assert report.values_after == pytest.approx(
        torch.linalg.svdvals(stored.double().T @ W[1])[:8].tolist(), abs=1e-12
    )


def test_threads_do_not_wait_for_each_other_to_factor_a_head() -> None:
    """In Python 3.11 ``functools.cached_property`` has one lock for all instances."""
    both = threading.Barrier(2, timeout=10)

    class Slow:
        @cached_property
        def value(self) -> int:
            both.wait()
            return id(self)

    heads = [Slow(), Slow()]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda head: head.value, heads)) == [id(head) for head in heads]
    assert [head.value for head in heads] == [id(head) for head in heads]  # and none computes again
    assert isinstance(vars(Factor)["_factors"], cached_property)


def test_float32_is_not_enough() -> None:
    W = [w.to(torch.bfloat16) for w in head(128, 4096)]
    rule = EditRule(Channel.full, Select.dominant, 4, 0.5)
    double, single = (
        round_once(
            edit_query(product((W[0].to(dtype), W[1].to(dtype))), rule, [torch.Generator()]).W_Q,
            torch.bfloat16,
        )
        .double()
        .numpy()
        for dtype in (torch.float64, torch.float32)
    )
    assert np.allclose(double, single, rtol=2e-2, atol=1e-4)
    assert oracle.ulps(double, single, "BF16") > 1
