"""Attention without a product of stored weights per head: known, and refused with its reason, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from qkpatch.checkpoint.tree import source_file
from qkpatch.common.strict_yaml import Fields, load_yaml
from qkpatch.recipes.catalogue import config_dir


@dataclass(frozen=True)
class RefusedKind:
    """Why some models cannot be edited, and how they are recognised."""

    name: str
    reason: str
    tensors: re.Pattern[str] | None  # names of tensors that tell
    word: str  # that config.json's model types and classes must hold for these to tell
    architectures: tuple[str, ...]  # classes that are always so
    sources: tuple[str, ...]  # what was read


@cache
def refused_kinds() -> tuple[RefusedKind, ...]:
    """The kinds of ``configs/refused/attention.yaml``, in its order."""
    path = config_dir() / "refused" / "attention.yaml"
    root = Fields(load_yaml(source_file(path, path.name).read(), path.name), path.name)
    kinds = [_kind(name, root.take_mapping(name)) for name in root.string_keys()]
    root.finish()
    return tuple(kinds)


def _kind(name: str, fields: Fields) -> RefusedKind:
    tensors = fields.take_optional("tensors", str)
    return RefusedKind(
        name,
        fields.take("reason", str, default="", required=True),
        None if tensors is None else re.compile(tensors),
        fields.take("word", str, default=""),
        fields.take_list("architectures", str),
        fields.take_list("source", str, required=True),
    )
