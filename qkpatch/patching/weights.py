"""From byte ranges to tensors and back: the one place where files and maths meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qkpatch.checkpoint.files import Readable, read_exact, read_into
from qkpatch.checkpoint.header import TensorRef
from qkpatch.errors import NumericalError
from qkpatch.model.block_fp8 import BLOCK, scale_range
from qkpatch.model.targets import LayerTarget
from qkpatch.recipes.recipe import NormKind
from qkpatch.spectral.fp8 import dequantise, requantise
from qkpatch.spectral.product import Factor, QKProduct, is_finite, largest
from qkpatch.spectral.rounding import round_once

COMPUTE_DTYPE = torch.float64

# Squares of products must neither overflow nor vanish; only float64 weights can be out of this range.
SMALLEST, LARGEST = 1e-75, 1e75
# A gain this far below the largest is a channel that is switched off: nothing maps back through it.
SMALLEST_GAIN = 1e-6

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,  # an exponent
}
_E8M0_BIAS = 127  # a scale stored as an exponent: 2^(byte − 127)


@dataclass(frozen=True)
class HeadWeights:
    """Some query heads: their weights as stored, and their products, in which norms' gains may be folded."""

    heads: tuple[int, ...]
    W_Q: Tensor  # (n, d_head, d_model), compute dtype
    product: QKProduct


@dataclass(frozen=True)
class StoredHeads:
    """Edited heads, rounded, and the bytes that hold them."""

    values: Tensor  # what a loader reads, (n, d_head, d_model), compute dtype
    pieces: tuple[
        Mapping[TensorRef, bytearray], ...
    ]  # of each head, what its range of a written tensor is to hold


