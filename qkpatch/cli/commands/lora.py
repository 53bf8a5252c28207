"""``qkpatch lora``: the edit as a low-rank adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkpatch.adapters.modules import Runtime
from qkpatch.cli.command import command
from qkpatch.cli.flags import EditFlags, ForceOpt, OverwriteOpt, RunFlags, ShowFlags, expanded
from qkpatch.errors import refuse_warnings
from qkpatch.output.options import Writing


@command
def lora(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="As of `apply`; with --from, OUT's own.", show_default=False),
    ] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", callback=expanded)],
    edit: EditFlags,
    recorded: Annotated[
        Path | None,
        typer.Option("--from", metavar="OUT", help="Take the edit that OUT records.", callback=expanded),
    ] = None,
    runtime: Annotated[Runtime, typer.Option("--for", help="What loads it.")] = Runtime.peft,
    max_rank: Annotated[int, typer.Option(help="The largest rank: heads times modes.")] = 512,
    run: RunFlags,
    overwrite: OverwriteOpt = False,
    force: ForceOpt = False,
    show: ShowFlags,
) -> None:
    """Write the edit of SOURCE as a low-rank adapter in PEFT's layout, from its factors; SOURCE is only read."""
    from qkpatch import api
    from qkpatch.cli.console import print_text, print_told, show_warnings
    from qkpatch.cli.progress import bars
    from qkpatch.publishing.card import loading, told

    writing = Writing(overwrite=overwrite, force=force, strict=show.strict)
    how = {"recorded": recorded, "runtime": runtime, "max_rank": max_rank, "writing": writing, **vars(run)}
    with bars(quiet=show.is_bare) as observer:
        manifest = api.lora(source, out, edit.request, observer=observer, **how)
    if not show.quiet:
        show_warnings([*manifest.warnings, *(manifest.run.weaker or ())])
    refuse_warnings(manifest.run.weaker or (), strict=show.strict)  # what became known when all was done
    if show.as_json:
        print_text(manifest.dumps())
    elif not show.quiet:
        what = f"{len(manifest.edits)} module(s), {manifest.files[0].size:,} bytes; {told(manifest.edit)}"
        said = f"Wrote {out}: {what}\nLoad it with: {loading(manifest, str(out), source)}\n"
        print_told(said)
