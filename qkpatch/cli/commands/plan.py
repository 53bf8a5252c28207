"""``qkpatch plan``: what ``apply`` would do, and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import (
    CopyFlags,
    EditFlags,
    InPlaceOpt,
    MarkdownOpt,
    OutOpt,
    RunFlags,
    ShowFlags,
    SourceArg,
    place_of,
)
from qkpatch.common.text import Warned, warned
from qkpatch.errors import UsageError
from qkpatch.output.options import Writing
from qkpatch.planning.request import check_device_name

if TYPE_CHECKING:
    from qkpatch.patches.in_place import Foreseen
    from qkpatch.planning.costs import Costs
    from qkpatch.planning.plan import EditPlan


@command
def plan(
    source: SourceArg,
    *,
    out: OutOpt = None,
    edit: EditFlags,
    copy: CopyFlags,
    run: RunFlags,
    show: ShowFlags,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="OUT may be an earlier output.")] = False,
    in_place: InPlaceOpt = False,
    markdown: MarkdownOpt = False,
) -> None:
    """Show what `apply` would do, from headers alone: tensors, heads, bytes, disk, memory and time."""
    from qkpatch import api
    from qkpatch.cli.console import end_strictly

    check_device_name(run.device)
    if in_place and (out is not None or overwrite):
        what = f"{'--overwrite' if out is None else '--out'} does not go with --in-place"
        raise UsageError(what, where="--in-place", fix="leave one of them out")
    place = None if out is None else place_of(out)
    made = api.plan(source, copy.over(edit.request), out=place, writing=Writing(overwrite=overwrite))
    warnings = preview(made, place, run, show, is_in_place=in_place, is_markdown=markdown)
    end_strictly(warnings, show)


def preview(
    plan: EditPlan, out: Path | str | None, run: RunFlags, show: ShowFlags, *,
    is_in_place: bool = False, is_markdown: bool = False,
) -> Sequence[str]:  # fmt: skip
    """Show a plan of which OUT would be ``out``, and what it would cost as ``run`` says; returns its warnings."""
    from qkpatch import api
    from qkpatch.cli.console import print_text, show_warnings
    from qkpatch.cli.tables import show_plan
    from qkpatch.common.json_text import canonical_json
    from qkpatch.planning.costs import costs_of
    from qkpatch.planning.manifest import planned_manifest

    foreseen = api.foresee_in_place(plan) if is_in_place else None
    if foreseen is not None:
        plan = replace(plan, is_done=foreseen.is_done)
    place = foreseen.undo if foreseen is not None else out if isinstance(out, Path) else plan.default_out
    undo_bytes = None if foreseen is None else foreseen.undo_bytes
    costs = costs_of(plan, place, run.device, run.threads, undo_bytes)
    if isinstance(out, str):  # a store has room, and how fast it is nobody knows
        costs = replace(costs, free_disk_bytes=None, estimated_seconds=None)
    if out is None and (lack := _lack_of_room(plan, foreseen, costs)) is not None:
        plan = replace(plan, warnings=(*plan.warnings, lack))
    if not show.quiet and not is_markdown:
        show_warnings(plan.warnings)
    if show.as_json:
        print_text(canonical_json({**planned_manifest(plan, run.device).to_json(), "costs": costs.to_json()}))
    elif not show.quiet:
        show_plan(plan, costs, foreseen, is_markdown=is_markdown)
    return plan.warnings


def _lack_of_room(plan: EditPlan, foreseen: Foreseen | None, costs: Costs) -> Warned | None:
    """What is missing where nobody chose the place; None where there is room."""
    what, needed, fix = "OUT takes", plan.output_bytes, "choose a place with -o"
    if foreseen is not None:
        what, needed, fix = "meanwhile it takes", foreseen.room, "free some, or edit a copy: -o OUT"
    free = costs.free_disk_bytes
    if free is None or free >= needed:
        return None
    return warned(f"{what} {needed:,} bytes, and {free:,} are free here: {fix}")
