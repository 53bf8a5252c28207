"""Text for a terminal: long lines are folded with their indent."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NewType

from qkpatch.errors import plain

_NARROWEST = 40  # columns; in fewer, lines are left to the terminal
LONGEST = 2000  # characters of what is shown on one line: files put names and texts of any length into it

NUMBER = "a number has no quotes, a point for a comma, and one before an e: 1.0e-3"  # in YAML


def cut(text: str, most: int) -> str:
    """``text``, or its first ``most`` characters and an ellipsis."""
    return text if len(text) <= most else f"{text[:most]}…"


Warned = NewType("Warned", str)


def warned(what: str) -> Warned:
    """A warning, of bounded length: names of tensors and files are of any. All are made here, and docs list them."""
    return Warned(cut(what, LONGEST))


def meant(unknown: Iterable[str], known: Iterable[str]) -> str:
    """What of the known may have been meant, as a question to be put before more; empty where nothing is near."""
    names = list(known)
    near = [found for word in unknown for found in get_close_matches(word[:80], names, 1)]
    return f"did you mean {', '.join(dict.fromkeys(near))}? " if near else ""


def as_word(path: str) -> str:
    """A path as it is written on a command line, where one that begins with a dash would be taken for an option."""
    return f"./{path}" if path.startswith("-") else path


def verify_command(out: str, source: str, recipe: str | None = None) -> str:
    """What proves OUT, to be copied from where it is shown."""
    own = [] if recipe is None else ["--recipe", as_word(recipe)]
    return shlex.join(["qkpatch", "verify", as_word(out), "--source", as_word(source), *own])


def wrapped(line: str, width: int) -> str:
    """``line`` made :func:`plain` and folded to ``width`` columns; words, such as tensor names, are not broken."""
    text = cut(plain(line), LONGEST)
    if len(text) <= width:
        return text
    indent = " " * (len(text) - len(text.lstrip()))
    return "\n".join(
        textwrap.wrap(
            text.lstrip(), max(width, _NARROWEST), initial_indent=indent, subsequent_indent=indent + "    ",
            break_long_words=False, break_on_hyphens=False,
        )
    )  # fmt: skip


def about(seconds: float) -> str:
    """A time that is not known exactly, in the unit that suits it: ``25 s``, ``3 min``."""
    unit, length = ("s", 1) if seconds < 90 else ("min", 60) if seconds < 90 * 60 else ("h", 3600)
    n = max(1.0, seconds / length)
    step = 1 if n < 10 else 5
    return f"{step * round(n / step)} {unit}"


def size_text(n: float) -> str:
    """A number of bytes in the unit that suits it: ``1.5 GB``."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while n >= 1000 and len(units) > 1:
        n, units = n / 1000, units[1:]
    return f"{n:.0f} B" if units[0] == "B" else f"{n:.1f} {units[0]}"
