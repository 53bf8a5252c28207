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
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.checkpoint.tree import load_json
from qkpatch.errors import FileSystemError, QKPatchError, UsageError

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def check_target(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an OUT that would harm SOURCE or someone's files.

    Raises:
        UsageError: OUT is, holds or lies in SOURCE (through links too); OUT is not empty, or with
            ``overwrite`` holds files that qkpatch did not write.
        FileSystemError: OUT's parent is missing or not writable.
    """
    real_out, real_source = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if real_out == real_source or real_source in real_out.parents or real_out in real_source.parents:
        raise UsageError(
            f"OUT {'is' if real_out == real_source else 'overlaps'} SOURCE, which is never written to",
            where=str(out),
            fix="choose an OUT beside SOURCE",
        )
    if out.name.endswith(".safetensors"):
        raise UsageError(
            "OUT is a directory; the patched files keep their names in it",
            where=str(out),
            fix=f"write -o {out.with_suffix('')}",
        )
    parent = out.absolute().parent
    if not parent.is_dir():
        raise FileSystemError(
            "its parent is not a directory", where=str(out), fix=f"create it first: mkdir -p {parent}"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FileSystemError("no permission to write in its parent", where=str(out), fix="choose another -o")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError("exists and is not a directory", where=str(out), fix="choose another -o")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            "exists and is not empty", where=str(out), fix="choose another -o, or add --overwrite"
        )
    foreign = _foreign_files(out)
    if foreign:
        raise UsageError(
            f"holds files that qkpatch did not write, such as {foreign[0]}",
            where=str(out),
            fix="--overwrite replaces only what qkpatch wrote; move them, or choose another -o",
        )


def _foreign_files(out: Path) -> list[str]:
    """Files in ``out`` that its manifest does not list; everything where there is no readable manifest."""
    try:
        manifest = load_json((out / MANIFEST_NAME).read_bytes(), MANIFEST_NAME)
        known = {str(file["name"]) for file in manifest["files"]} | {MANIFEST_NAME}
    except (OSError, QKPatchError, KeyError, TypeError):
        known = set()
    present = (
        p.relative_to(out).as_posix() for p in sorted(out.rglob("*")) if p.is_symlink() or not p.is_dir()
    )
    return [name for name in present if name not in known]


class Staging:
    """A locked staging directory for ``out``; gone on leaving the ``with`` block unless published."""

    def __init__(self, out: Path) -> None:
        # The link-free parent, so that staging and OUT are on one file system whatever links lead there.
        self.out = Path(os.path.realpath(out.absolute().parent)) / out.name
        self.path = self.out.with_name(f".{out.name}.qkpatch-{secrets.token_hex(4)}")
        self._lock = -1

    def __enter__(self) -> Staging:
        remove_stale(self.out)
        with os_errors("create the staging directory", self.path):
            self.path.mkdir()
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)

    def publish(self, directories: Iterable[str], *, overwrite: bool) -> None:
        """Make the staged directory OUT, all or nothing. Files must be synced already; directories are here.

        Raises:
            UsageError: OUT came into being meanwhile.
        """
        for name in (*directories, "."):
            _sync_directory(self.path / name)
        with os_errors("publish", self.out):
            if not os.path.lexists(self.out):
                self._move(_RENAME_NOREPLACE)
            elif not any(self.out.iterdir()):
                os.rename(self.path, self.out)  # replaces an empty directory, fails on any other
            elif overwrite:
                self._move(_RENAME_EXCHANGE)  # the old output is now the staged one, and goes on exit
            else:
                raise self._raced()
        _sync_directory(self.out.parent)

    def _move(self, flag: int) -> None:
        try:
            _renameat2(self.path, self.out, flag)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise self._raced() from error
            if error.errno not in _UNSUPPORTED:
                raise
            # A file system without renameat2 (some network and FUSE mounts): the nearest it can do.
            if flag == _RENAME_EXCHANGE:
                aside = self.out.with_name(f".{self.out.name}.replaced-{secrets.token_hex(4)}")
                os.rename(self.out, aside)
                os.rename(self.path, self.out)
                shutil.rmtree(aside)
            else:
                os.rename(self.path, self.out)

    def _raced(self) -> UsageError:
        return UsageError(
            "came into being while qkpatch was running; nothing was written to it",
            where=str(self.out),
            fix="is another qkpatch writing to it?",
        )


def remove_stale(out: Path) -> list[Path]:
    """Remove staging directories for ``out`` whose owner is dead; returns them."""
    removed = []
    pattern = re.compile(rf"\.{re.escape(out.name)}\.qkpatch-[0-9a-f]{{8}}")
    for path in [p for p in out.parent.iterdir() if pattern.fullmatch(p.name)]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # not a directory, or not ours to read
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its owner lives, or the file system cannot tell
        else:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
        finally:
            os.close(fd)
    return removed


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
