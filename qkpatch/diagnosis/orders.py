"""The order of fused rows, which no shape tells: from names and config.json, as the models' code reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkpatch.errors import UnsupportedError
from qkpatch.recipes.rows import RowLayout

# Model types whose code, read in transformers, views `query_key_value` as (heads, 3, head_dim).
_PER_HEAD = ("gpt_neox", "bloom", "falcon", "persimmon", "fuyu")


@dataclass(frozen=True)
class Order:
    """An order of fused rows and what it rests on."""

    rows: RowLayout
    remark: str
    is_certain: bool = False  # by a model type or key that one known code goes with


def fused_order(
    query: str, types: tuple[str, ...], section: Mapping[str, Any], n_heads: int, n_kv: int
) -> Order:
    """The order that fused rows most probably have.

    Raises:
        UnsupportedError: an order that no recipe can declare.
    """
    if any("codegen" in text for text in types):
        raise UnsupportedError(
            "rows lie in four parts, each [queries, values, keys] (CodeGen), an order that no recipe can declare",
            where=query,
            fix="this family cannot be edited by qkpatch",
        )
    order = _order(query, types, section, n_heads, n_kv)
    if order.is_certain:
        return order
    fit = [RowLayout.qkv, RowLayout.grouped_qkv, *([RowLayout.per_head_qkv] if n_heads == n_kv else [])]
    if n_kv == n_heads:
        fit.remove(RowLayout.grouped_qkv)  # the same as per_head_qkv
    others = " or ".join(rows.value for rows in fit if rows is not order.rows)
    none = "; CodeGen's order fits none of them" if "qkv_proj" in query.lower() and n_kv == n_heads else ""
    return Order(order.rows, f"{order.remark}; the shape would allow {others} too{none}")


def _order(query: str, types: tuple[str, ...], section: Mapping[str, Any], n_heads: int, n_kv: int) -> Order:
    name, is_plain = query.lower(), n_heads == n_kv
    if n_kv == 1 and not is_plain:
        return Order(RowLayout.qkv, "one key head: qkv and grouped_qkv are the same", is_certain=True)
    if "query_key_value" in name and "expert" in name:
        return Order(RowLayout.qkv, "as in CogVLM")
    if "query_key_value" in name:
        return _query_key_value(types, section, is_plain=is_plain)
    if "c_attn" in name and is_plain and section.get("multi_query") is False:
        is_known = any("gpt_bigcode" in text for text in types)
        return Order(RowLayout.per_head_qkv, "as in GPTBigCode without multi_query", is_known)
    if "Wqkv" in query:
        is_known = any(text.startswith(("mpt", "dbrx")) for text in types)
        return Order(RowLayout.qkv, "as in MPT and DBRX", is_known)
    if "wqkv" in name and not is_plain:
        return Order(RowLayout.grouped_qkv, "as in InternLM2")
    return Order(RowLayout.qkv, "the most common")


def _query_key_value(types: tuple[str, ...], section: Mapping[str, Any], *, is_plain: bool) -> Order:
    if section.get("new_decoder_architecture") is True:
        return Order(RowLayout.grouped_qkv, "as in Falcon with new_decoder_architecture", is_certain=True)
    if is_plain:
        known = next((text for text in types if text.startswith(_PER_HEAD)), None)
        return Order(RowLayout.per_head_qkv, f"as in {known or 'GPT-NeoX'}", known is not None)
    if "multi_query_group_num" in section:
        return Order(RowLayout.qkv, "as in ChatGLM, by multi_query_group_num")
    if any(text.startswith(("bailing", "ling", "ring")) for text in types):
        return Order(RowLayout.qkv, "as in Ling")
    return Order(RowLayout.grouped_qkv, "as in Falcon; in ChatGLM and Ling it is qkv")