@dataclass(frozen=True)
class LayerWeights:
    """Reads heads of one layer, some at a time, with ``pread``; memory does not grow with the tensor."""

    target: LayerTarget
    device: torch.device
    fds: Mapping[str, Readable]  # open shards, by name

    @cached_property
    def input_gain(self) -> Tensor | None:
        """γ of the RMSNorm before attention, (d_model,), where it is folded into the product."""
        ref = self.target.input_norm
        if ref is None:
            return None
        gain = self._read(ref, (ref.begin, ref.end), "the norm before attention")
        return gain + float(self.target.input_norm_plus_one)

    @cached_property
    def _invertible_gain(self) -> Tensor | None:
        """:attr:`input_gain`, with no element near zero."""
        ref, gain = self.target.input_norm, self.input_gain
        if ref is None or gain is None:
            return None
        smallest, largest = float(gain.abs().min()), float(gain.abs().max())
        if smallest <= SMALLEST_GAIN * largest:
            raise NumericalError(
                f"--fold-norm divides by the gains before attention, and the smallest is {smallest:.2g} "
                f"(the largest {largest:.2g})",
                where=f"{ref.name} in {ref.shard}",
                fix=f"leave the flag out, or layer {self.target.layer}",
            )
        return gain

    def batches(self, heads: tuple[int, ...], size: int) -> Iterator[HeadWeights]:
        """Query heads with their products, ``size`` at a time; heads of a group share one key factor where they can."""
        layout = self.target.layout
        current: tuple[tuple[int, int], ...] = ()
        for first in range(0, len(heads), size):
            batch = heads[first : first + size]
            # Query gains of a head's own make the weighted keys that head's own, too.
            is_own = self._has_gain_per_head(self.target.query_norm)
            owners = [(layout.kv_head(head), head if is_own else -1) for head in batch]
            distinct = tuple(dict.fromkeys(owners))
            if distinct != current:
                current, keys = distinct, Factor(self.folded(self._keys(distinct)))
                self._check(self.target.key, keys.W, [f"key head {kv_head}" for kv_head, _ in distinct])
            W_Q = self._queries(batch)
            product = QKProduct(Factor(self.folded(W_Q)), keys.take([distinct.index(o) for o in owners]))
            self._check(self.target.query, product.query.W, [f"query head {head}" for head in batch])
            yield HeadWeights(batch, W_Q, product)
            del W_Q, product  # before the next ones are read

    def _keys(self, owners: Sequence[tuple[int, int]]) -> Tensor:
        """W_K of key heads; under query-key norms, with all that is linear in them: ``diag(g_q ⊙ g_k) W_K``.

        With the gains on the key side, ``M = W_Qᵀ diag(g_q ⊙ g_k) W_K`` is a product like any other, and the
        edit, which acts on the query's input side, commutes with them. LayerNorm subtracts the mean of both,
        ``C = I − 11ᵀ/d_head``: ``M = W_Qᵀ C diag(g_q ⊙ g_k) C W_K``.
        """
        target, layout = self.target, self.target.layout
        at = [layout.key_range(target.key, kv_head) for kv_head, _ in owners]
        W_K = self._matrices(target.key, target.key_scale, at)
        if target.norms is None or target.query_norm is None or target.key_norm is None:
            return W_K
        gain = self._gains(target.query_norm, [head for _, head in owners])
        gain = (gain * self._gains(target.key_norm, [kv_head for kv_head, _ in owners]))[..., None]
        if target.norms.kind is NormKind.rms:
            return gain * W_K
        W_K = gain * (W_K - W_K.mean(-2, keepdim=True))
        return W_K - W_K.mean(-2, keepdim=True)

    def _has_gain_per_head(self, norm: TensorRef | None) -> bool:
        return norm is not None and norm.shape != (self.target.layout.d_head,)

    def _gains(self, norm: TensorRef, heads: Sequence[int]) -> Tensor:
        """Gains of each head, or one for all of them; (n or 1, d_head)."""
        values = self._read(norm, (norm.begin, norm.end), "a query-key norm").view(
            -1, self.target.layout.d_head
        )
        is_stored_less_one = self.target.norms is not None and self.target.norms.plus_one
        return (values[heads] if self._has_gain_per_head(norm) else values) + float(is_stored_less_one)

    def folded(self, W: Tensor) -> Tensor:
        """Weights (n, d_head, d_model) as they are in the product: ``W diag(γ)`` where a gain is folded into it."""
        return W if self.input_gain is None else W * self.input_gain

    def unfolded(self, batch: HeadWeights, W_Q: Tensor) -> Tensor:
        """Edited query weights of the product as they are stored: the change is mapped back by ``diag(1/γ)``.

        Raises:
            NumericalError: a γ is too small for that.
        """
        gain = self._invertible_gain
        return W_Q if gain is None else batch.W_Q + (W_Q - batch.product.query.W) / gain

    def _check(self, ref: TensorRef, W: Tensor, names: Sequence[str]) -> None:
        """Refuse weights, all gains in them, that hold what is no number or cannot be squared."""
        for i, norm in enumerate(torch.linalg.matrix_norm(W).tolist()):
            if SMALLEST < norm < LARGEST:
                continue
            size = largest(W[i])
            if not math.isfinite(size):
                raise self._damaged(ref, names[i])
            if size and not SMALLEST < size < LARGEST:
                raise NumericalError(
                    f"{names[i]} of layer {self.target.layer} has values around {size:.0e}, "
                    f"beyond what {COMPUTE_DTYPE} can square",
                    where=f"{ref.name} in {ref.shard}",
                    fix="are these weights what they should be?",
                )

    def _damaged(self, ref: TensorRef, what: str) -> NumericalError:
        return NumericalError(
            f"{what} of layer {self.target.layer} holds NaN or Inf",
            where=f"{ref.name} in {ref.shard}",
            fix="the checkpoint is damaged; download it again",
        )

    def store(self, heads: Sequence[int], W: Tensor) -> StoredHeads:
        """``W`` (n, d_head, d_model) rounded once to what the heads' rows are stored as.

        Raises:
            NumericalError: a scale of block FP8 overflows.
        """
        query, scale = self.target.query, self.target.query_scale
        if scale is None:
            rounded = round_once(W, DTYPES[query.dtype])
            codes = rounded.cpu()
            return StoredHeads(
                rounded.to(COMPUTE_DTYPE), tuple({query: to_bytes(of_head)} for of_head in codes)
            )
        at = [self.target.layout.query_range(query, head) for head in heads]
        rows, scales = requantise(W.flatten(0, 1), self._scales(query, scale, at), BLOCK)
        codes, by_head = rows.cpu().view(W.shape), self._stored_scales(scale, scales.cpu()).view(len(W), -1)
        pieces = ({query: to_bytes(c), scale: to_bytes(s)} for c, s in zip(codes, by_head, strict=True))
        return StoredHeads(dequantise(rows, scales, BLOCK).view(W.shape), tuple(pieces))

    def raw(self, ref: TensorRef, begin: int, end: int) -> bytearray:
        """Bytes of a tensor as they are stored."""
        return read_exact(self.fds[ref.shard], end - begin, begin, ref.shard)

    def _queries(self, heads: Sequence[int]) -> Tensor:
        ref = self.target.query
        at = [self.target.layout.query_range(ref, head) for head in heads]
        return self._matrices(ref, self.target.query_scale, at)

    def _matrices(self, ref: TensorRef, scale: TensorRef | None, at: Sequence[tuple[int, int]]) -> Tensor:
        """Heads at byte ranges, (n, d_head, d_model)."""
        layout = self.target.layout
        rows = self._values(ref, at).view(-1, layout.d_model)
        if scale is not None:
            rows = dequantise(rows, self._scales(ref, scale, at), BLOCK)
        return rows.view(-1, layout.d_head, layout.d_model)

    def _scales(self, ref: TensorRef, scale: TensorRef, at: Sequence[tuple[int, int]]) -> Tensor:
        """The scales of whole blocks of rows, (blocks of rows, blocks of columns)."""
        places = [scale_range(ref, scale, *of_head) for of_head in at]
        scales = self._values(scale, places)
        if scale.dtype == "F8_E8M0":
            scales = torch.where(scales < 255, (scales - _E8M0_BIAS).exp2(), torch.nan)
        if not bool(((scales > 0) & (scales < torch.inf)).all()):
            raise NumericalError(
                f"a scale of layer {self.target.layer} is not a positive number",
                where=f"{scale.name} in {scale.shard}",
                fix="the checkpoint is damaged; download it again",
            )
        return scales.view(-1, scale.shape[1])

    def _stored_scales(self, scale: TensorRef, scales: Tensor) -> Tensor:
        if scale.dtype == "F8_E8M0":
            stored, dtype = scales.log2() + _E8M0_BIAS, torch.uint8
            fits = bool((stored < 255).all())
        else:
            stored, dtype = scales, DTYPES[scale.dtype]
            fits = bool(torch.isfinite(stored.to(dtype)).all())
        if not fits:
            raise NumericalError(
                f"a scale of the edited layer {self.target.layer} does not fit in {scale.dtype}",
                where=f"{scale.name} in {scale.shard}",
                fix="use a larger --alpha or fewer --modes",
            )
        return stored.to(dtype)

    def _read(self, ref: TensorRef, byte_range: tuple[int, int], what: str) -> Tensor:
        values = self._values(ref, [byte_range])
        if not is_finite(values):
            raise self._damaged(ref, what)
        return values

    def _values(self, ref: TensorRef, byte_ranges: Sequence[tuple[int, int]]) -> Tensor:
        """What is stored at byte ranges, end to end."""
        buffer, filled = bytearray(sum(end - begin for begin, end in byte_ranges)), 0
        for begin, end in byte_ranges:
            piece = memoryview(buffer)[filled : filled + end - begin]
            read_into(self.fds[ref.shard], piece, begin, ref.shard)
            filled += len(piece)
        raw = torch.frombuffer(buffer, dtype=DTYPES[ref.dtype])
        if (
            self.device.type == "cuda"
        ):  # from pinned memory, so that this stream's other work is not waited for
            raw = raw.pin_memory().to(self.device, non_blocking=True)
        return raw.to(device=self.device, dtype=COMPUTE_DTYPE)


Opened = Callable[[str, Sequence[tuple[int, int]]], AbstractContextManager[Readable]]


@contextmanager
def open_layer(
    opened: Opened, target: LayerTarget, device: torch.device, heads: tuple[int, ...]
) -> Iterator[LayerWeights]:
    """Open the shards of a layer's weights for reading ``heads``; ``opened`` opens one for reading some ranges."""
    with ExitStack() as stack:
        fds = {
            shard: stack.enter_context(opened(shard, ranges))
            for shard, ranges in target.read_ranges(heads).items()
        }
        yield LayerWeights(target, device, fds)


def to_bytes(W: Tensor) -> bytearray:
    """The bytes of a tensor as safetensors stores them; needs no numpy."""
    raw = bytearray(W.numel() * W.element_size())
    torch.frombuffer(raw, dtype=W.dtype).copy_(W.flatten())
    return raw
