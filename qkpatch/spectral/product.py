"""``QKProduct``: the query-key product of one head, kept factored, and its ``Spectrum`` per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qkpatch.spectral.rule import Channel


def resolve_rcond(d_model: int, dtype: torch.dtype) -> float:
    """Threshold under which a singular value counts as zero, relative to the size of its matrix.

    ``max(m, n) * eps``, the default of ``torch.linalg.pinv`` and ``numpy.linalg.matrix_rank``.
    """
    return d_model * torch.finfo(dtype).eps


def largest(x: Tensor) -> float:
    """``max |x|`` in one pass and without a copy; NaN where ``x`` holds one, 0 where it is empty."""
    if not x.numel():
        return 0.0
    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high))


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns ``Q`` (d_model, k) of a QR, kept as Householder reflectors: applied, never formed."""

    reflectors: Tensor  # (d_model, n), n ≥ k
    tau: Tensor  # (k,)

    @classmethod
    def of(cls, A: Tensor) -> tuple[Basis, Tensor]:
        """``A = Q R``: ``A`` (d_model, n), ``R`` (k, n), ``k = min(d_model, n)``. Equivalent to ``numpy.linalg.qr``."""
        reflectors, tau = torch.geqrf(A)
        return cls(reflectors, tau), reflectors[: len(tau)].triu()

    def lift(self, core: Tensor) -> Tensor:
        """``Q core``, for ``core`` (k, r)."""
        padded = core.new_zeros(len(self.reflectors), core.shape[1])
        padded[: len(core)] = core
        lifted: Tensor = torch.ormqr(self.reflectors, self.tau, padded)
        return lifted

    def coordinates(self, vectors: Tensor) -> Tensor:
        """``Qᵀ vectors``, for ``vectors`` (d_model, r)."""
        turned: Tensor = torch.ormqr(self.reflectors, self.tau, vectors, transpose=True)
        return turned[: len(self.tau)]


@dataclass(frozen=True)
class Factor:
    """Thin QR of one head's weight, ``Wᵀ = Q R``, computed once and shared by all query heads of a key head."""

    W: Tensor  # (d_head, d_model)
    basis: Basis  # Q (d_model, k), k = min(d_head, d_model)
    R: Tensor  # (k, d_head)

    @classmethod
    def of(cls, W: Tensor) -> Factor:
        """Factor ``W`` of shape (d_head, d_model)."""
        return cls(W, *Basis.of(W.mT))

    @cached_property
    def pinv_core(self) -> Tensor:
        """``R⁺`` by SVD with :func:`resolve_rcond`, so that ``(W⁺)ᵀ = R⁺ Qᵀ``; shape (d_head, k)."""
        inverse: Tensor = torch.linalg.pinv(self.R, rtol=resolve_rcond(self.W.shape[-1], self.W.dtype))
        return inverse

    @property
    def row_space(self) -> Tensor:
        """Orthonormal basis (d_model, rank) of the row space of ``W``; rank under :func:`resolve_rcond`."""
        U, S, _ = torch.linalg.svd(self.R, full_matrices=False)
        # Strictly greater: a zero matrix has rank 0, not full rank.
        rank = int((S > resolve_rcond(self.W.shape[-1], self.W.dtype) * S.max()).sum())
        return self.basis.lift(U[:, :rank])


@dataclass(frozen=True)
class Modes:
    """A few modes of a channel, ``sum_j S_j u_j v_jᵀ``: ``U``, ``V`` (d_model, r), ``S`` (r,)."""

    U: Tensor
    S: Tensor
    V: Tensor


@dataclass(frozen=True)
class Spectrum:
    """Decomposition ``U diag(S) Vᵀ`` of one channel of M, strongest mode first.

    ``S`` holds singular values (full, antisymmetric: the latter in equal adjacent pairs) or signed
    eigenvalues ordered by size (symmetric, where ``U = V``). The vectors stay factored as basis times
    core and are built for the modes asked for.
    """

    channel: Channel
    S: Tensor  # (n_modes,)
    rank: int
    _left: tuple[Basis, Tensor]  # (d_model, k), (k, n_modes)
    _right: tuple[Basis, Tensor]

    def modes(self, indices: Sequence[int]) -> Modes:
        """The vectors and values of the modes at ``indices``."""
        at = torch.as_tensor(list(indices), dtype=torch.long, device=self.S.device)
        (B_u, U), (B_v, V) = self._left, self._right
        return Modes(B_u.lift(U[:, at]), self.S[at], B_v.lift(V[:, at]))

    def gap(self, selected: Sequence[int]) -> float | None:
        """Smallest relative gap ``(|s_j| - |s_j+1|) / |s_j|`` between a selected mode and an unselected neighbour.

        Under about 1e-3 the selection splits a near-degenerate block and is not well defined.
        None where the selection has no edge (nothing or everything selected).
        """
        inside = set(selected)
        size = self.S.abs().tolist()
        gaps = [
            (size[j] - size[j + 1]) / size[j]
            for j in range(self.rank - 1)
            if (j in inside) != (j + 1 in inside)
        ]
        return min(gaps, default=None)


