"""How far two stored versions of the same numbers are apart: counted exactly, measured in float64 and in ULPs.

The figures of a tensor are the sum (``+``) of those of its chunks, so that none has to be held whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qkpatch.common.dtypes import DTYPE_BITS, FLOATS

Buffer = bytearray


# As wide as a number is; the bits of floating point ones, without the sign, grow with the number.
_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_MOST = 2**63 - 1
# Numbers at a time: what is computed on the way stays in the cache, and torch does not share out so few among
# threads, so that the bits are the same whatever the machine.
_PIECE = 1 << 15
_FEW_DIGITS = 1e-140  # the square of what is smaller has lost some


@dataclass(frozen=True)
class Bucket:
    """How many numbers moved by ``first`` to ``last`` ULPs; ``last`` is None where there is no upper end."""

    first: int
    last: int | None
    count: int


@dataclass(frozen=True)
class Values:
    """Floating point numbers that differ; figures are over pairs of finite ones, ``frobenius_a`` over all of A."""

    differing: int = 0  # pairs of finite numbers of different value
    zero_signs: int = 0  # +0 here and -0 there
    infinite: int = 0  # at least one of the two, and neither is NaN
    nan_only_in_a: int = 0
    nan_only_in_b: int = 0
    nan_payloads: int = 0  # NaN on both sides, of different bits
    max_abs: float = 0.0  # max |B − A|
    frobenius: float = 0.0  # ‖B − A‖_F
    frobenius_a: float = 0.0  # ‖A‖_F
    max_ulps: int = 0
    ulps: tuple[int, ...] | None = None  # by bucket; None where the dtypes differ

    def __add__(self, other: Values) -> Values:
        mine, theirs = vars(self), vars(other)
        return Values(**{name: _TOGETHER.get(name, _sum)(mine[name], theirs[name]) for name in mine})

    @property
    def relative(self) -> float | None:
        """``‖B − A‖_F / ‖A‖_F``; None where A is zero."""
        return self.frobenius / self.frobenius_a if self.frobenius_a else None

    @property
    def median_bucket(self) -> Bucket | None:
        """The bucket that half of the numbers are in or below; None where no number moved."""
        reached, buckets = 0, self.buckets or ()
        for bucket in buckets:
            reached += bucket.count
            if 2 * reached >= self.differing:
                return bucket
        return None

    @property
    def buckets(self) -> tuple[Bucket, ...] | None:
        """1, 2, 3-4, 5-8, ... ULPs up to a factor of two, and what is beyond; those that are empty left out."""
        if self.ulps is None:
            return None
        edges = [0, *(2**k for k in range(len(self.ulps) - 1)), None]
        counted = zip(pairwise(edges), self.ulps, strict=True)
        return tuple(Bucket((first or 0) + 1, last, count) for (first, last), count in counted if count)


@dataclass(frozen=True)
class Change:
    """What differs between two runs of bytes."""

    n_bytes: int | None  # that differ; None where the dtypes do
    elements: int | None  # that differ in their bits; None where an element is no whole number of bytes
    values: Values | None  # None where the dtype is no floating point format

    def __add__(self, other: Change) -> Change:
        return Change(*map(_sum, vars(self).values(), vars(other).values()))


def _sum(a: Any, b: Any) -> Any:
    """None where one of them is."""
    return None if a is None or b is None else a + b


def _sums(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if a is None or b is None else tuple(map(int.__add__, a, b))


_TOGETHER: dict[str, Callable[[Any, Any], Any]] = {
    "max_abs": max, "max_ulps": max, "frobenius": math.hypot, "frobenius_a": math.hypot, "ulps": _sums,
}  # fmt: skip


def unchanged(a: Buffer, dtype: str) -> Change:
    """The share in a tensor's figures of a chunk that is equal on both sides."""
    if dtype not in FLOATS:
        return Change(0, None if _integer(dtype) is None else 0, None)
    norm = math.hypot(*(_norm(_values(bits, dtype)) for bits in _pieces(a, _INTEGERS[DTYPE_BITS[dtype]])))
    return Change(0, 0, Values(frobenius_a=norm, ulps=(0,) * (FLOATS[dtype].fraction + 2)))


def changed(a: Buffer, b: Buffer, dtype: str) -> Change:
    """What differs between two chunks of one dtype, of the same length."""
    n_bytes = _differing(a, b, torch.int8)
    if (bits := _integer(dtype)) is None:
        return Change(n_bytes, None, None)
    if dtype not in FLOATS:  # indices, flags, packed codes: equal or not
        return Change(n_bytes, _differing(a, b, bits), None)
    pairs = zip(_pieces(a, bits), _pieces(b, bits), strict=True)
    return Change(n_bytes, *_total([_changed(x, y, dtype) for x, y in pairs]))


def recast(a: Buffer, b: Buffer, dtype_a: str, dtype_b: str) -> Change:
    """What differs in value between two chunks of as many numbers in two formats; NaN is NaN in any of them."""
    parts = []
    integers = (_INTEGERS[DTYPE_BITS[dtype]] for dtype in (dtype_a, dtype_b))
    for bits_a, bits_b in zip(*map(_pieces, (a, b), integers), strict=True):
        x, y = _values(bits_a, dtype_a), _values(bits_b, dtype_b)
        differs = (x != y) | (torch.signbit(x) != torch.signbit(y))
        parts.append(_compared(x, y, differs & ~(torch.isnan(x) & torch.isnan(y))))
    return Change(None, *_total(parts))


