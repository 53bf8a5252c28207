"""``QKProduct``: the query-key products of some heads, kept factored, and their ``Spectrum`` per channel.

Heads are computed together: every tensor has a leading dimension ``n`` for them. What is as long as ``d_model``
stays on the device of the weights. The small cores go to the CPU, where LAPACK decomposes each in float64: so
devices differ by rounding only, and a GPU is not held up by matrices that are too small for it (of 128 × 128,
cuSOLVER's ``gesvd`` and ``gesvdj`` decompose one after the other).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkpatch.spectral.lazy import cached_property
from qkpatch.spectral.rule import Channel


_MARGIN = 2.0**-24  # of a rounding: what is lost to a condition number
_BLOCK = 64  # rows; half of a Gram matrix is enough, but smaller products take longer


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
    # Squares may overflow where numbers do not.
    return math.isfinite(float(torch.linalg.vector_norm(x))) or math.isfinite(largest(x))


def to_host(x: Tensor) -> Tensor:
    """``x`` as float64 on the CPU, where small matrices are decomposed."""
    return x.to("cpu", torch.float64)


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns ``Q = rowsᵀ mixing`` (n, d_model, k): applied, never formed."""

    rows: Tensor  # (n, k, d_model)
    mixing: Tensor  # (n, k, k), on the CPU

    def lift(self, core: Tensor) -> Tensor:
        """``Q core``, for ``core`` (n, k, r) on the CPU; each of its columns is contiguous."""
        return ((self.mixing @ core).mT.to(self.rows) @ self.rows).mT

    def coordinates(self, vectors: Tensor) -> Tensor:
        """``Qᵀ vectors`` on the CPU, for ``vectors`` (n, d_model, r)."""
        return self.mixing.mT @ to_host(self.rows @ vectors)


