"""Groups of flags as Typer sees them: each field an option, below the heading of its group."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_type_hints

import typer


def flag(default: Any, text: str, usual: str | bool = True, **how: Any) -> Any:
    """A field of a group, with what ``--help`` says of it and of its default, and what else Typer is to know."""
    return field(default=default, metadata={"help": text, "how": {"show_default": usual, **how}})


def _with_help(hint: Any, field: Field[Any]) -> Any:
    """The hint of a field that says itself what it is for."""
    name, said = f"--{field.name.replace('_', '-')}", field.metadata
    return Annotated[hint, typer.Option(name, help=said["help"], **said.get("how", {}))] if said else hint


_VALUES = {str: "TEXT", int: "N", float: "X", Path: "PATH"}


def _drawn(hint: Any, panel: str | None) -> Any:
    """An option as ``--help`` shows it: below the heading of its group; its value, unless one is said, by its type."""
    kind, *said = get_args(hint) or (hint,)
    said = [copy(one) for one in said]
    for one in said:
        if isinstance(one, typer.models.OptionInfo):
            one.rich_help_panel = panel
            kinds = (kind, *get_args(kind))
            if one.metavar is None:
                one.metavar = next((shown for of, shown in _VALUES.items() if of in kinds), None)
    return Annotated[(kind, *said)] if said else hint


def spread(
    function: Callable[..., Any],
) -> tuple[inspect.Signature, Callable[[dict[str, Any]], dict[str, Any]]]:
    """What Typer is to see of a command: each group of flags as its fields; and how to put the groups together."""
    hints = get_type_hints(function, include_extras=True)
    shown: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if not is_dataclass(hint):
            kind = inspect.Parameter.KEYWORD_ONLY
            shown.append(parameter.replace(annotation=_drawn(hint, None), kind=kind))
            continue
        groups[parameter.name] = cast("type[Any]", hint)
        panel = groups[parameter.name].__name__.removesuffix("Flags")
        inner = get_type_hints(hint, include_extras=True)
        kind = inspect.Parameter.KEYWORD_ONLY
        shown += [
            inspect.Parameter(
                field.name,
                kind,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=_drawn(_with_help(inner[field.name], field), panel),
            )
            for field in fields(hint)
        ]

    def gathered(given: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for name, group in groups.items():
            said = {field.name: given.pop(field.name) for field in fields(group) if field.name in given}
            made[name] = group(**said)
        return {**given, **made}

    return inspect.Signature(shown), gathered
