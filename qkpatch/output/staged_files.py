"""``StagedFiles``: the files of OUT while they grow, by descriptor; and the last look at them before they are OUT."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from qkpatch.checkpoint.files import FileId, LocalOpenFile, changed, os_errors, synced, write_exact
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.tree import LocalFile
from qkpatch.errors import FileSystemError
from qkpatch.output.layout import OutputFile

_CHANGED = "changed after it was written"


class StagedFiles:
    """What is in the directory that becomes OUT, and how each file was when it was done."""

    def __init__(self, files: Rooted) -> None:
        self._files = files
        self._done: dict[str, FileId] = {}

    def status(self, name: str) -> os.stat_result | None:
        """The ``stat`` of a staged file; None where no regular file has that name."""
        status = self._files.status(name)
        return status if status is not None and stat.S_ISREG(status.st_mode) else None

    def make_directories(self, directories: Collection[tuple[str, int]]) -> None:
        """Make each, or what is left of it, with its mode less the umask; the owner may write in each."""
        for name, mode in directories:
            with os_errors("create a directory", self._files.path / name):
                self._files.make_directory(name, mode | 0o700)

    def prune(self, files: Collection[str], directories: Collection[str]) -> None:
        """Remove what a run that is resumed left and this one does not make, such as a manifest."""
        for name, status in sorted(self._files.walk(), reverse=True):
            is_directory = stat.S_ISDIR(status.st_mode)
            is_kept = name in directories if is_directory else stat.S_ISREG(status.st_mode) and name in files
            if not is_kept:
                with os_errors("remove", self._files.path / name):
                    self._files.remove(name, status)

    def create(self, file: OutputFile) -> int:
        """A new file, open for reading and writing: it has its size, our own bytes, and else zeros."""
        path = self._files.path / file.name
        with os_errors("create", path):
            self._files.discard(file.name)  # left by a run that is resumed, and of no use
            # The owner may always write, so that edits can be made in a copy of a read-only file.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            fd = self._files.open(file.name, flags, file.mode & 0o777 | 0o200)
        try:
            with os_errors("write", path):
                os.ftruncate(fd, file.size)
            write_exact(fd, file.own, 0, path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def where(self, name: str) -> str:
        """What messages call a file: as OUT will have it."""
        return str(self._files.path / name)

    def open(self, name: str) -> int:
        """A file that is there, for reading and writing."""
        with os_errors("open", self._files.path / name):
            return self._files.open(name, os.O_RDWR)

    @contextmanager
    def reading(self, name: str) -> Iterator[LocalOpenFile]:
        """A file for reading, which must still be as it was when it was done."""
        with self._files.reading(name) as opened:
            done = self._done.get(name)
            if done is not None and not FileId.of(os.fstat(opened.fd)).is_still(done):
                raise self._error(name, _CHANGED)
            yield opened

    def link(self, file: LocalFile, name: str) -> bool:
        """Make ``name`` a hard link to ``file``, links resolved; False where the file system cannot."""
        status = self._files.status(name)
        if status is not None and FileId.of(status) == file.id:  # by a run before
            self.is_done(name, status)
            return True
        self._files.discard(name)
        with file.open():  # as it was planned for, or an error
            try:
                self._files.link(os.path.realpath(file.path), name)
            except OSError:
                return False  # another file system, too many links, not permitted: copying will do
        status = self.status(name)
        if status is None or FileId.of(status).but_for_links != file.id.but_for_links:
            return False  # it changed meanwhile, which copying will tell
        self.is_done(name, status)
        return True

    def write_new(self, name: str, data: bytes, more: Iterable[bytes | bytearray] = ()) -> None:
        """Write a file that SOURCE does not have, ``more`` piece by piece, and sync it."""
        with os_errors("write", self._files.path / name):
            fd = self._files.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                for piece in chain((data,), more):
                    write_exact(fd, piece, os.fstat(fd).st_size, self._files.path / name)
                synced(fd, self._files.path / name)
                self.is_done(name, os.fstat(fd))
            finally:
                os.close(fd)

    def is_done(self, name: str, status: os.stat_result) -> None:
        """Note that a file is done: whoever touches it from here on is noticed, so later digests are of these bytes."""
        self._done[name] = FileId.of(status)

    @property
    def times(self) -> dict[str, int]:
        """The files that are done, and their ``mtime_ns``."""
        return {name: done.mtime_ns for name, done in self._done.items()}

    def check(self, directories: Collection[str]) -> None:
        """Every file that was done is there as it was, and nothing else.

        Raises:
            FileSystemError: somebody removed, replaced, changed or added one.
        """
        found = dict(self._files.walk())
        for name, done in self._done.items():
            status = found.pop(name, None)
            if status is None:
                raise self._error(name, "is gone")
            if not stat.S_ISREG(status.st_mode) or not FileId.of(status).is_still(done):
                raise self._error(name, _CHANGED)
        for name in directories:
            status = found.pop(name, None)
            if status is None or not stat.S_ISDIR(status.st_mode):
                raise self._error(name, "is gone")
        if found:
            raise self._error(min(found), "came from elsewhere")

    def _error(self, name: str, what: str) -> FileSystemError:
        return changed(f"a file of the unfinished OUT {what}", self.where(name))
