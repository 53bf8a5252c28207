"""Byte ranges that are worth one request each, and the threads that fetch them. Nothing of HTTP is known here."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from qkpatch.checkpoint.files import OpenFile, gaps
from qkpatch.common.interrupts import check_stop, signals_masked

BLOCK = 8 << 20  # bytes of one request at most: a layer's weights come in several, side by side
PIECE = 4 << 20  # the same, of a file that is read from end to end
IN_FLIGHT = 12
_LARGE = 1 << 20  # bytes of a read that others like it may follow
# A gap between ranges is fetched along where it is no more than this part of the larger of the two.
_GAP_SHARE = 128

# Of begin, end, where to, and whether it was given up.
Fetch = Callable[[int, int, memoryview, Callable[[], bool]], None]


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """``ranges`` in order, joined where they meet or nearly do: at most a 64th more bytes than were asked for."""
    joined: list[tuple[int, int]] = []
    last = 0  # size of the range before, in bytes
    for begin, end in sorted({span for span in ranges if span[0] < span[1]}):
        if joined and begin - joined[-1][1] <= max(last, end - begin) // _GAP_SHARE:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
        last = end - begin
    return joined


def blocks(ranges: Iterable[tuple[int, int]], size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """``ranges`` in pieces of at most ``size`` bytes."""
    for begin, end in ranges:
        for at in range(begin, end, size):
            yield at, min(at + size, end)


class Block:
    """The bytes ``begin:end`` of a file, on their way."""

    def __init__(self, fetch: Fetch, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self._fetch, self._data = fetch, bytearray()
        self._done = threading.Event()
        self._failure: BaseException | None = None
        self._is_given_up = False

    def run(self) -> None:
        """Fetch it; whatever goes wrong is raised by :meth:`data`."""
        try:
            if not self._is_given_up:
                self._data = bytearray(self.end - self.begin)
                self._fetch(self.begin, self.end, memoryview(self._data), lambda: self._is_given_up)
        except BaseException as error:
            self._failure = error
        self._done.set()

    def data(self) -> memoryview:
        """The bytes, once they are there; raises what went wrong, and where this task is to end."""
        while not self._done.wait(0.1):
            check_stop()
        if self._failure is not None:
            raise self._failure
        return memoryview(self._data)

    def give_up(self) -> None:
        """Say that nobody waits for the bytes any more: what has not begun never will."""
        self._is_given_up = True


class Fetchers:
    """Threads that fetch blocks in the order in which they are asked for; they end with the process."""

    def __init__(self, threads: int = IN_FLIGHT) -> None:
        self._waiting: queue.SimpleQueue[Block] = queue.SimpleQueue()
        self._threads, self._started, self._lock = threads, 0, threading.Lock()

    def start(self, block: Block) -> Block:
        """Fetch ``block``, when a thread is free."""
        self._waiting.put(block)
        with self._lock:
            if self._started < self._threads:
                self._started += 1
                # Daemons: a server that says nothing must not hold up the end of the process.
                with signals_masked():
                    threading.Thread(target=self._work, name="qkpatch-fetch", daemon=True).start()
        return block

    def _work(self) -> None:
        while True:
            self._waiting.get().run()


class RangeReader(OpenFile):
    """One open file elsewhere. What was announced is fetched ahead and kept; what was not, when it is read.

    Where nothing was announced, and one large read begins where the one before ended, the next blocks are on their way.
    """

    def __init__(
        self, where: str, size: int, fetch: Fetch, fetchers: Fetchers, announced: Sequence[tuple[int, int]]
    ) -> None:
        self.where, self._size = where, size
        self._fetch, self._fetchers = fetch, fetchers
        self._kept = [self._start(*span) for span in blocks(merged(announced))]
        self._is_announced, self._last = bool(announced), -1  # where the last read ended

    def _start(self, begin: int, end: int) -> Block:
        return self._fetchers.start(Block(self._fetch, begin, end))

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """As :meth:`OpenFile.read_into`."""
        upto = offset + len(buffer)
        if not self._is_announced and len(buffer) >= _LARGE:
            self._look_ahead(offset, upto)
        self._last = upto
        known = [block for block in self._kept if block.begin < upto and block.end > offset]
        missing = gaps(offset, upto, ((block.begin, block.end) for block in known))
        more = [self._start(*span) for span in blocks(missing)]
        for block in (*known, *more):
            first, last = max(block.begin, offset), min(block.end, upto)
            data = block.data()
            buffer[first - offset : last - offset] = data[first - block.begin : last - block.begin]

    def _look_ahead(self, offset: int, upto: int) -> None:
        """Let go of blocks that lie behind, or far ahead; of a file that is read in order, begin the next ones."""
        for block in [b for b in self._kept if b.end <= offset or b.begin > upto + IN_FLIGHT * PIECE]:
            block.give_up()
            self._kept.remove(block)
        if offset != self._last:
            return
        begin = max([offset, *(block.end for block in self._kept)])
        for span in blocks([(begin, self._size)], PIECE):
            if len(self._kept) >= IN_FLIGHT:
                break
            self._kept.append(self._start(*span))

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes ``begin:end`` in order, a few blocks ahead of the reader."""
        ahead: list[Block] = []
        spans = blocks([(begin, end)], PIECE)
        try:
            while True:
                while len(ahead) < IN_FLIGHT and (span := next(spans, None)):
                    ahead.append(self._start(*span))
                if not ahead:
                    return
                data = ahead[0].data()
                ahead.pop(0)
                yield data
        finally:
            for block in ahead:
                block.give_up()

    def close(self) -> None:
        """Forget what was kept, and let what is still on its way go."""
        for block in self._kept:
            block.give_up()
        self._kept = []
