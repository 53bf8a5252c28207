"""``QKProduct``: the query-key products of some heads, kept factored, and their ``Spectrum`` per channel.

Heads are computed together: every tensor has a leading dimension ``n`` for them. What is as long as ``d_model``
stays on the device of the weights. The small cores go to the CPU, where LAPACK decomposes each in float64: so
devices differ by rounding only, and a GPU is not held up by matrices that are too small for it (of 128 × 128,
cuSOLVER's ``gesvd`` and ``gesvdj`` decompose one after the other).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkpatch.spectral.factors import Basis, Factor, to_host
from qkpatch.spectral.lazy import cached_property
from qkpatch.spectral.rule import Channel


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
        return self._spectra(channel, S, C), Decomposition(
            S, Side(both.basis, U), Side(both.basis, V), R_Q, R_K
        )

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
