"""Two byte ranges read side by side, chunk by chunk, into buffers used again: fresh memory costs more than reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qkpatch.checkpoint.files import OpenFile, Progress

CHUNK = 1 << 20


class Span(NamedTuple):
    """A half-open byte range of an open file."""

    file: OpenFile
    begin: int
    end: int


class Reader:
    """Yields chunks that hold until the next one is asked for."""

    def __init__(self) -> None:
        self._buffers = (bytearray(CHUNK), bytearray(CHUNK))

    def chunks(self, span: Span) -> Iterator[bytearray]:
        """One range; also while chunks of two are being yielded, though these are gone then."""
        for begin in range(span.begin, span.end, CHUNK):
            yield self._read(0, span, begin, min(CHUNK, span.end - begin))

    def pairs(self, a: Span, b: Span) -> Iterator[tuple[bytearray, bytearray]]:
        """Two ranges of as many elements, whose sizes in bytes may differ; each chunk has as many elements, too."""
        n_a, n_b = a.end - a.begin, b.end - b.begin
        if n_a == 0 or n_b == 0:
            return
        # A chunk of the larger elements is CHUNK bytes, and sizes of elements are powers of two.
        step_a, step_b = (CHUNK * n // max(n_a, n_b) for n in (n_a, n_b))
        for start_a, start_b in zip(range(0, n_a, step_a), range(0, n_b, step_b), strict=True):
            yield (
                self._read(0, a, a.begin + start_a, min(step_a, n_a - start_a)),
                self._read(1, b, b.begin + start_b, min(step_b, n_b - start_b)),
            )

    def first_difference(self, a: Span, b: Span, progress: Progress) -> int | None:
        """How many bytes are equal before two ranges of the same size differ; None where all are."""
        n_equal = 0
        for x, y in self.pairs(a, b):
            if x != y:
                return n_equal + next(i for i in range(len(x)) if x[i] != y[i])
            n_equal += len(x)
            progress(len(x))
        return None

    def _read(self, which: int, span: Span, begin: int, size: int) -> bytearray:
        buffer = self._buffers[which] if size == CHUNK else bytearray(size)
        span.file.read_into(memoryview(buffer), begin)
        return buffer
