"""Small file primitives: exact reads and writes, identity, digests. Errors say which file and what to do."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from qkpatch.errors import FileSystemError

READ_CHUNK = 1 << 20

_ADVICE = {
    errno.ENOSPC: "free some space, or write to another file system with -o",
    errno.EDQUOT: "your quota is used up; free some space, or write elsewhere with -o",
    errno.EACCES: "check the permissions",
    errno.EROFS: "the file system is read-only; write elsewhere with -o",
    errno.ENOENT: "check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}

Progress = Callable[[int], None]


class Digesting(Protocol):
    """What bytes are fed to: a digest of :mod:`hashlib`, or several."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take the next bytes."""


class Remote(Protocol):
    """A file that is open elsewhere, and read by byte ranges."""

    @property
    def size(self) -> int:
        """The file's size in bytes."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on, or raise."""

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes ``begin:end`` in order; each piece holds until the next one is asked for."""


Readable = int | Remote  # a file descriptor, or a file elsewhere


class Digests:
    """Some digests of the same bytes, by name."""

    def __init__(self) -> None:
        self.kinds: dict[str, hashlib._Hash] = {}

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take the next bytes."""
        for digest in self.kinds.values():
            digest.update(data)

    def hex(self, kind: str) -> str | None:
        """One of them; None where it was not taken."""
        return self.kinds[kind].hexdigest() if kind in self.kinds else None


@contextmanager
def os_errors(doing: str, where: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`FileSystemError` that says what was being done, and to which file."""
    try:
        yield
    except OSError as error:
        raise FileSystemError(
            f"cannot {doing}: {error.strerror or error}",
            where=str(where),
            fix=_ADVICE.get(error.errno or 0),
        ) from error


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
        """Whether nothing has happened to the file since, but for hard links that somebody made or removed."""
        return self == before or (
            self.n_links != before.n_links and self.but_for_links == before.but_for_links
        )


@contextmanager
def open_read(path: Path, expected: FileId | None = None) -> Iterator[int]:
    """A read-only descriptor; with ``expected``, the file must be unchanged on opening and on closing.

    Raises:
        FileSystemError: not readable, or replaced, truncated or written to meanwhile.
    """
    with os_errors("read", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check_unchanged(fd, path, expected)
        yield fd
        check_unchanged(fd, path, expected)
    finally:
        os.close(fd)


def check_unchanged(fd: int, path: Path, expected: FileId | None) -> None:
    """Raise :class:`FileSystemError` where the open file is no longer the one that was planned for."""
    if expected is not None and not FileId.of(os.fstat(fd)).is_still(expected):
        raise FileSystemError(
            "the source changed while qkpatch was running",
            where=str(path),
            fix="run again when nothing writes to it",
        )


def size_of(fd: Readable) -> int:
    """The size of an open file in bytes."""
    return os.fstat(fd).st_size if isinstance(fd, int) else fd.size


def read_exact(fd: Readable, size: int, offset: int, where: str | Path) -> bytearray:
    """``size`` bytes at ``offset``; the file position stays.

    Raises:
        FileSystemError: on a read error, or when the file ends before.
    """
    buffer = bytearray(size)
    read_into(fd, buffer, offset, where)
    return buffer


def read_into(fd: Readable, buffer: bytearray | memoryview, offset: int, where: str | Path) -> None:
    """Fill ``buffer`` from ``offset`` on; otherwise as :func:`read_exact`."""
    view = memoryview(buffer)
    if not isinstance(fd, int):
        fd.read_into(view, offset)
        return
    size, done = len(buffer), 0
    with os_errors("read", where):
        while done < size:
            n = os.preadv(fd, [view[done:]], offset + done)
            if n == 0:
                raise FileSystemError(
                    f"the file ends {size - done} bytes early",
                    where=str(where),
                    fix="is it being written to?",
                )
            done += n


def write_exact(fd: int, data: bytes | bytearray | memoryview, offset: int, where: str | Path) -> None:
    """Write all of ``data`` at ``offset``; the file position stays."""
    view = memoryview(data).cast("B")
    done = 0
    with os_errors("write", where):
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)


def sha256_range(fd: Readable, begin: int, end: int, where: str | Path) -> str:
    """SHA-256 of the bytes ``begin:end`` of an open file, in bounded memory."""
    digest = hashlib.sha256()
    update_digest(digest, fd, begin, end, where)
    return digest.hexdigest()


def update_digest(digest: Digesting, fd: Readable, begin: int, end: int, where: str | Path) -> None:
    """Feed the bytes ``begin:end`` of an open file to ``digest``."""
    if not isinstance(fd, int):
        for piece in fd.pieces(begin, end):
            digest.update(piece)
        return
    buffer = bytearray(min(READ_CHUNK, end - begin))  # one for all: fresh memory costs more than reading
    for offset in range(begin, end, len(buffer) or 1):
        view = memoryview(buffer)[: end - offset]
        read_into(fd, view, offset, where)
        digest.update(view)
