"""``qkpatch recipes``: the families, one of them, or what a checkpoint is."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from qkpatch.boundary import command
from qkpatch.options import (
    DebugOpt,
    JsonOpt,
)


@command
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show this one; or `check`, with a SOURCE.", show_default=False)
    ] = None,
    source: Annotated[
        str | None,
        typer.Argument(help="After `check`: the checkpoint to explain.", show_default=False),
    ] = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """List the model families qkpatch knows, show one, or explain which of them SOURCE is: `recipes check SOURCE`.

    `check` tells what matched and what did not, and prints a draft recipe for a family it does not know.
    Exit 0 where exactly one recipe fits, else 3.
    """
    from qkpatch.catalogue import CHECK, get_recipe, recipe_text, shipped_recipes
    from qkpatch.console import output_width, print_json, print_text
    from qkpatch.describe import recipe_table
    from qkpatch.errors import UsageError

    if name == CHECK and source is not None:
        _check(source, as_json=as_json)
    if source is not None or name == CHECK:
        raise UsageError("SOURCE goes with `check`", fix="qkpatch recipes check SOURCE")
    chosen = [get_recipe(name)] if name else list(shipped_recipes().values())
    if as_json:
        print_json([recipe.to_json() for recipe in chosen])
    elif name:
        print_text(recipe_text(name))
    else:
        print_text(recipe_table(chosen, output_width()))


def _check(source: str, *, as_json: bool) -> NoReturn:
    from qkpatch.console import output_width, print_json, print_text
    from qkpatch.diagnosis.diagnose import diagnose
    from qkpatch.diagnosis.explain import explanation

    diagnosis = diagnose(source)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        print_text(explanation(diagnosis, output_width()))
    raise typer.Exit(diagnosis.exit_code)
