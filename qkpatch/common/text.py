"""Text for a terminal: long lines are folded with their indent."""

from __future__ import annotations

import textwrap

from qkpatch.errors import plain

_NARROWEST = 40  # columns; in fewer, lines are left to the terminal


def cut(text: str, most: int) -> str:
    """``text``, or its first ``most`` characters and an ellipsis."""
    return text if len(text) <= most else f"{text[:most]}…"


def wrapped(line: str, width: int) -> str:
    """``line`` made :func:`plain` and folded to ``width`` columns; words, such as tensor names, are not broken."""
    text = plain(line)
    if len(text) <= width:
        return text
    indent = " " * (len(text) - len(text.lstrip()))
    return "\n".join(
        textwrap.wrap(
            text.lstrip(), max(width, _NARROWEST), initial_indent=indent, subsequent_indent=indent + "    ",
            break_long_words=False, break_on_hyphens=False,
        )
    )  # fmt: skip
