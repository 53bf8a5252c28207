"""Where the output grows until it is whole: a sibling directory, published by one rename.

OUT is never seen half done. The staging directory ``.OUT.qkpatch-<random>`` lies beside OUT, so the rename
stays on one file system; its owner holds a lock on it, which the kernel drops when the process dies in any
way. The next run for the same OUT takes an unlocked staging directory for what it is and removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.journal import is_of
from qkpatch.checkpoint.target import target_path
from qkpatch.errors import FileSystemError, HubError, UsageError
from qkpatch.interrupts import signals_held

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


class Staging:
    """A locked staging directory for ``out``; gone on leaving the ``with`` block unless published.

    Where the Hub failed it stays, for a run that resumes: what had come need not come again.
    """

    def __init__(self, out: Path, resume: str | None = None) -> None:
        """``resume`` is the fingerprint of the run whose leftovers are taken over, where there are any."""
        self.out = target_path(out)
        self.path = self.out.with_name(f".{out.name}.qkpatch-{secrets.token_hex(4)}")
        self._resume = resume
        self._lock = -1

    def __enter__(self) -> Staging:
        with os_errors("look for stale staging directories", self.out.parent):
            for path, lock in _stale(self.out):
                if self._resume is not None and self._lock < 0 and is_of(path, self._resume):
                    self.path, self._lock = path, lock
                else:
                    _remove(path, lock)
        try:
            with os_errors("create the staging directory", self.path):
                while self._lock < 0 or not self._is_locked():
                    self._create_locked()
        except BaseException:
            self._clean()
            raise
        return self

    def _create_locked(self) -> None:
        self._unlock()
        self.path.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _is_locked(self) -> bool:
        """False where another run took the directory for stale between its creation and its lock."""
        try:
            return os.path.samestat(os.fstat(self._lock), self.path.stat())
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, HubError):
            self._unlock()
            return
        self._clean()
        if error is None and self.path.exists():
            raise FileSystemError(
                "OUT is whole, but the directory it replaced could not be removed",
                where=str(self.path),
                fix="remove it yourself",
            )

    def _clean(self) -> None:
        with signals_held():  # a second Ctrl-C must not leave half of it behind
            if self.path.exists():
                shutil.rmtree(self.path, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def publish(self, directories: Iterable[str], still_replaceable: Callable[[], None] | None) -> None:
        """Make the staged directory OUT, all or nothing. Files must be synced already; directories are here.

        ``still_replaceable`` raises where the OUT that was to be replaced is another by now; None where there was none.

        Raises:
            UsageError: OUT came into being, or changed, meanwhile.
        """
        for name in (*directories, "."):
            _sync_directory(self.path / name)
        with os_errors("publish", self.out):
            if not os.path.lexists(self.out):
                self._move(_RENAME_NOREPLACE)
            elif not any(self.out.iterdir()):
                os.rename(self.path, self.out)  # replaces an empty directory, fails on any other
            elif still_replaceable is not None:
                still_replaceable()
                self._move(_RENAME_EXCHANGE)  # the old output is now the staged one, and goes on exit
            else:
                raise self._raced()
        _sync_directory(self.out.parent)

    def _move(self, flag: int) -> None:
        try:
            try:
                _renameat2(self.path, self.out, flag)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._move_plainly(flag)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise self._raced() from error
            raise

    def _move_plainly(self, flag: int) -> None:
        """The nearest that a file system without renameat2 can do (some network and FUSE mounts)."""
        if flag == _RENAME_NOREPLACE:
            os.rename(self.path, self.out)  # refuses all but an empty directory
            return
        aside = self.out.with_name(f".{self.out.name}.replaced-{secrets.token_hex(4)}")
        os.rename(self.out, aside)
        try:
            os.rename(self.path, self.out)
        except BaseException:
            os.rename(aside, self.out)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _raced(self) -> UsageError:
        return UsageError(
            "came into being while qkpatch was running; nothing was written to it",
            where=str(self.out),
            fix="is another qkpatch writing to it?",
        )


def remove_stale(out: Path) -> list[Path]:
    """Remove staging directories for ``out`` whose owner is dead; returns them."""
    return [_remove(path, lock) for path, lock in _stale(out)]


def _stale(out: Path) -> Iterator[tuple[Path, int]]:
    """Staging directories for ``out`` whose owner is dead, each locked by us from here on."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.qkpatch-[0-9a-f]{{8}}")
    for path in [p for p in out.parent.iterdir() if pattern.fullmatch(p.name)]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # not a directory, or not ours to read
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)  # its owner lives, or the file system cannot tell
        else:
            yield path, fd


def _remove(path: Path, lock: int) -> Path:
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
    return path


def _renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(new))


def _sync_directory(path: Path) -> None:
    with os_errors("sync", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
