"""The page of commands: what ``--help`` says of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from qkpatch.cli import app

HEAD = """\
# Commands

What `--help` says, written by `make docs`. Results go to stdout, everything else to stderr.
"""


def page(repo: Path) -> str:
    """A section per command, sub-commands included."""
    return HEAD + "".join(
        f"\n## {' '.join(('qkpatch', *name))}\n\n```text\n{_help(name)}\n```\n"
        for name in names(typer.main.get_command(app))
    )


def names(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """A command's name and those of all below it."""
    yield name
    for below, inner in getattr(command, "commands", {}).items():
        yield from names(inner, (*name, below))


def _help(name: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*name, "--help"], prog_name="qkpatch", catch_exceptions=False)
    return result.stdout.strip()
