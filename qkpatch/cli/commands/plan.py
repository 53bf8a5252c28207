"""``qkpatch plan``: what ``apply`` would do, and what it would cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import EditFlags, MarkdownOpt, RunFlags, ShowFlags, SourceArg, expanded
from qkpatch.output.options import Writing
from qkpatch.planning.request import check_device_name

if TYPE_CHECKING:
    from qkpatch.planning.plan import EditPlan


@command
def plan(
    source: SourceArg,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where OUT would be.", callback=expanded)
    ] = None,
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
    """Show a plan and what it would cost.

    Args:
        plan: the plan.
        out: where OUT would be; None where it is not named.
        run: device and threads, of which cost depends.
        show: what is printed.
        is_markdown: whether as a block of Markdown, warnings in it.
    """
    from qkpatch.cli.console import print_text, show_warnings
    from qkpatch.cli.tables import show_plan
    from qkpatch.common.json_text import canonical_json
    from qkpatch.output.space import free_bytes
    from qkpatch.planning.manifest import planned_manifest
    from qkpatch.planning.memory import choose_threads, peak_memory

    n_tensors = len(plan.model.checkpoint.tensors)
    n_threads = choose_threads(run.threads, plan.head_memory, n_tensors)
    memory = peak_memory(n_threads, plan.head_memory, n_tensors)
    free_disk = free_bytes(plan.default_out if out is None else out)
    if out is None and free_disk is not None and free_disk < plan.output_bytes:
        what = (
            f"OUT takes {plan.output_bytes:,} bytes, and {free_disk:,} are free here: choose a place with -o"
        )
        plan = replace(plan, warnings=(*plan.warnings, what))
    if not show.quiet and not is_markdown:
        show_warnings(plan.warnings)
    if show.as_json:
        costs = {
            "output_bytes": plan.output_bytes,
            "edited_bytes": plan.edited_bytes,
            "expected_peak_memory_bytes": memory,
            "threads": n_threads,
            **({} if free_disk is None else {"free_disk_bytes": free_disk}),
        }
        print_text(canonical_json({**planned_manifest(plan, run.device).to_json(), "costs": costs}))
    elif not show.quiet:
        show_plan(plan, free_disk, memory, n_threads, is_markdown=is_markdown)
