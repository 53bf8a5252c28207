"""``QKProduct``: the query-key product of one head, kept factored, and its ``Spectrum`` per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkpatch.spectral.lazy import cached_property
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


def is_finite(x: Tensor) -> bool:
    """Whether there is neither NaN nor Inf in ``x``; faster than looking at each number."""
    return math.isfinite(float(torch.linalg.vector_norm(x))) or math.isfinite(
        largest(x)
    )  # squares may overflow


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
    """One head's weight and its thin QR, ``Wᵀ = Q R``: computed when asked for, shared by all heads of a key head."""

    W: Tensor  # (d_head, d_model)

    @cached_property
    def _qr(self) -> tuple[Basis, Tensor]:
        return Basis.of(self.W.mT)

    @property
    def basis(self) -> Basis:
        """``Q`` (d_model, k), ``k = min(d_head, d_model)``."""
        return self._qr[0]

    @property
    def R(self) -> Tensor:
        """``R`` (k, d_head)."""
        return self._qr[1]

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
class Spectrum:
    """The values of one channel of M, strongest mode first.

    ``S`` holds singular values (full, antisymmetric: the latter in equal adjacent pairs) or signed
    eigenvalues ordered by size (symmetric).
    """

    channel: Channel
    S: Tensor  # (n_modes,)
    rank: int
    frobenius: float  # ‖M‖_F, of all channels together

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
class Side:
    """Orthonormal vectors ``Q core``, built when they are asked for."""

    basis: Basis  # Q (d_model, k)
    core: Tensor  # (k, r)

    def at(self, indices: Tensor) -> Side:
        """Some of the vectors."""
        return Side(self.basis, self.core[:, indices])

    @cached_property
    def vectors(self) -> Tensor:
        """The vectors themselves, (d_model, r)."""
        return self.basis.lift(self.core)


