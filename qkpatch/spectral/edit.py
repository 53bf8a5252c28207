"""The edit of some heads: choose modes, scale them, map the result back to the query weights in closed form.

full channel (the paper's object), with ``U_r`` the selected left singular vectors:

    W_Q' = W_Q (I − (1 − α) U_r U_rᵀ)                      equivalent to  W_Q'ᵀ = M' W_K⁺

symmetric and antisymmetric channels, with ``ΔM = (1 − α) Σ s_j u_j v_jᵀ`` over the selected modes:

    ΔW_Q = −(1 − α) Σ s_j (W_K⁺)ᵀ v_j u_jᵀ                  the least-squares answer to  ΔW_Qᵀ W_K = −ΔM

The part of ``v_j`` outside the row space of W_K cannot be reached while keys stay fixed; the share that
is reached is reported as ``realised_share``. Controls (ours, not the paper's):

    random     modes drawn from those the dominant selection did not take
    bottom     the weakest modes
    subspace   W_Q (I − (1 − α) G Gᵀ), G a Haar-random r-dimensional subspace of the row space of W_Q
    shrink     W_Q' = c W_Q, c such that ‖ΔW_Q‖_F equals that of the dominant edit
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkpatch.errors import NumericalError, UsageError
from qkpatch.spectral.factors import Factor, to_host
from qkpatch.spectral.lazy import cached_property
from qkpatch.spectral.product import Decomposition, QKProduct, Spectrum
from qkpatch.spectral.rule import Channel, EditRule, Select


class HeadError(NumericalError):
    """A head that cannot be edited; ``index`` is its place among those that are computed together."""

    def __init__(self, index: int, what: str, *, fix: str) -> None:
        super().__init__(what, fix=fix)
        self.index = index


@dataclass(frozen=True)
class Probe:
    """``y_jᵀ W_Q x_j`` per mode; those of an edit add up to 1 for the unedited query."""

    X: Tensor  # (n, d_model, r)
    Y: Tensor  # (n, d_head, r), on the CPU

    def of(self, W_Q: Tensor) -> Tensor:
        """``y_jᵀ W_Q x_j`` of each head and mode, (n, r), on the CPU."""
        return (to_host(W_Q @ self.X) * self.Y).sum(-2)


@dataclass(frozen=True)
class Decomposed:
    """What all edits of some heads in one channel are derived from; each part is computed once, when asked for."""

    product: QKProduct
    channel: Channel

    @cached_property
    def modes(self) -> tuple[tuple[Spectrum, ...], Decomposition]:
        """All modes, and their spectra."""
        return self.product.decompose(self.channel)

    @cached_property
    def row_space(self) -> tuple[Factor, Tensor, Tensor]:
        """W_Q's factor, and ``U, S`` of its R. By QR: what a seed draws depends on the signs of singular vectors."""
        query = Factor(self.product.query.W)
        U, S, _ = torch.linalg.svd(query.R, full_matrices=False)
        return query, U, S


@dataclass(frozen=True)
class QueryEdit:
    """What reaches the edited query weights of some heads, which are formed when asked for."""

    before: Tensor  # W_Q, (n, d_head, d_model), compute dtype
    kept: Tensor  # what W_Q is multiplied by first, (n,): the factors of shrink, 1 for all else
    size: Tensor  # ‖ΔW_Q‖_F, (n,)
    spectra: tuple[Spectrum, ...]  # of the unedited products, in the rule's channel
    indices: tuple[tuple[int, ...], ...]  # the selected modes; empty for subspace and shrink
    A: Tensor | None  # ΔW_Q = A directionsᵀ, (n, d_head, r); None for shrink
    directions: Tensor | None  # U_r, or a subspace's basis, (n, d_model, r), padded by zeros; None for shrink
    counts: tuple[int, ...]  # how many directions there are
    probes: tuple[Probe, ...]  # what their coefficients are measured by; empty for shrink
    gaps: tuple[float | None, ...]
    realised_shares: tuple[float | None, ...]  # None in the full channel, and where no mode is selected

    @cached_property
    def W_Q(self) -> Tensor:
        """The edited query weights before rounding, (n, d_head, d_model), compute dtype."""
        if self.A is None or self.directions is None:
            return self.before * self.kept[:, None, None].to(self.before)
        return torch.baddbmm(self.before, self.A.to(self.before), self.directions.mT)


@dataclass(frozen=True)
class HeadReport:
    """What the stored, rounded edit did to one head. Norms are Frobenius norms."""

    modes: tuple[int, ...]  # indices, 0 the strongest; empty for subspace and shrink
    rank: int
    values_before: tuple[float, ...]  # singular values, or signed eigenvalues in the symmetric channel
    values_after: tuple[float, ...]
    gap: float | None
    frobenius_before: float
    frobenius_after: float
    relative_change: float  # ‖ΔW_Q‖ / ‖W_Q‖
    rounding_error: float  # ‖stored W_Q − edited W_Q‖ / ‖ΔW_Q‖
    realised_share: float | None
    gains: tuple[float, ...]  # after / before per edited mode; α if nothing were rounded (full channel)


