"""Rows and numbers of heads that explain stored shapes, where config.json does not say all. Guesses, for a draft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qkpatch.checkpoint.header import TensorRef
from qkpatch.diagnosis.survey import QueryGroup, TextNumbers
from qkpatch.errors import UnsupportedError
from qkpatch.rows import RowLayout


@dataclass
class Heads:
    """Numbers of heads, as far as config.json and the shapes tell them."""

    rows: RowLayout
    defaults: dict[str, int] = field(default_factory=dict)  # what config.json lacks and the shapes give
    d_head: int | None = None
    n_heads: int | None = None
    remark: str = ""


def guess_heads(group: QueryGroup, key: str, tensors: Mapping[str, TensorRef], numbers: TextNumbers) -> Heads:
    """Rows and the counts that config.json does not hold, so that they add up to the stored shapes."""
    prefix, query = group.split
    is_fused = key == query
    if group.weight is None or len(group.weight.shape) != 2:
        rows = RowLayout.qkv if is_fused else RowLayout.separate
        return Heads(rows, remark="from the names; no weight of two dimensions is stored")
    n_rows, d_model = group.weight.shape
    layer = prefix.format(layer=group.weight_layer)
    key_ref = tensors.get(layer + key)
    key_rows = None if is_fused or key_ref is None or len(key_ref.shape) != 2 else key_ref.shape[0]
    hidden = numbers.values.get("hidden_size", d_model)
    if d_model != hidden and n_rows == hidden:
        raise UnsupportedError(
            f"stored as {list(group.weight.shape)} with hidden_size {hidden}: rows seem to be inputs",
            where=group.weight.name,
            fix="only weights stored (out, in) can be edited by qkpatch",
        )
    defaults = {} if "hidden_size" in numbers.keys else {"hidden_size": d_model}
    n_heads, d_head = numbers.values.get("num_attention_heads"), numbers.values.get("head_dim")
    if n_heads is None:
        d_head = d_head or next((d for d in (128, 64, 32, 16, 8) if n_rows % d == 0), 1)
        n_heads = max(1, n_rows // d_head // (3 if is_fused else 1))
        defaults["num_attention_heads"] = n_heads
    n_kv_heads = numbers.values.get("num_key_value_heads")
    fit = _fused(n_rows, hidden, n_heads, n_kv_heads, d_head) if is_fused else None
    if fit is None and not is_fused:
        fit = _separate(n_rows, key_rows, hidden, n_heads, n_kv_heads, d_head)
    if fit is None:
        rows = RowLayout.qkv if is_fused else RowLayout.separate
        told = f"{n_heads} heads do not add up to {n_rows} rows; config.json or the guessed names are wrong"
        return Heads(rows, defaults, d_head, n_heads, told)
    fitted_d, fitted_kv, rows = fit
    if rows is RowLayout.qkv:
        rows, remark = _fused_order(query, n_heads == fitted_kv)
    else:
        remark = f"{n_rows} rows are {'2 × ' if rows is RowLayout.gated else ''}{n_heads} heads × {fitted_d}"
    if "head_dim" not in numbers.keys and fitted_d != (hidden // n_heads if hidden % n_heads == 0 else 0):
        defaults["head_dim"] = fitted_d
    if "num_key_value_heads" not in numbers.keys and fitted_kv != n_heads:
        defaults["num_key_value_heads"] = fitted_kv
    return Heads(rows, defaults, fitted_d, n_heads, remark)


def _separate(
    n_rows: int, key_rows: int | None, hidden: int, n_heads: int, n_kv_heads: int | None, d_head: int | None
) -> tuple[int, int, RowLayout] | None:
    """``(head_dim, key heads, rows)`` that explain two tensors; what config.json says holds."""
    sizes = [d_head] if d_head else [hidden // n_heads]
    if not d_head and key_rows and n_kv_heads and key_rows % n_kv_heads == 0:
        sizes.append(key_rows // n_kv_heads)
    if not d_head:
        sizes.append(n_rows // n_heads)
    for d in sizes:
        rows = {n_heads * d: RowLayout.separate, 2 * n_heads * d: RowLayout.gated}.get(n_rows)
        k = n_kv_heads or (key_rows // d if d and key_rows and key_rows % d == 0 else n_heads)
        if rows and d and n_heads % k == 0 and key_rows in (None, k * d):
            return d, k, rows
    return None


def _fused(
    n_rows: int, hidden: int, n_heads: int, n_kv_heads: int | None, d_head: int | None
) -> tuple[int, int, RowLayout] | None:
    """The same for one tensor of queries, keys and values, in whatever order."""
    sizes = [d_head] if d_head else [hidden // n_heads, n_rows // (n_heads + 2 * (n_kv_heads or n_heads))]
    for d in sizes:
        blocks = n_rows // d if d and n_rows % d == 0 else 0
        k = n_kv_heads or (blocks - n_heads) // 2
        if k > 0 and n_heads + 2 * k == blocks and n_heads % k == 0:
            return d, k, RowLayout.qkv
    return None


def _fused_order(query: str, is_plain: bool) -> tuple[RowLayout, str]:
    """The order of fused rows, which no shape tells."""
    if "wqkv" in query.lower() and not is_plain:
        return RowLayout.grouped_qkv, "as in InternLM2; the shape would allow qkv too"
    if "query_key_value" in query.lower() and is_plain:
        return RowLayout.per_head_qkv, "as in GPT-NeoX; the shape would allow qkv too"
    others = "grouped_qkv or per_head_qkv" if is_plain else "grouped_qkv"
    return RowLayout.qkv, f"the most common; the shape would allow {others} too"
