"""One rounding from the compute dtype to the stored dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounded:
    """A weight in a plain dtype, after :func:`round_once`."""

    W: Tensor

    @property
    def values(self) -> Tensor:
        """The same numbers as float64."""
        return self.W.to(torch.float64)


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to nearest even in ``dtype``, with a single rounding.

    Casting float64 to bfloat16, float16 or float8 in torch goes through float32 and so rounds twice, which is
    wrong by one ULP near the midpoints. Rounding to odd in float32 first makes the second rounding
    exact (Boldo & Melquiond, "When double rounding is odd"): float32 keeps more than two spare bits.
    """
    if x.dtype is not torch.float64 or dtype not in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        return x.to(dtype)
    near = x.to(torch.float32)
    error = x - near.to(torch.float64)  # exact
    bits = near.view(torch.int32)
    away = ((error > 0) == (x > 0)).to(torch.int32) * 2 - 1  # towards the float32 on the other side of x
    is_even_and_inexact = (error.abs() > 0) & (bits % 2 == 0)  # not for infinities, whose error is NaN
    return (bits + away * is_even_and_inexact).view(torch.float32).to(dtype)
