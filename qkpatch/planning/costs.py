"""What a plan costs: bytes, memory, and a coarse estimate of time, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkpatch.output.space import free_bytes
from qkpatch.planning.memory import choose_threads, peak_memory

if TYPE_CHECKING:
    from qkpatch.planning.plan import EditPlan
    from qkpatch.recipes.heads import HeadLayout

# Measured on two cores and an ordinary cloud disk (docs/bench.md): llama-7b, cold, 13.5 GB in 54 s while 288 heads of
# 128 are edited; one-5g in memory, the same heads by two threads in 14 s; geometry-70b, 576 heads of 128, eight to a
# key head, and hidden size 8192, by one thread in 39 s. How a head's time grows: `python -m scripts.bench.heads`.
START = 1.2  # seconds: Python, and `import torch` while files are copied
COPIED = 0.3e9  # bytes a second, read and written
HEAD = 0.065  # seconds of a thread for a head of 128 with keys of its own, at hidden size 4096
LEAST = 0.003  # seconds of a thread for a head of any size


@dataclass(frozen=True)
class Costs:
    """What a run takes; None where that is not known."""

    edited_bytes: int
    output_bytes: int | None  # None: SOURCE is edited in place
    undo_bytes: int | None  # likewise, what leads back
    free_disk_bytes: int | None
    expected_peak_memory_bytes: int
    threads: int
    estimated_seconds: float | None
    heads_a_second: float | None  # of a thread, what that is estimated by

    def to_json(self) -> dict[str, Any]:
        """What is known, as a JSON object."""
        return {key: value for key, value in vars(self).items() if value is not None}


def costs_of(
    plan: EditPlan, place: Path, device: str, threads: int | None, undo_bytes: int | None = None
) -> Costs:
    """The costs of a plan.

    Raises:
        UsageError: so many threads are absurd.
    """
    n_tensors, n_heads = len(plan.model.checkpoint.tensors), len(plan.settings.heads)
    n_threads = choose_threads(threads, plan.head_memory, n_tensors)
    is_in_place = undo_bytes is not None
    # In place, rows are written once beside SOURCE, once into a patch file, once into the undo file, and into SOURCE.
    carried = 4 * plan.edited_bytes if is_in_place else plan.output_bytes
    work = 0.0 if plan.patch else sum(n_heads * head_seconds(edit.layout) for edit in plan.edits)
    is_known = device == "cpu"
    return Costs(
        edited_bytes=plan.edited_bytes,
        output_bytes=None if is_in_place else plan.output_bytes,
        undo_bytes=undo_bytes,
        free_disk_bytes=free_bytes(place),
        expected_peak_memory_bytes=peak_memory(n_threads, plan.head_memory, n_tensors),
        threads=n_threads,
        estimated_seconds=round(run_seconds(carried, work / n_threads), 1) if is_known else None,
        heads_a_second=round(len(plan.edits) * n_heads / work, 1) if is_known and work else None,
    )


def head_seconds(layout: HeadLayout) -> float:
    """Seconds of a thread for one head: half of it its query's, half its key's, which are factored once for a group."""
    size: float = layout.d_model / 4096 * (layout.d_head / 128) ** 1.5
    return LEAST + HEAD * size * (1 + layout.n_kv_heads / layout.n_heads) / 2


def run_seconds(n_bytes: int, computing: float) -> float:
    """Seconds of a run that copies ``n_bytes`` while heads are computed for ``computing`` seconds."""
    return START + max(n_bytes / COPIED, computing)
