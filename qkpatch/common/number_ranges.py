"""Layer and head lists: ``10-18,20``, inclusive, ascending."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import index

from qkpatch.errors import UsageError

MIDDLE_THIRD = "middle-third"

_MOST = 10**6  # there are no more numbers of six digits; a short text could name them over and over
_ITEM = re.compile(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", re.ASCII)


def parse_ranges(text: str, what: str) -> tuple[int, ...]:
    """``"10-18,20"`` -> ``(10, ..., 18, 20)``; sorted, each once.

    Raises:
        UsageError: empty, reversed (``18-10``), repeated or malformed.
    """
    numbers: list[int] = []
    for item in text.split(","):
        found = _ITEM.fullmatch(item)
        if not found:
            raise UsageError(
                f"cannot read {item.strip()!r} as a number or a range",
                where=f"{what} {text!r}",
                fix="write inclusive ranges such as 10-18,20",
            )
        first = int(found[1])
        last = int(found[2] or found[1])
        if last < first:
            raise UsageError(
                f"range {first}-{last} is reversed", where=f"{what} {text!r}", fix=f"write {last}-{first}"
            )
        numbers.extend(range(first, last + 1))
        if len(numbers) > _MOST:
            raise UsageError("some numbers are named twice", where=f"{what} {text!r:.80}")
    repeated = sorted(n for n, times in Counter(numbers).items() if times > 1)
    if repeated:
        raise UsageError(f"{format_ranges(repeated)} named twice", where=f"{what} {text!r}")
    return tuple(sorted(numbers))


Numbers = int | str | Iterable[int]


def as_numbers(given: Numbers, what: str) -> tuple[int, ...]:
    """What :func:`parse_ranges` gives, also from one number or several.

    Raises:
        UsageError: as :func:`parse_ranges`; or something else than whole numbers from 0 on.
    """
    if isinstance(given, str):
        return parse_ranges(given, what)
    several = given if isinstance(given, Iterable) else [given]
    try:
        numbers = [-1 if n is True or n is False else index(n) for n in several]
    except TypeError:
        numbers = [-1]
    if not numbers or min(numbers) < 0 or len(numbers) > _MOST:
        raise UsageError(f"{given!r:.80} is no list of numbers from 0 on", where=what)
    return parse_ranges(",".join(map(str, numbers)), what)


def format_ranges(numbers: Sequence[int]) -> str:
    """The shortest text that :func:`parse_ranges` reads back: ``(10, 11, 12, 20)`` -> ``"10-12,20"``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def abbreviate(items: Sequence[str], limit: int) -> str:
    """The first ``limit`` items, and an ellipsis where there are more."""
    return ", ".join(items[:limit]) + ("…" if len(items) > limit else "")


def some(items: Sequence[str], limit: int = 3, separator: str = ", ") -> str:
    """The first ``limit`` items, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def middle_third(n_layers: int) -> tuple[int, ...]:
    """Layers ``n // 3`` to ``2n // 3 - 1``: 10-19 of 30, 10-20 of 32. Our default, not the paper's."""
    return tuple(range(n_layers // 3, max(2 * n_layers // 3, n_layers // 3 + 1)))
