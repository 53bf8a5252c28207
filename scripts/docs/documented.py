"""Whether whatever a user may say is documented: flags, the keys of every YAML file, the inputs of the action."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer
import yaml

from qkpatch.cli import app
from qkpatch.common.strict_yaml import Fields
from qkpatch.errors import QKPatchError
from qkpatch.recipes.reading import parse_recipe

TAKING = ("take", "take_optional", "take_list", "take_mapping", "take_member")


def keys_of(read: Callable[[], Any]) -> list[str]:
    """The keys that a strict reader asks a document for, wherever in it, in their order; ``read`` gives it one."""
    asked: dict[str, None] = {}

    def noting(method: str) -> Any:
        original = getattr(Fields, method)

        def call(self: Fields, key: str, *arguments: Any, **options: Any) -> Any:
            asked[key] = None
            return original(self, key, *arguments, **options)

        return call

    # An empty document lacks what is required, which is told at its end.
    with patch.multiple(Fields, **{method: noting(method) for method in TAKING}), suppress(QKPatchError):
        read()
    return list(asked)


def undocumented(repo: Path) -> list[str]:
    """What a user may say and no page tells of, each with where it is missing."""
    missing = [f"{name}: no help" for name in _without_help(typer.main.get_command(app), "qkpatch")]
    action = yaml.safe_load((repo / "action.yml").read_text("utf-8"))
    for page, keys in (
        ("configs/README.md", keys_of(lambda: parse_recipe(b"{}", ""))),
        ("docs/ci.md", list(action["inputs"])),
    ):
        text = (repo / page).read_text("utf-8")
        fenced = re.findall(r"^```.*?^```$", text, flags=re.MULTILINE | re.DOTALL)
        for block in fenced:
            text = text.replace(block, "")
        told = set(re.findall(r"[\w-]+", " ".join([*fenced, *re.findall(r"`[^`]+`", text)])))
        missing += [f"{key}: not in {page}" for key in keys if key not in told]
    return missing


def _without_help(command: Any, name: str) -> Iterator[str]:
    if not command.help:
        yield name
    for parameter in command.params:
        if parameter.name != "help" and not getattr(parameter, "help", None):
            yield f"{name} {parameter.opts[0]}"
    for below, inner in getattr(command, "commands", {}).items():
        yield from _without_help(inner, f"{name} {below}")
