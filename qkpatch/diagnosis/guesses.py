"""Rows and numbers of heads that explain stored shapes, where config.json does not say all. Guesses, for a draft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.diagnosis.orders import fused_order
from qkpatch.diagnosis.signs import Beside, rotates_in_part, size
from qkpatch.diagnosis.survey import QueryGroup, TextNumbers
from qkpatch.errors import UnsupportedError
from qkpatch.recipes.rows import RowLayout

_USUAL = (128, 64, 32, 16, 8)  # numbers of rows of a head
_SHAPES = "from the shapes"


@dataclass
class Heads:
    """Numbers of heads, as far as config.json and the shapes tell them."""

    rows: RowLayout
    defaults: dict[str, tuple[int, str]] = field(default_factory=dict)  # not in config.json; and the source
    d_head: int | None = None
    n_heads: int | None = None
    remark: str = ""
    is_certain: bool = False  # of the order of the rows
    doubts: list[str] = field(default_factory=list)  # why the numbers may be others


@dataclass(frozen=True)
class Hints:
    """What is stored beside the weights, and what else config.json says."""

    beside: Beside
    gains: TensorRef | None  # of the queries' norm
    section: Mapping[str, Any]
    types: tuple[str, ...]  # model types, the text model's first


def guess_heads(
    group: QueryGroup, key: str, tensors: Mapping[str, TensorRef], numbers: TextNumbers, hints: Hints
) -> Heads:
    """Rows and the counts that config.json does not hold, so that they add up to the stored shapes.

    Raises:
        UnsupportedError: rows that no recipe can declare.
    """
    prefix, query = group.split
    is_fused = key == query
    if group.weight is None or len(group.weight.shape) != 2:
        rows = RowLayout.qkv if is_fused else RowLayout.separate
        return Heads(rows, remark="from the names; no weight of two dimensions is stored")
    n_rows, d_model = group.weight.shape
    if not n_rows or not d_model:
        raise UnsupportedError(
            "nothing is in it", where=group.weight.name, fix="is this the right checkpoint?"
        )
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
    heads = Heads(RowLayout.qkv if is_fused else RowLayout.separate)
    if "hidden_size" not in numbers.keys:
        heads.defaults["hidden_size"] = (d_model, _SHAPES)
    n_heads, d_head = numbers.values.get("num_attention_heads"), numbers.values.get("head_dim")
    if n_heads is None:
        n_heads, d_head = _invented(heads, n_rows // 3 if is_fused else n_rows, d_head, hints)
    heads.n_heads = n_heads
    n_kv_heads = numbers.values.get("num_key_value_heads")
    fit = _fused(n_rows, hidden, n_heads, n_kv_heads, d_head) if is_fused else None
    if fit is None and not is_fused:
        fit = _separate(n_rows, key_rows, hidden, n_heads, n_kv_heads, d_head)
    if fit is None:
        heads.d_head = d_head
        heads.remark = (
            f"{n_heads} heads do not add up to {n_rows} rows; config.json or the guessed names are wrong"
        )
        return heads
    heads.d_head, fitted_kv, heads.rows = fit
    if heads.rows is RowLayout.qkv:
        order = fused_order(query, hints.types, hints.section, n_heads, fitted_kv)
        heads.rows, heads.remark, heads.is_certain = order.rows, order.remark, order.is_certain
    else:
        gate = "2 × " if heads.rows is RowLayout.gated else ""
        heads.remark = f"{n_rows} rows are {gate}{n_heads} heads × {heads.d_head}"
    _complete(heads, fitted_kv, hidden, numbers, hints)
    return heads


def _complete(heads: Heads, n_kv_heads: int, hidden: int, numbers: TextNumbers, hints: Hints) -> None:
    """What the fit adds to config.json's numbers, and what speaks against it."""
    n_heads, d_head = heads.n_heads or 1, heads.d_head or 1
    odd = f"{n_heads} × {d_head} = {n_heads * d_head} is not hidden_size {hidden}"
    is_odd = n_heads * d_head != hidden
    if "head_dim" not in numbers.keys and d_head != (hidden // n_heads if hidden % n_heads == 0 else 0):
        heads.defaults["head_dim"] = (d_head, f"{_SHAPES}; {odd}" if is_odd else _SHAPES)
    if "num_key_value_heads" not in numbers.keys and n_kv_heads != n_heads:
        heads.defaults["num_key_value_heads"] = (n_kv_heads, _SHAPES)
    if is_odd and heads.defaults.keys() & {"num_attention_heads", "head_dim"}:
        heads.doubts.append(odd)
    rotary = _rotary(hints.beside)
    if rotary and rotary[0] < d_head and not rotates_in_part(hints.section):
        heads.doubts.append(
            f"{rotary[1]} rotates {rotary[0]} of head_dim {d_head}: right only where heads are rotated in part"
        )


def _invented(heads: Heads, n_rows: int, d_head: int | None, hints: Hints) -> tuple[int, int | None]:
    """Query heads and head_dim where config.json has no number of heads, from the best evidence there is."""
    rotary, gains = _rotary(hints.beside), hints.gains
    if hints.beside.sinks and size(hints.beside.sinks[0][1]) > 0:
        n_heads, told = size(hints.beside.sinks[0][1]), f"as many as {hints.beside.sinks[0][1].name} holds"
    else:
        if d_head is not None:
            told = f"{n_rows} rows / head_dim {d_head}"
        elif gains is not None and gains.shape and 0 < gains.shape[-1] < n_rows:
            d_head = gains.shape[-1]
            told = f"{n_rows} rows / {d_head}, the length of {gains.name}"
        elif rotary and n_rows % rotary[0] == 0:
            d_head = rotary[0]
            told = f"head_dim {d_head} assumed: {rotary[1]} rotates as many; it may be part of a head"
            heads.doubts.append(told)
        else:
            d_head = next((d for d in _USUAL if n_rows % d == 0), 1)
            told = f"head_dim {d_head} assumed; shapes cannot tell"
            heads.doubts.append(told)
        n_heads = max(1, n_rows // d_head)
    heads.defaults["num_attention_heads"] = (n_heads, told)
    return n_heads, d_head


def _rotary(beside: Beside) -> tuple[int, str] | None:
    """Rotated dims of a head, and the tensor that tells."""
    found = ((2 * size(ref), ref.name) for _, ref in beside.rotary)
    return next(((dims, name) for dims, name in found if dims), None)


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
