"""From byte ranges to tensors and back: the one place where files and maths meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qkpatch.checkpoint.files import Readable, read_exact
from qkpatch.checkpoint.header import TensorRef
from qkpatch.errors import NumericalError, UsageError
from qkpatch.fp8 import BLOCK, scale_range
from qkpatch.model import Model
from qkpatch.recipe import NormKind
from qkpatch.settings import check_device_name
from qkpatch.spectral.fp8 import dequantise, requantise
from qkpatch.spectral.product import Factor, QKProduct, is_finite, largest
from qkpatch.spectral.rounding import round_once
from qkpatch.targets import LayerTarget

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
}
_E8M0_BIAS = 127  # a scale stored as an exponent: 2^(byte − 127)


def choose_device(name: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:i``.

    Raises:
        UsageError: an unknown name, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device_name(name)
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"{name} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s)",
            where="--device",
            fix="use --device cpu",
        )
    return device


def use_one_blas_thread() -> None:
    """For each thread that computes; the setting is a thread's own.

    One head's factorisations are too small to share: QR of 4096 × 128 on two cores takes 15 ms with one BLAS thread;
    with two, 10 to 14 ms when nothing else runs and 117 ms when something does. One thread each also gives the same
    bits whatever the machine.
    """
    torch.set_num_threads(1)


@dataclass(frozen=True)
class HeadWeights:
    """One query head: its weight as stored, and its product, in which norms' gains may be folded."""

    head: int
    W_Q: Tensor  # (d_head, d_model), compute dtype
    product: QKProduct


@dataclass(frozen=True)
class StoredHead:
    """An edited head, rounded, and the bytes that hold it."""

    values: Tensor  # what a loader reads, (d_head, d_model), compute dtype
    pieces: tuple[tuple[TensorRef, bytearray], ...]  # per written tensor, the bytes of the head

    def bytes_of(self, ref: TensorRef) -> bytearray:
        """What the head's range of a written tensor is to hold."""
        return dict(self.pieces)[ref]


