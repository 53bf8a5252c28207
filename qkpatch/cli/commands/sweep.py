"""``qkpatch sweep``: many edits of SOURCE from one read; ``qkpatch collect``: what other tools found of them."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import CsvOpt, PartOpt, RunFlags, ShowFlags, SourceArg, expanded
from qkpatch.sweeps.collect import BASE
from qkpatch.sweeps.grid import Form
from qkpatch.sweeps.record import Figures


@command
def sweep(
    source: SourceArg,
    *,
    grid: Annotated[
        Path,
        typer.Option(metavar="GRID.yaml", help="Lists of layers, modes, alpha, ...", callback=expanded),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="SWEEP", help="Written, or gone on with.", callback=expanded),
    ],
    form: Annotated[Form, typer.Option("--as", help="Made of each variant besides figures.")] = Form.lora,
    run: RunFlags,
    part: PartOpt = None,
    as_csv: CsvOpt = False,
    yes: Annotated[bool, typer.Option("--yes", help="More than 1,000 variants are meant.")] = False,
    show: ShowFlags,
) -> None:
    """Derive many edits of SOURCE from one read, with their figures and what evaluates them."""
    from qkpatch import api
    from qkpatch.cli.console import print_csv, print_text, show_warnings
    from qkpatch.cli.progress import bars
    from qkpatch.cli.tables import show_part, show_sweep
    from qkpatch.common.part import parse_part

    mine = None if part is None else parse_part(part, os.environ)
    with bars(quiet=show.is_bare) as observer:
        how = {**vars(run), "part": mine, "observer": observer}
        done = api.sweep(source, grid, out, form=form, many=yes, strict=show.strict, **how)
    if not show.quiet:
        show_warnings(done.warnings)
    if show.as_json:
        print_text(done.dumps())
    elif as_csv:
        columns = ("variant", *(field.name for field in fields(Figures)))
        print_csv(columns, ((v.name, *vars(layer).values()) for v in done.variants for layer in v.layers))
    elif not show.quiet and mine is not None:
        show_part(mine, out)
    elif not show.quiet:
        show_sweep(done, out)


@command
def collect(
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="What qkpatch sweep wrote.", show_default=False)
    ],
    results: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RESULTS",
            help="Folders of lmms-eval or VLMEvalKit, called after variants; or NAME=FOLDER.",
            show_default="SWEEP/results",
        ),
    ] = None,
    *,
    against: Annotated[str, typer.Option(help="Hold variants against this one.", metavar="NAME")] = BASE,
    show: ShowFlags,
) -> None:
    """Compare what lmms-eval and VLMEvalKit found of a sweep's variants: intervals, McNemar's test, Holm's p.

    Answers are paired by question, so evaluate with --log_samples. What cannot be compared is told and left out.
    """
    from qkpatch import api
    from qkpatch.cli.console import end_strictly, print_json, show_warnings
    from qkpatch.cli.tables import show_collected
    from qkpatch.common.typed_json import as_json

    found = api.collect(sweep, *(results or ()), against=against)
    if show.as_json:
        print_json({"schema": 1, **as_json(found)})
    elif not show.quiet:
        show_warnings(found.warnings)
        show_collected(found)
    end_strictly(found.warnings, show)
