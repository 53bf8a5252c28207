"""Where the heads lie in stored weights, in blocks of head_dim rows: separate, gated or fused in one of three ways."""

from __future__ import annotations

from enum import Enum


class RowLayout(str, Enum):
    """How a checkpoint stores the rows of queries and keys. H query heads, K key heads, g = H / K per group."""

    separate = "separate"  # q: H blocks; k: K blocks
    gated = "gated"  # q: [q, gate] per head, 2H blocks; k: K blocks
    qkv = "qkv"  # one tensor: H query, K key, K value blocks
    grouped_qkv = "grouped_qkv"  # one tensor: K times [g queries, key, value]
    per_head_qkv = "per_head_qkv"  # one tensor: H times [query, key, value]; H = K

    @property
    def is_fused(self) -> bool:
        """Whether queries and keys are rows of one tensor."""
        return self not in (RowLayout.separate, RowLayout.gated)

    def query_block(self, head: int, n_heads: int, n_kv_heads: int) -> int:
        """The block that holds query head ``head``."""
        group = n_heads // n_kv_heads
        return {
            RowLayout.separate: head,
            RowLayout.gated: 2 * head,
            RowLayout.qkv: head,
            RowLayout.grouped_qkv: head // group * (group + 2) + head % group,
            RowLayout.per_head_qkv: 3 * head,
        }[self]

    def key_block(self, kv_head: int, n_heads: int, n_kv_heads: int) -> int:
        """The block that holds key head ``kv_head``."""
        group = n_heads // n_kv_heads
        return {
            RowLayout.separate: kv_head,
            RowLayout.gated: kv_head,
            RowLayout.qkv: n_heads + kv_head,
            RowLayout.grouped_qkv: kv_head * (group + 2) + group,
            RowLayout.per_head_qkv: 3 * kv_head + 1,
        }[self]

    def query_blocks(self, n_heads: int, n_kv_heads: int) -> int:
        """Blocks of the tensor that holds the queries."""
        if self.is_fused:
            return n_heads + 2 * n_kv_heads
        return 2 * n_heads if self is RowLayout.gated else n_heads

    def key_blocks(self, n_heads: int, n_kv_heads: int) -> int:
        """Blocks of the tensor that holds the keys."""
        return self.query_blocks(n_heads, n_kv_heads) if self.is_fused else n_kv_heads
