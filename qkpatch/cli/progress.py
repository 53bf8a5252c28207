"""How far a run is: bars on a terminal, elsewhere a line now and then. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Lock

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from qkpatch.cli.console import WIDE, note, stderr_console
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.common.text import size_text

_SECONDS_A_LINE = 30


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))


class _Pace(ProgressColumn):
    """How fast, where there is room, how long it has taken, and how long it will."""

    is_brief = False

    def render(self, task: Task) -> Text:
        """As rich asks for it."""
        rate = None if self.is_brief else task.finished_speed or task.speed
        unit = task.fields["unit"]
        pace = "" if rate is None else f"{size_text(int(rate)) if unit == 'B' else f'{rate:.1f} {unit}'}/s, "
        return Text(f"{pace}{_clock(task.elapsed)} gone, {_clock(task.time_remaining)} left", style="dim")


class _Bars:
    """Bytes copied or compared, and heads edited, each as a bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def begins(self, what: str, n_bytes: int, n_heads: int, of: str = "heads") -> None:
        """Bars of another part of the work, in place of those of the one before; none for what has bars of its own."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        add = self._progress.add_task
        self._bytes = add(f"{what} {size_text(n_bytes)}", total=n_bytes, visible=n_bytes > 0, unit="B")
        self._heads = add(
            f"{n_heads} {of if n_heads != 1 else of[:-1]}", total=n_heads, visible=n_heads > 0, unit=of
        )
        if n_bytes or n_heads:
            self._progress.start()
        else:
            self._progress.stop()

    def copied(self, n_bytes: int) -> None:
        """Advance the bar of bytes."""
        self._progress.advance(self._bytes, n_bytes)

    def edited(self, n_heads: int) -> None:
        """Advance the bar of heads."""
        self._progress.advance(self._heads, n_heads)


class _Lines:
    """The same as lines, where nobody draws."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.begins("", 0, 0)

    def begins(self, what: str, n_bytes: int, n_heads: int, of: str = "heads") -> None:
        """Another part of the work."""
        self._what, self._of, self._wanted, self._done = what, of, (n_bytes, n_heads), [0, 0]
        self._began = self._told = time.monotonic()

    def copied(self, n_bytes: int) -> None:
        """Count bytes."""
        self._count(0, n_bytes)

    def edited(self, n_heads: int) -> None:
        """Count heads."""
        self._count(1, n_heads)

    def _count(self, which: int, more: int) -> None:
        with self._lock:
            self._done[which] += more
            now = time.monotonic()
            if now - self._told < _SECONDS_A_LINE:
                return
            self._told = now
        shares = [done / wanted for done, wanted in zip(self._done, self._wanted, strict=True) if wanted]
        gone, share = now - self._began, min(shares, default=0.0)
        left = gone / share - gone if share else None
        n_bytes = f"{size_text(self._done[0])} of {size_text(self._wanted[0])}" if self._wanted[0] else ""
        n_heads = f"{self._done[1]} of {self._wanted[1]} {self._of}" if self._wanted[1] else ""
        note(
            f"{self._what}: {', '.join(filter(None, (n_bytes, n_heads)))}, {_clock(gone)} gone, {_clock(left)} left"
        )


@contextmanager
def bars(*, quiet: bool) -> Iterator[Observer]:
    """Progress while the block runs; nothing at all when quiet."""
    if quiet:
        yield UNSEEN
        return
    console = stderr_console()
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield _Lines()
        return
    whole = Column(no_wrap=True)
    share = TextColumn("{task.percentage:>3.0f}%", table_column=whole)
    columns = [TextColumn("{task.description}", table_column=whole), BarColumn(), share, pace := _Pace(whole)]
    pace.is_brief = console.width < WIDE
    if pace.is_brief:
        del columns[1]
    # Left to rich, lines that come meanwhile would be wrapped, and an address in two halves is not redacted.
    progress = Progress(*columns, console=console, transient=True, redirect_stderr=False)
    try:
        yield _Bars(progress)
    finally:
        progress.stop()