@dataclass(frozen=True)
class LayerWeights:
    """Reads heads of one layer, a head at a time, with ``pread``; memory does not grow with the tensor."""

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

    def invertible_gain(self) -> Tensor | None:
        """:attr:`input_gain`, through whose inverse an edit can be mapped back.

        Raises:
            NumericalError: a γ is too small.
        """
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

    def heads(self, heads: tuple[int, ...]) -> Iterator[HeadWeights]:
        """Each query head with its product; consecutive heads of a group share one key factor where they can."""
        layout = self.target.layout
        current: tuple[int, int] | None = None
        for head in heads:
            kv_head = layout.kv_head(head)
            # Query gains of a head's own make the weighted keys that head's own, too.
            owner = (kv_head, head if self._has_gain_per_head(self.target.query_norm) else -1)
            if owner != current:
                current, key = owner, Factor(self._folded(self._key(kv_head, head)))
                self._check(self.target.key, key.W, f"key head {kv_head}")
            W_Q = self._query(head)
            product = QKProduct(Factor(self._folded(W_Q)), key)
            self._check(self.target.query, product.query.W, f"query head {head}")
            yield HeadWeights(head, W_Q, product)
            del W_Q, product  # before the next ones are read

    def _key(self, kv_head: int, head: int) -> Tensor:
        """W_K of a key head; under query-key norms, with all that is linear in them: ``diag(g_q ⊙ g_k) W_K``.

        With the gains on the key side, ``M = W_Qᵀ diag(g_q ⊙ g_k) W_K`` is a product like any other, and the
        edit, which acts on the query's input side, commutes with them. LayerNorm subtracts the mean of both,
        ``C = I − 11ᵀ/d_head``: ``M = W_Qᵀ C diag(g_q ⊙ g_k) C W_K``.
        """
        target, layout = self.target, self.target.layout
        at = layout.key_range(target.key, kv_head)
        W_K = self._matrix(target.key, target.key_scale, at)
        if target.norms is None or target.query_norm is None or target.key_norm is None:
            return W_K
        gain = self._gain(target.query_norm, head) * self._gain(target.key_norm, kv_head)
        if target.norms.kind is NormKind.rms:
            return gain[:, None] * W_K
        W_K = gain[:, None] * (W_K - W_K.mean(0))
        return W_K - W_K.mean(0)

    def _has_gain_per_head(self, norm: TensorRef | None) -> bool:
        return norm is not None and norm.shape != (self.target.layout.d_head,)

    def _gain(self, norm: TensorRef, head: int) -> Tensor:
        values = self._read(norm, (norm.begin, norm.end), "a query-key norm")
        if self._has_gain_per_head(norm):
            values = values.view(-1, self.target.layout.d_head)[head]
        is_stored_less_one = self.target.norms is not None and self.target.norms.plus_one
        return values + float(is_stored_less_one)

    def _folded(self, W: Tensor) -> Tensor:
        return W if self.input_gain is None else W * self.input_gain

    def _check(self, ref: TensorRef, W: Tensor, what: str) -> None:
        """Refuse a weight, all gains in it, that holds what is no number or cannot be squared."""
        if SMALLEST < float(torch.linalg.vector_norm(W)) < LARGEST:
            return
        size = largest(W)
        if not math.isfinite(size):
            raise self._damaged(ref, what)
        if size and not SMALLEST < size < LARGEST:
            raise NumericalError(
                f"{what} of layer {self.target.layer} has values around {size:.0e}, "
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

    def store(self, head: int, W: Tensor) -> StoredHead:
        """``W`` (d_head, d_model) rounded once to what the head's rows are stored as.

        Raises:
            NumericalError: a scale of block FP8 overflows.
        """
        (ref, begin, end), *_ = self.target.written_ranges(head)
        scale = self.target.query_scale
        if scale is None:
            rounded = round_once(W, DTYPES[ref.dtype])
            return StoredHead(rounded.to(COMPUTE_DTYPE), ((ref, to_bytes(rounded)),))
        codes, scales = requantise(W, self._scales(ref, scale, (begin, end)), BLOCK)
        pieces = ((ref, to_bytes(codes)), (scale, self._scale_bytes(scale, scales)))
        return StoredHead(dequantise(codes, scales, BLOCK), pieces)

    def raw(self, ref: TensorRef, begin: int, end: int) -> bytearray:
        """Bytes of a tensor as they are stored."""
        return read_exact(self.fds[ref.shard], end - begin, begin, ref.shard)

    def _query(self, head: int) -> Tensor:
        ref = self.target.query
        at = self.target.layout.query_range(ref, head)
        return self._matrix(ref, self.target.query_scale, at)

    def _matrix(self, ref: TensorRef, scale: TensorRef | None, at: tuple[int, int]) -> Tensor:
        layout = self.target.layout
        values = self._values(ref, at).view(layout.d_head, layout.d_model)
        return values if scale is None else dequantise(values, self._scales(ref, scale, at), BLOCK)

    def _scales(self, ref: TensorRef, scale: TensorRef, at: tuple[int, int]) -> Tensor:
        """The scales of whole blocks of rows, (blocks of rows, blocks of columns)."""
        place = scale_range(ref, scale, *at)
        if scale.dtype == "F8_E8M0":
            raw = self.raw(scale, *place)
            exponents = torch.frombuffer(raw, dtype=torch.uint8).to(self.device, COMPUTE_DTYPE)
            scales = torch.where(exponents < 255, (exponents - _E8M0_BIAS).exp2(), torch.nan)
        else:
            scales = self._read(scale, place, "a scale")
        if not bool((scales > 0).all()):
            raise NumericalError(
                f"a scale of layer {self.target.layer} is not a positive number",
                where=f"{scale.name} in {scale.shard}",
                fix="the checkpoint is damaged; download it again",
            )
        return scales.view(-1, scale.shape[1])

    def _scale_bytes(self, scale: TensorRef, scales: Tensor) -> bytearray:
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
        return to_bytes(stored.to(dtype))

    def _read(self, ref: TensorRef, byte_range: tuple[int, int], what: str) -> Tensor:
        values = self._values(ref, byte_range)
        if not is_finite(values):
            raise self._damaged(ref, what)
        return values

    def _values(self, ref: TensorRef, byte_range: tuple[int, int]) -> Tensor:
        raw = torch.frombuffer(self.raw(ref, *byte_range), dtype=DTYPES[ref.dtype])
        return raw.to(device=self.device, dtype=COMPUTE_DTYPE)


@contextmanager
def open_layer(
    model: Model, target: LayerTarget, device: torch.device, heads: tuple[int, ...]
) -> Iterator[LayerWeights]:
    """Open the shards of a layer's weights for reading ``heads``; they must be as the plan saw them."""
    with ExitStack() as stack:
        files = model.checkpoint.files
        fds = {
            shard: stack.enter_context(files[shard].open(ranges))
            for shard, ranges in target.read_ranges(heads).items()
        }
        yield LayerWeights(target, device, fds)


def to_bytes(W: Tensor) -> bytearray:
    """The bytes of a tensor as safetensors stores them; needs no numpy."""
    raw = bytearray(W.numel() * W.element_size())
    torch.frombuffer(raw, dtype=W.dtype).copy_(W.flatten())
    return raw
