"""Small file primitives: open files, exact writes, identity, digests. Errors say which file and what to do."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from qkpatch.common import system
from qkpatch.common.interrupts import check_stop
from qkpatch.errors import CheckpointError, FileSystemError, broken_library

READ_CHUNK = 1 << 20
# The index of 10^12 parameters, in some 200,000 tensors, is about 25 MB; the record of editing all modes of all their
# heads as much.
MAX_JSON_BYTES = 64 << 20

# What file systems say that cannot do a thing at all: some network and FUSE mounts.
CANNOT = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}  # on macOS the last two differ
# What only the side that is written to can say.
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_ADVICE = {
    errno.ENOSPC: "free some space or inodes (df, df -i), or write to another file system with -o",
    errno.EFBIG: "no file may be as large there (FAT32, or ulimit -f): write to another file system with -o, "
    "or smaller files with --max-shard-size",
    errno.EDQUOT: "your quota is used up; free some space, or write elsewhere with -o",
    errno.EACCES: "check the permissions",
    errno.EROFS: "the file system is read-only; write elsewhere with -o",
    errno.ENOENT: "check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has no more open files to give; end other programs",
    errno.ENOMEM: "free some memory, or raise its limit (ulimit -v)",
}

Progress = Callable[[int], None]


class Digesting(Protocol):
    """What bytes are fed to: a digest of :mod:`hashlib`, or several."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take the next bytes."""


class Digests(list[Digesting]):
    """Some digests of the same bytes."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take the next bytes."""
        for digest in self:
            digest.update(data)


