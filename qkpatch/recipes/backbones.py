"""A family around language models that have recipes: what its file does not say is as those recipes say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OWN = ("sections", "prefixes")  # where a family sits, which it says itself


@dataclass(frozen=True)
class Backbone:
    """A language model, by its text ``model_type``, as a recipe without backbones describes it."""

    model_type: str
    said: Mapping[str, Any]
    text: bytes  # of the recipe's file


def is_family(text: bytes) -> bool:
    """Whether a recipe's file names backbones, so that it is none itself."""
    return b"\nbackbones:" in text


def completed(said: Mapping[str, Any], backbones: Sequence[Backbone]) -> tuple[dict[str, Any], list[str]]:
    """What a family's file says, over what its backbones say, key by key; and the keys in which those differ.

    A null of the family's takes a key away; norms that only some backbones have are optional.
    """
    merged, differing = dict(said), []
    known = {b.model_type: b.said["config"]["class_defaults"][b.model_type] for b in backbones}
    for part in ("config", "tensors"):
        mine = said.get(part, {})
        if not isinstance(mine, dict):
            continue  # a fault, which the reader tells
        also = {"class_defaults": known} if part == "config" else {}
        theirs = [{**b.said[part], **also} for b in backbones]
        for key in {key: None for they in theirs for key in they if key not in (*mine, *_OWN)}:
            values = [they.get(key) for they in theirs]
            if key == "norms" and None in values:
                values = [{**value, "optional": True} for value in values if value is not None]
            if any(value != values[0] for value in values):
                differing.append(f"{part}.{key}")
            mine = {**mine, key: values[0]}
        merged[part] = {key: value for key, value in mine.items() if value is not None}
        if isinstance(own := mine.get("class_defaults"), dict):
            named = {k: known.get(v, v) if isinstance(v, str) else v for k, v in own.items()}
            merged[part]["class_defaults"] = named
    return merged, differing