def apart(a: Buffer, b: Buffer, dtype: str, columns: int) -> tuple[int, float]:
    """How far rows ``b`` are from ``a``, which hold nothing but numbers.

    Returns how many numbers have other bits, and the largest difference that is more than one ULP, as a share of its
    row's norm: infinite for NaN and Inf. In float64 that of a whole row, ``‖Δ‖ / ‖row‖``.
    """
    bits_a, bits_b = (
        torch.frombuffer(x, dtype=_INTEGERS[DTYPE_BITS[dtype]]).view(-1, columns) for x in (a, b)
    )
    x, y = _values(bits_a, dtype), _values(bits_b, dtype)
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    off = (y - x).abs_()
    off = torch.linalg.vector_norm(off, dim=1) if dtype == "F64" else off * (_steps(bits_a, bits_b) > 1)
    off = (off.view(len(norms), -1) / norms).nan_to_num_(0.0)  # 0 of a row of zeros
    largest = float(off.max()) if bool(torch.isfinite(y).all()) else math.inf
    return _count(bits_a != bits_b), largest


def _integer(dtype: str) -> torch.dtype | None:
    """None where several numbers share a byte, or the format is not known."""
    return _INTEGERS.get(DTYPE_BITS.get(dtype, 0))


def _differing(a: Buffer, b: Buffer, dtype: torch.dtype) -> int:
    return sum(_count(x != y) for x, y in zip(_pieces(a, dtype), _pieces(b, dtype), strict=True))


def _total(parts: Sequence[tuple[int, Values]]) -> tuple[int, Values]:
    return sum(n for n, _ in parts), reduce(Values.__add__, (values for _, values in parts))


def _changed(bits_a: Tensor, bits_b: Tensor, dtype: str) -> tuple[int, Values]:
    elements, values = _compared(_values(bits_a, dtype), _values(bits_b, dtype), bits_a != bits_b)
    if elements != values.differing:  # only pairs of finite numbers have a distance, and ±0 have none
        moved = _moved(_values(bits_a, dtype), _values(bits_b, dtype))
        bits_a, bits_b = bits_a[moved], bits_b[moved]
    apart = _steps(bits_a, bits_b)
    most = int(apart.max()) if len(apart) else 0
    return elements, replace(values, max_ulps=most, ulps=_histogram(apart, FLOATS[dtype].fraction))


def _compared(x: Tensor, y: Tensor, differs: Tensor) -> tuple[int, Values]:
    """How many pairs differ, and their figures."""
    elements, norm = _count(differs), _norm(x)
    delta = y - x
    distance = float(torch.linalg.vector_norm(delta))
    if math.isfinite(distance):  # all numbers are
        moved = _count(delta)
        plain = Values(
            moved, elements - moved, max_abs=_largest(delta), frobenius=_norm(delta), frobenius_a=norm
        )
        return elements, plain
    x, y, delta = x[differs], y[differs], delta[_moved(x, y)]
    nan_x, nan_y = torch.isnan(x), torch.isnan(y)
    return elements, Values(
        differing=len(delta),
        zero_signs=_count(x == y),  # of different bits, and equal: no other numbers are
        infinite=_count((torch.isinf(x) | torch.isinf(y)) & ~nan_x & ~nan_y),
        nan_only_in_a=_count(nan_x & ~nan_y),
        nan_only_in_b=_count(nan_y & ~nan_x),
        nan_payloads=_count(nan_x & nan_y),
        max_abs=_largest(delta),
        frobenius=_norm(delta, finite=True),
        frobenius_a=norm,
    )


def _moved(x: Tensor, y: Tensor) -> Tensor:
    return (x != y) & torch.isfinite(x) & torch.isfinite(y)


def _steps(a: Tensor, b: Tensor) -> Tensor:
    """Steps between numbers of one format, counted on the line of all its numbers, where ±0 are one."""
    size = torch.iinfo(a.dtype).max  # all bits but the sign
    wide = torch.int32 if a.element_size() < 4 else torch.int64
    a, b = a.to(wide), b.to(wide)
    same_sign = (a ^ b) >= 0
    a, b = a & size, b & size
    apart = torch.where(same_sign, (a - b).abs_(), a + b)
    # float64 alone has more numbers than can be counted
    return torch.where(apart < 0, torch.iinfo(wide).max, apart) if size == _MOST else apart


def _histogram(apart: Tensor, fraction: int) -> tuple[int, ...]:
    """Counts of distances by the length in bits of the distance less one; zeros are left out."""
    capped = apart.clamp(max=2**fraction + 1)
    exponent = torch.frexp((capped - 1).to(torch.float64)).exponent  # exact up to here, and 1 for -1
    by_length = torch.bincount(exponent, minlength=fraction + 2).tolist()
    by_length[1] -= len(apart) - _count(apart)
    return tuple(by_length)


def _norm(x: Tensor, *, finite: bool = False) -> float:
    """Frobenius norm of the finite numbers; also where their squares are too large or too small for float64."""
    norm = float(torch.linalg.vector_norm(x))
    if _FEW_DIGITS < norm < math.inf:
        return norm
    if not math.isfinite(norm) and not finite:
        x = x[torch.isfinite(x)]
    largest = _largest(x)
    if largest in (0.0, math.inf):
        return largest
    return largest * float(torch.linalg.vector_norm(x / largest))


def _largest(x: Tensor) -> float:
    return max(-float(x.min()), float(x.max())) if len(x) else 0.0


def _values(bits: Tensor, dtype: str) -> Tensor:
    stored: torch.dtype = getattr(torch, FLOATS[dtype].torch)
    return bits.view(stored).to(torch.float64)


def _pieces(data: Buffer, dtype: torch.dtype) -> Iterator[Tensor]:
    whole = torch.frombuffer(data, dtype=dtype)
    for begin in range(0, len(whole), _PIECE):
        yield whole[begin : begin + _PIECE]


def _count(where: Tensor) -> int:
    return int(torch.count_nonzero(where))
