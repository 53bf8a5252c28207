"""``Rooted``: a directory used by descriptor. No name below it is looked up through a link, so none leads out of it."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from qkpatch.checkpoint.files import CANNOT, LocalOpenFile, os_errors, regular, synced, write_exact
from qkpatch.common import system
from qkpatch.common.text import cut
from qkpatch.errors import FileSystemError, UsageError

# The deepest and widest real checkpoints have about 10 levels and 10^4 files.
MOST_LEVELS, MOST_NAMES = 64, 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Rooted:
    """An open directory; names are plain POSIX paths relative to it.

    Whoever may rename the directory itself, or put links in place of what lies in it, cannot redirect what is read
    and written here: every step of a path is opened from the one before, and a link is an error.
    """

    def __init__(self, path: Path, *, within: Rooted | None = None, name: str = "") -> None:
        """``path`` is for messages; it is opened by its own name, or as ``name`` within another one.

        Raises:
            FileSystemError: there is no such directory, or it cannot be opened.
        """
        self.path = path
        self._place: Path = path if within is None else within._place / name
        self.fd = -1
        with os_errors("open the directory", path):
            self.fd = (
                os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                if within is None
                else os.open(name, _DIRECTORY, dir_fd=within.fd)
            )

    def __enter__(self) -> Rooted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory; once more does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def as_path(self) -> str:
        """A path that leads here, for what takes paths alone: as :func:`system.path_of`."""
        return system.path_of(self.fd, self._place)

    @contextmanager
    def _parent(self, name: str) -> Iterator[tuple[int, str]]:
        """The open directory that holds ``name``, and its last part."""
        *folders, last = PurePosixPath(name).parts
        fd, is_own = self.fd, False
        try:
            for folder in folders:
                inner = os.open(folder, _DIRECTORY, dir_fd=fd)
                if is_own:
                    os.close(fd)
                fd, is_own = inner, True
            yield fd, last
        finally:
            if is_own:
                os.close(fd)

    def status(self, name: str) -> os.stat_result | None:
        """``lstat``; None where there is nothing of that name, or no directory where one should be."""
        with os_errors("look up", self.path / name):
            try:
                with self._parent(name) as (fd, last):
                    return os.stat(last, dir_fd=fd, follow_symlinks=False)
            except OSError as error:
                # The last: a link where a directory should be.
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                return None

    def open(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
        """A descriptor; ``flags`` as of :func:`os.open`, and no link is followed.

        Raises:
            OSError: as :func:`os.open`; ELOOP or ENOTDIR where a link stands in the way.
        """
        with self._parent(name) as (fd, last):
            return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=fd)

    @contextmanager
    def reading(self, name: str) -> Iterator[LocalOpenFile]:
        """A regular file for reading.

        Raises:
            FileSystemError: it is not there, or no regular file, or not readable.
        """
        where = self.path / name
        with os_errors("read", where):
            # Without O_NONBLOCK a pipe without a writer would be waited for.
            fd = self.open(name, os.O_RDONLY | os.O_NONBLOCK)
        with regular(fd, where) as opened:
            yield opened

    def mkdir(self, name: str, mode: int = 0o700) -> None:
        """Make a directory; its parent is there."""
        with self._parent(name) as (fd, last):
            os.mkdir(last, mode, dir_fd=fd)

    def make_directory(self, name: str, mode: int) -> None:
        """Make a directory with ``mode`` less the umask, or mend one that is there; what else has its name goes."""
        status = self.status(name)
        if status is not None and not stat.S_ISDIR(status.st_mode):
            self.remove(name, status)
            status = None
        if status is None:
            self.mkdir(name, mode)
        elif (mended := status.st_mode & ~0o777 | mode & ~system.umask(self.fd)) != status.st_mode:
            fd = self.open(name, os.O_RDONLY | os.O_DIRECTORY)
            try:
                with suppress(OSError):  # a file system without modes
                    os.fchmod(fd, stat.S_IMODE(mended))
            finally:
                os.close(fd)

    def create(self, name: str, content: Callable[[LocalOpenFile], None]) -> None:
        """Put a file directly in the directory, whole or not at all, where nothing has its name yet.

        Until it is whole it has no name, so that a kill leaves nothing; where the file system cannot do that, one of
        its own.

        Raises:
            UsageError: something has its name by now.
        """
        where, temporary = self.path / name, ""
        with os_errors("write", where):
            try:
                fd = system.open_unnamed(self.fd)
            except OSError as error:
                if error.errno not in {*CANNOT, errno.EISDIR, errno.ENOENT}:
                    raise
                # No number of a process: one on another machine may have the same.
                temporary = f"{name}.{secrets.token_hex(4)}"
                fd = self.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                content(LocalOpenFile(fd, str(where)))
                synced(fd, where)
                try:
                    if temporary:
                        os.link(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
                    else:
                        system.name_unnamed(fd, self.fd, name)
                except OSError as error:
                    if not temporary or error.errno not in {*CANNOT, errno.EPERM, errno.EACCES}:
                        raise
                    # There are no hard links.
                    if self.status(name) is not None:
                        raise raced(where) from None
                    os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            except FileExistsError as error:
                raise raced(where) from error
            finally:
                os.close(fd)
                if temporary:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=self.fd)

    def replace(self, name: str, content: bytes | Callable[[LocalOpenFile], None], part: str = "") -> None:
        """Put a file directly in the directory, in place of one that may be there, whole or not at all.

        ``content`` may write it itself; ``part`` is its name until it is whole.
        """
        temporary = part or f".{name}.{secrets.token_hex(4)}"
        with os_errors("write", self.path / name):
            fd = self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                try:
                    if isinstance(content, bytes):
                        write_exact(fd, content, 0, self.path / name)
                    else:
                        content(LocalOpenFile(fd, str(self.path / name)))
                    synced(fd, self.path / name)
                finally:
                    os.close(fd)
                os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=self.fd)
                raise

    def remove(self, name: str, status: os.stat_result) -> None:
        """Remove an empty directory, a file, or a link itself, whichever ``status`` says."""
        with self._parent(name) as (fd, last):
            (os.rmdir if stat.S_ISDIR(status.st_mode) else os.unlink)(last, dir_fd=fd)

    def discard(self, name: str) -> None:
        """Remove whatever has a name, if anything has."""
        with os_errors("remove", self.path / name):
            if (status := self.status(name)) is not None:
                self.remove(name, status)

    def link(self, source: str, name: str) -> None:
        """Make ``name`` a hard link to the file at the path ``source``."""
        with self._parent(name) as (fd, last):
            os.link(source, last, dst_dir_fd=fd)

    def lock(self, *, shared: bool = False) -> bool:
        """Hold the directory for this process, or those that share it; False where another one does.

        Where there are no locks, nobody does.
        """
        try:
            system.lock(self.fd, shared=shared)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def sync(self, name: str = ".") -> bool:
        """Wait until a directory's entries are on the disk; False where the file system cannot do that."""
        if name == ".":
            return synced(self.fd, self.path)
        with os_errors("sync", self.path / name):
            fd = self.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return synced(fd, self.path / name)
        finally:
            os.close(fd)

    def names(self) -> list[str]:
        """The names of what lies directly in the directory, sorted."""
        with os_errors("list", self.path):
            return _listed(self.fd)

    def clear(self) -> None:
        """Remove everything below, as far as that can be done, one name after the other in order."""
        found: list[tuple[str, os.stat_result]] = []
        with suppress(OSError, FileSystemError):
            found.extend(self.walk())
        for top in sorted({PurePosixPath(name).parts[0] for name, _ in found}):
            below = [(name, status) for name, status in found if PurePosixPath(name).parts[0] == top]
            for name, status in reversed(below):
                with suppress(OSError):
                    self.remove(name, status)

    def remove_tree(self, name: str) -> None:
        """Remove what has a name directly in the directory, and all below it.

        Raises:
            FileSystemError: something of it stays.
        """
        status = self.status(name)
        if status is not None and stat.S_ISDIR(status.st_mode):
            with Rooted(self.path / name, within=self, name=name) as inner:
                inner.clear()
        self.discard(name)

    def walk(self, skip: Collection[str] = ()) -> Iterator[tuple[str, os.stat_result]]:
        """Everything below but what is in ``skip``, directories before what is in them; links are told, not followed.

        Raises:
            FileSystemError: a directory cannot be listed; far more, or far deeper, than any checkpoint.
        """
        n_names, waiting = 0, [""]
        while waiting:
            prefix = waiting.pop()
            # By its whole path, step by step: a descriptor for each level could be more than there are.
            with os_errors("list", self.path / prefix), self._parent(f"{prefix}-") as (fd, _):
                names = _listed(fd)
                n_names += len(names)
                check_extent(self.path / prefix, prefix.count("/"), n_names)
                for last in names:
                    name = prefix + last
                    with suppress(FileNotFoundError):  # gone meanwhile
                        status = os.stat(last, dir_fd=fd, follow_symlinks=False)
                        if name not in skip:
                            yield name, status
                            waiting += [f"{name}/"] if stat.S_ISDIR(status.st_mode) else []


def raced(where: Path) -> UsageError:
    """The error for a name that was free when a run began, and is not when it ends."""
    what = "came into being while qkpatch was running; nothing was written to it"
    return UsageError(what, where=str(where), fix="is another qkpatch writing to it?")


def _listed(fd: int) -> list[str]:
    """What lies in an open directory now, sorted."""
    # Without this, btrfs lists what was there when the descriptor was opened, as POSIX allows.
    os.lseek(fd, 0, os.SEEK_SET)
    return sorted(os.listdir(fd))


def check_extent(where: Path, n_levels: int, n_names: int) -> None:
    """Refuse a directory that is no checkpoint's: a tree that was made to trip programs, or ``/``."""
    levels, names = (n_levels, MOST_LEVELS, "directories inside each other"), (n_names, MOST_NAMES, "files")
    for n, most, kind in (levels, names):
        if n > most:
            what = f"more than {most} {kind}, which no checkpoint has"
            raise FileSystemError(what, where=cut(str(where), 200))
