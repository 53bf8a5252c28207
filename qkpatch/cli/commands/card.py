"""``qkpatch card``: the model card of an edited checkpoint, and its publication with that card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.commands.publishing import push_out, push_wish
from qkpatch.cli.flags import DebugOpt, PushFlags, QuietOpt, ShowFlags
from qkpatch.errors import UsageError


@command
def card(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What `apply` wrote.", show_default=False)],
    publish: PushFlags,
    results: Annotated[
        Path | None,
        typer.Option(help="*_results.json of lmms-eval on OUT.", metavar="FILE", show_default=False),
    ] = None,
    base_results: Annotated[
        Path | None,
        typer.Option(help="The same of a run on SOURCE.", metavar="FILE", show_default=False),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="With --push: what OUT was made from, to verify it.",
            metavar="SOURCE",
            show_default="the repository that the manifest names",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="With --push: the YAML file, where it was made by one of yours.", metavar="FILE"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: do all but send.")] = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Print the model card of OUT; with --push, verify OUT and publish it with the card.

    Files that the base repository has are copied on the Hub's side, the others are sent, in one commit.
    """
    from qkpatch import api
    from qkpatch.cli.console import print_text
    from qkpatch.publishing.lmms_eval import compare_both

    wish = push_wish(publish, compare_both(results, base_results))
    if wish is not None:
        address = push_out(out, wish, source, recipe, ShowFlags(quiet=quiet), dry_run=dry_run)
        print_text("" if address is None else f"{address}\n")
        return
    if dry_run or source is not None or recipe is not None:
        raise UsageError("--dry-run, --source and --recipe go with --push", fix="add --push org/name")
    print_text(api.card(out, results, base_results))
