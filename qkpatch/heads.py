"""``HeadLayout``: which rows of the stored weights belong to which head, and which key head a query head uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.errors import CheckpointError, UnsupportedError
from qkpatch.recipe import CLASS_DEFAULT_KEYS, TOP_LEVEL, Recipe
from qkpatch.rows import RowLayout

# Far above any real model; a config.json beyond it is broken or hostile.
MAX_COUNT = 1 << 20


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


@dataclass(frozen=True)
class LanguageTower:
    """The language model's numbers, from config.json and the recipe's class defaults."""

    text_model_type: str
    n_layers: int
    layout: HeadLayout


def read_tower(recipe: Recipe, config: Mapping[str, Any], *, insist: bool = False) -> LanguageTower:
    """Translate config.json into a :class:`LanguageTower`, the only place where its keys are read.

    A key that is absent takes the transformers class default; an explicit null means "derive it", as it does
    there: ``num_key_value_heads = num_attention_heads``, ``head_dim = hidden_size / num_attention_heads``.
    With ``insist`` (the user named the recipe) a text model type that the recipe does not list is taken too,
    without class defaults.

    Raises:
        UnsupportedError: a text model type the recipe does not know.
        CheckpointError: numbers that are missing, not positive integers, or do not divide.
    """
    section_name, section = _text_section(recipe, config)
    text_type = str(section.get("model_type") or next(iter(recipe.class_defaults)))
    if text_type not in recipe.class_defaults and not insist:
        raise UnsupportedError(
            f"recipe {recipe.name} knows the language models {', '.join(recipe.class_defaults)}, not {text_type!r}",
            where=f"config.json: {section_name}model_type",
            fix=f"if its layout is the same, say so: --recipe {recipe.name}",
        )
    merged = {
        **recipe.class_defaults.get(text_type, {}),
        **{k: section[k] for k in CLASS_DEFAULT_KEYS if k in section},
    }

    def count(key: str, derived: int | None = None) -> int:
        value = merged.get(key)
        if value is None:
            value = derived
        if type(value) is not int or not 1 <= value <= MAX_COUNT:
            raise CheckpointError(
                f"expected a positive integer, got {value!r}", where=f"config.json: {section_name}{key}"
            )
        return value

    n_heads = count("num_attention_heads")
    n_kv_heads = count("num_key_value_heads", n_heads)
    d_model = count("hidden_size")
    if n_heads % n_kv_heads:
        raise CheckpointError(
            f"{n_heads} query heads cannot share {n_kv_heads} key heads evenly",
            where=f"config.json: {section_name}num_key_value_heads",
        )
    if merged.get("head_dim") is None and d_model % n_heads:
        raise CheckpointError(
            f"no head_dim, and hidden_size {d_model} is not a multiple of {n_heads} heads",
            where=f"config.json: {section_name}head_dim",
        )
    rows = recipe.tensors.rows
    if rows is RowLayout.per_head_qkv and n_heads != n_kv_heads:
        raise CheckpointError(
            f"per-head [q, k, v] rows need as many key heads as query heads, not {n_kv_heads} for {n_heads}",
            where=f"config.json: {section_name}num_key_value_heads",
        )
    layout = HeadLayout(n_heads, n_kv_heads, count("head_dim", d_model // n_heads), d_model, rows)
    return LanguageTower(text_type, count("num_hidden_layers"), layout)


def _text_section(recipe: Recipe, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    for name in recipe.config_sections:
        if name == TOP_LEVEL:
            return "", config
        if isinstance(config.get(name), dict):
            return f"{name}.", config[name]
    raise CheckpointError(
        f"no section {' or '.join(recipe.config_sections)}, where recipe {recipe.name} expects the language model",
        where="config.json",
    )
