"""``qkpatch card``: the model card of an edited checkpoint, and its publication with that card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkpatch.boundary import command
from qkpatch.commands.publishing import push_out, push_wish
from qkpatch.errors import FileSystemError, UsageError
from qkpatch.options import (
    CreatePrOpt,
    DebugOpt,
    IncludeHiddenOpt,
    IncludeOpt,
    PrivateOpt,
    PushOpt,
    QuietOpt,
)

if TYPE_CHECKING:
    from qkpatch.manifest import Manifest


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
    private: PrivateOpt = False,
    create_pr: CreatePrOpt = False,
    include: IncludeOpt = None,
    include_hidden: IncludeHiddenOpt = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: do all but send.")] = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Print the model card of OUT; with --push, verify OUT and publish it with the card.

    Files that the base repository has are copied on the Hub's side, the others are sent, in one commit.
    """
    from qkpatch.card import model_card
    from qkpatch.console import print_text
    from qkpatch.results import compare

    if (results is None) != (base_results is None):
        raise UsageError(
            "an effect is a difference: --results and --base-results go together", fix="run both models"
        )
    comparison = None if results is None or base_results is None else compare(base_results, results)
    wish = push_wish(
        push,
        private=private,
        create_pr=create_pr,
        include=include,
        include_hidden=include_hidden,
        comparison=comparison,
    )
    if wish is not None:
        address = push_out(out, wish, source, recipe, quiet=quiet, dry_run=dry_run)
        print_text("" if address is None else f"{address}\n")
        return
    if dry_run or source is not None or recipe is not None:
        raise UsageError("--dry-run, --source and --recipe go with --push", fix="add --push org/name")
    manifest, base_card = read_out(out)
    print_text(model_card(manifest, out.resolve().name, base_card, comparison))


def read_out(out: Path) -> tuple[Manifest, str | None]:
    """The manifest, and SOURCE's card, which OUT has as it was.

    Raises:
        FileSystemError: there is no manifest; or one of them is a link, whatever it leads to.
    """
    from qkpatch.checkpoint.present import Present
    from qkpatch.checkpoint.rooted import Rooted
    from qkpatch.checkpoint.source import MANIFEST_NAME
    from qkpatch.verify import CARD_NAME, recorded

    with Rooted(out) as root:
        present = Present(root)
        for name in (MANIFEST_NAME, CARD_NAME):
            if name in present.odd:
                raise FileSystemError(
                    f"{present.odd[name]}, which qkpatch never writes",
                    where=present.where(name),
                    fix="do not trust this directory; apply again",
                )
        if MANIFEST_NAME not in present.files:
            raise FileSystemError(
                f"no {MANIFEST_NAME} there", where=str(out), fix="give the directory that qkpatch apply wrote"
            )
        card = present.read(CARD_NAME) if CARD_NAME in present.files else None
        return recorded(present), None if card is None else card.decode("utf-8", "replace")