@contextmanager
def os_errors(doing: str, where: str | Path, to: str | Path | None = None) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`FileSystemError` that says what was being done, and to which file.

    Where bytes go from ``where`` to ``to``, it names the one that failed.
    """
    try:
        yield
    except OSError as error:
        failed = where if to is None or error.errno not in _OF_WRITING else to
        what = f"cannot {doing}: {error.strerror or error}"
        raise FileSystemError(what, where=str(failed), fix=_ADVICE.get(error.errno or 0)) from error


# A library that cannot be mapped, a thread that cannot be started, and how torch says MemoryError.
_STARVED = re.compile("failed to map segment|(cannot|can't) allocate memory|can't start new thread")


@contextmanager
def machine_errors() -> Iterator[None]:
    """What the machine refuses where nobody expects it, files, memory or threads, as a :class:`FileSystemError`.

    A library that cannot be imported is a :class:`UsageError`.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if (broken := broken_library(error)) is not None and _STARVED.search(str(error)) is None:
            raise broken from error
        with os_errors("go on", str(error.filename or "")):
            raise
    except (MemoryError, ImportError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and _STARVED.search(str(error)) is None:
            if isinstance(error, ImportError) and (broken := broken_library(error)) is not None:
                raise broken from error
            raise
        raise FileSystemError("there is not enough memory", fix=_ADVICE[errno.ENOMEM]) from error


@dataclass(frozen=True)
class FileId:
    """What identifies the content of an open file without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # which cannot be set by hand: content that changed under a restored time is noticed
    n_links: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileId:
        """The identity of the file that was asked for its ``stat``."""
        times = status.st_mtime_ns, status.st_ctime_ns
        return cls(status.st_dev, status.st_ino, status.st_size, *times, status.st_nlink)

    @property
    def but_for_links(self) -> FileId:
        """The same whatever hard links are made to the file, which move its ctime."""
        return replace(self, ctime_ns=0, n_links=0)

    def is_still(self, before: FileId) -> bool:
        """Whether nothing has happened to the file since, but for hard links that somebody made or removed, or both."""
        has_links = (self.n_links, before.n_links) != (1, 1)
        return self == before or (has_links and self.but_for_links == before.but_for_links)


def gaps(begin: int, end: int, taken: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of the bytes ``begin:end`` lies in none of the ranges ``taken``, ascending."""
    for first, last in sorted(taken):
        if begin < (upto := min(first, end)):
            yield begin, upto
        begin = max(begin, last)
    if begin < end:
        yield begin, end


def check_size(size: int, limit: int, where: str) -> None:
    """Raise :class:`CheckpointError` where a file that is to be small has more than ``limit`` bytes."""
    if size > limit:
        raise CheckpointError(f"{size} bytes, more than any real file of this kind", where=where)


class OpenFile(ABC):
    """A file that is open for reading, on this machine or elsewhere; it has no position."""

    where: str  # what messages call it

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes."""

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on.

        Raises:
            FileSystemError: on a read error, or when the file ends before.
            HubError: it does not come.
        """

    def read(self, size: int, offset: int) -> bytearray:
        """``size`` bytes at ``offset``; otherwise as :meth:`read_into`."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return buffer

    def whole(self, limit: int = MAX_JSON_BYTES) -> bytes:
        """All of a small file; :class:`CheckpointError` where it has more than ``limit`` bytes."""
        check_size(self.size, limit, self.where)
        return bytes(self.read(self.size, 0))

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes ``begin:end`` in order; each piece holds until the next one is asked for."""
        # One buffer for all: fresh memory costs more than reading.
        buffer = memoryview(bytearray(min(READ_CHUNK, end - begin)))
        for offset in range(begin, end, len(buffer) or 1):
            check_stop()
            piece = buffer[: end - offset]
            self.read_into(piece, offset)
            yield piece

    def feed(self, digest: Digesting, begin: int, end: int) -> None:
        """Feed the bytes ``begin:end`` to ``digest``, in bounded memory."""
        for piece in self.pieces(begin, end):
            digest.update(piece)

    def copy_to(self, out: LocalOpenFile, begin: int, end: int, at: int) -> None:
        """Write the bytes ``begin:end`` to another file, from its offset ``at`` on."""
        for piece in self.pieces(begin, end):
            write_exact(out.fd, piece, at, out.where)
            at += len(piece)

    def sha256(self, begin: int, end: int) -> str:
        """Of the bytes ``begin:end``."""
        digest = hashlib.sha256()
        self.feed(digest, begin, end)
        return digest.hexdigest()

    def data(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """What of ``begin:end`` is not a hole."""
        yield begin, end


@dataclass(frozen=True)
class LocalOpenFile(OpenFile):
    """A file on this machine, by its descriptor, which whoever opened it closes."""

    fd: int
    where: str

    @property
    def size(self) -> int:
        """Bytes, as of now."""
        return os.fstat(self.fd).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """As :meth:`OpenFile.read_into`."""
        size, done = len(buffer), 0
        with os_errors("read", self.where):
            while done < size:
                n = system.read_into(self.fd, buffer[done:], offset + done)
                if n == 0:
                    raise changed(f"the file ends {size - done} bytes early", self.where)
                done += n

    def data(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """As :meth:`OpenFile.data`; all of it where the file system cannot tell."""
        while begin < end:
            try:
                first, last = system.data_at(self.fd, begin)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    yield begin, end
                return
            if first < end:
                yield first, min(last, end)
            begin = last


@contextmanager
def open_read(
    path: Path, expected: FileId | None = None, ranges: Sequence[tuple[int, int]] = ()
) -> Iterator[LocalOpenFile]:
    """A file for reading, ``ranges`` of it soon; with ``expected``, it must be unchanged on opening and on closing.

    Raises:
        FileSystemError: not readable, or replaced, truncated or written to meanwhile.
    """
    with os_errors("read", path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    with regular(fd, path) as opened:
        _check_unchanged(opened, expected)
        for begin, end in ranges:
            system.will_read(fd, begin, end)
        yield opened
        _check_unchanged(opened, expected)


@contextmanager
def regular(fd: int, where: str | Path) -> Iterator[LocalOpenFile]:
    """An open file that is a regular one, or an error; closed at the end."""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileSystemError("not a regular file", where=str(where))
        yield LocalOpenFile(fd, str(where))
    finally:
        os.close(fd)


def _check_unchanged(opened: LocalOpenFile, expected: FileId | None) -> None:
    if expected is not None and not FileId.of(os.fstat(opened.fd)).is_still(expected):
        raise changed("the source changed while qkpatch was running", opened.where)


def changed(what: str, where: str) -> FileSystemError:
    """The error for a file that somebody else writes to meanwhile."""
    return FileSystemError(what, where=where, fix="run again when nothing writes to it")


def synced(fd: int, where: str | Path) -> bool:
    """Wait until an open file or directory is on the disk; False where the file system cannot do that."""
    with os_errors("sync", where):
        try:
            system.sync(fd)
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            return False
    return True


def write_exact(fd: int, data: bytes | bytearray | memoryview, offset: int, where: str | Path) -> None:
    """Write all of ``data`` at ``offset``; the file position stays."""
    view = memoryview(data).cast("B")
    done = 0
    with os_errors("write", where):
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)
