"""``qkpatch card``: the model card of an edited checkpoint, and its publication with that card."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.commands.publishing import push_out, push_wish
from qkpatch.cli.flags import OutArg, PushFlags, ShowFlags, check_present
from qkpatch.common.text import as_word
from qkpatch.errors import UsageError


@command
def card(
    out: OutArg,
    publish: PushFlags,
    show: ShowFlags,
    results: Annotated[
        Path | None,
        typer.Option(
            help="*_results.json of lmms-eval on OUT; or evaluation.json.", metavar="FILE", show_default=False
        ),
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
        str | None, typer.Option(help="With --push: the YAML file of a recipe of yours.", metavar="FILE")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: do all but send.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put it in place of the card in OUT.")] = False,
) -> None:
    """Print the model card of OUT, or write it; with --push, verify OUT and publish it with the card.

    Files that the base repository has are copied on the Hub's side, the others are sent, in one commit.
    """
    from qkpatch import api
    from qkpatch.cli.console import note, print_json, print_text
    from qkpatch.publishing.card import CARD_NAME
    from qkpatch.publishing.lmms_eval import compare_both

    check_present(out)
    wish = push_wish(publish, compare_both(results, base_results))
    if write and wish is not None:
        raise UsageError("--push publishes a card of its own", where="--write", fix="leave one of them out")
    if wish is not None:
        address = push_out(out, wish, source, recipe, show, dry_run=dry_run)
        if show.as_json:
            print_json({"published": address})
        elif address is not None:
            print_text(f"{address}\n")
        return
    if dry_run or show.strict or source is not None or recipe is not None:
        raise UsageError(
            "--dry-run, --strict, --source and --recipe go with --push", fix="add --push org/name"
        )
    if not write:
        _refuse_to_print_into(out / CARD_NAME)
    text = api.card(out, results, base_results, write=write)
    if show.as_json:
        print_json({"card": text, "wrote": str(out / CARD_NAME) if write else None})
    elif not write:
        print_text(text)
    elif not show.quiet:
        note(f"Wrote {out / CARD_NAME}")


def _refuse_to_print_into(card: Path) -> None:
    """Refuse where stdout is OUT's own card, by whichever name."""
    with suppress(OSError):  # no such file, or stdout is none
        if os.path.samestat(os.fstat(sys.stdout.fileno()), card.stat()):
            cure = shlex.join(["qkpatch", "card", as_word(str(card.parent)), "--write"])
            if not card.stat().st_size:
                cure += ", once SOURCE's README.md is there again: the shell emptied it"
            raise UsageError("it would be printed into itself", where=str(card), fix=cure)
