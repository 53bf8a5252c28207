"""``Passage`` and ``Arrival``: bytes from one open file to another by the best means there is, hashed on the way."""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import cycle, pairwise

from qkpatch.checkpoint.files import (
    CANNOT,
    Digesting,
    LocalOpenFile,
    OpenFile,
    Progress,
    os_errors,
    write_exact,
)
from qkpatch.common import system
from qkpatch.errors import FileSystemError

# One system call copies at most this much, so that progress moves and Ctrl-C is heard.
COPY_CHUNK = 64 << 20
PIECE = 4 << 20  # what is read at once, where bytes pass through memory
_BUFFERS = 3  # one is read into, one is written from, one waits
# A multiple of any page and block: what others write beside it through the page cache never shares a page.
ALIGN = 64 << 10
LEAST_DIRECT = 4 * PIECE  # below this there is nothing to gain

# Means of copying decline with these where the file systems cannot do it; other errnos are real.
_DECLINED = {*CANNOT, errno.EXDEV, errno.EBADF, errno.ETXTBSY, errno.EPERM}


class Lane:
    """Buffers, and a thread that writes one while the next is read; for one :class:`Passage` at a time."""

    def __init__(self) -> None:
        self.buffers = [mmap.mmap(-1, PIECE) for _ in range(_BUFFERS)]  # aligned to pages
        self.writer = ThreadPoolExecutor(1, "qkpatch-write")

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.shutdown(wait=True)
        self.buffers.clear()  # not closed: after an error, its traceback still refers to parts of them


