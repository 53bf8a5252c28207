"""``qkpatch card``: the model card of an edited checkpoint, and its publication with that card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkpatch.boundary import command
from qkpatch.commands.publishing import publication_of, push_target
from qkpatch.errors import FileSystemError, UsageError
from qkpatch.options import CreatePrOpt, DebugOpt, PrivateOpt, PushOpt, QuietOpt


@command
def card(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What `apply` wrote.", show_default=False)],
    results: Annotated[
        Path | None,
        typer.Option(help="*_results.json of lmms-eval on OUT.", metavar="FILE", show_default=False),
    ] = None,
    base_results: Annotated[
        Path | None,
        typer.Option(help="The same of a run on SOURCE.", metavar="FILE", show_default=False),
    ] = None,
    push: PushOpt = None,
    private: PrivateOpt = False,
    create_pr: CreatePrOpt = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: only show the commit.")] = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Print the model card of OUT; with --push, publish OUT with it.

    Files that the base repository has are copied on the Hub's side, the others are sent, in one commit.
    """
    from qkpatch.card import model_card
    from qkpatch.checkpoint.source import MANIFEST_NAME
    from qkpatch.checkpoint.tree import source_file
    from qkpatch.console import print_text
    from qkpatch.manifest import Manifest
    from qkpatch.publication import check_whole
    from qkpatch.results import compare
    from qkpatch.tables import show_publication

    if (results is None) != (base_results is None):
        raise UsageError(
            "an effect is a difference: --results and --base-results go together", fix="run both models"
        )
    target = push_target(push, private=private, create_pr=create_pr)
    if target is None and dry_run:
        raise UsageError("--dry-run goes with --push", fix="add --push org/name")
    if not (out / MANIFEST_NAME).is_file():
        raise FileSystemError(
            f"no {MANIFEST_NAME} there", where=str(out), fix="give the directory that qkpatch apply wrote"
        )
    manifest = Manifest.loads(source_file(out / MANIFEST_NAME, MANIFEST_NAME).read(), MANIFEST_NAME)
    comparison = None if results is None or base_results is None else compare(base_results, results)
    base_card = read_card(out)
    if target is None:
        print_text(model_card(manifest, out.resolve().name, base_card, comparison))
        return
    check_whole(out, manifest)
    publication = publication_of(manifest, target, base_card, comparison)
    if not quiet:
        show_publication(publication)
    if not dry_run:
        print_text(publication.carry_out(out) + "\n")


def read_card(out: Path) -> str | None:
    """SOURCE's card, which OUT has as it was."""
    from qkpatch.checkpoint.tree import source_file
    from qkpatch.publication import CARD_NAME

    if not (out / CARD_NAME).is_file():
        return None
    return source_file(out / CARD_NAME, CARD_NAME).read().decode("utf-8", "replace")
