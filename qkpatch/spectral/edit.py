"""The edit of one head: choose modes, scale them, map the result back to the query weights in closed form.

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from qkpatch.errors import NumericalError, UsageError
from qkpatch.spectral.product import Decomposition, Factor, QKProduct, Spectrum, is_finite
from qkpatch.spectral.rule import Channel, EditRule, Select


class Stored(Protocol):
    """An edited weight as it is stored."""

    @property
    def values(self) -> Tensor:
        """What a loader reads, (d_head, d_model), compute dtype."""


S = TypeVar("S", bound=Stored)


@dataclass(frozen=True)
class Probe:
    """``y_jᵀ W_Q x_j`` per mode; those of an edit add up to 1 for the unedited query."""

    X: Tensor  # (d_model, r)
    Y: Tensor  # (d_head, r)

    def of(self, W_Q: Tensor) -> Tensor:
        """The figures, (r,)."""
        return ((W_Q @ self.X) * self.Y).sum(0)


@dataclass(frozen=True)
class QueryEdit:
    """The edited query weight of one head, before rounding, and what was done to reach it."""

    W_Q: Tensor  # (d_head, d_model), compute dtype
    size: Tensor  # ‖ΔW_Q‖_F
    spectrum: Spectrum  # of the unedited product, in the rule's channel
    indices: tuple[int, ...]  # the selected modes; empty for subspace and shrink
    directions: Tensor | None  # U_r, or a subspace's basis, (d_model, r); None for shrink
    probes: tuple[Probe, ...]  # what a mode's coefficient is measured by; empty for shrink
    gap: float | None
    realised_share: float | None  # None in the full channel, and where no mode is selected


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


@dataclass(frozen=True)
class Folding:
    """What a product with the gain of the norm before attention was made from."""

    W_Q: Tensor  # (d_head, d_model), without the gain
    gain: Tensor  # γ (d_model,), no element near zero


def select_modes(spectrum: Spectrum, rule: EditRule, generator: torch.Generator) -> tuple[int, ...]:
    """Indices of the modes that ``rule`` edits, ascending; at most the numerical rank of the head.

    ``shrink`` takes the dominant ones, its reference; ``subspace`` takes none.
    """
    if rule.select is Select.subspace:
        return ()
    rank, r = spectrum.rank, rule.paired_modes
    if rule.select is Select.bottom:
        return tuple(range(max(0, rank - r), rank))
    if rule.select is Select.random:
        # Antisymmetric values come in equal pairs: a lone half of a pair is no mode of its own.
        step = 2 if rule.channel is Channel.antisymmetric else 1
        rest = range(r, rank, step)
        drawn = torch.randperm(len(rest), generator=generator)[: r // step].sort().values.tolist()
        return tuple(rest[i] + offset for i in drawn for offset in range(step))
    return tuple(range(min(r, rank)))


def edit_query(product: QKProduct, rule: EditRule, generator: torch.Generator) -> QueryEdit:
    """Edit one head by ``rule``; ``generator`` (CPU) feeds the random selections.

    Raises:
        NumericalError: no ``shrink`` is as large as the dominant edit.
        UsageError: ``subspace`` with a channel other than full.
    """
    W_Q = product.query.W
    if rule.select is Select.subspace:
        return _edit_subspace(product, rule, generator)
    decomposition = product.decompose(rule.channel)
    spectrum = decomposition.spectrum
    indices = select_modes(spectrum, rule, generator)
    modes = decomposition.modes(indices)
    A, realised_share = _delta(product, modes, rule)
    size = torch.linalg.matrix_norm(A)  # u_j are orthonormal, so ‖A U_rᵀ‖ = ‖A‖
    gap = spectrum.gap(indices)
    if rule.select is Select.shrink:
        whole = torch.linalg.matrix_norm(W_Q)
        factor = _shrink_factor(float(size), float(whole))
        return QueryEdit(W_Q * factor, whole * (1 - factor), spectrum, (), None, (), gap, None)
    W_Q_edited = torch.addmm(W_Q, A, modes.U.mT)
    return QueryEdit(
        W_Q_edited, size, spectrum, indices, modes.U, _probes(modes, rule.channel), gap, realised_share
    )


def edit_and_round(
    product: QKProduct,
    rule: EditRule,
    store: Callable[[Tensor], S],
    generator: torch.Generator,
    folding: Folding | None = None,
) -> tuple[S, HeadReport]:
    """Edit one head and round it once, by ``store``: what is stored, and what it does.

    Where a gain is folded into the product, ``M̃ = diag(γ) M diag(γ)``, the change is mapped back by ``diag(1/γ)``
    before it is rounded; the report stays in the folded basis.

    Raises:
        NumericalError: the stored result holds NaN or Inf; and as :func:`edit_query`.
    """
    edit = edit_query(product, rule, generator)
    stored = store(edit.W_Q if folding is None else folding.W_Q + (edit.W_Q - product.query.W) / folding.gain)
    if not is_finite(stored.values):
        raise NumericalError(
            "the edited weight does not fit in the stored dtype: NaN or Inf",
            fix="use a larger --alpha or fewer --modes",
        )
    return stored, measure(product, edit, stored.values if folding is None else stored.values * folding.gain)


def measure(product: QKProduct, edit: QueryEdit, W_Q_stored: Tensor) -> HeadReport:
    """What the rounded ``W_Q_stored`` (compute dtype, stored values) does to the head's product."""
    W_Q, before = product.query.W, edit.spectrum
    after = QKProduct(Factor(W_Q_stored), product.key).spectrum(before.channel)
    # One array for both differences: at these sizes fresh memory costs as much as arithmetic.
    difference = W_Q_stored - edit.W_Q
    rounding = torch.linalg.matrix_norm(difference)
    change = torch.linalg.matrix_norm(torch.sub(W_Q_stored, W_Q, out=difference))
    return HeadReport(
        modes=edit.indices,
        rank=before.rank,
        values_before=tuple(before.S.tolist()),
        values_after=tuple(after.S.tolist()),
        gap=edit.gap,
        frobenius_before=before.frobenius,
        frobenius_after=after.frobenius,
        relative_change=_ratio(change, torch.linalg.matrix_norm(W_Q)),
        rounding_error=_ratio(rounding, edit.size),
        realised_share=edit.realised_share,
        gains=_gains(edit, W_Q, W_Q_stored),
    )


