"""``qkpatch inspect``: spectra of the products, nothing written."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import (
    AttentionOpt,
    DebugOpt,
    ExcludeOpt,
    FoldOpt,
    HeadsOpt,
    JsonOpt,
    PrefixOpt,
    QuietOpt,
    RecipeOpt,
    RunFlags,
    SourceArg,
)
from qkpatch.common.typed_json import as_json
from qkpatch.planning.request import Request, check_device_name

if TYPE_CHECKING:
    from qkpatch.patching.spectra import LayerSpectra

COLUMNS = ("layer", "attention", "head", "kv_head", "mode", "singular_value")  # of --csv, whatever the model


@command
def inspect(
    source: SourceArg,
    run: RunFlags,
    layers: Annotated[
        str | None, typer.Option(help="Inclusive list such as 10-18,20.", show_default="all")
    ] = None,
    heads: HeadsOpt = None,
    modes: Annotated[
        int | None, typer.Option(help="r of energy share and gap.", show_default="the recipe's")
    ] = None,
    recipe: RecipeOpt = None,
    prefix: PrefixOpt = None,
    attention: AttentionOpt = None,
    fold_norm: FoldOpt = False,
    exclude: ExcludeOpt = None,
    as_json: JsonOpt = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line per singular value.")] = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show the spectra of SOURCE's query-key products."""
    from qkpatch.cli.console import bars, print_csv, print_json
    from qkpatch.cli.tables import show_spectra
    from qkpatch.errors import UsageError
    from qkpatch.patching.inspection import Inspection

    if as_json and as_csv:
        raise UsageError("one of --json and --csv", fix="drop the other")
    request = Request.of(
        recipe=recipe, prefix=prefix, attention=attention, layers=layers, heads=heads, modes=modes,
        fold_norm=fold_norm, exclude=exclude,
    )  # fmt: skip
    check_device_name(run.device)
    looked_at = Inspection.of(source, request)
    # On one terminal, lines that come meanwhile would run into the bars.
    with bars(quiet=quiet or (as_csv and sys.stdout.isatty())) as observer:
        layers_in_turn = looked_at.spectra(run.device, run.threads, observer)
        if as_csv:
            print_csv(COLUMNS, _csv_rows(layers_in_turn))
            return
        spectra = list(layers_in_turn)
    model, chosen = looked_at.model, looked_at.settings
    if as_json:
        print_json(_json(model.source.name, model.recipe.name, chosen.rule.modes, spectra))
    elif not quiet:
        show_spectra(model, chosen, spectra, is_folded=fold_norm)


def _csv_rows(layers: Iterable[LayerSpectra]) -> Iterator[tuple[object, ...]]:
    for layer in layers:
        for head in layer.heads:
            for mode, value in enumerate(head.singular_values):
                yield layer.layer, layer.attention, head.head, head.kv_head, mode, repr(value)


def _json(source: str, recipe: str, modes: int, layers: Sequence[LayerSpectra]) -> dict[str, Any]:
    return {
        "source": source,
        "recipe": recipe,
        "modes": modes,
        "layers": as_json(layers),
    }