def select_modes(spectrum: Spectrum, rule: EditRule, generator: torch.Generator) -> tuple[int, ...]:
    """Indices of the modes that ``rule`` edits, ascending; at most the numerical rank of the head.

    ``shrink`` takes the dominant ones, its reference; ``subspace`` takes none.
    """
    if rule.select is Select.subspace:
        return ()
    rank, r = spectrum.rank, rule.count(spectrum.S.tolist())
    if rule.select is Select.bottom:
        return tuple(range(max(0, rank - r), rank))
    if rule.select is Select.random:
        # Antisymmetric values come in equal pairs: a lone half of a pair is no mode of its own.
        step = 2 if rule.channel is Channel.antisymmetric else 1
        rest = range(r, rank, step)
        drawn = torch.randperm(len(rest), generator=generator)[: r // step].sort().values.tolist()
        return tuple(rest[i] + offset for i in drawn for offset in range(step))
    return tuple(range(min(r, rank)))


def edit_query(
    product: QKProduct,
    rule: EditRule,
    generators: Sequence[torch.Generator],
    known: Decomposed | None = None,
) -> QueryEdit:
    """Edit heads by ``rule``; each one's generator (CPU) feeds its random selection.

    What is ``known`` of the product, in the rule's channel, is not computed again.

    Raises:
        HeadError: no ``shrink`` is as large as the dominant edit.
        UsageError: ``subspace`` with a channel other than full.
    """
    W_Q, of = product.query.W, known or Decomposed(product, rule.channel)
    if rule.select is Select.subspace:
        return _edit_subspace(of, rule, generators)
    spectra, all_modes = of.modes
    indices = tuple(select_modes(s, rule, g) for s, g in zip(spectra, generators, strict=True))
    modes = all_modes.modes(indices)
    A, shares = _delta(product, modes, rule)
    size = torch.linalg.matrix_norm(A)  # u_j are orthonormal, so ‖A U_rᵀ‖ = ‖A‖
    gaps = tuple(s.gap(chosen) for s, chosen in zip(spectra, indices, strict=True))
    nothing: tuple[None, ...] = (None,) * len(W_Q)
    if rule.select is Select.shrink:
        whole = torch.linalg.matrix_norm(product.query.R)  # ‖R‖ = ‖W_Q‖
        sizes = zip(size.tolist(), whole.tolist(), strict=True)
        kept = torch.tensor([shrink_factor(i, *pair) for i, pair in enumerate(sizes)], dtype=torch.float64)
        none, counts = ((),) * len(W_Q), (1,) * len(W_Q)
        return QueryEdit(W_Q, kept, whole * (1 - kept), spectra, none, None, None, counts, (), gaps, nothing)
    probes, counts = _probes(modes, rule.channel), tuple(map(len, indices))
    kept = torch.ones(len(W_Q), dtype=torch.float64)
    shares = shares or nothing
    return QueryEdit(W_Q, kept, size, spectra, indices, A, modes.U, counts, probes, gaps, shares)


def measure(product: QKProduct, edit: QueryEdit, W_Q_stored: Tensor) -> tuple[HeadReport, ...]:
    """What the rounded ``W_Q_stored`` (n, d_head, d_model), in the basis of ``product``, does to each head's product.

    Raises:
        HeadError: it holds NaN or Inf.
    """
    W_Q = product.query.W
    rounding, change = (_distance(W_Q_stored, W) for W in (edit.W_Q, W_Q))
    whole = torch.linalg.matrix_norm(product.query.R).to(change)  # ‖R‖ = ‖W_Q‖
    norms = torch.stack([rounding, change, whole], dim=-1).tolist()
    for i, (_, changed, _) in enumerate(norms):
        if not math.isfinite(changed) and not bool(W_Q_stored[i].isfinite().all()):
            raise HeadError(
                i,
                "the edited weight does not fit in the stored dtype: NaN or Inf",
                fix="use a larger --alpha or fewer --modes",
            )
    after = QKProduct(Factor(W_Q_stored, product.query.roundoff), product.key).spectra(
        edit.spectra[0].channel
    )
    gains = _gains(edit, W_Q, W_Q_stored)
    return tuple(
        HeadReport(
            modes=edit.indices[i],
            rank=edit.spectra[i].rank,
            values_before=tuple(edit.spectra[i].S.tolist()),
            values_after=tuple(after[i].S.tolist()),
            gap=edit.gaps[i],
            frobenius_before=edit.spectra[i].frobenius,
            frobenius_after=after[i].frobenius,
            relative_change=_ratio(changed, whole),
            rounding_error=_ratio(rounded, float(edit.size[i])),
            realised_share=edit.realised_shares[i],
            gains=tuple(gains[i][: edit.counts[i]]),
        )
        for i, (rounded, changed, whole) in enumerate(norms)
    )


def _delta(
    product: QKProduct, modes: Decomposition, rule: EditRule
) -> tuple[Tensor, tuple[float | None, ...] | None]:
    """``A`` (n, d_head, r) of ``ΔW_Q = A U_rᵀ`` for the selected modes, and the share of ΔM that it realises."""
    scale = 1 - rule.alpha
    if rule.channel is Channel.full:
        return -scale * (modes.product.query.R.mT @ modes.U_core), None
    # (W_K⁺)ᵀ v_j = R_k⁺ Q_kᵀ v_j, shape (n, d_head, r)
    mapped = product.key.pinv_core @ product.key.basis.coordinates(modes.V)
    reached = torch.linalg.vector_norm(product.key.R @ mapped, dim=-2)  # |P_K v_j|
    # u_j are orthonormal, so ‖ΔM‖² and its reached part are sums over modes.
    weight = modes.S.square()
    parts = torch.stack([(weight * reached.square()).sum(-1), weight.sum(-1)], dim=-1).tolist()
    shares = tuple(part / whole if whole else None for part, whole in parts)
    return -scale * (mapped * modes.S[:, None]), shares


def _edit_subspace(of: Decomposed, rule: EditRule, generators: Sequence[torch.Generator]) -> QueryEdit:
    if rule.channel is not Channel.full:
        raise UsageError("a random subspace belongs to no channel", fix="drop --channel")
    query, spectra = of.row_space[0], of.product.spectra(rule.channel)
    core, counts = haar_subspaces(of, [rule.count(s.S.tolist()) for s in spectra], generators)
    G = query.basis.lift(core)
    W_Q_G = query.R.mT @ core
    A = (rule.alpha - 1) * W_Q_G
    size = W_Q_G.square().sum(-2, keepdim=True)  # 0 where it underflows
    probe = Probe(G, torch.where(size > 0, W_Q_G / size, 0.0))  # how much of it the query still reads
    none, nothing = ((),) * len(counts), (None,) * len(counts)
    moved, kept = torch.linalg.matrix_norm(A), torch.ones(len(counts), dtype=torch.float64)
    return QueryEdit(query.W, kept, moved, spectra, none, A, G, counts, (probe,), nothing, nothing)


def haar_subspaces(
    of: Decomposed, wanted: Sequence[int], generators: Sequence[torch.Generator]
) -> tuple[Tensor, tuple[int, ...]]:
    """Uniformly random subspaces of the row spaces of W_Q: coordinates (n, k, r), padded by zeros; how many there are.

    The rank of a row space is that under the factor's ``rcond``.
    """
    query, U, S = of.row_space
    core, counts = U.new_zeros(*U.shape[:-1], min(max(wanted), U.shape[-1])), []
    for i, generator in enumerate(generators):
        # Strictly greater: a zero matrix has rank 0, not full rank.
        rank = int((S[i] > query.rcond * S[i].max()).sum())
        counts.append(min(wanted[i], rank))
        # Drawn on the CPU so that every device sees the same numbers.
        gaussian = torch.randn(rank, counts[i], generator=generator, dtype=torch.float64)
        core[i, :, : counts[i]] = U[i, :, :rank] @ torch.linalg.qr(gaussian)[0]
    return core, tuple(counts)


def shrink_factor(index: int, reference: float, size: float) -> float:
    """What shrinks a head of ``size`` by as much as ``reference``; :class:`HeadError` where that is larger."""
    if reference > size * (1 + 1e-9):  # equal up to rounding is a shrink to zero
        what = f"no shrink matches the dominant edit: ‖ΔW_Q‖ {reference:.4g} > ‖W_Q‖ {size:.4g}"
        raise HeadError(index, what, fix="use fewer modes or a larger --alpha")
    return max(0.0, 1 - reference / size) if size else 1.0


def _probes(modes: Decomposition, channel: Channel) -> tuple[Probe, ...]:
    """``u_jᵀ M' v_j / s_j``; for half a matrix the mean of that and, transposed, of ``± v_jᵀ M' u_j / s_j``."""
    S = torch.where(modes.S == 0, 1.0, modes.S)[:, None]  # where there is no such mode
    R_K = modes.product.key.R.mT
    if channel is not Channel.antisymmetric:  # in the symmetric one the two are the same
        return (Probe(modes.U, R_K @ modes.V_core / S),)
    return Probe(modes.U, R_K @ modes.V_core / (2 * S)), Probe(modes.V, R_K @ modes.U_core / (-2 * S))


def _gains(edit: QueryEdit, W_Q: Tensor, W_Q_new: Tensor) -> list[list[float]]:
    """Per edited mode, its coefficient in the edited channel over its coefficient before."""
    if not edit.probes:  # shrink: one factor for the whole head
        old, new = W_Q.flatten(1), W_Q_new.flatten(1)
        products = torch.stack([torch.linalg.vecdot(new, old), torch.linalg.vecdot(old, old)], dim=-1)
        return [[_ratio(part, whole)] for part, whole in products.tolist()]
    gains: list[list[float]] = torch.stack([probe.of(W_Q_new) for probe in edit.probes]).sum(0).tolist()
    return gains


def _distance(A: Tensor, B: Tensor) -> Tensor:
    """``‖A − B‖_F`` of each head; of a few rows at a time, whose difference stays in the processor's cache."""
    parts = [torch.linalg.matrix_norm(a - b) for a, b in zip(A.chunk(8, -2), B.chunk(8, -2), strict=True)]
    return torch.stack(parts).square().sum(0).sqrt()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
