"""The page of commands: what ``--help`` says of each, and what the YAML files that they take may say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from qkpatch.cli import app
from qkpatch.planning.request import ITEM_KEYS, parse_request
from qkpatch.sweeps.grid import AXES, read_grid
from scripts.docs.documented import keys_of
from scripts.markdown import joined, table

HEAD = """\
# Commands

What `--help` says, written by `make docs`. Results go to stdout, everything else to stderr. At the end:
[the keys of EDIT.yaml](#edityaml) and [of GRID.yaml](#gridyaml).
"""
EDIT = """\
What `--config` takes: the flags of an edit, with underscores. A flag wins over what stands beside `edits`. *By layer*:
may also be said in an item of `edits`, a list of edits of some layers each ([how](guide.md#the-edit)).
"""
GRID = """\
What `qkpatch sweep --grid` takes ([how](guide.md#many-edits)). An *axis* takes a list, and every combination is a
variant; the other keys hold for all.
"""
# What is no flag.
MEANT = {
    "edits": "Edits of some layers each: a list of the keys by layer.",
    "matched": "Beside each dominant variant its controls: random modes, and a shrink of equal size.",
}


def page(repo: Path) -> str:
    """A section per command, sub-commands included, and one per file that they take."""
    helps = MEANT | {name.replace("-", "_"): text for name, text in options("apply").items()}
    edit = [
        (f"`{key}`", helps[key], "yes" if key in ITEM_KEYS else "")
        for key in keys_of(lambda: parse_request(b"{}", ""))
    ]
    grid = [
        (f"`{key}`", helps[key], "axis" if key in AXES else "")
        for key in keys_of(lambda: read_grid({}))
        if key != "edits"
    ]
    files = joined([
        "## EDIT.yaml", EDIT, table(("key", "what it is", "by layer"), edit),
        "## GRID.yaml", GRID, table(("key", "what it is", ""), grid),
    ])  # fmt: skip
    sections = "".join(
        f"\n## {' '.join(('qkpatch', *name))}\n\n```text\n{_help(name)}\n```\n"
        for name in names(typer.main.get_command(app))
    )
    return f"{HEAD}{sections}\n{files}"


def names(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """A command's name and those of all below it."""
    yield name
    for below, inner in getattr(command, "commands", {}).items():
        yield from names(inner, (*name, below))


def options(name: str) -> dict[str, str]:
    """The help of each option of a command, by its longest name without dashes."""
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return {
        max(o.opts, key=len).lstrip("-"): getattr(o, "help", None) or ""
        for o in command.params
        if o.opts[0].startswith("-")
    }


def _help(name: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*name, "--help"], prog_name="qkpatch", catch_exceptions=False)
    return result.stdout.strip()
