"""``qkpatch inspect``: spectra of the products, nothing written."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import DebugOpt, JsonOpt, LookFlags, QuietOpt, RunFlags, SourceArg, expanded
from qkpatch.cli.pictures import FigureFile, page_file
from qkpatch.errors import UsageError
from qkpatch.planning.request import check_device_name
from qkpatch.spectral.rule import Channel

if TYPE_CHECKING:
    from qkpatch.patching.inspection import Inspection
    from qkpatch.patching.spectra import LayerSpectra
    from qkpatch.planning.settings import EditSettings
    from qkpatch.reports.spectra_page import Side

COLUMNS = ("layer", "attention", "head", "kv_head", "mode", "singular_value")  # of --csv, whatever the model


@command
def inspect(
    source: SourceArg,
    look: LookFlags,
    run: RunFlags,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="Also of this checkpoint, such as a patched one, side by side."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a page to look at, in one file.", callback=expanded),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw a figure for a paper: .pdf, .svg or .png.", callback=expanded
        ),
    ] = None,
    curves: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER.HEAD,...",
            help="With --plot: whose spectra are drawn, such as 12.3,20.0.",
            show_default="most, middle and least energy",
        ),
    ] = None,
    as_json: JsonOpt = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line per singular value.")] = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show the spectra of SOURCE's query-key products."""
    from qkpatch.cli.console import note, print_csv, print_json
    from qkpatch.cli.drawing import channel_told, show_spectra
    from qkpatch.cli.progress import bars
    from qkpatch.cli.tables import model_line
    from qkpatch.patching.inspection import Inspection
    from qkpatch.reports.spectra_page import Side, check_alike, spectra_page

    if as_csv and (against, report, plot) != (None, None, None):
        what = "--csv is of one checkpoint, as it comes"
        raise UsageError(what, fix="drop it, or --against, --report and --plot")
    if curves is not None and plot is None:
        raise UsageError("there is no figure for them", where="--curves", fix="add --plot FILE")
    check_device_name(run.device)
    request = look.request
    looked_at = Inspection.of(source, request)
    other = None if against is None else Inspection.of(against, request)
    both = [looked_at, *filter(None, [other])]
    # Before heads are computed: there is no such directory, say.
    page = None if report is None else page_file(report, both)
    drawn = None if plot is None else FigureFile.of(plot, curves, both)
    # On one terminal, lines that come meanwhile would run into the bars.
    with bars(quiet=quiet or (as_csv and sys.stdout.isatty())) as observer:
        layers_in_turn = looked_at.spectra(run.device, run.threads, observer)
        if as_csv:
            print_csv(COLUMNS, _csv_rows(layers_in_turn))
            return
        model, chosen = looked_at.model, looked_at.settings
        sides = [Side(model.source.name, list(layers_in_turn))]
        if other is not None:
            layers_in_turn = other.spectra(run.device, run.threads, observer)
            sides.append(Side(other.model.source.name, list(layers_in_turn)))
            check_alike(*sides)
    if page is not None:
        modes = median_high(head.modes for layer in sides[0].layers for head in layer.heads)
        what = model_line(model) + channel_told(chosen)
        page.write(spectra_page(what, modes, sides).encode())
    if drawn is not None:
        drawn.write(both, sides, run.device)
    for file in () if quiet else filter(None, (report, plot)):
        note(f"Wrote {file}")
    if as_json:
        found = [_json(side, looked) for side, looked in zip(sides, both, strict=True)]
        print_json(found[0] if other is None else {**found[0], "against": found[1]})
    elif not quiet:
        show_spectra(model, chosen, sides)


def _csv_rows(layers: Iterable[LayerSpectra]) -> Iterator[tuple[object, ...]]:
    for layer in layers:
        for head in layer.heads:
            for mode, value in enumerate(head.singular_values):
                yield layer.layer, layer.attention, head.head, head.kv_head, mode, repr(value)


def _json(side: Side, looked: Inspection) -> dict[str, Any]:
    settings = looked.settings
    energies, channels = ({getattr(rule, key) for _, rule in settings.edits} for key in ("energy", "channel"))
    said = {"modes": {rule.modes for _, rule in settings.edits}, "energy": energies, "channel": channels}
    # What is not the same of every layer, heads say.
    common = {key: only for key, values in said.items() for only in values if len(values) == 1}
    usual = ("energy", None), ("channel", Channel.full)
    return {
        "source": side.name,
        "recipe": looked.model.recipe.name,
        **{key: value for key, value in common.items() if (key, value) not in usual},
        "layers": [{**vars(layer), "heads": _heads(layer, settings)} for layer in side.layers],
    }


def _heads(layer: LayerSpectra, settings: EditSettings) -> list[dict[str, Any]]:
    is_common = settings.modes is not None
    return [{k: v for k, v in vars(head).items() if k != "modes" or not is_common} for head in layer.heads]
