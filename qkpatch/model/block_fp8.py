"""How a checkpoint stores block FP8: which scales belong to which rows. The arithmetic is in ``spectral.fp8``."""

from __future__ import annotations

from qkpatch.checkpoint.header import TensorRef
from qkpatch.errors import UnsupportedError

BLOCK = (128, 128)  # rows, columns, as DeepSeek began it and all published checkpoints have it
CODES = "F8_E4M3"
SCALES = ("F32", "BF16", "F16", "F8_E8M0")


def block_scale(weight: TensorRef | None, scale: TensorRef | None, d_head: int) -> TensorRef | None:
    """The scales of a weight in block FP8, ``weight_scale_inv``; None where it is stored in another way.

    Raises:
        UnsupportedError: a block would hold rows of more than one head.
    """
    if weight is None or scale is None or weight.dtype != CODES or len(weight.shape) != 2:
        return None
    blocks = tuple(-(-size // block) for size, block in zip(weight.shape, BLOCK, strict=True))
    if scale.shape != blocks or scale.dtype not in SCALES:
        return None
    if d_head % BLOCK[0]:
        raise UnsupportedError(
            f"block FP8 with {BLOCK[0]} rows to a scale, and head_dim {d_head} is no multiple of it: "
            "a block would hold rows of several heads",
            where=weight.name,
            fix="patch the unquantised checkpoint, then quantise the result",
        )
    return scale


def scale_range(weight: TensorRef, scale: TensorRef, begin: int, end: int) -> tuple[int, int]:
    """Bytes, in its shard, of the scales of the weight's bytes ``begin`` to ``end``, which are whole blocks of rows."""
    row, scale_row = weight.nbytes // weight.shape[0], scale.nbytes // scale.shape[0]
    first, last = ((at - weight.begin) // row // BLOCK[0] for at in (begin, end))
    return scale.begin + first * scale_row, scale.begin + last * scale_row