@dataclass(frozen=True)
class Factor:
    """Weights of some heads and their thin factors, ``Wᵀ = Q R`` with orthonormal ``Q``, computed when asked for.

    R is the Cholesky factor of ``W Wᵀ``, in half of the time of a QR, where that is as good. With ``D`` the norms of
    the rows and ``ε`` that of float64, what is computed is the R of ``W Wᵀ + D E D``, ``|E| ≤ c ε`` (Higham, *Accuracy
    and Stability of Numerical Algorithms*, 2002, sections 3.1 and 10.1.1), so that, to first order,

        ‖Qᵀ Q − I‖ ≤ c ε κ²,    κ = ‖D R⁻¹‖_F

    and no singular value of a product moves by more than that of itself (Eisenstat & Ipsen, *Relative perturbation
    techniques for singular value problems*, 1995). κ is the condition number of the rows scaled to norm 1, but for √d_head
    at most; c is below 1 in practice. Heads with ``ε κ² > 2⁻²⁴ roundoff`` take Householder's QR: κ above 1024 for
    BF16, 362 for F16, 4 for F32, and all of F64; each head by itself, whichever others are beside it.
    """

    W: Tensor  # (n, d_head, d_model)
    roundoff: float = 0.0  # relative, of the format that a result is rounded to; 0 asks for the QR
    known: tuple[Basis, Tensor] | None = None
    known_gram: Callable[[], Tensor] | None = None

    @cached_property
    def gram(self) -> Tensor:
        """``W Wᵀ`` (n, d_head, d_head) on the CPU; above the diagonal only in part."""
        if self.known_gram is not None:
            return self.known_gram()
        n, d_head, _ = self.W.shape
        gram = self.W.new_zeros(n, d_head, d_head)
        for i in range(0, d_head, _BLOCK):
            gram[:, i:, i : i + _BLOCK] = self.W[:, i:] @ self.W[:, i : i + _BLOCK].mT
        return to_host(gram)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, list[int], tuple[Tensor, Tensor] | None]:
        """``R``, what mixes rows to ``Q``, and the heads that take the QR, with it."""
        n, d_head, d_model = self.W.shape
        k, eye = min(d_head, d_model), torch.eye(d_head, dtype=torch.float64)
        eps, most, at = torch.finfo(self.W.dtype).eps, _MARGIN * self.roundoff, list(range(n))
        if eps * d_head <= most:  # κ² is no less than d_head
            L, info = torch.linalg.cholesky_ex(self.gram)
            R, mixing = L.mT, torch.linalg.solve_triangular(L.mT, eye.expand_as(L), upper=True)
            squares = self.gram.diagonal(dim1=-2, dim2=-1)[..., None] * mixing.square()
            is_good = (info == 0) & (eps * squares.sum((-2, -1)) <= most)
            at = [i for i, good in enumerate(is_good.tolist()) if not good]
            if not at:
                return R, mixing, at, None
        qr = torch.geqrf((self.W if len(at) == n else self.W[at]).mT)
        R_qr = to_host(qr[0][:, :k].triu())
        if len(at) == n:
            return R_qr, eye[:k, :k].expand(n, k, k), at, qr
        R[at], mixing[at] = R_qr, eye
        return R, mixing, at, qr

    @cached_property
    def basis(self) -> Basis:
        """``Q`` (n, d_model, k), ``k = min(d_head, d_model)``."""
        if self.known:
            return self.known[0]
        R, mixing, at, qr = self._factors
        rows = self.W
        if qr is not None:
            Q = torch.linalg.householder_product(qr[0][..., : R.shape[-2]], qr[1]).mT
            if len(at) == len(rows):
                return Basis(Q, mixing)
            rows = rows.clone()
            rows[at] = Q
        return Basis(rows, mixing)

    @property
    def R(self) -> Tensor:
        """``R`` (n, k, d_head), on the CPU."""
        return self.known[1] if self.known else self._factors[0]

    @cached_property
    def norm(self) -> Tensor:
        """``‖W‖_F = ‖R‖_F``, (n,), on the CPU."""
        norm: Tensor = torch.linalg.matrix_norm(self.R)
        return norm

    def take(self, at: Sequence[int]) -> Factor:
        """The factors at ``at``, which may repeat: heads that share keys share their factors."""
        if list(at) == list(range(len(self.W))):
            return self
        W, basis = self.W[at], self.basis
        rows = W if basis.rows is self.W else basis.rows[at]
        return Factor(W, self.roundoff, (Basis(rows, basis.mixing[at]), self.R[at]), lambda: self.gram[at])

    @property
    def rcond(self) -> float:
        """:func:`resolve_rcond` of these weights."""
        return resolve_rcond(self.W.shape[-1], self.W.dtype)

    @cached_property
    def pinv_core(self) -> Tensor:
        """``R⁺`` by SVD with :attr:`rcond`, so that ``(W⁺)ᵀ = R⁺ Qᵀ``; shape (n, d_head, k), on the CPU."""
        inverse: Tensor = torch.linalg.pinv(self.R, rtol=self.rcond)
        return inverse


@dataclass(frozen=True)
class Spectrum:
    """The values of one channel of one head's M, strongest mode first.

    ``S`` holds singular values (full, antisymmetric: the latter in equal adjacent pairs) or signed
    eigenvalues ordered by size (symmetric).
    """

    channel: Channel
    S: Tensor  # (n_modes,), on the CPU
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

    basis: Basis  # Q (n, d_model, k)
    core: Tensor  # (n, k, r), on the CPU

    @cached_property
    def vectors(self) -> Tensor:
        """The vectors themselves, (n, d_model, r)."""
        return self.basis.lift(self.core)


