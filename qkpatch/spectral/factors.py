"""``Factor``: the weights of some heads as an orthonormal ``Basis`` and a small R, by Cholesky or by QR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkpatch.spectral.lazy import cached_property

_MARGIN = 2.0**-24  # of a rounding: what is lost to a condition number
_BLOCK = 32  # rows; half of a Gram matrix is enough, but smaller products take longer


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

    and no singular value of a product moves by more, relative to itself (Eisenstat & Ipsen, *Relative perturbation
    techniques for singular value problems*, 1995). κ is the condition number of the rows scaled to norm 1, but for
    √d_head at most; c is below 1 in practice. Heads with ``ε κ² > 2⁻²⁴ roundoff`` take Householder's QR: κ above 1024
    for BF16, 362 for F16, 4 for F32, and all of F64; each head by itself, whichever others are beside it.
    """

    W: Tensor  # (n, d_head, d_model)
    roundoff: float = 0.0  # relative, of the format that a result is rounded to; 0 asks for the QR
    known: tuple[Callable[[], Basis], Tensor] | None = None  # Q, when it is asked for, and R
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
            return self.known[0]()
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

    def take(self, at: Sequence[int]) -> Factor:
        """The factors at ``at``, which may repeat: heads that share keys share their factors."""
        if list(at) == list(range(len(self.W))):
            return self
        known = (lambda: Basis(self.basis.rows[at], self.basis.mixing[at]), self.R[at])
        return Factor(self.W[at], self.roundoff, known, lambda: self.gram[at])

    @property
    def rcond(self) -> float:
        """Singular values up to this, relative to their matrix, count as zero; the default of ``torch.linalg.pinv``."""
        return self.W.shape[-1] * torch.finfo(self.W.dtype).eps

    @cached_property
    def pinv_core(self) -> Tensor:
        """``R⁺`` by SVD with :attr:`rcond`, so that ``(W⁺)ᵀ = R⁺ Qᵀ``; shape (n, d_head, k), on the CPU."""
        inverse: Tensor = torch.linalg.pinv(self.R, rtol=self.rcond)
        return inverse
