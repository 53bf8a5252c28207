"""``qkpatch inspect``: spectra of the products, nothing written."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import (
    AttentionOpt,
    DebugOpt,
    EnergyOpt,
    ExcludeOpt,
    FoldOpt,
    HeadsOpt,
    JsonOpt,
    PrefixOpt,
    QuietOpt,
    RecipeOpt,
    RunFlags,
    SourceArg,
    expanded,
)
from qkpatch.planning.request import Request, check_device_name

if TYPE_CHECKING:
    from qkpatch.checkpoint.open_directory import Rooted
    from qkpatch.patching.inspection import Inspection
    from qkpatch.patching.spectra import LayerSpectra
    from qkpatch.reports.spectra_page import Side

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
        int | None,
        typer.Option(help="r of energy share and gap; with --energy the most.", show_default="the recipe's"),
    ] = None,
    energy: EnergyOpt = None,
    recipe: RecipeOpt = None,
    prefix: PrefixOpt = None,
    attention: AttentionOpt = None,
    fold_norm: FoldOpt = False,
    exclude: ExcludeOpt = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="Also of this checkpoint, such as a patched one, side by side."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a page to look at, in one file.", callback=expanded),
    ] = None,
    as_json: JsonOpt = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line per singular value.")] = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show the spectra of SOURCE's query-key products."""
    from qkpatch.cli.console import print_csv, print_json
    from qkpatch.cli.progress import bars
    from qkpatch.cli.tables import model_line, show_spectra
    from qkpatch.errors import UsageError
    from qkpatch.patching.inspection import Inspection
    from qkpatch.reports.spectra_page import Side, check_alike, spectra_page

    if as_json and as_csv:
        raise UsageError("one of --json and --csv", fix="drop the other")
    if as_csv and (against is not None or report is not None):
        raise UsageError("--csv is of one checkpoint, as it comes", fix="drop it, or --against and --report")
    request = Request.of(
        recipe=recipe, prefix=prefix, attention=attention, layers=layers, heads=heads, modes=modes,
        energy=energy, fold_norm=fold_norm, exclude=exclude,
    )  # fmt: skip
    check_device_name(run.device)
    looked_at = Inspection.of(source, request)
    # Before heads are computed: there is no such directory, say.
    folder = None if report is None else _folder_of(report, looked_at)
    other = None if against is None else Inspection.of(against, request)
    # On one terminal, lines that come meanwhile would run into the bars.
    with bars(quiet=quiet or (as_csv and sys.stdout.isatty())) as observer:
        layers_in_turn = looked_at.spectra(run.device, run.threads, observer)
        if as_csv:
            print_csv(COLUMNS, _csv_rows(layers_in_turn))
            return
        model, chosen = looked_at.model, looked_at.settings
        sides = [Side(model.source.name, list(layers_in_turn))]
        if other is not None:
            sides.append(
                Side(other.model.source.name, list(other.spectra(run.device, run.threads, observer)))
            )
            check_alike(*sides)
    if report is not None and folder is not None:
        with folder:
            shown = [head for layer in sides[0].layers for head in layer.heads]
            modes = median_high(head.modes or chosen.edits[0][1].modes for head in shown)
            folder.replace(report.name, spectra_page(model_line(model), modes, sides).encode())
    if as_json:
        found = [_json(side, looked, energy)
                 for side, looked in zip(sides, filter(None, (looked_at, other)), strict=True)]  # fmt: skip
        print_json(found[0] if other is None else {**found[0], "against": found[1]})
    elif not quiet:
        show_spectra(model, chosen, sides, is_folded=fold_norm)


def _folder_of(report: Path, looked_at: Inspection) -> Rooted:
    """Where a page is to be, which is neither in SOURCE nor over a file that is no page of ours."""
    from qkpatch.checkpoint.open_directory import Rooted
    from qkpatch.errors import UsageError
    from qkpatch.output.destination import check_apart
    from qkpatch.reports.spectra_page import is_ours

    where = f"--report {report}"
    if report.suffix != ".html":
        raise UsageError("a report is an .html file", where=where, fix="name it page.html")
    check_apart(report, looked_at.model.checkpoint)
    folder = Rooted(report.parent)
    if folder.status(report.name) is not None:
        with folder.reading(report.name) as opened:
            if not is_ours(bytes(opened.read(min(opened.size, 1 << 12), 0))):
                raise UsageError(
                    "exists, and is no page of inspect's", where=where, fix="choose another name"
                )
    return folder


def _csv_rows(layers: Iterable[LayerSpectra]) -> Iterator[tuple[object, ...]]:
    for layer in layers:
        for head in layer.heads:
            for mode, value in enumerate(head.singular_values):
                yield layer.layer, layer.attention, head.head, head.kv_head, mode, repr(value)


def _json(side: Side, looked: Inspection, energy: float | None) -> dict[str, Any]:
    return {
        "source": side.name,
        "recipe": looked.model.recipe.name,
        "modes": looked.settings.edits[0][1].modes,
        **({} if energy is None else {"energy": energy}),
        "layers": [{**vars(layer), "heads": _heads(layer)} for layer in side.layers],
    }


def _heads(layer: LayerSpectra) -> list[dict[str, Any]]:
    return [{k: v for k, v in vars(head).items() if k != "modes" or v} for head in layer.heads]
