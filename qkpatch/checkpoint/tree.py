"""The files of a checkpoint, as they lie on disk: which there are, what identifies them, the small ones whole."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qkpatch.checkpoint.cache import blob_of, is_in_cache
from qkpatch.checkpoint.content import Content
from qkpatch.checkpoint.files import FileId, LocalOpenFile, OpenFile, open_read, os_errors
from qkpatch.errors import CheckpointError, FileSystemError

BOOKKEEPING = (".git", ".cache/huggingface")  # of git and huggingface_hub, not the model's
# The index of 10^12 parameters, in some 200,000 tensors, is about 25 MB; the record of editing all modes of all their
# heads as much. The largest config.json are below 1 MB.
MAX_JSON_BYTES = 64 << 20
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class SourceFile(ABC):
    """One file of a checkpoint, by its POSIX path relative to the checkpoint root."""

    name: str
    size: int
    mode: int
    where: str  # what messages call it

    @property
    @abstractmethod
    def content(self) -> str:
        """What identifies its bytes without reading them."""

    @property
    def listed(self) -> Content | None:
        """What the Hub says it holds, where it is the Hub's; not checked here."""
        return None

    @abstractmethod
    def open(self, ranges: Sequence[tuple[int, int]] = ()) -> AbstractContextManager[OpenFile]:
        """Open it for reading; ``ranges`` tells what will be read, where that is known.

        Raises:
            FileSystemError: not readable, or changed since it was listed or while it is open.
        """

    def read(self, limit: int = MAX_JSON_BYTES) -> bytes:
        """All of a small file.

        Raises:
            CheckpointError: it has more than ``limit`` bytes.
        """
        self.check_size(limit)
        with self.open([(0, self.size)]) as opened:
            return bytes(opened.read(self.size, 0))

    def check_size(self, limit: int) -> None:
        """Raise :class:`CheckpointError` where it has more than ``limit`` bytes."""
        if self.size > limit:
            raise CheckpointError(
                f"{self.size} bytes, more than any real file of this kind", where=self.where
            )


@dataclass(frozen=True)
class LocalFile(SourceFile):
    """A file on this machine."""

    path: Path
    id: FileId

    @property
    def content(self) -> str:
        """Device, inode, size and times of the file, as text."""
        return str(self.id)

    @property
    def listed(self) -> Content | None:
        """The name of its blob in the Hub cache."""
        blob = blob_of(self.path)
        return None if blob is None or not is_in_cache(blob) else Content.of_name(blob.name)

    def open(self, ranges: Sequence[tuple[int, int]] = ()) -> AbstractContextManager[LocalOpenFile]:
        """As :func:`open_read`."""
        return open_read(self.path, self.id)


class Repository(ABC):
    """All files of a checkpoint that is elsewhere, at one commit."""

    where: str
    files: Mapping[str, SourceFile]

    @property
    @abstractmethod
    def directories(self) -> Mapping[str, int]:
        """All sub-directories with their modes, each after the one that it lies in."""


def is_plain_relative(name: str) -> bool:
    """Whether ``name`` is a path that stays inside the checkpoint, written in the one plain way."""
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and str(path) == name
        and name not in ("", ".")
        and "\\" not in name
        and "\0" not in name
    )


def walk_files(
    root: Path, skip: Collection[str] = BOOKKEEPING
) -> tuple[dict[str, LocalFile], dict[str, int]]:
    """All regular files below ``root``, links followed, and all sub-directories with their modes, less ``skip``.

    Files are sorted by name; a directory comes after the one that it lies in.
    """
    files: dict[str, LocalFile] = {}
    directories: dict[str, int] = {}

    def visit(directory: Path, prefix: str, ancestors: tuple[Path, ...]) -> None:
        real = directory.resolve()
        if real in ancestors:
            raise FileSystemError("a link leads back to a directory above it", where=str(directory))
        with os_errors("list", directory):
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        for entry in entries:
            name = prefix + entry.name
            if name in skip:
                continue
            if any("\ud800" <= c <= "\udfff" for c in name):  # how Python holds bytes that are not UTF-8
                raise FileSystemError(
                    "the file's name is not UTF-8", where=ascii(entry.path), fix="rename it"
                )
            with os_errors("read (is it a dangling link?)", entry.path):
                mode = entry.stat().st_mode
            if not stat.S_ISDIR(mode):
                files[name] = source_file(Path(entry.path), name, fix="move it out of SOURCE")
            else:
                directories[name] = mode & 0o777
                visit(Path(entry.path), f"{name}/", (*ancestors, real))

    visit(root, "", ())
    return dict(sorted(files.items())), directories


def source_file(path: Path, name: str, fix: str | None = None) -> LocalFile:
    """The regular file at ``path``, links followed; anything else is a :class:`FileSystemError`."""
    with os_errors("read", path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileSystemError("not a regular file", where=str(path), fix=fix)
    mode = stat.S_IMODE(status.st_mode)
    return LocalFile(name, status.st_size, mode, str(path), path, FileId.of(status))