@dataclass(frozen=True)
class Decomposition:
    """``U diag(S) Vᵀ`` of one channel of each head's M, all modes or a few; vectors stay factored."""

    S: Tensor  # (n, r), on the CPU
    left: Side
    right: Side  # the very same in the symmetric channel
    R_Q: Tensor  # (n, k, d_head), W_Qᵀ in the basis of the left side
    R_K: Tensor  # (n, k, d_head), W_Kᵀ in the basis of the right side

    def modes(self, indices: Sequence[Sequence[int]]) -> Decomposition:
        """Some modes of each head alone; where a head has fewer than another, the rest of its ``U, S, V`` is zero."""
        at, is_mode = padded_indices(indices)
        left = Side(self.left.basis, pick(self.left.core, at, is_mode))
        right = left
        if self.right is not self.left:
            right = Side(self.right.basis, pick(self.right.core, at, is_mode))
        return Decomposition(self.S.gather(1, at) * is_mode, left, right, self.R_Q, self.R_K)

    @property
    def U(self) -> Tensor:
        """Left vectors, (n, d_model, r)."""
        return self.left.vectors

    @property
    def V(self) -> Tensor:
        """Right vectors, (n, d_model, r)."""
        return self.right.vectors

    @property
    def W_Q_U(self) -> Tensor:
        """``W_Q U`` (n, d_head, r), from the small cores."""
        return self.R_Q.mT @ self.left.core

    @property
    def W_K_V(self) -> Tensor:
        """``W_K V`` (n, d_head, r), from the small cores."""
        return self.R_K.mT @ self.right.core