@dataclass(frozen=True)
class QKProduct:
    """``M = W_Qᵀ W_K`` of one query head and its key head, never materialised.

    Equivalent to TransformerLens' ``FactoredMatrix(W_Qᵀ, W_K)``.
    """

    query: Factor
    key: Factor

    @classmethod
    def of(cls, W_Q: Tensor, W_K: Tensor) -> QKProduct:
        """Product of two (d_head, d_model) weights."""
        return cls(Factor.of(W_Q), Factor.of(W_K))

    @cached_property
    def frobenius(self) -> float:
        """``‖M‖_F = ‖R_q R_kᵀ‖_F``."""
        return float(torch.linalg.matrix_norm(self.query.R @ self.key.R.mT))

    @cached_property
    def symmetric_share(self) -> float:
        """``‖(M + Mᵀ)/2‖² / ‖M‖²``, between 0 and 1; 0.5 when symmetric and antisymmetric parts weigh the same.

        ``‖(M + Mᵀ)/2‖² = (‖M‖² + tr(M M)) / 2`` and ``tr(M M) = tr(G G)`` with ``G = W_K W_Qᵀ``.
        """
        if self.frobenius == 0.0:
            return 0.0
        G = self.key.W @ self.query.W.mT  # (d_head, d_head)
        trace = float((G * G.mT).sum())
        return min(1.0, max(0.0, 0.5 * (1.0 + trace / self.frobenius**2)))  # rounding may step outside

    def singular_values(self) -> Tensor:
        """Singular values of M, (min(d_head, d_model),), without vectors."""
        S: Tensor = torch.linalg.svdvals(self.query.R @ self.key.R.mT)
        return S

    def values(self, channel: Channel) -> Tensor:
        """The ``S`` of :meth:`spectrum`, without vectors."""
        if channel is Channel.full:
            return self.singular_values()
        _, C = self._joint_core()
        if channel is Channel.symmetric:
            values: Tensor = torch.linalg.eigvalsh((C + C.mT) / 2)
            return values[values.abs().argsort(descending=True, stable=True)]
        return _pairs(torch.linalg.eigvalsh(1j * (C - C.mT) / 2))

    def spectrum(self, channel: Channel) -> Spectrum:
        """Decompose one channel; O(d_model d_head²).

        full           SVD of the core ``R_q R_kᵀ``; ``U = Q_q U_c``, ``V = Q_k V_c``
        symmetric      eigendecomposition of ``(C + Cᵀ)/2``, ``C = Bᵀ M B``, ``B = orth([W_Qᵀ, W_Kᵀ])``
        antisymmetric  Hermitian eigendecomposition of ``i (C - Cᵀ)/2``: an eigenvector ``x + i y`` of
                       ``+s`` gives the exact pair ``A x = s y``, ``A y = -s x``
        """
        if channel is Channel.full:
            U, S, Vh = torch.linalg.svd(self.query.R @ self.key.R.mT, full_matrices=False)
            return self._spectrum(channel, S, (self.query.basis, U), (self.key.basis, Vh.mT))
        B, C = self._joint_core()
        if channel is Channel.symmetric:
            values, E = torch.linalg.eigh((C + C.mT) / 2)
            order = values.abs().argsort(descending=True, stable=True)
            return self._spectrum(channel, values[order], (B, E[:, order]), (B, E[:, order]))
        values, W = torch.linalg.eigh(1j * (C - C.mT) / 2)
        S = _pairs(values)
        W = W.flip(1)[:, : len(S) // 2] * 2**0.5
        U = torch.stack([W.imag, -W.real], dim=-1).flatten(-2)  # y_1, -x_1, y_2, -x_2, ...
        V = torch.stack([W.real, W.imag], dim=-1).flatten(-2)  # x_1,  y_1, x_2,  y_2, ...
        return self._spectrum(channel, S, (B, U), (B, V))

    def _joint_core(self) -> tuple[Basis, Tensor]:
        """``B`` (d_model, b), an orthonormal basis that holds both row spaces, and ``C = Bᵀ M B`` (b, b)."""
        B, R = Basis.of(torch.cat([self.query.W.mT, self.key.W.mT], dim=-1))
        d_head = self.query.W.shape[0]
        return B, R[:, :d_head] @ R[:, d_head:].mT

    def _spectrum(
        self, channel: Channel, S: Tensor, left: tuple[Basis, Tensor], right: tuple[Basis, Tensor]
    ) -> Spectrum:
        # Zero compared with M, not with its own largest value: a half that M does not have is all rounding.
        tolerance = resolve_rcond(self.query.W.shape[-1], S.dtype) * self.frobenius
        return Spectrum(channel, S, int((S.abs() > tolerance).sum()), left, right)


def _pairs(values: Tensor) -> Tensor:
    """The positive half of a Hermitian spectrum that is symmetric about zero, strongest first, each twice."""
    return values.flip(0)[: len(values) // 2].clamp_min(0.0).repeat_interleave(2)


def energy_share(S: Tensor, r: int) -> float:
    """Share of the ``r`` strongest values in ``‖M‖_F² = Σ s_j²``; 0 for a zero product."""
    energy = S.square()
    total = float(energy.sum())
    return float(energy[:r].sum()) / total if total else 0.0


def effective_rank(S: Tensor) -> float:
    """``exp(−Σ p_j log p_j)`` with ``p_j = s_j / Σ s``: between 1 and the rank (Roy & Vetterli, 2007); 0 for zero."""
    total = float(S.sum())
    if not total:
        return 0.0
    p = S / total
    return float(torch.exp(torch.special.entr(p).sum()))
