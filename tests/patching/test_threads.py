"""``Crew``: tasks side by side, in order, and no thread idle where there is something to do."""

from __future__ import annotations

import threading

import pytest

from qkpatch.patching.threads import Crew


def test_a_thread_that_is_done_before_the_first_takes_the_next() -> None:
    third_begins = threading.Event()

    def task(item: int) -> bool:
        if item == 2:
            third_begins.set()
        return item != 0 or third_begins.wait(10)

    with Crew(2) as crew:
        assert list(crew.map(task, range(3))) == [True] * 3


@pytest.mark.parametrize("alongside", [0, 3])
def test_no_more_compute_at_a_time_than_there_are_threads(alongside: int) -> None:
    """Though there are more that wait for disks; and none begins far ahead of whoever reads."""
    lock, now, most, begun = threading.Lock(), 0, 0, 0
    both = threading.Barrier(2)

    def task(item: int) -> int:
        nonlocal now, most, begun
        with lock:
            now, begun = now + 1, begun + 1
            most = max(most, now)
        if item < 2:
            both.wait(10)
        with lock:
            now -= 1
        return item

    with Crew(2, alongside) as crew:
        results = crew.map(task, range(50))
        assert next(results) == 0
        assert begun <= 3
        assert list(results) == list(range(1, 50))
    assert most == 2
