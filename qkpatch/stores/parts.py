"""How an object is put together: which of its bytes are sent, and which the store copies itself. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from qkpatch.stores.store import Entry

# Of S3: each part but the last has at least so many bytes, and there are at most 10,000.
LEAST, MOST_PARTS = 5 << 20, 10_000
_SENT, _COPIED = 16 << 20, 1 << 30  # bytes of a part that is sent, or copied; several are on their way


class Part(NamedTuple):
    """The bytes ``begin:end`` of an object: those of ``source`` from ``offset`` on, or else they are sent."""

    begin: int
    end: int
    source: Entry | None = None
    offset: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin

    def within(self, begin: int, end: int) -> Part:
        """The part of it that is ``begin:end``."""
        return Part(begin, end, self.source, self.offset + begin - self.begin)


def upload_parts(spans: Iterable[Part]) -> list[Part]:
    """Parts that S3 takes, of ``spans`` that follow each other: as few bytes as may be are sent."""
    spans = list(spans)
    longest = max(_SENT, spans[-1].end // (MOST_PARTS // 2)) if spans else _SENT
    return [
        piece
        for part in _large_enough(spans)
        for piece in _cut(part, longest if part.source is None else max(_COPIED, longest))
    ]


def _large_enough(spans: Iterable[Part]) -> Iterator[Part]:
    """What is too short to be a part is sent with what follows, and so is as much of that as it takes."""
    sent: Part | None = None
    for span in spans:
        if not span.size:
            continue
        begin = span.begin if sent is None else sent.begin
        short = 0 if sent is None else max(0, LEAST - sent.size)
        if span.source is None or span.size - short < LEAST:
            sent = Part(begin, span.end)
            continue
        if sent is not None:
            yield Part(begin, sent.end + short)
        yield span.within(span.begin + short, span.end)
        sent = None
    if sent is not None:
        yield sent


def _cut(part: Part, longest: int) -> Iterator[Part]:
    """A part in pieces of nearly one size, at most ``longest`` each, so that none is too short."""
    n = -(-part.size // longest)
    return (part.within(*edges) for edges in pairwise(part.begin + part.size * i // n for i in range(n + 1)))
