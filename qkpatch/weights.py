"""From byte ranges to tensors and back: the one place where files and maths meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qkpatch.checkpoint.files import open_read, read_exact
from qkpatch.checkpoint.header import TensorRef
from qkpatch.errors import NumericalError, UsageError
from qkpatch.heads import HeadLayout
from qkpatch.settings import check_device_name
from qkpatch.spectral.product import Factor, QKProduct
from qkpatch.targets import LayerTarget, Model

COMPUTE_DTYPE = torch.float64

# Squares of products must neither overflow nor vanish; only float64 weights can be out of this range.
SMALLEST, LARGEST = 1e-75, 1e75

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

    One head's factorisations are too small to share. QR of 4096 × 128 on two cores: 15 ms with one thread; with
    two, 10 to 14 ms when nothing else runs and 117 ms when something does.
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
    fds: Mapping[str, int]  # open shards, by name
    norm_plus_one: bool = False

    def query(self, head: int) -> Tensor:
        """W_Q of a query head, (d_head, d_model), compute dtype."""
        ref = self.target.query
        return self._matrix(ref, self.layout.query_range(ref, head), f"query head {head}")

    def key(self, kv_head: int) -> Factor:
        """W_K of a key head, factored; under a query-key norm, ``diag(g_q ⊙ g_k) W_K``.

        With the gains on the key side, ``M = W_Qᵀ diag(g_q ⊙ g_k) W_K`` is a product like any other, and the
        edit, which acts on the query's input side, commutes with them.
        """
        ref = self.target.key
        W_K = self._matrix(ref, self.layout.key_range(ref, kv_head), f"key head {kv_head}")
        for norm in (self.target.query_norm, self.target.key_norm):
            if norm is not None:
                gain = self._read(norm, (norm.begin, norm.end), "a query-key norm")
                W_K = W_K * (gain + float(self.norm_plus_one))[:, None]
        return Factor.of(W_K)

    def products(self, heads: tuple[int, ...]) -> Iterator[tuple[int, QKProduct]]:
        """Each query head with its product; consecutive heads of a group share one key factor."""
        current = -1
        key: Factor | None = None
        for head in heads:
            if key is None or self.layout.kv_head(head) != current:
                current = self.layout.kv_head(head)
                key = self.key(current)
            product = QKProduct(Factor.of(self.query(head)), key)
            self._check_magnitude(product, head)
            yield head, product

    def _check_magnitude(self, product: QKProduct, head: int) -> None:
        for ref, W in ((self.target.query, product.query.W), (self.target.key, product.key.W)):
            largest = float(W.abs().max())
            if largest and not SMALLEST < largest < LARGEST:
                raise NumericalError(
                    f"head {head} of layer {self.target.layer} has values around {largest:.0e}, "
                    f"beyond what {COMPUTE_DTYPE} can square",
                    where=f"{ref.name} in {ref.shard}",
                    fix="are these weights what they should be?",
                )

    def _matrix(self, ref: TensorRef, byte_range: tuple[int, int], what: str) -> Tensor:
        return self._read(ref, byte_range, what).view(self.layout.d_head, self.layout.d_model)

    def _read(self, ref: TensorRef, byte_range: tuple[int, int], what: str) -> Tensor:
        begin, end = byte_range
        values = torch.frombuffer(
            read_exact(self.fds[ref.shard], end - begin, begin, ref.shard), dtype=DTYPES[ref.dtype]
        )
        if not torch.isfinite(values).all():
            raise NumericalError(
                f"{what} of layer {self.target.layer} holds NaN or Inf",
                where=f"{ref.name} in {ref.shard}",
                fix="the checkpoint is damaged; download it again",
            )
        return values.to(device=self.device, dtype=COMPUTE_DTYPE)


@contextmanager
def open_layer(model: Model, target: LayerTarget, device: torch.device) -> Iterator[LayerWeights]:
    """Open the shards of a layer's weights for reading; they must be as the plan saw them."""
    refs = (target.query, target.key, target.query_norm, target.key_norm)
    norms = model.recipe.tensors.norms
    with ExitStack() as stack:
        fds = {}
        for shard in dict.fromkeys(ref.shard for ref in refs if ref is not None):
            file = model.checkpoint.files[shard]
            fds[shard] = stack.enter_context(open_read(file.path, file.id))
        yield LayerWeights(target, model.tower.layout, device, fds, norms is not None and norms.plus_one)


def to_bytes(W: Tensor) -> bytearray:
    """The bytes of a tensor as safetensors stores them; needs no numpy."""
    raw = bytearray(W.numel() * W.element_size())
    torch.frombuffer(raw, dtype=W.dtype).copy_(W.flatten())
    return raw