class Passage:
    """From one open file to another, through ``lane``.

    Disks are written past the page cache, and read past it where it does not hold the bytes. That takes a tenth of
    the processor time of ``copy_file_range``, which the edit can use, and leaves other programs' files in the cache.
    """

    def __init__(self, lane: Lane, source: LocalOpenFile, destination: int, where: str | None = None) -> None:
        """``where`` is what messages call the destination."""
        self._lane, self._source, self._destination, self._where = lane, source, destination, where
        self._raw_source = _past_cache(source.fd, os.O_RDONLY)
        self._raw_destination = _past_cache(destination, os.O_WRONLY)

    def __enter__(self) -> Passage:
        return self

    def __exit__(self, *_: object) -> None:
        for raw in (self._raw_source, self._raw_destination):
            if raw is not None:
                os.close(raw)

    def copy(self, begin: int, end: int, at: int, progress: Progress, digest: Digesting | None = None) -> str:
        """Copy the source's bytes ``begin:end`` to offset ``at``, and feed them to ``digest``; returns the means' name.

        The destination is as long already, and zero where nothing was written: holes are left out. ``progress`` may
        raise to stop it.

        Raises:
            FileSystemError: reading or writing fails, or the source ends early.
        """
        shift = at - begin
        used, position = "none", begin
        for first, last in self._source.data(begin, end):
            self._leave_out(position, first, progress, digest)
            used, position = self._copy_data(first, last, shift, progress, digest), last
        missing = end - self._source.size
        if missing > 0:  # no hole
            raise _ends_early(missing, self._source)
        self._leave_out(position, end, progress, digest)
        return used

    def _leave_out(self, begin: int, end: int, progress: Progress, digest: Digesting | None) -> None:
        if digest is None:
            progress(end - begin)
            return
        zeros = bytes(min(PIECE, end - begin))
        for at in range(begin, end, PIECE):
            digest.update(memoryview(zeros)[: end - at])
            progress(min(PIECE, end - at))

    def _copy_data(
        self, begin: int, end: int, shift: int, progress: Progress, digest: Digesting | None
    ) -> str:
        # Whole blocks of the destination, in the source's offsets.
        first, last = -(-(begin + shift) // ALIGN) * ALIGN - shift, (end + shift) // ALIGN * ALIGN - shift
        is_direct = self._raw_destination is not None and last - first >= LEAST_DIRECT
        if not is_direct and digest is None:
            return copy_range(self._source, self._destination, begin, end, progress, shift, self._where)
        edges = [begin, first, last, end] if is_direct else [begin, end]
        pieces = [
            (at, min(at + PIECE, upto)) for start, upto in pairwise(edges) for at in range(start, upto, PIECE)
        ]
        self._pipe(pieces, shift, progress, digest)
        return "direct" if is_direct else "read_write"

    def _pipe(
        self, pieces: Sequence[tuple[int, int]], shift: int, progress: Progress, digest: Digesting | None
    ) -> None:
        """Read pieces in order, and write each while the next ones are read."""
        writing: deque[Future[int]] = deque()
        try:
            for (begin, end), buffer in zip(pieces, cycle(self._lane.buffers)):
                if len(writing) == len(self._lane.buffers):
                    progress(writing.popleft().result())
                piece = memoryview(buffer)[: end - begin]
                self._read(piece, begin)
                if digest is not None:
                    digest.update(piece)
                writing.append(self._lane.writer.submit(self._write, piece, begin + shift))
            while writing:
                progress(writing.popleft().result())
        finally:
            wait(writing)  # before files are closed

    def _read(self, piece: memoryview, offset: int) -> None:
        """Out of the page cache what is there, past it what is not."""
        raw = self._raw_source if _is_aligned(piece, offset) else None
        if raw is not None and not system.is_cached(self._source.fd, offset + len(piece) - 1):
            with suppress(OSError):  # the plain way works, or says why not
                if system.read_into(raw, piece, offset) == len(piece):
                    return
        self._source.read_into(piece, offset)

    def _write(self, piece: memoryview, offset: int) -> int:
        raw, done = self._raw_destination if _is_aligned(piece, offset) else None, 0
        with os_errors("copy", self._source.where, self._where):
            while done < len(piece):
                try:
                    done += os.pwrite(self._destination if raw is None else raw, piece[done:], offset + done)
                except OSError as error:
                    if raw is None or error.errno not in _DECLINED:
                        raise
                    raw = None  # the rest of the piece goes the plain way
        return done


@dataclass(frozen=True)
class Arrival:
    """From a file elsewhere to an open one, in order; a few pieces are in memory and none is on the disk twice."""

    source: OpenFile
    destination: int
    where: str  # what messages call the destination

    def copy(self, begin: int, end: int, at: int, progress: Progress, digest: Digesting | None = None) -> str:
        """As :meth:`Passage.copy`; raises :class:`HubError` where they do not come."""
        for piece in self.source.pieces(begin, end):
            if digest is not None:
                digest.update(piece)
            write_exact(self.destination, piece, at, self.where)
            at += len(piece)
            progress(len(piece))
        return "download"


def passage_for(
    lane: Lane, source: OpenFile, destination: int, where: str
) -> AbstractContextManager[Passage | Arrival]:
    """What copies from ``source`` to ``destination``, both open; through ``lane`` where both are on this machine."""
    if isinstance(source, LocalOpenFile):
        return Passage(lane, source, destination, where)
    return nullcontext(Arrival(source, destination, where))


def _is_aligned(piece: memoryview, offset: int) -> bool:
    return offset % ALIGN == 0 and len(piece) % ALIGN == 0


def _past_cache(fd: int, access: int) -> int | None:
    """The open file once more, past the page cache; None where it lies on no disk of this machine's.

    Network file systems, tmpfs and overlays, which have no device of their own, manage their caches better.
    """
    return system.open_direct(fd, access) if os.major(os.fstat(fd).st_dev) else None


def copy_range(
    source: LocalOpenFile,
    destination: int,
    begin: int,
    end: int,
    progress: Progress,
    shift: int = 0,
    where: str | None = None,
) -> str:
    """Copy the bytes ``begin:end`` between open files within the kernel where it can; returns the means' name.

    ``copy_file_range`` stays in the file system, ``sendfile`` crosses file systems, read and write always work. Each
    continues where the one before declined. They arrive ``shift`` bytes further on. ``progress`` may raise to stop it;
    ``where`` is what messages call the destination.
    """
    done, used = begin, "none"
    with os_errors("copy", source.where, where):
        for step in (system.copy_file_range, system.sendfile, read_write):
            name = step.__name__
            while done < end:
                try:
                    n = step(source.fd, destination, done, done + shift, min(COPY_CHUNK, end - done))
                except OSError as error:
                    if error.errno not in _DECLINED or name == "read_write":
                        raise
                    break
                if n == 0:  # some kernels report success and copy nothing; let the next means decide
                    break
                used = name
                done += n
                progress(n)
            if done == end:
                return used
    raise _ends_early(end - done, source)


def _ends_early(n_bytes: int, source: LocalOpenFile) -> FileSystemError:
    return FileSystemError(f"the source ends {n_bytes} bytes early", where=source.where)


def read_write(source: int, destination: int, offset: int, at: int, count: int) -> int:
    """Copy through memory; it works between any two files. How many bytes, as its likes in the kernel."""
    data = os.pread(source, min(count, PIECE), offset)
    return os.pwrite(destination, data, at)
