"""The tree of commands, built once for all calls of a process; Typer builds it at each, which takes most of a call."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import typer.main
import typer.testing

from qkpatch.cli import app


def built_once() -> Any:
    """From here on; returns it."""
    build = typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)
    return build(app)


def ready_to_fork() -> None:
    """As :func:`built_once`, with what Typer else does at the first call of a process.

    What is there by now, no fork's garbage collector goes through, and so none copies it.
    """
    for command in built_once().commands.values():
        for parameter in command.params:
            if hasattr(parameter, "get_runtime_param"):  # of Typer 0.29
                parameter.get_runtime_param()
    gc.collect()
    gc.freeze()


def last_said(*words: object) -> tuple[object, ...]:
    """A command line's words, of each option the last time that it is said."""
    kept: dict[object, list[object]] = {"": []}
    name: object = ""
    for word in words:
        if isinstance(word, str) and word.startswith("-"):
            name = word
            kept[name] = []
        kept[name].append(word)
    return tuple(word for some in kept.values() for word in some)
