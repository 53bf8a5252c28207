"""Markdown as this repository writes it: no line is longer than 120 characters."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 120


def joined(blocks: Iterable[str]) -> str:
    """A page of blocks; sentences are wrapped, and headings, tables, lists, pictures and code stay as they are."""
    return (
        "\n\n".join(b if b.startswith(("#", "|", "* ", "![", "```")) else _wrapped(b) for b in blocks) + "\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, a line per row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def listed(items: Iterable[str]) -> str:
    """A list, each item wrapped."""
    return "\n".join(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent="* ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for text in items
    )


def _wrapped(text: str) -> str:
    # A sign at the start of a line would begin a quotation or a list: it stays behind the word before it.
    text = re.sub(r" (?=(?:[>+*#-]|\d+\.) )", "\N{NO-BREAK SPACE}", text)
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
