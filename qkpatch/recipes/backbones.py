"""A family around language models that have recipes: what its file does not say is as those recipes say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a family says of itself: where it sits, in config.json and among the tensors.
_OWN = {"config": "sections", "tensors": "prefixes"}


@dataclass(frozen=True)
class Backbone:
    """A language model, by its text ``model_type``, as a recipe without backbones describes it."""

    model_type: str
    said: Mapping[str, Any]
    text: bytes  # of the recipe's file


def backbones_of(said: Mapping[str, Any], text: bytes) -> Iterator[Backbone]:
    """The language models that a recipe describes, none where it names backbones itself."""
    if "backbones" not in said:
        yield from (Backbone(model_type, said, text) for model_type in said["config"]["class_defaults"])


def completed(said: Mapping[str, Any], backbones: Sequence[Backbone]) -> tuple[dict[str, Any], list[str]]:
    """What a family's file says, over what its backbones say, key by key; and the keys in which those differ.

    A null of the family's takes a key away; norms that only some backbones have are optional.
    """
    merged, differing = dict(said), []
    known = {b.model_type: b.said["config"]["class_defaults"][b.model_type] for b in backbones}
    for part, own in _OWN.items():
        mine = said.get(part, {})
        if not isinstance(mine, dict):
            continue  # a fault, which the reader tells
        if part == "config":
            defaults = mine.get("class_defaults", known)
            if isinstance(defaults, dict):
                defaults = {k: known.get(v, v) if isinstance(v, str) else v for k, v in defaults.items()}
            mine = {**mine, "class_defaults": defaults}
        theirs = [b.said[part] for b in backbones]
        for key in {key: None for they in theirs for key in they if key not in mine and key != own}:
            values = [they.get(key) for they in theirs]
            if key == "norms" and None in values:
                values = [{**value, "optional": True} for value in values if value is not None]
            if any(value != values[0] for value in values):
                differing.append(f"{part}.{key}")
            mine = {**mine, key: values[0]}
        merged[part] = {key: value for key, value in mine.items() if value is not None}
    return merged, differing
