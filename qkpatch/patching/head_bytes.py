"""``HeadBytes``: heads of one layer as they are stored, and as float64: byte ranges, dtypes, codes and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkpatch.checkpoint.files import OpenFile
from qkpatch.checkpoint.header import TensorRef
from qkpatch.common.dtypes import EDITABLE, FLOATS
from qkpatch.errors import NumericalError
from qkpatch.model.block_fp8 import block_of, is_shared, scale_range
from qkpatch.model.targets import LayerTarget
from qkpatch.spectral.fp8 import dequantise, requantise
from qkpatch.spectral.rounding import round_once

COMPUTE_DTYPE = torch.float64

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, FLOATS[name].torch) for name in (*EDITABLE, "F8_E4M3")
} | {"F8_E8M0": torch.uint8}  # an exponent
_E8M0_BIAS = 127  # a scale stored as an exponent: 2^(byte − 127)


def roundoff(dtype: str) -> float:
    """The most by which rounding to a stored dtype moves a number, relative."""
    return torch.finfo(DTYPES[dtype]).eps / 2


@dataclass(frozen=True)
class StoredHeads:
    """Edited heads, rounded, and the bytes that hold them."""

    values: Tensor  # what a loader reads, (n, d_head, d_model), compute dtype
    # Of each head, what its range of a written tensor is to hold.
    pieces: tuple[Mapping[TensorRef, bytearray], ...]


@dataclass(frozen=True)
class HeadBytes:
    """Reads heads of one layer with ``pread``, and rounds edited ones; memory does not grow with the tensor."""

    target: LayerTarget
    device: torch.device
    shards: Mapping[str, OpenFile]  # by name

    def queries(self, heads: Sequence[int]) -> Tensor:
        """``W_Q`` of query heads, (n, d_head, d_model), compute dtype.

        Raises:
            NumericalError: a scale of FP8 is no positive number.
        """
        ref = self.target.query
        at = [self.target.layout.query_range(ref, head) for head in heads]
        return self._matrices(ref, self.target.query_scale, at)

    def keys(self, kv_heads: Sequence[int]) -> Tensor:
        """``W_K`` of key heads, as :meth:`queries`."""
        ref = self.target.key
        at = [self.target.layout.key_range(ref, kv_head) for kv_head in kv_heads]
        return self._matrices(ref, self.target.key_scale, at)

    def gains(self, norm: TensorRef, what: str) -> Tensor:
        """The weight of a norm, flat, compute dtype; ``what`` is its name in messages.

        Raises:
            NumericalError: it holds NaN or Inf.
        """
        values = self._values(norm, [(norm.begin, norm.end)])
        if not bool(values.isfinite().all()):
            raise self.damaged(norm, what)
        return values

    def damaged(self, ref: TensorRef, what: str) -> NumericalError:
        """The error for stored numbers that are none."""
        return NumericalError(
            f"{what} of layer {self.target.layer} holds NaN or Inf",
            where=f"{ref.name} in {ref.shard}",
            fix="the checkpoint is damaged; download it again",
        )

    def store(self, heads: Sequence[int], W: Tensor) -> StoredHeads:
        """``W`` (n, d_head, d_model) rounded once to what the heads' rows are stored as.

        Raises:
            NumericalError: what a scale of FP8 can hold is exceeded.
        """
        query, scale = self.target.query, self.target.query_scale
        if scale is None:
            rounded = round_once(W, DTYPES[query.dtype])
            pieces = tuple({query: to_bytes(of_head)} for of_head in rounded.cpu())
            return StoredHeads(_computed(rounded), pieces)
        at = [self.target.layout.query_range(query, head) for head in heads]
        flat, before = W.flatten(0, 1), self._scales(query, scale, at)
        block = (len(flat), flat.shape[1]) if is_shared(scale) else block_of(query, scale)
        rows, scales = requantise(flat, before, block)
        values, codes = dequantise(rows, scales, block).view(W.shape), rows.cpu().view(W.shape)
        if not is_shared(scale):
            by_head = zip(codes, self._stored_scales(scale, scales.cpu()).view(len(W), -1), strict=True)
            return StoredHeads(values, tuple({query: to_bytes(c), scale: to_bytes(s)} for c, s in by_head))
        if not torch.equal(scales, before):
            raise self._too_large(scale, "with the whole tensor's one scale, which must stay")
        return StoredHeads(values, tuple({query: to_bytes(of_head)} for of_head in codes))

    def raw(self, ref: TensorRef, begin: int, end: int) -> bytearray:
        """Bytes of a tensor as they are stored."""
        return self.shards[ref.shard].read(end - begin, begin)

    def _matrices(self, ref: TensorRef, scale: TensorRef | None, at: Sequence[tuple[int, int]]) -> Tensor:
        """Heads at byte ranges, (n, d_head, d_model)."""
        layout = self.target.layout
        rows = self._values(ref, at).view(-1, layout.d_model)
        if scale is not None:
            rows = dequantise(rows, self._scales(ref, scale, at), block_of(ref, scale))
        return rows.view(-1, layout.d_head, layout.d_model)

    def _scales(self, ref: TensorRef, scale: TensorRef, at: Sequence[tuple[int, int]]) -> Tensor:
        """The scales of whole blocks of rows, (blocks of rows, blocks of columns)."""
        places = [scale_range(ref, scale, *of_head) for of_head in (at[:1] if is_shared(scale) else at)]
        scales = self._values(scale, places)
        if scale.dtype == "F8_E8M0":
            scales = torch.where(scales < 255, (scales - _E8M0_BIAS).exp2(), torch.nan)
        if not bool(((scales > 0) & (scales < torch.inf)).all()):
            raise NumericalError(
                f"a scale of layer {self.target.layer} is not a positive number",
                where=f"{scale.name} in {scale.shard}",
                fix="the checkpoint is damaged; download it again",
            )
        return scales.view(-1, scale.shape[1] if len(scale.shape) == 2 else 1)

    def _stored_scales(self, scale: TensorRef, scales: Tensor) -> Tensor:
        if scale.dtype == "F8_E8M0":
            stored, dtype = scales.log2() + _E8M0_BIAS, torch.uint8
            fits = bool((stored < 255).all())
        else:
            stored, dtype = scales, DTYPES[scale.dtype]
            fits = bool(torch.isfinite(stored.to(dtype)).all())
        if not fits:
            raise self._too_large(scale, f"with a scale in {scale.dtype}")
        return stored.to(dtype)

    def _too_large(self, scale: TensorRef, how: str) -> NumericalError:
        return NumericalError(
            f"a value of the edited layer {self.target.layer} is too large to be stored {how}",
            where=f"{scale.name} in {scale.shard}",
            fix="use a larger --alpha or fewer --modes",
        )

    def _values(self, ref: TensorRef, byte_ranges: Sequence[tuple[int, int]]) -> Tensor:
        """What is stored at byte ranges, end to end."""
        buffer, filled = bytearray(sum(end - begin for begin, end in byte_ranges)), 0
        for begin, end in byte_ranges:
            piece = memoryview(buffer)[filled : filled + end - begin]
            self.shards[ref.shard].read_into(piece, begin)
            filled += len(piece)
        raw = torch.frombuffer(buffer, dtype=DTYPES[ref.dtype])
        if self.device.type == "cuda":
            # From pinned memory, so that this stream's other work is not waited for.
            raw = raw.pin_memory().to(self.device, non_blocking=True)
        return _computed(raw.to(self.device))


def _computed(stored: Tensor) -> Tensor:
    """Stored numbers in the compute dtype."""
    # By way of float32, torch takes a third of the time for float16.
    exact = stored.to(torch.float32) if stored.dtype is torch.float16 else stored
    return exact.to(COMPUTE_DTYPE)


def to_bytes(W: Tensor) -> bytearray:
    """The bytes of a tensor as safetensors stores them; needs no numpy."""
    raw = bytearray(W.numel() * W.element_size())
    torch.frombuffer(raw, dtype=W.dtype).copy_(W.flatten())
    return raw
