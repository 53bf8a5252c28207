"""What people see: tables and progress bars on a terminal, plain text when piped, errors with their cure.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qkpatch.cli.redaction import Redacted
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.common.text import size_text
from qkpatch.errors import FileSystemError, QKPatchError, plain, shown

_PIPED_WIDTH = 140  # rich assumes 80 where there is no terminal, which cuts tensor names


class _Console(Console):
    """Rich's console; a reader who leaves early is an exception here, not an exit of rich's own."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return _Console(stderr=stderr, width=None if stream.isatty() else _PIPED_WIDTH, highlight=False)


def prepare_streams() -> None:
    """Make stdout and stderr take any text, whatever the locale, and be there even when closed; redact stderr."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # All that goes there: messages, logs and warnings of libraries, tracebacks of any thread.
    sys.stderr = Redacted(sys.stderr)


@contextmanager
def results() -> Iterator[Console]:
    """The console for stdout; output that cannot be delivered is an error, not a traceback.

    Raises:
        FileSystemError: stdout is full or broken. What the command did stays done.
    """
    try:
        yield _console()
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
        raise FileSystemError(
            f"the result cannot be printed: {error.strerror}",
            where="stdout",
            fix="the command itself was done",
        ) from error


def silence_stdout() -> None:
    """Let nothing more reach a stdout that takes nothing: the interpreter must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def safe(text: str) -> str:
    """``text`` for one line of the terminal: neither rich's markup nor anything out of a file acts in it."""
    return escape(plain(text))


def print_text(text: str) -> None:
    """Print a document on stdout, not wrapped; nothing acts in it."""
    with results():
        sys.stdout.write(shown(text))


@contextmanager
def verdict(code: int) -> Iterator[None]:
    """Print what was found, and end with ``code``, also where printing fails: that must not hide a mismatch."""
    try:
        yield
    except (FileSystemError, BrokenPipeError) as error:
        if not code:
            raise
        if isinstance(error, FileSystemError):
            show_error(error)
        else:
            silence_stdout()
    if code:
        raise typer.Exit(code)


def print_json(value: Any) -> None:
    """Print ``value`` on stdout as JSON with sorted keys."""
    print_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def show_error(error: QKPatchError) -> None:
    """Print an error on stderr: what happened, where, and what to do."""
    _say(f"[bold red]Error:[/] {escape(error.what)}")
    for label, fact in (("where[/]  ", error.where), ("try[/]    ", error.fix)):
        if fact:
            _say(f"  [dim]{label}{escape(fact)}")


def show_warnings(warnings: Sequence[str]) -> None:
    """Each warning on a line of its own, on stderr."""
    for warning in warnings:
        _say(f"[yellow]Warning:[/] {safe(warning)}")


def note(text: str) -> None:
    """Print a remark on stderr."""
    _say(safe(text))


def _say(line: str) -> None:
    with suppress(OSError):
        _console(stderr=True).print(line, soft_wrap=True)


class Bars:
    """Progress drawn on stderr: bytes copied or compared, heads edited."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bytes, self._heads = TaskID(0), TaskID(0)

    def begins(self, what: str, n_bytes: int, n_heads: int, of: str = "heads") -> None:
        """Bars of another part of the work, in place of those of the one before; none for what has bars of its own."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._bytes = self._progress.add_task(
            f"{what} {size_text(n_bytes)}", total=n_bytes, visible=n_bytes > 0
        )
        self._heads = self._progress.add_task(f"{n_heads} {of}", total=n_heads, visible=n_heads > 0)
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


@contextmanager
def bars(*, quiet: bool) -> Iterator[Observer]:
    """Progress while the block runs; nothing at all when quiet or when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield UNSEEN
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Left to rich, lines that come meanwhile would be wrapped, and an address in two halves is not redacted.
    progress = Progress(*columns, console=_console(stderr=True), transient=True, redirect_stderr=False)
    try:
        yield Bars(progress)
    finally:
        progress.stop()


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table for programs, each row as it comes."""
    with results():
        lines = csv.writer(sys.stdout, lineterminator="\n")  # while bars are drawn, sys.stdout is another
        lines.writerow(columns)
        lines.writerows(rows)


def output_width(*, stderr: bool = False) -> int:
    """Columns of stdout or stderr, for text that is wrapped elsewhere."""
    return _console(stderr=stderr).width
