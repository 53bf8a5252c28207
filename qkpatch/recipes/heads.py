"""``HeadLayout``: which rows of the stored weights belong to which head, and which key head a query head uses."""

from __future__ import annotations

from dataclasses import dataclass

from qkpatch.checkpoint.header import TensorRef
from qkpatch.recipes.rows import RowLayout


@dataclass(frozen=True)
class HeadLayout:
    """The heads of one layer's query and key weights, stored (out, in) in blocks of ``d_head`` rows."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    rows: RowLayout = RowLayout.separate

    @property
    def group_size(self) -> int:
        """Query heads per key head."""
        return self.n_heads // self.n_kv_heads

    def kv_head(self, head: int) -> int:
        """Key head of a query head: ``h // (n_heads / n_kv_heads)``, as ``repeat_kv`` in transformers."""
        return head // self.group_size

    def query_range(self, ref: TensorRef, head: int) -> tuple[int, int]:
        """Half-open byte range, in its shard, of query head ``head``."""
        return self._range(ref, self.rows.query_block(head, self.n_heads, self.n_kv_heads))

    def key_range(self, ref: TensorRef, kv_head: int) -> tuple[int, int]:
        """Half-open byte range, in its shard, of key head ``kv_head``."""
        return self._range(ref, self.rows.key_block(kv_head, self.n_heads, self.n_kv_heads))

    def _range(self, ref: TensorRef, block: int) -> tuple[int, int]:
        size = ref.nbytes // ref.shape[0] * self.d_head
        return ref.begin + block * size, ref.begin + (block + 1) * size

    @property
    def query_shape(self) -> tuple[int, int]:
        """Stored shape of the tensor that holds the queries, (out, in)."""
        return self.rows.query_blocks(self.n_heads, self.n_kv_heads) * self.d_head, self.d_model

    @property
    def key_shape(self) -> tuple[int, int]:
        """Stored shape of the tensor that holds the keys, (out, in)."""
        return self.rows.key_blocks(self.n_heads, self.n_kv_heads) * self.d_head, self.d_model
