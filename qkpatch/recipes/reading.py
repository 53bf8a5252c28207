"""Reading a recipe from YAML, strictly: every key that is wrong is told, all of them at once."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from qkpatch.common.json_text import measured
from qkpatch.common.number_ranges import MIDDLE_THIRD, parse_ranges
from qkpatch.common.strict_yaml import Fields, load_yaml
from qkpatch.errors import UsageError
from qkpatch.recipes.backbones import Backbone, completed
from qkpatch.recipes.heads import RowLayout
from qkpatch.recipes.recipe import (
    COUNT_KEYS,
    LOGIT_KEYS,
    ConfigReading,
    ConfigValue,
    InputNorm,
    KeyOverride,
    LayerType,
    NormKind,
    NormNames,
    NormSpan,
    Recipe,
    TensorNames,
    is_prefix,
)

DEFAULT_MODES = 4  # ours, not the paper's, as is the middle third of the layers
UNTESTED = "untested"
TESTED = ("transformers class", "documented layout", "real weights", UNTESTED)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


_Backbones = Callable[[str], Backbone | None]  # by text model_type


def parse_recipe(text: bytes, where: str, backbone: _Backbones = lambda model_type: None) -> Recipe:
    """Read a recipe, which may name language models that ``backbone`` knows.

    Raises:
        RecipeError: every unknown key, wrong type and missing field in one.
    """
    root, sources = _fields(load_yaml(text, where), where, backbone)
    match = root.take_mapping("match", required=True)
    defaults = root.take_mapping("defaults")
    config = root.take_mapping("config", required=True)
    tensors = root.take_mapping("tensors", required=True)
    keys = _keys(config)
    first = _tensor_names(tensors, None, tensors.take("attention", str, default="self"), keys)
    recipe = Recipe(
        name=root.take("name", str, default="", required=True),
        title=root.take("title", str, default="", required=True),
        default_repo=root.take_optional("default_repo", str),
        gated=root.take_optional("gated", bool),
        source=root.take_list("source", str) or None,
        tested=root.take("tested", str, default=TESTED[0], required=True),
        model_types=match.take_list("model_types", str, required="model_types" in match),
        architectures=match.take_list("architectures", str, required=True),
        config=_config_reading(config),
        tensors=first,
        others=_other_sets(tensors, first),
        default_layers=_default_layers(defaults),
        default_modes=defaults.take("modes", int, default=DEFAULT_MODES),
        sha256=hashlib.sha256(b"".join((text, *sources))).hexdigest(),
    )
    if recipe.tested not in TESTED:
        root.fault(f"{recipe.tested!r} is not one of {', '.join(TESTED)}", "tested")
    if recipe.default_modes < 1:
        defaults.fault("must be at least 1", "modes")
    root.finish()
    return recipe


def _fields(said: Any, where: str, backbone: _Backbones) -> tuple[Fields, tuple[bytes, ...]]:
    """What a file says, over what its backbones say, and the texts of their files."""
    if not isinstance(said, dict) or "backbones" not in said:
        return Fields(said, where), ()
    found = {name: backbone(name) for name in Fields(said, where).take_list("backbones", str)}
    known = [described for described in found.values() if described is not None]
    merged, differing = completed(said, known)
    root = Fields(merged, where)
    root.take_list("backbones", str, required=True)
    for name in (name for name, described in found.items() if described is None):
        root.fault(f"no recipe without backbones describes a language model {name!r}", "backbones")
    for key in differing:
        root.fault(f"the backbones {', '.join(found)} differ here: say which it is, or null for none", key)
    return root, tuple(dict.fromkeys(described.text for described in known))


def _config_reading(fields: Fields) -> ConfigReading:
    types = fields.take_mapping("layer_types")
    by_type = {kind: _layer_type(types.take_mapping(kind)) for kind in types.string_keys()}
    return ConfigReading(
        sections=fields.take_list("sections", str, required=True),
        class_defaults=_class_defaults(fields.take_mapping("class_defaults", required=True)),
        layer_types=MappingProxyType(by_type),
        shared_kv=_key_or_default(fields.take_mapping("shared_kv"), 0) if "shared_kv" in fields else None,
    )


def _keys(fields: Fields) -> dict[str, str]:
    names = fields.take_mapping("keys")
    return {key: names.take(key, str, default=key) for key in COUNT_KEYS if key in names}


def _class_defaults(fields: Fields) -> Mapping[str, Mapping[str, ConfigValue]]:
    table: dict[str, Mapping[str, ConfigValue]] = {}
    for text_type in fields.string_keys():
        entry = fields.take_mapping(text_type)
        counts = {key: _at_least(entry, key, 1) or 1 for key in COUNT_KEYS if key in entry}
        facts = {key: _fact(entry, key) for key in LOGIT_KEYS if key in entry}
        table[text_type] = MappingProxyType({**counts, **facts})
    if not table:
        fields.fault("must name at least one text model type")
    return MappingProxyType(table)


def _fact(entry: Fields, key: str) -> float | bool:
    """What is recorded only, as config.json's own are."""
    if entry.is_a(key, bool):
        return entry.take(key, bool, default=False)
    value = entry.take(key, float, default=0.0)
    if math.isfinite(value):
        return float(measured(value))
    entry.fault("must be finite", key)
    return 0.0


