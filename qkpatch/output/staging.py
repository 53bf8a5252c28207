"""Where the output grows until it is whole: beside OUT, in a directory of the caller's own, published by one rename.

OUT is never seen half done. The staging directory ``.OUT.qkpatch-<random>`` lies beside OUT, so the rename stays on
one file system; it holds the journal and ``files``, the directory that becomes OUT, so no name of SOURCE's can meet
one of ours. Nobody but its owner may enter it, and it is used by descriptor: whoever renames it, or puts another in
its place, redirects nothing. Its owner holds a lock on it, which the kernel drops when the process dies in any way.
The next run for the same OUT takes over or removes an unlocked one, if it is the caller's and plainly qkpatch's.
In a directory that several machines share, a lock proves nothing between them (NFS may be mounted with locks of its
own): there a machine looks only at what it has left itself, which its name says.
What a file system cannot do (locks, modes, syncing directories, exchanging names) is done without, and told.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from qkpatch.checkpoint.files import CANNOT, os_errors
from qkpatch.checkpoint.names import KEPT
from qkpatch.checkpoint.open_directory import Rooted, raced
from qkpatch.common import system
from qkpatch.common.interrupts import signals_held
from qkpatch.common.text import Warned, warned
from qkpatch.errors import FileSystemError
from qkpatch.output import journal
from qkpatch.output.destination import destination_path

FILES = "files"  # in the staging directory: what becomes OUT
_REPLACED = "replaced"  # and what was there, where the two cannot be exchanged
_STAYS = "what a killed run leaves beside OUT stays there, and --resume cannot take it over"
NO_LOCKS = f"the file system has no locks: {_STAYS}"
NO_MODES = f"the file system keeps no modes: others may look into an unfinished OUT; {_STAYS}"
NO_SYNC = "the file system cannot sync directories: after a power failure OUT may not be whole"
NO_EXCHANGE = "the file system cannot exchange names: for a moment, while it was replaced, there was no OUT"


class Staging:
    """A locked staging directory for ``out``; gone on leaving the ``with`` block unless published or kept."""

    room: Rooted  # the staging directory itself
    files: Rooted  # what becomes OUT

    def __init__(
        self, out: Path, resume: str | None = None, mode: int = 0o777, shared: Rooted | None = None
    ) -> None:
        """Name a new one.

        Args:
            out: what it becomes.
            resume: the fingerprint of the run whose leftovers are taken over.
            mode: of OUT.
            shared: OUT's parent, where several machines write to it.
        """
        self.out = destination_path(out)
        self._shared, self._tag = shared, "" if shared is None else f"{_machine()}-"
        self.path = self.out.with_name(f".{out.name}.qkpatch-{self._tag}{secrets.token_hex(4)}")
        self._resume, self._mode = resume, mode | 0o700
        self._is_held = self.is_kept = False
        self.lacks: dict[
            Warned, None
        ] = {}  # which promises are weaker, since the file system cannot keep them
        # Of OUT's parents, those that are made here.
        self._made = [path for path in self.out.parents if not os.path.lexists(path)]

    def __enter__(self) -> Staging:
        try:
            with os_errors("create a directory", self.out.parent):
                self.out.parent.mkdir(parents=True, exist_ok=True)
            name = "." if self._shared is not None else ""
            self._parent = Rooted(self.out.parent, within=self._shared, name=name)
            with os_errors("look for stale staging directories", self.out.parent):
                self._take_over()
            with os_errors("create the staging directory", self.path):
                while not self._is_held:
                    self._create()
                self.room.make_directory(FILES, self._mode)
            # Messages speak of OUT, which is what the user knows.
            self.files = Rooted(self.out, within=self.room, name=FILES)
        except BaseException:
            self._clean()
            raise
        return self

    def _take_over(self) -> None:
        """Of what dead runs left, hold that of this plan in which most is done; the rest is removed."""
        done = {
            room: journal.done_bytes(room, self._resume) for room in _stale(self._parent, self.out, self._tag)
        }
        for room in sorted(done, key=done.__getitem__, reverse=True):
            if done[room] >= 0 and not self._is_held:
                self.path, self.room, self._is_held = room.path, room, True
            else:
                _remove(self._parent, room)

    def _create(self) -> None:
        """Make and lock a directory; it is not held where another run took it for stale before it was locked."""
        self._parent.mkdir(self.path.name, 0o700)
        try:
            room = Rooted(self.path, within=self._parent, name=self.path.name)
        except FileSystemError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return
            raise
        try:
            try:
                system.lock(room.fd, wait=True)
            except OSError as error:
                if error.errno not in {*CANNOT, errno.ENOLCK}:
                    raise
                self.lacks[warned(NO_LOCKS)] = None
            if os.fstat(room.fd).st_mode & 0o077:
                self.lacks[warned(NO_MODES)] = None
            if not _is_still(room, self._parent.status(self.path.name)):
                return
            self.room, self._is_held = room, True
        finally:
            if not self._is_held:
                room.close()
        # Owned as what we make in it: on some file systems that is not the user's own number.
        os.close(room.open(journal.NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        inner = room.status(journal.NAME)
        if inner is None or os.fstat(room.fd).st_uid != inner.st_uid:
            self._is_held = False  # nor is it to be removed
            what = "somebody else put a directory in place of the staging directory"
            raise FileSystemError(what, where=str(self.path), fix="choose an -o where only you may write")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_kept:
            self._let_go()
            return
        if not self._clean() and error is None:
            what = "OUT is whole, but the directory it replaced could not be removed"
            raise FileSystemError(what, where=str(self.path), fix="remove it yourself")

    def _clean(self) -> bool:
        with signals_held():  # a second Ctrl-C must not leave half of it behind
            try:
                return not self._is_held or _clear(self._parent, self.room)
            finally:
                self._let_go()

    def _let_go(self) -> None:
        for held in ("files", "room", "_parent"):
            if hasattr(self, held):
                getattr(self, held).close()
        for path in self._made:
            with suppress(OSError):  # OUT is in it
                path.rmdir()

    @property
    def can_be_kept(self) -> bool:
        """Whether what is done could be taken over by another run: it is not OUT already, and can be locked."""
        return not self.lacks.keys() & {NO_LOCKS, NO_MODES} and _is_still(self.files, self.room.status(FILES))

    def publish(self, directories: Iterable[str], still_replaceable: Callable[[Path], None] | None) -> None:
        """Make the staged directory OUT, all or nothing. Files must be synced already; directories are here.

        ``still_replaceable`` raises where the OUT that was to be replaced, wherever it is moved to, is another by now;
        None where there was none.

        Raises:
            UsageError: OUT came into being, or changed, meanwhile.
        """
        synced = [self.files.sync(name) for name in (*directories, ".")]
        with os_errors("publish", self.out):
            if self._parent.status(self.out.name) is None:
                self._move(system.NOREPLACE)
            elif not any(self.out.iterdir()):
                self._rename(FILES, self.out.name)  # replaces an empty directory, fails on any other
            elif still_replaceable is not None:
                still_replaceable(self.out)
                aside = self._move(system.EXCHANGE)  # the old output is now in staging, and goes on exit
                try:
                    still_replaceable(self.path / aside)  # what came just before belongs to somebody
                except BaseException:
                    self._move_back(aside)
                    raise
                for name in KEPT:  # but these are the user's
                    with suppress(OSError):
                        if self.files.status(name) is None:
                            self._rename(f"{aside}/{name}", f"{self.out.name}/{name}")
            else:
                raise raced(self.out)
        if not all([*synced, self.room.sync(), self._parent.sync()]):
            self.lacks[warned(NO_SYNC)] = None

    def _rename(self, name: str, to: str) -> None:
        """From staging to beside it."""
        os.rename(name, to, src_dir_fd=self.room.fd, dst_dir_fd=self._parent.fd)

    def _rename_back(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self._parent.fd, dst_dir_fd=self.room.fd)

    def _move(self, flag: int) -> str:
        """Make the staged directory OUT; the name in staging of what was there."""
        try:
            try:
                system.renameat2(self.room.fd, FILES, self._parent.fd, self.out.name, flag)
                return FILES
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
                self._move_plainly(flag)
                return _REPLACED
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise raced(self.out) from error
            raise

    def _move_plainly(self, flag: int) -> None:
        """The nearest that a file system without renameat2 can do (some network and FUSE mounts)."""
        if flag == system.NOREPLACE:
            self._rename(FILES, self.out.name)  # refuses all but an empty directory
            return
        self.lacks[warned(NO_EXCHANGE)] = None
        self._rename_back(self.out.name, _REPLACED)
        try:
            self._rename(FILES, self.out.name)
        except BaseException:
            self._rename(_REPLACED, self.out.name)
            raise

    def _move_back(self, aside: str) -> None:
        if aside == FILES:
            system.renameat2(self.room.fd, FILES, self._parent.fd, self.out.name, system.EXCHANGE)
            return
        self._rename_back(self.out.name, FILES)
        self._rename(aside, self.out.name)


def _machine() -> str:
    """The running system, in eight letters: within it, and nowhere else, a lock that can be had has no owner."""
    return hashlib.sha256(f"{platform.node()} {system.boot_id()}".encode()).hexdigest()[:8]


def clear_shared(parent: Rooted, out: Path) -> None:
    """Remove what any machine left of a shared ``out``, once that is published: nobody can need it."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.qkpatch-[0-9a-f]{{8}}-[0-9a-f]{{8}}")
    for name in filter(pattern.fullmatch, parent.names()):
        with suppress(FileSystemError), Rooted(parent.path / name, within=parent, name=name) as room:
            if _is_ours(room):
                parent.remove_tree(name)


