"""``LanguageTower``: the language model's numbers, and the only place where config.json's keys are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qkpatch.common.json_text import measured
from qkpatch.errors import CheckpointError, UnsupportedError
from qkpatch.recipes.heads import HeadLayout, RowLayout
from qkpatch.recipes.recipe import (
    ANY,
    COUNT_KEYS,
    LOGIT_KEYS,
    TOP_LEVEL,
    ConfigValue,
    KeyOverride,
    Recipe,
    TensorNames,
)

# Far above any real model; a config.json beyond it is broken or hostile.
MAX_COUNT = 1 << 20
MAX_LOGIT = 1e30  # of what is recorded only; also keeps NaN out
_LAYER = re.compile("[0-9]{1,7}", re.ASCII)


@dataclass(frozen=True)
class LanguageTower:
    """The language model's numbers, from config.json and the recipe's class defaults."""

    text_model_type: str
    section: str  # where config.json has these numbers, as a prefix of its keys: "text_config."
    n_layers: int
    layout: HeadLayout  # of all layers but those in `exceptions`
    exceptions: Mapping[int, HeadLayout] = field(default_factory=dict)
    first_shared: int | None = None  # layers from here on use an earlier layer's keys
    fp8_block: tuple[int, ...] | None = None  # rows and columns of a scale, where config.json says
    has_input_norm: bool = True  # false where config.json puts it after attention
    logits: Mapping[str, ConfigValue] = field(default_factory=dict)  # what rescales or clips logits

    def layout_of(self, layer: int) -> HeadLayout:
        """The heads of one layer."""
        return self.exceptions.get(layer, self.layout)

    def has_product(self, layer: int) -> bool:
        """Whether the layer has a product to edit: keys of its own, and as many query heads as the model."""
        return self.has_own_keys(layer) and self.layout_of(layer).n_heads == self.layout.n_heads

    def has_own_keys(self, layer: int) -> bool:
        """Whether the layer uses keys of its own; a key weight stored in one that does not is dead."""
        return self.first_shared is None or layer < self.first_shared


def read_tower(
    recipe: Recipe, config: Mapping[str, Any], names: TensorNames | None = None, *, insist: bool = False
) -> LanguageTower:
    """Translate config.json into a :class:`LanguageTower` for one set of tensors, the recipe's first by default.

    A key that is absent takes the transformers class default; an explicit null means "derive it", as it does
    there: ``num_key_value_heads = num_attention_heads``, ``head_dim = hidden_size / num_attention_heads``.
    With ``insist`` (the user named the recipe) a text model type that the recipe does not list is taken too,
    without class defaults.

    Raises:
        UnsupportedError: a text model type the recipe does not know.
        CheckpointError: numbers that are missing, not positive integers, or do not divide.
    """
    names = names or recipe.tensors
    where, section = _text_section(recipe, config)
    known = recipe.config.class_defaults
    text_type = str(section.get("model_type") or next(iter(known)))
    if text_type not in known and ANY not in known and not insist:
        raise UnsupportedError(
            f"recipe {recipe.name} knows the language models {', '.join(known)}, not {text_type!r}",
            where=f"config.json: {where}model_type",
            fix=f"if its layout is the same, say so: --recipe {recipe.name}",
        )
    defaults = known.get(text_type, known.get(ANY, {}))
    # By the family's own name; where neither that nor a class default is there, by the name that transformers saves.
    numbers = {
        key: section.get(names.keys.get(key, key), defaults.get(key, section.get(key))) for key in COUNT_KEYS
    }
    if "num_hidden_layers" in names.keys and isinstance(kinds := numbers["num_hidden_layers"], list):
        numbers["num_hidden_layers"] = len(kinds)
    counts = _Counts(numbers, where, names)
    n_layers = counts.number("num_hidden_layers")
    logits = {
        key: measured(value)
        for key in LOGIT_KEYS
        if isinstance(value := section.get(key, defaults.get(key)), int | float) and abs(value) < MAX_LOGIT
    }
    exceptions = {
        layer: _Counts({**numbers, **changes}, where, names).layout()
        for layer, changes in _exceptions(recipe, section, where, n_layers).items()
    }
    layout = counts.layout()
    unless = names.input_norm.unless if names.input_norm is not None else None
    return LanguageTower(
        text_model_type=text_type,
        section=where,
        n_layers=n_layers,
        layout=layout,
        exceptions=exceptions,
        first_shared=_first_shared(recipe, section, where, n_layers),
        fp8_block=_fp8_block(config),
        has_input_norm=unless is None or section.get(unless) is not True,
        logits=logits,
    )


@dataclass(frozen=True)
class _Counts:
    """The five numbers of some layers, by transformers' names; None where there is none."""

    numbers: Mapping[str, Any]
    where: str
    names: TensorNames

    def place(self, key: str) -> str:
        return f"config.json: {self.where}{self.names.keys.get(key, key)}"

    def number(self, key: str, derived: int | None = None) -> int:
        value = self.numbers.get(key)
        return _positive(derived if value is None else value, self.place(key))

    def layout(self) -> HeadLayout:
        n_heads = self.number("num_attention_heads")
        n_kv_heads = self.number("num_key_value_heads", n_heads)
        d_model = self.number("hidden_size")
        key, what = "num_key_value_heads", ""
        if n_heads % n_kv_heads:
            what = f"{n_heads} query heads cannot share {n_kv_heads} key heads evenly"
        elif self.numbers.get("head_dim") is None and d_model % n_heads:
            key, what = (
                "head_dim",
                f"no head_dim, and hidden_size {d_model} is not a multiple of {n_heads} heads",
            )
        elif self.names.rows is RowLayout.per_head_qkv and n_heads != n_kv_heads:
            what = f"per-head [q, k, v] rows need as many key heads as query heads, not {n_kv_heads} for {n_heads}"
        if what:
            raise CheckpointError(what, where=self.place(key))
        d_head = self.number("head_dim", d_model // n_heads)
        return HeadLayout(n_heads, n_kv_heads, d_head, d_model, self.names.rows)


def _exceptions(
    recipe: Recipe, section: Mapping[str, Any], where: str, n_layers: int
) -> dict[int, dict[str, Any]]:
    """Layers whose counts differ from the others', by number."""
    # What transformers writes itself for such models takes the place of the family's own keys.
    per_layer = section.get("per_layer_config")
    if per_layer is not None:
        entries = per_layer.items() if isinstance(per_layer, dict) else [("", None)]
        if not all(_LAYER.fullmatch(k) and isinstance(v, dict) for k, v in entries):
            raise CheckpointError(
                "not a mapping by layer number", where=f"config.json: {where}per_layer_config"
            )
        chosen = {int(k): {key: v[key] for key in COUNT_KEYS if key in v} for k, v in per_layer.items()}
        return {layer: changes for layer, changes in chosen.items() if changes and layer < n_layers}
    found = {}
    for layer, kind in enumerate(_layer_types(recipe, section, where, n_layers)):
        if kind in recipe.config.layer_types:
            sources = recipe.config.layer_types[kind].counts
            changes = {key: _overridden(source, section) for key, source in sources.items()}
            found[layer] = {key: value for key, value in changes.items() if value is not None}
    return found


def _layer_types(recipe: Recipe, section: Mapping[str, Any], where: str, n_layers: int) -> list[str]:
    """The type of each layer, where the recipe asks for it."""
    declared = recipe.config.layer_types
    if not declared:
        return []
    types = section.get("layer_types")
    if types is None:
        every = {kind: layers.every for kind, layers in declared.items() if layers.every}
        return [
            next((kind for kind, n in every.items() if (i + 1) % n == 0 or i == n_layers - 1), "")
            for i in range(n_layers)
        ]
    if isinstance(types, list) and recipe.tensors.mtp_layers:
        types = types[:n_layers]
    if not isinstance(types, list) or len(types) != n_layers:
        size = f"{len(types)} entries" if isinstance(types, list) else repr(types)[:40]
        raise CheckpointError(f"{size} for {n_layers} layers", where=f"config.json: {where}layer_types")
    return [str(kind) for kind in types]


def _first_shared(recipe: Recipe, section: Mapping[str, Any], where: str, n_layers: int) -> int | None:
    source = recipe.config.shared_kv
    n_shared = None if source is None else _overridden(source, section)
    if source is None or n_shared is None or (type(n_shared) is int and n_shared == 0):
        return None
    place = f"config.json: {where}{source.key}"
    if (n_shared := _positive(n_shared, place)) >= n_layers:
        raise CheckpointError(f"{n_shared} of {n_layers} layers share keys", where=place)
    return n_layers - n_shared


def _fp8_block(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    return tuple(block) if isinstance(block, list) else None


def _overridden(source: KeyOverride, section: Mapping[str, Any]) -> Any:
    if source.condition is not None and section.get(source.condition) is not True:
        return None
    above, _, key = source.key.rpartition(".")
    holder = _reached(section, above) if above else section
    return holder.get(key, source.default) if isinstance(holder, Mapping) else source.default


def _reached(section: Mapping[str, Any], key: str) -> Any:
    """What is at a key of config.json in which dots descend; None where nothing is."""
    found: Any = section
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _positive(value: Any, place: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise CheckpointError(f"expected a positive integer, got {value!r}", where=place)
    return value


def _text_section(recipe: Recipe, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The first section that is there, with its name as errors spell it."""
    for name in recipe.config.sections:
        if name == TOP_LEVEL:
            return "", config
        section = _reached(config, name)
        if isinstance(section, dict):
            return f"{name}.", section
    raise CheckpointError(
        f"no section {' or '.join(recipe.config.sections)}, where recipe {recipe.name} expects the language model",
        where="config.json",
        fix="config.json belongs to another model, or --recipe does",
    )
