"""The method again, dense and slow: every product is formed as a d_model × d_model float64 matrix.

Shares nothing with ``qkpatch.spectral`` but the definitions, so that agreement means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# Significand bits with the leading one, and exponents of the largest and the smallest normal numbers.
FORMATS = {"BF16": (8, 127, -126), "F16": (11, 15, -14), "F32": (24, 127, -126)}


@dataclass(frozen=True)
class Dense:
    """The non-zero modes of one channel of M, ``U diag(S) Vᵀ``, largest ``|S|`` first."""

    S: Matrix
    U: Matrix
    V: Matrix

    def part(self, modes: Sequence[int]) -> Matrix:
        """The sum of the chosen modes, d_model × d_model."""
        chosen = list(modes)
        return (self.U[:, chosen] * self.S[chosen]) @ self.V[:, chosen].T

    def gap(self, modes: Sequence[int]) -> float | None:
        """Smallest relative distance between a chosen mode and a neighbour that was not chosen."""
        size = np.abs(self.S)
        steps = (size[:-1] - size[1:]) / size[:-1]
        edges = [steps[j] for j in range(len(steps)) if (j in modes) != (j + 1 in modes)]
        return float(min(edges)) if edges else None


@dataclass(frozen=True)
class Edited:
    """The query weight of one head after the edit, not yet rounded."""

    W_Q: Matrix
    realised: float | None = None


def channel_of(M: Matrix, channel: str) -> Matrix:
    """The part of M that a channel sees."""
    return {"full": M, "symmetric": (M + M.T) / 2, "antisymmetric": (M - M.T) / 2}[channel]


def decompose(W_Q: Matrix, W_K: Matrix, channel: str) -> Dense:
    """Dense modes of one channel: ``eigh`` for the symmetric part, ``svd`` for the others."""
    M = W_Q.T @ W_K
    part = channel_of(M, channel)
    if channel == "symmetric":
        values, vectors = np.linalg.eigh(part)
        order = np.argsort(-np.abs(values), kind="stable")
        S, U, V = values[order], vectors[:, order], vectors[:, order]
    else:
        U, S, Vh = np.linalg.svd(part)
        V = Vh.T
    # Measured by M, because the rounding errors of a half that cancels are those of M.
    rank = int(np.sum(np.abs(S) > len(M) * np.finfo(np.float64).eps * np.linalg.norm(M)))
    return Dense(S[:rank].copy(), U[:, :rank].copy(), V[:, :rank].copy())


def choose(dense: Dense, channel: str, select: str, r: int) -> tuple[int, ...]:
    """The ``dominant`` or ``bottom`` modes; values of the antisymmetric part come in pairs, so r does too."""
    r += r % 2 if channel == "antisymmetric" else 0
    rank = len(dense.S)
    return tuple(range(min(r, rank))) if select == "dominant" else tuple(range(max(rank - r, 0), rank))


def pinv(W: Matrix) -> Matrix:
    return np.linalg.pinv(W, rcond=max(W.shape) * np.finfo(np.float64).eps)


def edit(
    W_Q: Matrix, W_K: Matrix, channel: str, modes: Sequence[int], alpha: float, dense: Dense | None = None
) -> Edited:
    """Scale ``modes`` by ``alpha`` in M and map the result back to the query with the keys fixed."""
    dense = dense or decompose(W_Q, W_K, channel)
    removed = (1 - alpha) * dense.part(modes)  # ΔM
    if channel == "full":
        if np.linalg.matrix_rank(W_K) == len(W_K):
            return Edited(((W_Q.T @ W_K - removed) @ pinv(W_K)).T)  # W_Q'ᵀ = M' W_K⁺
        U = dense.U[:, list(modes)]  # M' W_K⁺ would lose what W_K does not read; the projection keeps it
        return Edited(W_Q @ (np.eye(len(U)) - (1 - alpha) * U @ U.T))
    change = -(removed @ pinv(W_K)).T
    missed = np.linalg.norm(change.T @ W_K + removed) ** 2
    whole = np.linalg.norm(removed) ** 2
    return Edited(W_Q + change, float(1 - missed / whole) if whole else None)


def shrink(W_Q: Matrix, like: Matrix) -> Matrix:
    """``c W_Q`` that moves W_Q exactly as far as ``like`` did."""
    return W_Q * (1 - np.linalg.norm(like - W_Q) / np.linalg.norm(W_Q))


def gains(dense: Dense, modes: Sequence[int], M_after: Matrix, channel: str) -> list[float]:
    """``u_jᵀ M' v_j / s_j`` in the channel, per mode."""
    after = channel_of(M_after, channel)
    return [float(dense.U[:, j] @ after @ dense.V[:, j] / dense.S[j]) for j in modes]


def values(W_Q: Matrix, W_K: Matrix, channel: str, count: int) -> Matrix:
    """The ``count`` largest values of a channel, zeros included."""
    part = channel_of(W_Q.T @ W_K, channel)
    if channel != "symmetric":
        return np.linalg.svd(part, compute_uv=False)[:count]
    eigenvalues = np.linalg.eigvalsh(part)
    return eigenvalues[np.argsort(-np.abs(eigenvalues), kind="stable")][:count]


def round_to(x: Matrix, dtype: str) -> Matrix:
    """Nearest number of ``dtype``, ties to even, in one step, still held as float64.

    ``x / step`` is exact because the step is a power of two, and ``rint`` is the only rounding.
    """
    step = step_exponent(x, dtype)
    with np.errstate(over="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(x, -step)), step)
    return np.where(np.abs(rounded) >= 2.0 ** (FORMATS[dtype][1] + 1), np.copysign(np.inf, x), rounded)


def step_exponent(x: Matrix, dtype: str) -> NDArray[np.int64]:
    """``e`` such that the numbers of ``dtype`` around ``x`` (upwards, if ``x`` is one) lie ``2^e`` apart."""
    bits, _, smallest = FORMATS[dtype]
    exponent = np.where(x == 0, smallest, np.frexp(x)[1] - 1)  # 2^exponent <= |x|
    return np.maximum(exponent, smallest) - (bits - 1)


def ordinal(x: Matrix, dtype: str) -> NDArray[np.int64]:
    """Position of a number of ``dtype`` among all its numbers, counted from zero; ±0 share one."""
    if dtype == "F16":
        raw = x.astype(np.float16).view(np.int16).astype(np.int64)
        raw, sign = raw & 0x7FFF, raw < 0
    else:
        raw = x.astype(np.float32).view(np.int32).astype(np.int64)
        raw, sign = raw & 0x7FFFFFFF, raw < 0
        raw = raw >> 16 if dtype == "BF16" else raw
    return np.where(sign, -raw, raw)


def ulps(a: Matrix, b: Matrix, dtype: str) -> int:
    """Largest distance between two arrays of ``dtype`` numbers, in units in the last place."""
    return int(np.abs(ordinal(a, dtype) - ordinal(b, dtype)).max(initial=0))
