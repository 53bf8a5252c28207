"""One rounding from the compute dtype to the stored dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# float32 → dtype: the low bits that are zero in every float32 halfway between two neighbours of dtype, subnormal
# ones included, because such a midpoint has one significant bit more than they.
_BELOW_MIDPOINTS = {
    torch.bfloat16: (1 << 15) - 1,
    torch.float16: (1 << 12) - 1,
    torch.float8_e4m3fn: (1 << 19) - 1,
}
_TOGETHER = 64


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to nearest even in ``dtype``, with a single rounding.

    Casting float64 to bfloat16, float16 or float8 in torch goes through float32 and so rounds twice. That is wrong,
    by one ULP, where the first rounding ends on a midpoint of ``dtype``, and nowhere else: rounding is monotonic
    and midpoints are numbers of float32. There, rounding to odd in float32 makes the second rounding exact (Boldo &
    Melquiond, "When double rounding is odd"): float32 keeps more than two spare bits.
    """
    if x.dtype is not torch.float64 or dtype not in _BELOW_MIDPOINTS:
        return x.to(dtype)
    near = x.to(torch.float32, memory_format=torch.contiguous_format)
    rounded = near.to(dtype)
    low_bits = near.view(torch.int32).bitwise_and_(_BELOW_MIDPOINTS[dtype])  # near is not needed any more
    # A few at a time, because finding single numbers takes longer than rounding their neighbours again.
    few = math.gcd(x.numel(), _TOGETHER)
    at = (low_bits.view(-1, few).amin(1) == 0).nonzero().squeeze(1)
    if at.numel():
        bits = torch.uint8 if rounded.element_size() == 1 else torch.int16  # not all indexing knows float8
        rounded.view(bits).view(-1, few)[at] = _to_odd(x.reshape(-1, few)[at]).to(dtype).view(bits)
    return rounded


def _to_odd(x: Tensor) -> Tensor:
    """The float32 next to ``x`` whose last bit is one, or ``x`` where float32 holds it."""
    near = x.to(torch.float32)
    error = x - near.to(torch.float64)  # exact
    bits = near.view(torch.int32)
    away = ((error > 0) == (x > 0)).to(torch.int32) * 2 - 1  # towards the float32 on the other side of x
    is_even_and_inexact = (error.abs() > 0) & (bits % 2 == 0)  # not for infinities, whose error is NaN
    return (bits + away * is_even_and_inexact).view(torch.float32)
