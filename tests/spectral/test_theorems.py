"""Theorems about the edit of one head, in float64. Each also checks that it was not true before the edit.

All hold for heads that are factored by QR alone, and for those that take their Gram matrix where they can.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import build_tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import Result

from qkpatch.errors import NumericalError, UsageError
from qkpatch.spectral.edit import HeadReport, QueryEdit, edit_query, measure, select_modes
from qkpatch.spectral.factors import Factor
from qkpatch.spectral.lazy import cached_property
from qkpatch.spectral.product import QKProduct, Spectrum, effective_rank, energy_share
from qkpatch.spectral.rounding import round_once
from qkpatch.spectral.rule import Channel, EditRule, Select

HALVES = (Channel.symmetric, Channel.antisymmetric)
RULES = [(c, s) for c in Channel for s in Select if s is not Select.subspace or c is Channel.full]
every_channel = pytest.mark.parametrize("channel", Channel, ids=lambda c: c.value)
either_half = pytest.mark.parametrize("channel", HALVES, ids=lambda c: c.value)
every_rule = pytest.mark.parametrize(("channel", "select"), RULES, ids=lambda v: v.value)
theorem = settings(derandomize=True, deadline=None, max_examples=60)

QUARTER = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)  # turn of a plane

shapes = st.tuples(st.integers(1, 6), st.integers(2, 13))  # d_head, d_model, either of them the larger
seeds = st.integers(0, 2**32)
alphas = st.floats(0, 1)
Head = tuple[Tensor, Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")
roundoff = 0.0


@pytest.fixture(autouse=True, scope="module", params=["QR", "Gram"])
def _factored(request: pytest.FixtureRequest) -> None:
    global roundoff
    roundoff = 0.0 if request.param == "QR" else 2.0**-11


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(rows, columns, seed=seed))[0]


def head(d_head: int = 4, d_model: int = 10, seed: int = 0) -> Head:
    """Random W_Q and W_K."""
    both = random(2, d_head, d_model, seed=seed)
    return both[0], both[1]


def head_of(U: Tensor, S: Tensor, V: Tensor, seed: int = 0) -> Head:
    """W_Q and W_K, neither of them orthogonal, with ``W_Qᵀ W_K = U diag(S) Vᵀ``."""
    T = random(len(S), len(S), seed=seed) + 3 * torch.eye(len(S), dtype=S.dtype)
    return T.T @ (U * S).T, torch.linalg.inv(T) @ V.T


@dataclass(frozen=True)
class Edited:
    """The edit of one head."""

    W_Q: Tensor
    spectrum: Spectrum
    indices: tuple[int, ...]
    directions: Tensor | None
    gap: float | None
    realised_share: float | None


def product(W: Head) -> QKProduct:
    return QKProduct(Factor(W[0][None], roundoff), Factor(W[1][None], roundoff))


def edited(
    W: Head,
    channel: Channel = Channel.full,
    select: Select = Select.dominant,
    modes: int = 2,
    alpha: float = 0.0,
    seed: int = 0,
) -> Edited:
    edit = edit_as_is(W, channel, select, modes, alpha, seed)
    directions = None if edit.directions is None else edit.directions[0]
    return Edited(
        edit.W_Q[0], edit.spectra[0], edit.indices[0], directions, edit.gaps[0], edit.realised_shares[0]
    )


def edit_as_is(
    W: Head, channel: Channel, select: Select, modes: int, alpha: float, seed: int = 0
) -> QueryEdit:
    rule = EditRule(channel, select, modes, alpha)
    return edit_query(product(W), rule, [torch.Generator().manual_seed(seed)])


def directions(edit: Edited) -> Tensor:
    assert edit.directions is not None
    return edit.directions


def spectrum_of(W: Head, channel: Channel = Channel.full) -> Spectrum:
    return product(W).spectra(channel)[0]


def modes_of(W: Head, channel: Channel, indices: Iterable[int]) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V of some modes."""
    modes = product(W).decompose(channel)[1].modes([tuple(indices)])
    return modes.U[0], modes.S[0], modes.V[0]


def dense(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    return (U * S) @ V.T


def part(W: Head, channel: Channel) -> Tensor:
    return torch.from_numpy(oracle.channel_of((W[0].T @ W[1]).numpy(), channel.value))


def close(a: Tensor, b: Tensor, size: float = 1.0, digits: int = 9) -> bool:
    """Equal up to ``10^-digits`` of the larger of their norms and ``size``."""
    assert a.shape == b.shape
    bound = max(float(a.norm()), float(b.norm()), size)
    return float((a - b).norm()) <= 10.0**-digits * bound


def rank(A: Tensor, size: float) -> int:
    return int((torch.linalg.svdvals(A) > 1e-9 * size).sum())


def rotation(d_head: int, offset: int) -> Tensor:
    """``R_δ`` of RoPE as in llama: coordinates i and i + d_head/2 turn together."""
    half = d_head // 2
    angles = offset * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


# Full channel.


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


def edited_and_rounded(W: Head, rule: EditRule, dtype: torch.dtype) -> tuple[Tensor, HeadReport]:
    """What is stored, and what it does."""
    edit = edit_query(product(W), rule, [torch.Generator()])
    rounded = round_once(edit.W_Q, dtype)
    (report,) = measure(product(W), edit, rounded.double())
    return rounded[0], report


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


# Controls.


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


@every_rule
@theorem
@given(seed=seeds, energy=st.floats(0.01, 1))
def test_heads_that_are_computed_together_take_each_as_many_modes_as_by_itself(
    channel: Channel, select: Select, seed: int, energy: float
) -> None:
    heads = [head(4, 13, seed=seed + i) for i in range(3)]
    assume(all(np.linalg.cond(W_K) < 30 for _, W_K in heads))
    rule = EditRule(channel, select, 3, 0.95, energy=energy, min_modes=1)
    both = QKProduct(*(Factor(torch.stack(weights), roundoff) for weights in zip(*heads, strict=True)))
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
