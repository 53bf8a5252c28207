"""What people see: text on a terminal, plain when piped, errors with their cure.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from qkpatch.cli.redaction import Redacted
from qkpatch.common.text import LONGEST, cut
from qkpatch.errors import FileSystemError, QKPatchError, WarnedError, plain, shown

if TYPE_CHECKING:
    from qkpatch.cli.flags import ShowFlags

_MARKDOWN_WIDTH = 100
_PIPED_WIDTH = 140  # rich assumes 80 where there is no terminal, which cuts tensor names
_MOST = 100  # lines of one kind
WIDE = 80  # columns, in less of which one draws closer together
# Signs of ours for a terminal that has none; most are as wide, so that columns stay columns.
_SIGNS = {
    "‖": "|", "Δ": "d", "σ": "s", "Σ": "S", "α": "a", "×": "x", "−": "-", "–": "-", "→": ">", "₁": "1", "²": "^2",
    "ᵀ": "^T", "≥": ">=", "≤": "<=", "…": "...", "─": "-", "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip
_ASCII = str.maketrans(_SIGNS)


class _Console(Console):
    """Rich's console; a reader who leaves early is an exception here, not an exit of rich's own."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Spelled:
    """A stream that has no signs of ours, as rich writes to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be read there."""
        return int(self._stream.write(text.translate(_ASCII)))


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # A file called :heart: is not a heart.
    width = None if stream.isatty() else _PIPED_WIDTH
    drawn = _Console(stderr=stderr, width=width, highlight=False, emoji=False)
    if not drawn.encoding.startswith("utf"):
        drawn.file = _Spelled(stream)  # type: ignore[assignment]
    return drawn


def stderr_console() -> Console:
    """The console for what is no result."""
    return _console(stderr=True)


def prepare_streams() -> None:
    """Make stdout and stderr take any text, whatever the locale, and be there even when closed; redact stderr."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    Console.on_broken_pipe = _Console.on_broken_pipe  # type: ignore[assignment,method-assign] # also of Typer's --help
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
        what = f"the result cannot be printed: {error.strerror}"
        raise FileSystemError(what, where="stdout", fix="the command itself was done") from error


@contextmanager
def markdown_results(title: str) -> Iterator[Console]:
    """A console whose text becomes a block of Markdown on stdout, below ``title``, in which nothing acts.

    Raises:
        FileSystemError: as :func:`results`.
    """
    drawn = _Console(file=io.StringIO(), width=_MARKDOWN_WIDTH, highlight=False, emoji=False, no_color=True)
    yield drawn
    print_markdown(title, drawn.file.getvalue())  # type: ignore[attr-defined]


def print_markdown(title: str, text: str) -> None:
    """Print ``text`` as a block of Markdown below ``title``: for a comment, or a summary of a job."""
    lines = "".join(f"{line.rstrip()}\n" for line in text.splitlines()).strip("\n")
    title = plain(title)
    mark, fence = (
        "`" * max(least, 1 + max(map(len, re.findall("`+", what)), default=0))
        for least, what in ((1, title), (3, lines))
    )
    print_text(f"### {mark} {title} {mark}\n\n{fence}text\n{lines}\n{fence}\n")


def silence_stdout() -> None:
    """Let nothing more reach a stdout that takes nothing: the interpreter must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def safe(text: str) -> str:
    """``text`` for one line of the terminal, of bounded length: no markup, nor anything out of a file, acts in it."""
    return escape(cut(plain(text), LONGEST))


def lines(kind: str, texts: Sequence[str]) -> Iterator[str]:
    """A line of each of ``texts``, and of how many more there are."""
    yield from (f"{kind} {safe(text)}" for text in texts[:_MOST])
    if len(texts) > _MOST:
        yield f"{kind} and {len(texts) - _MOST:,} more; --json lists all"


def print_text(text: str) -> None:
    """Print a document on stdout, not wrapped; nothing acts in it."""
    with results():
        sys.stdout.write(shown(text))


def print_told(text: str) -> None:
    """Print text for people on stdout, as it is wrapped, in signs that the terminal has."""
    has_signs = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    print_text(text if has_signs else text.translate(_ASCII))


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


def print_error(error: QKPatchError) -> None:
    """Print an error on stdout as JSON, where that takes it: the exit code stands."""
    with suppress(typer.Exit), verdict(error.exit_code):
        print_json({"error": error.to_json()})


def show_error(error: QKPatchError) -> None:
    """Print an error on stderr: what happened, where, and what to do."""
    _say(f"[bold red]Error:[/] {escape(error.what)}")
    for label, fact in (("where[/]  ", error.where), ("try[/]    ", error.fix)):
        if fact:
            _say(f"  [dim]{label}{escape(fact)}")


def show_warnings(warnings: Sequence[str]) -> None:
    """Each warning on a line of its own, on stderr."""
    for line in lines("[yellow]Warning:[/]", warnings):
        _say(line)


def end_strictly(warnings: Sequence[str], show: ShowFlags) -> None:
    """Once all was shown, end with the code of :class:`WarnedError` where warnings are errors and there are any."""
    if show.strict and warnings:
        error = WarnedError(warnings)
        said = error.what if show.quiet else error.what.partition(":\n")[0]  # they were shown
        _say(f"[bold red]Error:[/] {escape(said)}")
        raise typer.Exit(error.exit_code)


def note(text: str) -> None:
    """Print a remark on stderr."""
    _say(safe(text))


def _say(line: str) -> None:
    with suppress(OSError):
        _console(stderr=True).print(line, soft_wrap=True)


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table for programs, each row as it comes."""
    with results():
        lines = csv.writer(sys.stdout, lineterminator="\n")  # while bars are drawn, sys.stdout is another
        lines.writerow(columns)
        lines.writerows(rows)


def output_width(*, stderr: bool = False) -> int:
    """Columns of stdout or stderr, for text that is wrapped elsewhere."""
    return _console(stderr=stderr).width
