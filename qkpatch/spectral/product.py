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

from qkpatch.spectral.factors import Factor, to_host
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
        inside, size = set(selected), self.S.abs().tolist()
        edges = [j for j in range(self.rank - 1) if (j in inside) != (j + 1 in inside)]
        return min(((size[j] - size[j + 1]) / size[j] for j in edges), default=None)


@dataclass(frozen=True)
class Decomposition:
    """``U diag(S) Vᵀ`` of one channel of each head's M, all modes or a few; vectors are coordinates until asked for."""

    S: Tensor  # (n, r), on the CPU
    U_core: Tensor  # (n, k, r), in the basis of the product's query
    V_core: Tensor  # (n, k, r), in that of its key
    product: QKProduct

    def modes(self, indices: Sequence[Sequence[int]]) -> Decomposition:
        """Some modes of each head alone; where a head has fewer than another, the rest of its ``U, S, V`` is zero."""
        each = [torch.tensor(of_head, dtype=torch.long) for of_head in indices]
        at = torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=-1)
        is_mode, at = at >= 0, at.clamp_min(0)
        U, V = (_pick(core, at) * is_mode[:, None] for core in (self.U_core, self.V_core))
        return Decomposition(self.S.gather(1, at) * is_mode, U, V, self.product)

    @cached_property
    def U(self) -> Tensor:
        """Left vectors, (n, d_model, r)."""
        return self.product.query.basis.lift(self.U_core)

    @cached_property
    def V(self) -> Tensor:
        """Right vectors, (n, d_model, r)."""
        return self.product.key.basis.lift(self.V_core)


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
        traces, norms = (self.cross * self.cross.mT).sum((-2, -1)), torch.linalg.matrix_norm(self.core)
        shares = (0.5 * (1.0 + traces / norms.square())).clamp(0.0, 1.0)  # rounding may step outside
        found: list[float] = torch.where(norms > 0, shares, 0.0).tolist()
        return found

    def spectra(self, channel: Channel) -> tuple[Spectrum, ...]:
        """The spectra of :meth:`decompose`, at less cost since no vectors are computed."""
        if channel is Channel.full:
            return self._spectra(channel, torch.linalg.svdvals(self.core))
        joint, half = self._half(channel)
        values = torch.linalg.eigvalsh(half)
        if channel is Channel.symmetric:
            return joint._spectra(channel, values.gather(1, _by_size(values)))
        return joint._spectra(channel, _pairs(values))

    def decompose(self, channel: Channel) -> tuple[tuple[Spectrum, ...], Decomposition]:
        """Decompose one channel; O(d_model d_head²) per head.

        full           SVD of the core ``R_q R_kᵀ``; ``U = Q_q U_c``, ``V = Q_k V_c``
        symmetric      eigendecomposition of ``(C + Cᵀ)/2``, ``C = Bᵀ M B``, ``B = orth([W_Qᵀ, W_Kᵀ])``
        antisymmetric  Hermitian eigendecomposition of ``i (C - Cᵀ)/2``: an eigenvector ``x + i y`` of
                       ``+s`` gives the exact pair ``A x = s y``, ``A y = -s x``
        """
        if channel is Channel.full:
            U, S, Vh = torch.linalg.svd(self.core, full_matrices=False)
            return self._spectra(channel, S), Decomposition(S, U, Vh.mT, self)
        joint, half = self._half(channel)
        values, E = torch.linalg.eigh(half)
        if channel is Channel.symmetric:
            order = _by_size(values)
            S, U = values.gather(1, order), _pick(E, order)
            return joint._spectra(channel, S), Decomposition(S, U, U, joint)
        S = _pairs(values)
        W = E.flip(-1)[..., : S.shape[-1] // 2] * 2**0.5
        U = torch.stack([W.imag, -W.real], dim=-1).flatten(-2)  # y_1, -x_1, y_2, -x_2, ...
        V = torch.stack([W.real, W.imag], dim=-1).flatten(-2)  # x_1,  y_1, x_2,  y_2, ...
        return joint._spectra(channel, S), Decomposition(S, U, V, joint)

    def _half(self, channel: Channel) -> tuple[QKProduct, Tensor]:
        """The product in an orthonormal basis of both row spaces, and there, as a Hermitian matrix, half of it."""
        query, key = self.query, self.key

        def gram() -> Tensor:
            upper = torch.cat([query.gram, self.cross.mT], dim=-1)
            return torch.cat([upper, torch.cat([self.cross, key.gram], dim=-1)], dim=-2)

        both = Factor(torch.cat([query.W, key.W], dim=-2), query.roundoff, known_gram=gram)
        d_head = query.W.shape[-2]
        known = [(lambda: both.basis, R) for R in (both.R[..., :d_head], both.R[..., d_head:])]
        joint = QKProduct(Factor(query.W, known=known[0]), Factor(key.W, known=known[1]))
        C = joint.core
        return joint, (C + C.mT) / 2 if channel is Channel.symmetric else 1j * (C - C.mT) / 2

    def _spectra(self, channel: Channel, S: Tensor) -> tuple[Spectrum, ...]:
        """Spectra with values ``S``."""
        norms = torch.linalg.matrix_norm(self.core).tolist()
        # Zero compared with M, not with its own largest value: a half that M does not have is all rounding.
        return tuple(
            Spectrum(channel, s, int((s.abs() > self.query.rcond * norm).sum()), norm)
            for s, norm in zip(S, norms, strict=True)
        )


def _pick(core: Tensor, at: Tensor) -> Tensor:
    """The columns ``at`` (n, r) of ``core`` (n, k, m)."""
    return core.gather(-1, at[:, None, :].expand(-1, core.shape[1], -1))


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
