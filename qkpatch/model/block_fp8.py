"""How a checkpoint stores FP8: which scales belong to which rows. The arithmetic is in ``spectral.fp8``."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from qkpatch.checkpoint.header import TensorRef
from qkpatch.errors import UnsupportedError

BLOCK = (128, 128)  # rows, columns, as DeepSeek began it and all published checkpoints have it
CODES = "F8_E4M3"
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_SCALE_NAMES = {"weight_scale_inv", "weight_scale"}  # of the same thing: a value is code × scale
# What may stand beside, and is no part of the weight: scales of activations and of the cache.
_BESIDE = {"weight", "bias", "input_scale", "activation_scale", "output_scale", "q_scale", "k_scale"}


def fp8_scale(
    stored: Mapping[str, TensorRef], declared: tuple[int, ...] | None, d_head: int
) -> TensorRef | None:
    """The scales of a module in FP8 by blocks (as ``declared``), rows or the tensor; None where it is no such module.

    Raises:
        UnsupportedError: a block would hold rows of more than one head.
    """
    weight, names = stored.get("weight"), stored.keys() - _BESIDE
    if weight is None or weight.dtype != CODES or len(weight.shape) != 2 or len(names) != 1:
        return None
    scale = stored[names.pop()]
    if scale.name.rpartition(".")[2] not in _SCALE_NAMES or scale.dtype not in SCALES:
        return None
    rows, columns = weight.shape
    blocks = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    forms = [blocks] if declared else [blocks, (), (1,), (1, 1), (rows,), (rows, 1)]
    if scale.shape not in forms or declared not in (None, BLOCK):
        return None
    if scale.shape == blocks and not is_shared(scale) and d_head % BLOCK[0]:
        what = f"block FP8 with {BLOCK[0]} rows to a scale, and head_dim {d_head} is no multiple of it"
        fix = "patch the unquantised checkpoint, then quantise the result"
        raise UnsupportedError(
            f"{what}: a block would hold rows of several heads", where=weight.name, fix=fix
        )
    return scale


def is_shared(scale: TensorRef) -> bool:
    """Whether one scale is the whole tensor's; it stays, since growing it would change rows that are not edited."""
    return prod(scale.shape) == 1


def block_of(weight: TensorRef, scale: TensorRef) -> tuple[int, int]:
    """Rows and columns of one scale."""
    rows, columns = weight.shape
    if is_shared(scale):
        return rows, columns
    return (1, columns) if scale.shape in ((rows,), (rows, 1)) else BLOCK


def scale_range(weight: TensorRef, scale: TensorRef, begin: int, end: int) -> tuple[int, int]:
    """Bytes, in its shard, of the scales of the weight's bytes ``begin`` to ``end``, which are whole blocks of rows."""
    if is_shared(scale):
        return scale.begin, scale.end
    rows = block_of(weight, scale)[0]
    row, scale_row = weight.nbytes // weight.shape[0], scale.nbytes // scale.shape[0]
    first, last = ((at - weight.begin) // row // rows for at in (begin, end))
    return scale.begin + first * scale_row, scale.begin + last * scale_row
