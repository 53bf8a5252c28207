"""``HeadLayout``: which rows of the stored weights belong to which head, and which key head a query head uses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qkpatch.checkpoint.header import TensorRef


class RowLayout(str, Enum):
    """How a checkpoint stores the rows of queries and keys. H query heads, K key heads, g = H / K per group."""

    separate = "separate"  # q: H blocks; k: K blocks
    gated = "gated"  # q: [q, gate] per head, 2H blocks; k: K blocks
    qkv = "qkv"  # one tensor: H query, K key, K value blocks
    grouped_qkv = "grouped_qkv"  # one tensor: K times [g queries, key, value]
    per_head_qkv = "per_head_qkv"  # the same where g = 1: H times [query, key, value]

    @property
    def is_fused(self) -> bool:
        """Whether queries and keys are rows of one tensor."""
        return self not in (RowLayout.separate, RowLayout.gated)


@dataclass(frozen=True)
class HeadLayout:
    """The heads of one layer's query and key weights, stored (out, in) in blocks of ``d_head`` rows."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    rows: RowLayout = RowLayout.separate

    def kv_head(self, head: int) -> int:
        """Key head of a query head: ``h // (n_heads / n_kv_heads)``, as ``repeat_kv`` in transformers."""
        return head // (self.n_heads // self.n_kv_heads)

    def query_block(self, head: int) -> int:
        """The block of ``d_head`` rows that is query head ``head``."""
        before = {RowLayout.gated: head, RowLayout.separate: 0, RowLayout.qkv: 0}
        return head + before.get(self.rows, 2 * self.kv_head(head))

    def query_range(self, ref: TensorRef, head: int) -> tuple[int, int]:
        """Half-open byte range, in its shard, of query head ``head``."""
        return self._range(ref, self.query_block(head))

    def key_range(self, ref: TensorRef, kv_head: int) -> tuple[int, int]:
        """Half-open byte range, in its shard, of key head ``kv_head``."""
        if self.rows is RowLayout.qkv:
            return self._range(ref, self.n_heads + kv_head)
        group = self.n_heads // self.n_kv_heads
        return self._range(ref, kv_head * (group + 2) + group if self.rows.is_fused else kv_head)

    def _range(self, ref: TensorRef, block: int) -> tuple[int, int]:
        size = ref.nbytes // ref.shape[0] * self.d_head
        return ref.begin + block * size, ref.begin + (block + 1) * size

    @property
    def query_shape(self) -> tuple[int, int]:
        """Stored shape of the tensor that holds the queries, (out, in)."""
        also = {RowLayout.separate: 0, RowLayout.gated: self.n_heads}
        return (self.n_heads + also.get(self.rows, 2 * self.n_kv_heads)) * self.d_head, self.d_model

    @property
    def key_shape(self) -> tuple[int, int]:
        """Stored shape of the tensor that holds the keys, (out, in)."""
        return self.query_shape if self.rows.is_fused else (self.n_kv_heads * self.d_head, self.d_model)