def _edit_subspace(product: QKProduct, rule: EditRule, generator: torch.Generator) -> QueryEdit:
    if rule.channel is not Channel.full:
        raise UsageError("a random subspace belongs to no channel", fix="drop --channel")
    W_Q = product.query.W
    G = _haar_subspace(product.query, rule.modes, generator)
    W_Q_G = W_Q @ G
    A = W_Q_G * (rule.alpha - 1)
    size = W_Q_G.square().sum(0)  # 0 where it underflows
    probe = Probe(G, torch.where(size > 0, W_Q_G / size, 0.0))  # how much of it the query still reads
    return QueryEdit(
        torch.addmm(W_Q, A, G.mT),
        torch.linalg.matrix_norm(A),
        product.spectrum(rule.channel),
        (),
        G,
        (probe,),
        None,
        None,
    )


def _shrink_factor(reference: float, whole: float) -> float:
    if reference > whole * (1 + 1e-9):  # equal up to rounding is a shrink to zero
        raise NumericalError(
            f"no shrink matches the dominant edit: ‖ΔW_Q‖ {reference:.4g} > ‖W_Q‖ {whole:.4g}",
            fix="use fewer modes or a larger --alpha",
        )
    return max(0.0, 1 - reference / whole) if whole else 1.0


def _delta(product: QKProduct, modes: Decomposition, rule: EditRule) -> tuple[Tensor, float | None]:
    """``A`` (d_head, r) of ``ΔW_Q = A U_rᵀ`` for the selected modes, and the share of ΔM that it realises."""
    scale = 1 - rule.alpha
    if rule.channel is Channel.full:
        return -scale * modes.W_Q_U, None
    # (W_K⁺)ᵀ v_j = R_k⁺ Q_kᵀ v_j, shape (d_head, r)
    mapped = product.key.pinv_core @ product.key.basis.coordinates(modes.V)
    reached = torch.linalg.vector_norm(product.key.R @ mapped, dim=0)  # |P_K v_j|
    # u_j are orthonormal, so ‖ΔM‖² and its reached part are sums over modes.
    weight = modes.S.square()
    share = _ratio((weight * reached.square()).sum(), weight.sum()) if modes.S.numel() else None
    return -scale * (mapped * modes.S), share


def _probes(modes: Decomposition, channel: Channel) -> tuple[Probe, ...]:
    """``u_jᵀ M' v_j / s_j``; for half a matrix the mean of that and, transposed, of ``± v_jᵀ M' u_j / s_j``."""
    if channel is not Channel.antisymmetric:  # in the symmetric one the two are the same
        return (Probe(modes.U, modes.W_K_V / modes.S),)
    W_K_U = modes.R_K.mT @ modes.left.core  # both sides have one basis here
    return Probe(modes.U, modes.W_K_V / (2 * modes.S)), Probe(modes.V, -W_K_U / (2 * modes.S))


def _gains(edit: QueryEdit, W_Q: Tensor, W_Q_new: Tensor) -> tuple[float, ...]:
    """Per edited mode, its coefficient in the edited channel over its coefficient before."""
    if not edit.probes:  # shrink: one factor for the whole head
        old, new = W_Q.flatten(), W_Q_new.flatten()
        return (_ratio(torch.dot(new, old), torch.dot(old, old)),)
    return tuple(torch.stack([probe.of(W_Q_new) for probe in edit.probes]).sum(0).tolist())


def _haar_subspace(query: Factor, r: int, generator: torch.Generator) -> Tensor:
    """Orthonormal basis (d_model, ≤ r) of a uniformly random subspace of the row space of W_Q."""
    basis = query.row_space
    rank = basis.shape[1]
    # Drawn on the CPU so that every device sees the same numbers.
    gaussian = torch.randn(rank, min(r, rank), generator=generator, dtype=torch.float64)
    coordinates: Tensor = torch.linalg.qr(gaussian.to(basis.device, basis.dtype))[0]
    return basis @ coordinates


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) else 0.0
