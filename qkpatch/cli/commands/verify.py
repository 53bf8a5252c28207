"""``qkpatch verify``: OUT against SOURCE and its own manifest; ``qkpatch revert``: back from an edit in place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import (
    DebugOpt,
    JsonOpt,
    OutOrUrlArg,
    QuietOpt,
    check_present,
    expanded,
    named,
    place_of,
)
from qkpatch.errors import MismatchError


@command
def verify(
    out: OutOrUrlArg,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="What it was made from.",
            show_default="the repository, or store, that the manifest names",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The YAML file, where it was made by one of yours.", metavar="FILE")
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option("--recompute/--no-recompute", help="Compute the edited heads anew, or bytes alone."),
    ] = True,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Prove that OUT is SOURCE with the recorded edit and nothing else: bytes, and arithmetic. Exit 1 if not."""
    from qkpatch import api
    from qkpatch.cli.console import note, print_json, verdict
    from qkpatch.cli.progress import bars
    from qkpatch.cli.tables import show_verification

    place = place_of(out)
    if isinstance(place, Path):
        check_present(place)
    with bars(quiet=quiet or as_json) as observer:
        result = api.verify(place, source, recipe=recipe, recompute=recompute, observer=observer)
    if source is None and result.plan is not None and not quiet:
        note(f"SOURCE is {result.plan.model.source.text}, as the manifest says")
    with verdict(0 if result.ok else MismatchError.exit_code):
        if as_json:
            print_json(result.to_json())
        elif not quiet:
            show_verification(result, place)


@command
def revert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="What was edited in place.", show_default=False, parser=named),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="OUT", help="Write a restored copy instead.", callback=expanded),
    ] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Make SOURCE what it was before `apply --in-place`, byte for byte, also where that was cut short."""
    from qkpatch import api
    from qkpatch.cli.console import note, print_json
    from qkpatch.common.number_ranges import some

    changed = api.revert(source, out)
    if as_json:
        print_json({"restored": str(out or source), "changed_since": list(changed)})
    elif not quiet:
        but = f", but for what changed since, by the time of {some(changed)}" if changed else ""
        note(f"{source} is as it was before its edit in place{but}" if out is None else f"Wrote {out}{but}")
