"""``LayerWeights``: heads of one layer and their products, with norms and their gains in the keys or in both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qkpatch.checkpoint.header import TensorRef
from qkpatch.errors import NumericalError
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.head_bytes import COMPUTE_DTYPE, HeadBytes, roundoff
from qkpatch.planning.patch_file import Opened as Opened
from qkpatch.recipes.recipe import NormKind
from qkpatch.spectral.factors import Factor
from qkpatch.spectral.product import QKProduct

# Squares of products must neither overflow nor vanish; only float64 weights can be out of this range.
SMALLEST, LARGEST = 1e-75, 1e75
# A gain this far below the largest is a channel that is switched off: nothing maps back through it.
SMALLEST_GAIN = 1e-6


@dataclass(frozen=True)
class HeadWeights:
    """Some query heads: their weights as stored, and their products, in which norms' gains may be folded."""

    heads: tuple[int, ...]
    W_Q: Tensor  # (n, d_head, d_model), compute dtype
    product: QKProduct


@dataclass(frozen=True)
class LayerWeights:
    """Heads of one layer, read some at a time."""

    stored: HeadBytes

    @property
    def target(self) -> LayerTarget:
        """The layer's tensors."""
        return self.stored.target

    @cached_property
    def input_gain(self) -> Tensor | None:
        """γ of the RMSNorm before attention, (d_model,), where it is folded into the product."""
        ref = self.target.input_norm
        if ref is None:
            return None
        return self.stored.gains(ref, "the norm before attention") + float(self.target.input_norm_plus_one)

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
                current, keys = distinct, self._factor(self._keys(distinct))
                self._check(self.target.key, keys, [f"key head {kv_head}" for kv_head, _ in distinct])
            W_Q = self.stored.queries(batch)
            product = QKProduct(self._factor(W_Q), keys.take([distinct.index(o) for o in owners]))
            self._check(self.target.query, product.query, [f"query head {head}" for head in batch])
            yield HeadWeights(batch, W_Q, product)
            del W_Q, product  # before the next ones are read

    def _keys(self, owners: Sequence[tuple[int, int]]) -> Tensor:
        """W_K of key heads; under query-key norms, with all that is linear in them: ``diag(g_q ⊙ g_k) W_K``.

        With the gains on the key side, ``M = W_Qᵀ diag(g_q ⊙ g_k) W_K`` is a product like any other, and the
        edit, which acts on the query's input side, commutes with them. LayerNorm subtracts the mean of both,
        ``C = I − 11ᵀ/d_head``: ``M = W_Qᵀ C diag(g_q ⊙ g_k) C W_K``.
        """
        target, W_K = self.target, self.stored.keys([kv_head for kv_head, _ in owners])
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
        values = self.stored.gains(norm, "a query-key norm").view(-1, self.target.layout.d_head)
        is_stored_less_one = self.target.norms is not None and self.target.norms.plus_one
        return (values[heads] if self._has_gain_per_head(norm) else values) + float(is_stored_less_one)

    def folded(self, W: Tensor) -> Tensor:
        """Weights (n, d_head, d_model) as they are in the product: ``W diag(γ)`` where a gain is folded into it."""
        return W if self.input_gain is None else W * self.input_gain

    def _factor(self, W: Tensor) -> Factor:
        return Factor(self.folded(W), roundoff(self.target.query.dtype))

    def unfolded(self, batch: HeadWeights, W_Q: Tensor) -> Tensor:
        """Edited query weights of the product as they are stored, their change as of :meth:`mapped_back`."""
        if self.input_gain is None:
            return W_Q
        return batch.W_Q + self.mapped_back(W_Q - batch.product.query.W)

    def mapped_back(self, change: Tensor) -> Tensor:
        """``change diag(1/γ)`` of what is read by the product as it is of what is stored; (..., d_model).

        Raises:
            NumericalError: a γ is too small for that.
        """
        ref, gain = self.target.input_norm, self.input_gain
        if ref is None or gain is None:
            return change
        smallest, largest = float(gain.abs().min()), float(gain.abs().max())
        if smallest <= SMALLEST_GAIN * largest:
            gains = f"the smallest is {smallest:.2g} (the largest {largest:.2g})"
            what = f"--fold-norm divides by the gains before attention, and {gains}"
            fix = f"leave the flag out, or layer {self.target.layer}"
            raise NumericalError(what, where=f"{ref.name} in {ref.shard}", fix=fix)
        return change / gain

    def _check(self, ref: TensorRef, factor: Factor, names: Sequence[str]) -> None:
        """Refuse weights, all gains in them, that hold what is no number or cannot be squared."""
        for i, norm in enumerate(torch.linalg.matrix_norm(factor.R).tolist()):
            if SMALLEST < norm < LARGEST:
                continue
            size = float(factor.W[i].abs().max())
            if not math.isfinite(size):
                raise self.stored.damaged(ref, names[i])
            if size and not SMALLEST < size < LARGEST:
                raise NumericalError(
                    f"{names[i]} of layer {self.target.layer} has values around {size:.0e}, "
                    f"beyond what {COMPUTE_DTYPE} can square",
                    where=f"{ref.name} in {ref.shard}",
                    fix="are these weights what they should be?",
                )


@contextmanager
def open_layer(
    opened: Opened, target: LayerTarget, device: torch.device, heads: tuple[int, ...]
) -> Iterator[LayerWeights]:
    """Open the shards of a layer's weights, of which ``heads`` will be read."""
    with ExitStack() as stack:
        shards = {
            shard: stack.enter_context(opened(shard, ranges))
            for shard, ranges in target.read_ranges(heads).items()
        }
        yield LayerWeights(HeadBytes(target, device, shards))