@dataclass(frozen=True)
class QKProduct:
    """``M = W_Qᵀ W_K`` of some query heads and their key heads, never materialised.

    Equivalent to TransformerLens' ``FactoredMatrix(W_Qᵀ, W_K)``.
    """

    query: Factor
    key: Factor  # one for each query head

    @cached_property
    def core(self) -> Tensor:
        """``R_q R_kᵀ``, (n, k, k): M in the orthonormal bases of its two weights."""
        return self.query.R @ self.key.R.mT

    @cached_property
    def cross(self) -> Tensor:
        """``W_K W_Qᵀ`` (n, d_head, d_head), on the CPU."""
        return to_host(self.key.W @ self.query.W.mT)

    def symmetric_shares(self) -> list[float]:
        """``‖(M + Mᵀ)/2‖² / ‖M‖²``, between 0 and 1; 0.5 when symmetric and antisymmetric parts weigh the same.

        ``‖(M + Mᵀ)/2‖² = (‖M‖² + tr(M M)) / 2`` and ``tr(M M) = tr(G G)`` with ``G = W_K W_Qᵀ``.
        """
        traces = (self.cross * self.cross.mT).sum((-2, -1)).tolist()
        norms = torch.linalg.matrix_norm(self.core).tolist()
        # Rounding may step outside.
        return [
            min(1.0, max(0.0, 0.5 * (1.0 + trace / norm**2))) if norm else 0.0
            for trace, norm in zip(traces, norms, strict=True)
        ]

    def spectra(self, channel: Channel) -> tuple[Spectrum, ...]:
        """The spectra of :meth:`decompose`, at less cost since no vectors are computed."""
        if channel is Channel.full:
            return self._spectra(channel, torch.linalg.svdvals(self.core), self.core)
        _, R_Q, R_K = self._joint()
        C = R_Q @ R_K.mT
        if channel is Channel.symmetric:
            values = torch.linalg.eigvalsh((C + C.mT) / 2)
            return self._spectra(channel, values.gather(1, _by_size(values)), C)
        return self._spectra(channel, _pairs(torch.linalg.eigvalsh(1j * (C - C.mT) / 2)), C)

    def decompose(self, channel: Channel) -> tuple[tuple[Spectrum, ...], Decomposition]:
        """Decompose one channel; O(d_model d_head²) per head.

        full           SVD of the core ``R_q R_kᵀ``; ``U = Q_q U_c``, ``V = Q_k V_c``
        symmetric      eigendecomposition of ``(C + Cᵀ)/2``, ``C = Bᵀ M B``, ``B = orth([W_Qᵀ, W_Kᵀ])``
        antisymmetric  Hermitian eigendecomposition of ``i (C - Cᵀ)/2``: an eigenvector ``x + i y`` of
                       ``+s`` gives the exact pair ``A x = s y``, ``A y = -s x``
        """
        if channel is Channel.full:
            U, S, Vh = torch.linalg.svd(self.core, full_matrices=False)
            left, right = Side(self.query.basis, U), Side(self.key.basis, Vh.mT)
            modes = Decomposition(S, left, right, self.query.R, self.key.R)
            return self._spectra(channel, S, self.core), modes
        both, R_Q, R_K = self._joint()
        C = R_Q @ R_K.mT
        if channel is Channel.symmetric:
            values, E = torch.linalg.eigh((C + C.mT) / 2)
            order = _by_size(values)
            S, side = values.gather(1, order), Side(both.basis, pick(E, order))
            return self._spectra(channel, S, C), Decomposition(S, side, side, R_Q, R_K)
        values, W = torch.linalg.eigh(1j * (C - C.mT) / 2)
        S = _pairs(values)
        W = W.flip(-1)[..., : S.shape[-1] // 2] * 2**0.5
        U = torch.stack([W.imag, -W.real], dim=-1).flatten(-2)  # y_1, -x_1, y_2, -x_2, ...
        V = torch.stack([W.real, W.imag], dim=-1).flatten(-2)  # x_1,  y_1, x_2,  y_2, ...
        return self._spectra(channel, S, C), Decomposition(S, Side(both.basis, U), Side(both.basis, V), R_Q, R_K)

    def _joint(self) -> tuple[Factor, Tensor, Tensor]:
        """``[W_Q; W_K]``, factored into a basis (n, d_model, b), and ``R_Q``, ``R_K`` (n, b, d_head)."""
        d_head = self.query.W.shape[-2]

        def gram() -> Tensor:
            upper = torch.cat([self.query.gram, self.cross.mT], dim=-1)
            return torch.cat([upper, torch.cat([self.cross, self.key.gram], dim=-1)], dim=-2)

        W = torch.cat([self.query.W, self.key.W], dim=-2)
        both = Factor(W, self.query.roundoff, known_gram=gram)
        return both, both.R[..., :d_head], both.R[..., d_head:]

    def _spectra(self, channel: Channel, S: Tensor, cores: Tensor) -> tuple[Spectrum, ...]:
        """Spectra with values ``S``; ``cores`` are M in orthonormal bases, of the same norm."""
        norms = torch.linalg.matrix_norm(cores).tolist()
        # Zero compared with M, not with its own largest value: a half that M does not have is all rounding.
        return tuple(
            Spectrum(channel, s, int((s.abs() > self.query.rcond * norm).sum()), norm)
            for s, norm in zip(S, norms, strict=True)
        )


def padded_indices(indices: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Indices of each head, and which of them are none but fill it up to the longest; both (n, r)."""
    r = max(map(len, indices), default=0)
    at = torch.tensor([[*of_head, *[0] * (r - len(of_head))] for of_head in indices], dtype=torch.long)
    is_one = torch.tensor([[j < len(of_head) for j in range(r)] for of_head in indices], dtype=torch.bool)
    return at.view(len(indices), r), is_one.view(len(indices), r)


def pick(core: Tensor, at: Tensor, is_one: Tensor | None = None) -> Tensor:
    """The columns ``at`` (n, r) of ``core`` (n, k, m); zero where they are none."""
    columns = core.gather(-1, at[:, None, :].expand(-1, core.shape[1], -1))
    return columns if is_one is None else columns * is_one[:, None, :]


def _by_size(values: Tensor) -> Tensor:
    return values.abs().argsort(dim=-1, descending=True, stable=True)


def _pairs(values: Tensor) -> Tensor:
    """The positive half of a Hermitian spectrum that is symmetric about zero, strongest first, each twice."""
    return values.flip(-1)[..., : values.shape[-1] // 2].clamp_min(0.0).repeat_interleave(2, dim=-1)


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
