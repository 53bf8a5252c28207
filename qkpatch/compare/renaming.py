"""Two spellings of one model: the prefixes under which tensors that only A has are those that only B has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from qkpatch.checkpoint.source import Stored
from qkpatch.compare.diff_types import Renaming

_LEAST = 2  # parts that two names have in common at their end: `weight` is the end of all
_MOST = 64  # of parts, and of prefixes: more than any model's


def spelled_as(a: Stored, b: Stored) -> tuple[Stored, tuple[Renaming, ...]]:
    """B with A's names, where prefixes explain most of those that only one has; and which prefixes these are."""
    left, only_b = a.tensors.keys() - b.tensors.keys(), b.tensors.keys() - a.tensors.keys()
    fewest = min(len(left), len(only_b))
    names: dict[str, str] = {}  # of A, by B's
    found: list[Renaming] = []
    # The right prefix explains the most; of what is left then, the next does.
    for (first, second), _ in Counter(_candidates(left, only_b)).most_common(_MOST):
        whole = [name for name in left if name.startswith(first)]
        pairs = {second + name[len(first) :]: name for name in whole}
        pairs = {theirs: ours for theirs, ours in pairs.items() if theirs in only_b and theirs not in names}
        if 2 * len(pairs) > len(whole):
            names |= pairs
            found.append(Renaming(first, second, len(pairs)))
            left -= set(pairs.values())
    if not names or 2 * len(names) < fewest:
        return b, ()
    renamed = {
        shard: {names.get(n, n): replace(ref, name=names.get(n, n)) for n, ref in header.tensors.items()}
        for shard, header in b.headers.items()
    }
    headers = {shard: replace(header, tensors=renamed[shard]) for shard, header in b.headers.items()}
    return replace(b, headers=headers), tuple(found)


def _candidates(a: set[str], b: set[str]) -> Iterator[tuple[str, str]]:
    """For each name of A what stands before the longest end that it shares with names of B, where that is one name."""
    ends: dict[str, str | None] = {}
    for name in sorted(b):
        for _, end in _splits(name):
            ends[end] = None if end in ends else name
    for name in sorted(a):
        first, end = next((split for split in _splits(name) if split[1] in ends), ("", ""))
        if (other := ends.get(end)) is not None:
            second = other.removesuffix(end)
            if not first or not second:  # would be the beginning of every name
                head = end.partition(".")[0] + "."
                first, second = first + head, second + head
            if not any(part.isdigit() for part in (first + second).split(".")):
                yield first, second


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Beginnings, with the dot, and ends of at least a few parts; the longest end first."""
    parts = name.split(".")
    for n in range(len(parts) - _LEAST + 1 if len(parts) <= _MOST else 0):
        yield "".join(f"{part}." for part in parts[:n]), ".".join(parts[n:])