def _stale(parent: Rooted, out: Path, tag: str = "") -> Iterator[Rooted]:
    """Staging directories for ``out`` whose owner is dead, each open, and locked by us from here on."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.qkpatch-{tag}[0-9a-f]{{8}}")
    for name in filter(pattern.fullmatch, parent.names()):
        try:
            room = Rooted(parent.path / name, within=parent, name=name)
        except FileSystemError:
            continue  # not a directory, or not ours to read
        try:
            system.lock(room.fd)
        except OSError:
            room.close()  # its owner lives, or the file system cannot tell
            continue
        if _is_ours(room):
            yield room
        else:
            room.close()


def left_bytes(out: Path) -> int:
    """What dead runs for the same OUT left beside it, on the disk, which the next one takes over or removes."""
    out, total = destination_path(out), 0
    if not out.parent.is_dir():
        return 0
    with Rooted(out.parent) as parent:
        for room in _stale(parent, out):
            total += sum(512 * status.st_blocks for _, status in room.walk())
            room.close()
    return total


def _is_ours(room: Rooted) -> bool:
    """Whether a directory is the caller's alone and holds what a staging directory holds, nothing else."""
    status = os.fstat(room.fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        return False
    names = set(room.names())
    return not names or (names <= {journal.NAME, FILES} and journal.is_one(room))


def _clear(parent: Rooted, room: Rooted) -> bool:
    """Remove a staging directory and all in it, as far as that can be done; whether it is gone."""
    room.clear()  # the journal last: what a kill leaves of it is still plainly ours
    name = room.path.name
    with suppress(FileSystemError):
        if _is_still(room, parent.status(name)):
            with suppress(OSError):
                os.rmdir(name, dir_fd=parent.fd)
        return not _is_still(room, parent.status(name))
    return False


def _is_still(room: Rooted, status: os.stat_result | None) -> bool:
    return status is not None and os.path.samestat(os.fstat(room.fd), status)


def _remove(parent: Rooted, room: Rooted) -> None:
    try:
        _clear(parent, room)
    finally:
        room.close()
