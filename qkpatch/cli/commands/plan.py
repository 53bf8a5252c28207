"""``qkpatch plan``: what ``apply`` would do, and what it would cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import EditFlags, MarkdownOpt, OutOpt, RunFlags, ShowFlags, SourceArg
from qkpatch.output.options import Writing
from qkpatch.planning.request import check_device_name

if TYPE_CHECKING:
    from qkpatch.planning.plan import EditPlan


@command
def plan(
    source: SourceArg,
    *,
    out: OutOpt = None,
    edit: EditFlags,
    run: RunFlags,
    show: ShowFlags,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="OUT may be an earlier output.")] = False,
    markdown: MarkdownOpt = False,
) -> None:
    """Show what `apply` would do, from headers alone: tensors, heads, bytes, disk and memory."""
    from qkpatch import api

    check_device_name(run.device)
    made = api.plan(source, edit.request, out=out, writing=Writing(overwrite=overwrite))
    preview(made, out, run, show, is_markdown=markdown)


def preview(
    plan: EditPlan, out: Path | None, run: RunFlags, show: ShowFlags, *, is_markdown: bool = False
) -> None:
    """Show a plan of which OUT would be ``out``, and what it would cost as ``run`` says."""
    from qkpatch.cli.console import print_text, show_warnings
    from qkpatch.cli.tables import show_plan
    from qkpatch.common.json_text import canonical_json
    from qkpatch.output.space import free_bytes
    from qkpatch.planning.manifest import planned_manifest
    from qkpatch.planning.memory import choose_threads, peak_memory

    n_tensors = len(plan.model.checkpoint.tensors)
    n_threads = choose_threads(run.threads, plan.head_memory, n_tensors)
    costs = {
        "output_bytes": plan.output_bytes,
        "edited_bytes": plan.edited_bytes,
        "expected_peak_memory_bytes": peak_memory(n_threads, plan.head_memory, n_tensors),
        "threads": n_threads,
    }
    free_disk = free_bytes(plan.default_out if out is None else out)
    if free_disk is not None:
        costs["free_disk_bytes"] = free_disk
    if out is None and free_disk is not None and free_disk < plan.output_bytes:
        what = f"OUT takes {plan.output_bytes:,} bytes, and {free_disk:,} are free here"
        plan = replace(plan, warnings=(*plan.warnings, f"{what}: choose a place with -o"))
    if not show.quiet and not is_markdown:
        show_warnings(plan.warnings)
    if show.as_json:
        print_text(canonical_json({**planned_manifest(plan, run.device).to_json(), "costs": costs}))
    elif not show.quiet:
        show_plan(plan, costs, is_markdown=is_markdown)
