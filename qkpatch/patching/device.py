"""Where heads are computed: the device, how many heads at once, with how many threads, and in which stream.

The dtype is float64 on every card. Nine edited layers of a 7B model take about 0.2 · 10¹² operations, less than a
second at the 1/64 rate of consumer cards. In float32, small numbers of a weight would end several units in the last
place off, because the change is as exact as the largest (``test_float32_is_not_enough``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qkpatch.errors import UsageError
from qkpatch.planning.request import check_device_name

MOST_TOGETHER = 16  # heads; more would only take more memory
_OF_THREAD = threading.local()


def choose_device(name: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:i``.

    Raises:
        UsageError: an unknown name, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device_name(name)
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s)"
        raise UsageError(f"{name} is not there: {seen}", where="--device", fix="use --device cpu")
    return device


def devices() -> list[str]:
    """What heads can be computed on, as ``--device`` has it."""
    cards = range(torch.cuda.device_count())
    return ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in cards)]


def heads_together(device: torch.device, per_head: int, threads: int) -> int:
    """How many heads are computed at once: one on a CPU; on CUDA as many as leave half of the free memory.

    The result of a head does not depend on it but for rounding in float64.
    """
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(MOST_TOGETHER, free // 2 // (threads * max(per_head, 1))))


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """For each thread that computes: one BLAS thread; on CUDA, a stream of its own.

    One head's factorisations are too small to share: QR of 4096 × 128 on two cores takes 15 ms with one BLAS thread;
    with two, 10 to 14 ms when nothing else runs and 117 ms when something does. One thread each also gives the same
    bits whatever the machine. With streams, one thread computes while another reads, sends or waits for LAPACK.

    Raises:
        UsageError: the card's memory is taken.
    """
    torch.set_num_threads(1)  # of this thread alone
    if device.type != "cuda":
        yield
        return
    if not hasattr(_OF_THREAD, "stream"):  # once, because each stream keeps the memory that it has used
        _OF_THREAD.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.stream(_OF_THREAD.stream):
            yield
    except torch.cuda.OutOfMemoryError as error:
        what = f"{device} has no memory left for a few heads: {error}"
        raise UsageError(what, where="--device", fix="use fewer --threads, or --device cpu") from error