def _layer_type(fields: Fields) -> LayerType:
    counts = {}
    for key in COUNT_KEYS:
        if key in fields:
            entry = fields.take_mapping(key)
            counts[key] = replace(_key_or_default(entry, 1), condition=entry.take_optional("if", str))
    return LayerType(MappingProxyType(counts), _at_least(fields, "every", 1))


def _key_or_default(fields: Fields, least: int) -> KeyOverride:
    return KeyOverride(
        key=fields.take("key", str, default="", required=True), default=_at_least(fields, "default", least)
    )


def _at_least(fields: Fields, key: str, least: int) -> int | None:
    value = fields.take_optional(key, int)
    if value is not None and value < least and fields.is_a(key, int):
        fields.fault(f"must be at least {least}", key)
    return value


def _tensor_names(
    fields: Fields, base: TensorNames | None, attention: str, keys: Mapping[str, str]
) -> TensorNames:
    """One set of names; what a further set does not say is as in ``base``, but for all norms."""
    is_first = base is None
    if not _NAME.fullmatch(attention):
        fields.fault(f"{attention!r} is not a name of small letters, digits, dot, dash", "attention")
    names = TensorNames(
        attention=attention,
        prefixes=fields.take_list("prefixes", str, required=is_first),
        query=fields.take("query", str, default="", required=True),
        key=fields.take("key", str, default="", required=True),
        orientation=fields.take("orientation", str, default="out_in", required=is_first),
        rows=fields.take_member("rows", RowLayout) or (RowLayout.separate if base is None else base.rows),
        norms=_norms(fields.take_mapping("norms")) if "norms" in fields else None,
        input_norm=_input_norm(fields.take_mapping("input_norm")) if "input_norm" in fields else None,
        every_layer=fields.take("every_layer", bool, default=True),
        mtp_layers=fields.take("mtp_layers", bool, default=False),
        keys=keys,
    )
    if names.rows.is_fused != (names.query == names.key):
        verb = "need" if names.rows.is_fused else "exclude"
        fields.fault(f"rows {names.rows.value} {verb} query = key", "rows")
    for i, prefix in enumerate(names.prefixes):
        if not is_prefix(prefix):
            what = f"must hold {{layer}} exactly once and no other brace, got {prefix!r}"
            fields.fault(what, f"prefixes[{i}]")
    if names.orientation != "out_in":
        fields.fault(f"only out_in is supported, got {names.orientation!r}", "orientation")
    return names if base is None else replace(names, prefixes=names.prefixes or base.prefixes)


def _other_sets(fields: Fields, first: TensorNames) -> tuple[TensorNames, ...]:
    others = fields.take_mapping("others")
    sets = []
    for attention in others.string_keys():
        entry = others.take_mapping(attention)
        if attention == first.attention:
            entry.fault(f"{attention!r} is the name of the first set")
        sets.append(_tensor_names(entry, first, attention, {**first.keys, **_keys(entry)}))
    return tuple(sets)


def _norms(fields: Fields) -> NormNames:
    kind = fields.take_member("kind", NormKind) or NormKind.rms
    over = fields.take_member("over", NormSpan) or NormSpan.head
    if kind is NormKind.layer and over is not NormSpan.head:
        # Its mean would be that of all heads, so that editing one head moved the others.
        fields.fault("LayerNorm is supported per head only", "over")
    return NormNames(
        query=fields.take("query", str, default="", required=True),
        key=fields.take("key", str, default="", required=True),
        kind=kind,
        over=over,
        plus_one=fields.take("plus_one", bool, default=False),
        optional=fields.take("optional", bool, default=False),
    )


def _input_norm(fields: Fields) -> InputNorm:
    return InputNorm(
        weight=fields.take("weight", str, default="", required=True),
        plus_one=fields.take("plus_one", bool, default=False),
        unless=fields.take_optional("unless", str),
    )


def _default_layers(fields: Fields) -> str:
    text = fields.take("layers", str, default=MIDDLE_THIRD)
    if text != MIDDLE_THIRD:
        try:
            parse_ranges(text, "layers")
        except UsageError as error:
            fields.fault(error.what, "layers")
    return text
