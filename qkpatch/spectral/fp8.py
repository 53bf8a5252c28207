"""Scaled FP8 (E4M3): ``W = code × scale`` with one scale per block of rows and columns, row, or tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from qkpatch.spectral.rounding import round_once

LARGEST = 448.0  # the largest E4M3 number
OVERFLOW = 464.0  # what is larger no longer rounds to it

Block = tuple[int, int]  # rows, columns


def dequantise(codes: Tensor, scale: Tensor, block: Block) -> Tensor:
    """``codes × scale`` in the dtype of ``scale``, exact in float64.

    ``codes`` (rows, columns) begin at a block's first row; ``scale`` (⌈rows / b_r⌉, ⌈columns / b_c⌉), or of one number.
    Equivalent to ``_dequantize_fp8_weight`` of transformers' ``finegrained_fp8``.
    """
    return codes.to(scale.dtype) * _expand(scale, block, codes.shape)


def requantise(W: Tensor, scale: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``W``, rounded to nearest once; a block keeps its scale unless it overflows.

    E4M3 is a floating point format, so a smaller scale would not be more precise. An overflowing block's scale is
    doubled until it holds: then the values of the block that were not edited are still stored exactly, but for
    the smallest of all (under 2⁻⁶ scale).
    """
    columns = W.shape[1]
    largest = (W.abs() / _expand(scale, block, W.shape)).view(-1, block[0], columns).amax(1)
    padded = torch.nn.functional.pad(largest, (0, -columns % block[1]))
    largest = padded.view(*padded.shape[:-1], -1, block[1]).amax(-1)  # per block
    exponent = torch.zeros_like(largest)
    while bool((over := largest > OVERFLOW * exponent.exp2()).any()):
        exponent += over
    grown = scale * exponent.exp2()
    codes = (W / _expand(grown, block, W.shape)).clamp(-LARGEST, LARGEST)
    return round_once(codes, torch.float8_e4m3fn), grown


def _expand(scale: Tensor, block: Block, shape: torch.Size) -> Tensor:
    if scale.numel() == 1:
        return scale.view(1, 1)
    rows = scale.repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]
