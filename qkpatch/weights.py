"""From byte ranges to tensors and back: the one place where files and maths meet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qkpatch.checkpoint.files import open_read, read_exact
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.source import Checkpoint
from qkpatch.errors import NumericalError, UsageError
from qkpatch.heads import HeadLayout
from qkpatch.settings import check_device_name
from qkpatch.spectral.product import Factor, QKProduct
from qkpatch.targets import LayerTarget

COMPUTE_DTYPE = torch.float64

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, for the same bits whatever the machine, and for speed.

    One head's factorisations are too small to share: with two threads on a busy machine a QR of 4096 × 128
    takes 117 ms, with one 15 ms.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class LayerWeights:
    """Reads heads of one layer, a head at a time, with ``pread``; memory does not grow with the tensor."""

    target: LayerTarget
    layout: HeadLayout
    device: torch.device
    query_fd: int
    key_fd: int

    def query(self, head: int) -> Tensor:
        """W_Q of a query head, (d_head, d_model), compute dtype."""
        return self._rows(self.query_fd, self.target.query, head, "query head")

    def key(self, kv_head: int) -> Factor:
        """W_K of a key head, factored."""
        return Factor.of(self._rows(self.key_fd, self.target.key, kv_head, "key head"))

    def products(self, heads: tuple[int, ...]) -> Iterator[tuple[int, QKProduct]]:
        """Each query head with its product; consecutive heads of a group share one key factor."""
        current = -1
        key: Factor | None = None
        for head in heads:
            if key is None or self.layout.kv_head(head) != current:
                current = self.layout.kv_head(head)
                key = self.key(current)
            product = QKProduct(Factor.of(self.query(head)), key)
            if not math.isfinite(product.frobenius):
                raise NumericalError(
                    f"the query-key product of head {head} of layer {self.target.layer} overflows {COMPUTE_DTYPE}",
                    where=f"{self.target.query.name} and {self.target.key.name}",
                    fix="are these weights what they should be?",
                )
            yield head, product

    def _rows(self, fd: int, ref: TensorRef, head: int, kind: str) -> Tensor:
        begin, end = self.layout.byte_range(ref, head)
        raw = read_exact(fd, end - begin, begin, ref.shard)
        W = torch.frombuffer(raw, dtype=DTYPES[ref.dtype]).view(self.layout.d_head, self.layout.d_model)
        if not torch.isfinite(W).all():
            raise NumericalError(
                f"{kind} {head} of layer {self.target.layer} holds NaN or Inf",
                where=f"{ref.name} in {ref.shard}",
                fix="the checkpoint is damaged; download it again",
            )
        return W.to(device=self.device, dtype=COMPUTE_DTYPE)


@contextmanager
def open_layer(
    checkpoint: Checkpoint, target: LayerTarget, layout: HeadLayout, device: torch.device
) -> Iterator[LayerWeights]:
    """Open the shards of a layer's query and key for reading; they must be as the plan saw them."""
    with ExitStack() as stack:
        fds = {}
        for shard in {target.query.shard, target.key.shard}:
            file = checkpoint.files[shard]
            fds[shard] = stack.enter_context(open_read(file.path, file.id))
        yield LayerWeights(target, layout, device, fds[target.query.shard], fds[target.key.shard])


def to_bytes(W: Tensor) -> bytearray:
    """The bytes of a tensor as safetensors stores them; needs no numpy."""
    raw = bytearray(W.numel() * W.element_size())
    torch.frombuffer(raw, dtype=W.dtype).copy_(W.flatten())
    return raw
