"""The files of a checkpoint, as they lie on disk: which there are, what identifies them, the small ones whole."""

from __future__ import annotations

import os
import shlex
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from qkpatch.checkpoint.cache import blob_of, is_in_cache
from qkpatch.checkpoint.content import Content
from qkpatch.checkpoint.files import (
    MAX_JSON_BYTES,
    FileId,
    LocalOpenFile,
    OpenFile,
    check_size,
    open_read,
    os_errors,
)
from qkpatch.checkpoint.names import BOOKKEEPING, matching
from qkpatch.checkpoint.open_directory import MOST_LEVELS, Rooted, check_extent
from qkpatch.errors import FileSystemError

MAX_CONFIG_BYTES = 16 << 20  # the largest are below 1 MB
_LONGEST_PATH = 4096  # of Linux


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

    @property
    def everywhere(self) -> str:
        """As :attr:`content`, and the same on every machine that sees the file."""
        return str(self.listed or self.content)

    @property
    def is_known_by_digest(self) -> bool:
        """Whether it is elsewhere, where a digest of it is listed: nothing else of it has to come to be compared."""
        return False

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
        check_size(self.size, limit, self.where)
        with self.open([(0, self.size)]) as opened:
            return opened.whole(limit)


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

    @property
    def everywhere(self) -> str:
        """As :attr:`SourceFile.everywhere`: without device and inode, which are others behind another mount."""
        return str(self.listed or (self.size, self.id.mtime_ns, self.id.ctime_ns))

    def open(self, ranges: Sequence[tuple[int, int]] = ()) -> AbstractContextManager[LocalOpenFile]:
        """As :func:`open_read`."""
        return open_read(self.path, self.id, ranges)


class Repository(ABC):
    """All files of a checkpoint that is elsewhere, as they were at one time."""

    where: str
    files: Mapping[str, SourceFile]

    @property
    def directories(self) -> dict[str, int]:
        """All sub-directories, each after the one that it lies in; their modes are not known elsewhere."""
        parents = (PurePosixPath(name).parents for name in self.files)
        return dict.fromkeys(sorted({path.as_posix() for some in parents for path in some} - {"."}), 0o777)

    @abstractmethod
    def check_still(self, names: Collection[str]) -> None:
        """Raise :class:`FileSystemError` where one of these files is another by now, or one more is there."""


def is_plain_relative(name: str) -> bool:
    """Whether ``name`` is a path that stays inside the checkpoint, written in the one plain way."""
    parts = name.split("/")
    is_short = len(name) <= _LONGEST_PATH and len(parts) <= MOST_LEVELS + 1
    return is_short and not {"", ".", ".."} & {*parts} and not {"\\", "\0"} & {*name}


class Folder(NamedTuple):
    """What lies below a directory: regular files by name, sorted, links followed; and all sub-directories."""

    files: dict[str, LocalFile]
    directories: dict[str, int]  # with their modes, each after the one that it lies in
    left_out: dict[str, int]  # what is excluded, with bytes; it is not looked into otherwise


def walk_files(root: Path, exclude: Collection[str] = ()) -> Folder:
    """The folder at ``root``, less its bookkeeping and what ``exclude`` means (:func:`matching`).

    Raises:
        FileSystemError: something cannot be read, or is no regular file; far more, or far deeper, than any checkpoint.
    """
    found, real_root = Folder({}, {}, {}), os.path.realpath(root)
    entered: dict[str, Path] = {}
    waiting = [root]
    while waiting:
        where = waiting.pop()
        name = where.relative_to(root).as_posix()
        first = entered.setdefault(os.path.realpath(where), where)
        if first != where:  # links could multiply directories without end
            is_above = first in where.parents
            back = "leads back to a directory above it," if is_above else "to the same directory as"
            raise FileSystemError(f"a link {back} {first}", where=str(where), fix=_without(name))
        with os_errors("list", where):
            entries = sorted(os.listdir(where))
        check_extent(where, len(where.relative_to(root).parts), len(found.files) + len(entries))
        inner = []
        for path in map(where.joinpath, entries):
            name = path.relative_to(root).as_posix()
            linked = os.path.relpath(os.path.realpath(path), real_root) if path.is_symlink() else name
            is_inside = not linked.startswith("../")
            if name in BOOKKEEPING or matching(name, exclude) or (is_inside and matching(linked, exclude)):
                found.left_out[name] = 0 if name in BOOKKEEPING else _bytes_of(path)
                continue
            if any("\ud800" <= c <= "\udfff" for c in name):  # how Python holds bytes that are not UTF-8
                what = "the file's name is not UTF-8"
                raise FileSystemError(what, where=ascii(path)[1:-1], fix="rename it")
            with os_errors("read", path):
                if path.is_symlink() and not path.exists():
                    what = f"a dangling link, to {path.readlink()}"
                    fix = f"restore what it leads to, or download it again; if nothing needs it, {_without(name)}"
                    raise FileSystemError(what, where=str(path), fix=fix)
                mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                found.directories[name] = mode & 0o777
                inner.append(path)
            else:
                found.files[name] = source_file(path, name, fix=_without(name))
        waiting += reversed(inner)
    return found._replace(files=dict(sorted(found.files.items())))


def _without(name: str) -> str:
    return f"move it out of SOURCE, or leave it out: --exclude {shlex.quote(name)}"


def _bytes_of(path: Path) -> int:
    """Of a file, or of all files in a directory; what cannot be looked at counts nothing."""
    with suppress(OSError, FileSystemError):
        if not path.is_dir():
            return path.stat().st_size
        with Rooted(path) as root:
            return sum(status.st_size for _, status in root.walk() if stat.S_ISREG(status.st_mode))
    return 0


def near_paths(text: str) -> list[str]:
    """What is nearly called so in the directory of a path that does not exist, or in one of nearly its name."""
    folder, slash, name = text.rstrip("/").rpartition("/")
    place = os.path.expanduser(folder) or slash or "."  # noqa: PTH111 - Path's raises for ~nobody/x
    try:
        there = os.listdir(place) if name else []
    except (OSError, ValueError):
        above = near_paths(folder) if Path(place).parent.is_dir() else []
        paths = [f"{near}/{name}" for near in above]
        return [path for path in paths if os.path.lexists(os.path.expanduser(path))]  # noqa: PTH111 - as above
    longer = [found for found in sorted(there) if found.startswith(f"{name}.")]  # its end was left out
    near = dict.fromkeys([*get_close_matches(name, there, 3, 0.8), *longer])
    return [f"{folder}{slash}{found}" for found in [*near][:3]]


def source_file(path: Path, name: str, fix: str | None = None) -> LocalFile:
    """The regular file at ``path``, links followed; anything else is a :class:`FileSystemError`."""
    try:
        with os_errors("read", path):
            status = path.stat()
    except FileSystemError as error:
        near = near_paths(str(path)) if isinstance(error.__cause__, FileNotFoundError) else []
        if not near:
            raise
        fix = f"near: {', '.join(near)}"
        raise FileSystemError(error.what, where=str(path), fix=fix) from error.__cause__
    if not stat.S_ISREG(status.st_mode):
        raise FileSystemError("not a regular file", where=str(path), fix=fix)
    mode = stat.S_IMODE(status.st_mode)
    return LocalFile(name, status.st_size, mode, str(path), path, FileId.of(status))
