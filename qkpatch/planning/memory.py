"""What a run takes of memory, and how many threads fit in it. Neither shard nor model size is part of it."""

from __future__ import annotations

from collections.abc import Iterable

from qkpatch.common.system import processors
from qkpatch.errors import UsageError
from qkpatch.recipes.heads import HeadLayout

# Measured: 250 to 270 MiB for the smallest checkpoint, nearly all of it `import torch` (CPU build of 2.13), and on top
# per thread, in arrays of d_head × d_model float64: 9 to 13 in the full channel, 14 to 16 in the others, and up to 18
# where the norm before attention is folded in (`python -m scripts.bench.heads`, and whole runs).
BASE = 270 << 20
WORK_ARRAYS = 18
BYTES_PER_TENSOR = 1100  # of a parsed header; a mixture of experts can have 10^5 tensors
USUAL_PEAK = 450 << 20  # what threads are chosen to stay within, where nothing is asked for
MAX_THREADS = 256


def head_memory(layouts: Iterable[HeadLayout]) -> int:
    """Bytes that a thread takes while it edits one head of the largest layout."""
    return WORK_ARRAYS * 8 * max((layout.d_head * layout.d_model for layout in layouts), default=0)


def peak_memory(threads: int, per_thread: int, n_tensors: int) -> int:
    """Expected peak resident bytes: torch, the arrays of one head per thread, the headers."""
    return BASE + threads * per_thread + BYTES_PER_TENSOR * n_tensors


def choose_threads(asked: int | None, per_thread: int, n_tensors: int) -> int:
    """``asked``, or as many as there are processors and stay within :data:`USUAL_PEAK`; at least one.

    Raises:
        UsageError: fewer than one, or absurdly many.
    """
    if asked is not None:
        if type(asked) is not int or not 1 <= asked <= MAX_THREADS:
            raise UsageError(f"{asked!r:.80} is not between 1 and {MAX_THREADS}", where="--threads")
        return asked
    fitting = (USUAL_PEAK - peak_memory(0, per_thread, n_tensors)) // max(per_thread, 1)
    return max(1, min(processors(), fitting))