@dataclass(frozen=True)
class Decomposition:
    """``U diag(S) Vᵀ`` of one channel of M, all modes or a few; vectors stay factored until they are asked for."""

    spectrum: Spectrum
    S: Tensor  # (r,)
    left: Side
    right: Side  # the very same in the symmetric channel
    R_Q: Tensor  # (k, d_head), W_Qᵀ in the basis of the left side
    R_K: Tensor  # (k, d_head), W_Kᵀ in the basis of the right side

    def modes(self, indices: Sequence[int]) -> Decomposition:
        """The modes at ``indices`` alone."""
        at = torch.as_tensor(list(indices), dtype=torch.long, device=self.S.device)
        left = self.left.at(at)
        right = left if self.right is self.left else self.right.at(at)
        return Decomposition(self.spectrum, self.S[at], left, right, self.R_Q, self.R_K)

    @property
    def U(self) -> Tensor:
        """Left vectors, (d_model, r)."""
        return self.left.vectors

    @property
    def V(self) -> Tensor:
        """Right vectors, (d_model, r)."""
        return self.right.vectors

    @property
    def W_Q_U(self) -> Tensor:
        """``W_Q U`` (d_head, r), from the small cores."""
        return self.R_Q.mT @ self.left.core

    @property
    def W_K_V(self) -> Tensor:
        """``W_K V`` (d_head, r), from the small cores."""
        return self.R_K.mT @ self.right.core


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
        return cls(Factor(W_Q), Factor(W_K))

    @cached_property
    def symmetric_share(self) -> float:
        """``‖(M + Mᵀ)/2‖² / ‖M‖²``, between 0 and 1; 0.5 when symmetric and antisymmetric parts weigh the same.

        ``‖(M + Mᵀ)/2‖² = (‖M‖² + tr(M M)) / 2`` and ``tr(M M) = tr(G G)`` with ``G = W_K W_Qᵀ``.
        """
        frobenius = float(torch.linalg.matrix_norm(self.core))
        if frobenius == 0.0:
            return 0.0
        G = self.key.W @ self.query.W.mT  # (d_head, d_head)
        trace = float((G * G.mT).sum())
        return min(1.0, max(0.0, 0.5 * (1.0 + trace / frobenius**2)))  # rounding may step outside

    @cached_property
    def core(self) -> Tensor:
        """``R_q R_kᵀ``, (k, k): M in the orthonormal bases of its two weights."""
        return self.query.R @ self.key.R.mT

    def spectrum(self, channel: Channel) -> Spectrum:
        """The values of :meth:`decompose`, without vectors."""
        if channel is Channel.full:
            return self._spectrum(channel, torch.linalg.svdvals(self.core), self.core)
        _, R_Q, R_K = self._joint()
        C = R_Q @ R_K.mT
        if channel is Channel.symmetric:
            values = torch.linalg.eigvalsh((C + C.mT) / 2)
            return self._spectrum(channel, values[_by_size(values)], C)
        return self._spectrum(channel, _pairs(torch.linalg.eigvalsh(1j * (C - C.mT) / 2)), C)

    def decompose(self, channel: Channel) -> Decomposition:
        """Decompose one channel; O(d_model d_head²).

        full           SVD of the core ``R_q R_kᵀ``; ``U = Q_q U_c``, ``V = Q_k V_c``
        symmetric      eigendecomposition of ``(C + Cᵀ)/2``, ``C = Bᵀ M B``, ``B = orth([W_Qᵀ, W_Kᵀ])``
        antisymmetric  Hermitian eigendecomposition of ``i (C - Cᵀ)/2``: an eigenvector ``x + i y`` of
                       ``+s`` gives the exact pair ``A x = s y``, ``A y = -s x``
        """
        if channel is Channel.full:
            U, S, Vh = torch.linalg.svd(self.core, full_matrices=False)
            left, right = Side(self.query.basis, U), Side(self.key.basis, Vh.mT)
            spectrum = self._spectrum(channel, S, self.core)
            return Decomposition(spectrum, S, left, right, self.query.R, self.key.R)
        B, R_Q, R_K = self._joint()
        C = R_Q @ R_K.mT
        if channel is Channel.symmetric:
            values, E = torch.linalg.eigh((C + C.mT) / 2)
            order = _by_size(values)
            S, both = values[order], Side(B, E[:, order])
            return Decomposition(self._spectrum(channel, S, C), S, both, both, R_Q, R_K)
        values, W = torch.linalg.eigh(1j * (C - C.mT) / 2)
        S = _pairs(values)
        W = W.flip(1)[:, : len(S) // 2] * 2**0.5
        U = torch.stack([W.imag, -W.real], dim=-1).flatten(-2)  # y_1, -x_1, y_2, -x_2, ...
        V = torch.stack([W.real, W.imag], dim=-1).flatten(-2)  # x_1,  y_1, x_2,  y_2, ...
        return Decomposition(self._spectrum(channel, S, C), S, Side(B, U), Side(B, V), R_Q, R_K)

    def _joint(self) -> tuple[Basis, Tensor, Tensor]:
        """An orthonormal basis (d_model, b) of both row spaces together, and ``R_Q``, ``R_K`` (b, d_head) in it."""
        B, R = Basis.of(torch.cat([self.query.W, self.key.W], dim=-2).mT)
        d_head = self.query.W.shape[0]
        return B, R[:, :d_head], R[:, d_head:]

    def _spectrum(self, channel: Channel, S: Tensor, core: Tensor) -> Spectrum:
        """``core`` is M in orthonormal bases, and as large."""
        frobenius = float(torch.linalg.matrix_norm(core))
        # Zero compared with M, not with its own largest value: a half that M does not have is all rounding.
        tolerance = resolve_rcond(self.query.W.shape[-1], S.dtype) * frobenius
        return Spectrum(channel, S, int((S.abs() > tolerance).sum()), frobenius)


def _by_size(values: Tensor) -> Tensor:
    return values.abs().argsort(descending=True, stable=True)


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
