"""Two spellings of one model: the prefixes under which tensors that only A has are those that only B has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from qkpatch.checkpoint.source import Stored
from qkpatch.compare.diff_types import Renaming

_Pair = tuple[str, str]
_LEAST = 2  # parts that two names have in common at their end: `weight` is the end of all
_MOST = 64  # of parts, more than any model's
_AMBIGUOUS = 16  # candidates: a longer end of the name would tell them apart, and there is none


def spelled_as(a: Stored, b: Stored) -> tuple[Stored, tuple[Renaming, ...]]:
    """B with A's names, where prefixes explain most of those that only one has; and which prefixes these are."""
    only_a = {name: ref.shape for name, ref in a.tensors.items() if name not in b.tensors}
    only_b = {name: ref.shape for name, ref in b.tensors.items() if name not in a.tensors}
    votes = Counter(pair for pair in _candidates(only_a, only_b))
    names: dict[str, str] = {}  # of A, by B's
    left, found = dict(only_a), list[Renaming]()
    # The right prefix explains the most; of what is left then, the next does.
    for first, second in sorted(votes, key=lambda pair: (-votes[pair], pair)):
        whole = [name for name in left if name.startswith(first)]
        pairs = {second + name[len(first) :]: name for name in whole}
        pairs = {theirs: ours for theirs, ours in pairs.items() if theirs in only_b and theirs not in names}
        if 2 * len(pairs) > len(whole):
            names |= pairs
            found.append(Renaming(first, second, len(pairs)))
            for ours in pairs.values():
                del left[ours]
    if not names or 2 * len(names) < min(len(only_a), len(only_b)):
        return b, ()
    headers = {
        shard: replace(
            header,
            tensors={
                names.get(name, name): replace(ref, name=names.get(name, name))
                for name, ref in header.tensors.items()
            },
        )
        for shard, header in b.headers.items()
    }
    return replace(b, headers=headers), tuple(found)


def _candidates(a: dict[str, tuple[int, ...]], b: dict[str, tuple[int, ...]]) -> Iterator[_Pair]:
    """For each name of A, what stands before the longest end that it has in common with one of B, of that shape."""
    ends: dict[str, list[str]] = {}
    for name in b:
        for _, end in _splits(name):
            some = ends.setdefault(end, [])
            if len(some) <= _AMBIGUOUS:
                some.append(name)
    for name, shape in a.items():
        for first, end in _splits(name):
            found = ends.get(end, [])
            if found:
                for other in found if len(found) <= _AMBIGUOUS else ():
                    if b[other] == shape:
                        yield from _pair(first, other[: len(other) - len(end)], end)
                break


def _splits(name: str) -> Iterator[_Pair]:
    """Beginnings, with the dot, and ends of at least a few parts; the longest end first."""
    parts = name.split(".")
    for n in range(len(parts) - _LEAST + 1 if len(parts) <= _MOST else 0):
        yield "".join(f"{part}." for part in parts[:n]), ".".join(parts[n:])


def _pair(first: str, second: str, end: str) -> Iterator[_Pair]:
    if not first or not second:  # would be the beginning of every name
        head = end.partition(".")[0] + "."
        first, second = first + head, second + head
    if not any(part.isdigit() for part in (first + second).split(".")):
        yield first, second
