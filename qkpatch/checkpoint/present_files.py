"""``Present``: what is in OUT, as it was when it was listed; of a directory by descriptor, never through a link."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from qkpatch.checkpoint.files import MAX_JSON_BYTES, FileId, LocalOpenFile, OpenFile, changed, os_errors
from qkpatch.checkpoint.names import BOOKKEEPING, came_by_itself
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.tree import SourceFile

_CHANGED = "it changed while qkpatch was reading it"
_KINDS = {
    stat.S_IFLNK: "is a link",
    stat.S_IFIFO: "is a named pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


class Present(ABC):
    """The files of OUT. One that changes after it was listed is an error when it is used."""

    def __init__(self, address: str, name: str) -> None:
        """``address`` is what finds it again; ``name`` is what it is called for short."""
        self.address, self.name = address, name
        self.files: dict[str, FileId | SourceFile] = {}
        self.odd: dict[str, str] = {}  # what is neither a regular file nor a directory, and what it is
        self.directories: list[str] = []
        self.aside: list[str] = []
        self._digests: dict[str, str] = {}

    def set_aside(self, recorded: Collection[str]) -> None:
        """Look no more at what came into OUT by itself, and is none of what its manifest records."""
        found = {name for name in {**self.files, **self.odd} if came_by_itself(name, recorded)}
        self.aside = sorted({*self.aside, *found})
        for name in self.aside:
            self.files.pop(name, None)
            self.odd.pop(name, None)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def where(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.address}/{name}"

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[OpenFile]:
        """A file for reading.

        Raises:
            FileSystemError: it is no regular file, not readable, or not the one that was listed, now or on closing.
        """

    @abstractmethod
    def check_still(self) -> None:
        """Raise :class:`FileSystemError` where anything is not as it was listed, whether it was used or not."""

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """All of a small file.

        Raises:
            CheckpointError: it has more than ``limit`` bytes.
            FileSystemError: as :meth:`open`.
        """
        with self.open(name) as opened:
            return opened.whole(limit)

    def sha256(self, name: str) -> str:
        """SHA-256 of a whole file, read once: whoever uses the file afterwards meets the same one, or an error."""
        if name not in self._digests:
            with self.open(name) as opened:
                self._digests[name] = opened.sha256(0, opened.size)
        return self._digests[name]


class PresentHere(Present):
    """The regular files of an open directory."""

    def __init__(self, root: Rooted) -> None:
        """Raises :class:`FileSystemError` where the directory cannot be listed."""
        super().__init__(str(root.path), root.path.name)
        self.root = root
        self.identities: dict[str, FileId] = {}  # of all, for whoever asks later whether anything changed
        with os_errors("list", root.path):
            for name, status in root.walk(BOOKKEEPING):
                self._add(name, status)
        self.aside += [name for name in BOOKKEEPING if root.status(name) is not None]

    def _add(self, name: str, status: os.stat_result) -> None:
        is_wish = not came_by_itself(name, ()) and not any(b.startswith(f"{name}/") for b in BOOKKEEPING)
        if is_wish:
            self.identities[name] = _identity(status)
        shown = name.encode("utf-8", "backslashreplace").decode()
        if stat.S_ISDIR(status.st_mode):
            self.directories += [name] if is_wish else []
        elif shown != name:  # how Python holds bytes that are not UTF-8
            self.odd[shown] = "has a name that is not UTF-8"
        elif not stat.S_ISREG(status.st_mode):
            self.odd[name] = _KINDS.get(stat.S_IFMT(status.st_mode), "is no regular file")
        else:
            self.files[name] = FileId.of(status)

    def where(self, name: str) -> str:
        """As :meth:`Present.where`."""
        return str(self.root.path / name)

    @contextmanager
    def open(self, name: str) -> Iterator[LocalOpenFile]:
        """As :meth:`Present.open`."""
        with self.root.reading(name) as opened:
            self._check(name, opened)
            yield opened
            self._check(name, opened)

    def _check(self, name: str, opened: LocalOpenFile) -> None:
        with os_errors("read", opened.where):
            status = os.fstat(opened.fd)
        if FileId.of(status) != self.files.get(name):
            raise changed(_CHANGED, self.where(name))

    def confirm(self, name: str) -> None:
        """Raise :class:`FileSystemError` where a file is not, or no longer, the one that was listed."""
        with self.open(name):
            return

    def check_still(self) -> None:
        """As :meth:`Present.check_still`."""
        with Rooted(self.root.path) as root:
            name = first_change(self.identities, PresentHere(root).identities)
        if name is not None:
            raise changed(_CHANGED, self.where(ascii(name)[1:-1]))


def first_change(before: Mapping[str, FileId], after: Mapping[str, FileId]) -> str | None:
    """The first name that is not the same in two listings of a directory."""
    return next((name for name in sorted({*before, *after}) if before.get(name) != after.get(name)), None)


def _identity(status: os.stat_result) -> FileId:
    """As :class:`FileId`; of a file with other names, which links made and removed elsewhere would change, less."""
    identity = FileId.of(status)
    if stat.S_ISDIR(status.st_mode):  # the same, whatever comes and goes in it
        return FileId(identity.device, identity.inode, 0, 0, 0, 0)
    return identity if status.st_nlink == 1 else identity.but_for_links
