"""``qkpatch recipes``: the families, one of them, or what a checkpoint is."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import DebugOpt, JsonOpt


@command
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show this one, or list those about this word; or `check`, with a SOURCE.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Argument(help="After `check`: the checkpoint to explain.", show_default=False),
    ] = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """List the model families qkpatch knows, show one, or explain which of them SOURCE is: `recipes check SOURCE`.

    `check` tells what matched and what did not. For a family it does not know it names the command that would do, or
    prints a draft recipe on stdout, and the explanation on stderr. Exit 0 where exactly one recipe fits, else 3.
    """
    from qkpatch.cli.console import output_width, print_json, print_text, print_told
    from qkpatch.errors import UsageError
    from qkpatch.recipes.catalogue import CHECK, get_recipe, is_recipe_file, recipe_text, shipped_recipes
    from qkpatch.recipes.descriptions import is_about, recipe_table

    if name == CHECK and source is not None:
        _check(source, as_json=as_json)
    if source is not None or name == CHECK:
        raise UsageError("SOURCE goes with `check`", fix="qkpatch recipes check SOURCE")
    name = name or ""
    about = [recipe for recipe in shipped_recipes().values() if is_about(recipe, name)]
    is_one = name in shipped_recipes() or is_recipe_file(name) or not about
    chosen = [get_recipe(name)] if is_one else about
    if as_json:
        print_json([recipe.to_json() for recipe in chosen])
    elif is_one:
        print_text(recipe_text(name))
    else:
        print_told(recipe_table(chosen, output_width()))


def _check(source: str, *, as_json: bool) -> NoReturn:
    from qkpatch.cli.console import note, output_width, print_json, print_text, print_told, verdict
    from qkpatch.diagnosis.diagnose import diagnose
    from qkpatch.diagnosis.explain import explanation

    diagnosis = diagnose(source)
    with verdict(diagnosis.exit_code):
        if as_json:
            print_json(diagnosis.to_json())
        elif diagnosis.draft is None:
            print_told(explanation(diagnosis, output_width()))
        else:
            # So that `> draft.yaml` makes a file that can be used.
            for line in explanation(diagnosis, output_width(stderr=True)).split("\n"):
                note(line)
            print_text(diagnosis.draft)
    raise typer.Exit
