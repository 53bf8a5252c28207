"""One head in float64, its edit and its dense product: what theorems are stated with.

All hold for heads that are factored by QR alone, and for those that take their Gram matrix where they can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import oracle
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from qkpatch.spectral.edit import HeadReport, QueryEdit, edit_query, measure
from qkpatch.spectral.factors import Factor
from qkpatch.spectral.product import QKProduct, Spectrum
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


def factor(W: Tensor) -> Factor:
    """As the case has it: by QR alone, or by the Gram matrix where that is exact enough."""
    return Factor(W, roundoff)


def product(W: Head) -> QKProduct:
    return QKProduct(factor(W[0][None]), factor(W[1][None]))


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


def edited_and_rounded(W: Head, rule: EditRule, dtype: torch.dtype) -> tuple[Tensor, HeadReport]:
    """What is stored, and what it does."""
    edit = edit_query(product(W), rule, [torch.Generator()])
    rounded = round_once(edit.W_Q, dtype)
    (report,) = measure(product(W), edit, rounded.double())
    return rounded[0], report
