"""``Recipe``: what qkpatch must know about one model family, read strictly from a YAML file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from qkpatch.errors import UsageError
from qkpatch.rows import RowLayout
from qkpatch.selection import MIDDLE_THIRD, parse_ranges
from qkpatch.strict import Fields, load_yaml

TOP_LEVEL = "."  # the config section that stands for config.json itself
CLASS_DEFAULT_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class NormNames:
    """Per-head RMSNorm of queries and keys before RoPE: ``q̂ = g_q ⊙ W_Q x / rms``, likewise for keys."""

    query: str
    key: str
    plus_one: bool  # the stored weight is g − 1, as in Gemma


@dataclass(frozen=True)
class TensorNames:
    """How the family spells its query and key tensors: ``prefix.format(layer=i) + query``."""

    prefixes: tuple[str, ...]  # each holds {layer} once; a checkpoint uses exactly one of them
    query: str
    key: str
    orientation: str  # "out_in": rows are outputs, as nn.Linear stores them. Declared, never guessed
    rows: RowLayout
    norms: NormNames | None
    every_layer: bool  # whether each layer has these tensors; others are skipped and listed where not

    @property
    def query_module(self) -> str:
        """The module that holds the query weight: ``q_proj``."""
        return self.query.removesuffix(".weight")

    def pattern(self, prefix: str, suffix: str) -> re.Pattern[str]:
        """Anchored pattern of one tensor's name, so that look-alikes in a vision tower never match."""
        head, tail = prefix.split("{layer}")
        return re.compile(f"{re.escape(head)}(?P<layer>0|[1-9][0-9]{{0,5}}){re.escape(tail + suffix)}")


@dataclass(frozen=True)
class Recipe:
    """One model family: how to recognise it, where its numbers and tensors are, what to edit by default."""

    name: str
    title: str
    default_repo: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config_sections: tuple[str, ...]
    class_defaults: Mapping[str, Mapping[str, int]]  # text model_type -> config key -> value
    tensors: TensorNames
    default_layers: str
    default_modes: int
    sha256: str  # of the YAML file

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return {
            **asdict(replace(self, class_defaults={})),
            "class_defaults": {text_type: dict(values) for text_type, values in self.class_defaults.items()},
        }

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json names this family; a config without ``architectures`` goes by its model_type."""
        named = config.get("architectures")
        architectures = named if isinstance(named, list) and named else self.architectures
        return config.get("model_type") in self.model_types and any(
            a in self.architectures for a in architectures
        )


def parse_recipe(text: bytes, where: str) -> Recipe:
    """Read a recipe; every unknown key, wrong type and missing field is reported in one :class:`RecipeError`."""
    root = Fields(load_yaml(text, where), where)
    match = root.take_mapping("match", required=True)
    config = root.take_mapping("config", required=True)
    defaults = root.take_mapping("defaults", required=True)
    recipe = Recipe(
        name=root.take("name", str, default="", required=True),
        title=root.take("title", str, default="", required=True),
        default_repo=root.take("default_repo", str, default="", required=True),
        model_types=match.take_list("model_types", str, required=True),
        architectures=match.take_list("architectures", str, required=True),
        config_sections=config.take_list("sections", str, required=True),
        class_defaults=_class_defaults(config.take_mapping("class_defaults", required=True)),
        tensors=_tensor_names(root.take_mapping("tensors", required=True)),
        default_layers=_default_layers(defaults),
        default_modes=defaults.take("modes", int, default=1, required=True),
        sha256=hashlib.sha256(text).hexdigest(),
    )
    if recipe.default_modes < 1:
        defaults.fault("must be at least 1", "modes")
    root.finish()
    return recipe


def _class_defaults(fields: Fields) -> Mapping[str, Mapping[str, int]]:
    table: dict[str, Mapping[str, int]] = {}
    for text_type in fields.string_keys():
        entry = fields.take_mapping(text_type)
        values = {key: entry.take(key, int, default=0) for key in CLASS_DEFAULT_KEYS if key in entry}
        for key, value in values.items():
            if value < 1:
                entry.fault("must be at least 1", key)
        table[text_type] = MappingProxyType(values)
    if not table:
        fields.fault("must name at least one text model type")
    return MappingProxyType(table)


def _tensor_names(fields: Fields) -> TensorNames:
    names = TensorNames(
        prefixes=fields.take_list("prefixes", str, required=True),
        query=fields.take("query", str, default="", required=True),
        key=fields.take("key", str, default="", required=True),
        orientation=fields.take("orientation", str, default="out_in", required=True),
        rows=_rows(fields),
        norms=_norms(fields.take_mapping("norms")) if "norms" in fields else None,
        every_layer=fields.take("every_layer", bool, default=True),
    )
    if names.rows.is_fused != (names.query == names.key):
        fields.fault(
            f"rows {names.rows.value} {'need' if names.rows.is_fused else 'exclude'} query = key", "rows"
        )
    for i, prefix in enumerate(names.prefixes):
        if prefix.count("{layer}") != 1:
            fields.fault(f"must hold {{layer}} exactly once, got {prefix!r}", f"prefixes[{i}]")
    if names.orientation != "out_in":
        fields.fault(f"only out_in is supported, got {names.orientation!r}", "orientation")
    return names


def _rows(fields: Fields) -> RowLayout:
    text = fields.take("rows", str, default=RowLayout.separate.value)
    try:
        return RowLayout(text)
    except ValueError:
        fields.fault(f"{text!r} is not one of {', '.join(layout.value for layout in RowLayout)}", "rows")
        return RowLayout.separate


def _norms(fields: Fields) -> NormNames:
    return NormNames(
        query=fields.take("query", str, default="", required=True),
        key=fields.take("key", str, default="", required=True),
        plus_one=fields.take("plus_one", bool, default=False, required=True),
    )


def _default_layers(fields: Fields) -> str:
    text = fields.take("layers", str, default=MIDDLE_THIRD, required=True)
    if text != MIDDLE_THIRD:
        try:
            parse_ranges(text, "layers")
        except UsageError as error:
            fields.fault(error.what, "layers")
    return text
