"""``Copier``: carries every file of SOURCE over into staging, all but the bytes that the edit writes itself."""

from __future__ import annotations

import os
import re
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore
from types import TracebackType
from typing import NamedTuple, Protocol

from qkpatch.checkpoint.files import FileId, clone, copy_range, open_read, os_errors, sha256_range
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.journal import NAME as JOURNAL_NAME
from qkpatch.checkpoint.journal import Journal, State
from qkpatch.checkpoint.tree import SourceFile
from qkpatch.crew import Crew
from qkpatch.plan import EditPlan
from qkpatch.writing import Digest, Writing

_COPIES_AHEAD = 64  # open files: far below the usual limit of 1024


class Carried(NamedTuple):
    """How one file came into staging."""

    means: str
    sha256: str | None


class Observer(Protocol):
    """Hears of progress, from any thread; the surface draws it."""

    def copied(self, n_bytes: int) -> None:
        """``n_bytes`` more were copied."""

    def edited(self, n_heads: int) -> None:
        """``n_heads`` more were edited."""


class Copier:
    """The files of a plan, on their way into ``staging``.

    The planned rows are left out, for the edit to write: so neither has to wait for the other. Where the file
    system can share blocks, edited files are cloned whole before any edit.
    """

    def __init__(
        self, plan: EditPlan, staging: Path, journal: Journal, writing: Writing, observer: Observer
    ) -> None:
        self.fds: dict[str, int] = {}  # edited files in staging, open for reading and writing
        self._plan, self._staging, self._observer = plan, staging, observer
        self._journal, self._writing = journal, writing
        # Edited files of which only the rows are to be written, and the means.
        self._ready: dict[str, str] = {}
        self._open = ExitStack()
        self._copies: set[int] = set()  # open copies, of which the disk is still to be waited for
        self._slots = BoundedSemaphore(_COPIES_AHEAD)

    def __enter__(self) -> Copier:
        checkpoint = self._plan.model.checkpoint
        with self._open:  # closed again where the rest fails
            self._open.callback(self._close_copies)
            self._prune()
            for name in checkpoint.directories:
                with os_errors("create a directory", self._staging / name):
                    (self._staging / name).mkdir(exist_ok=self._writing.resume)
            for name in self._plan.edits_by_shard:
                file, staged = checkpoint.files[name], self._staging / name
                is_filled = self._journal.state(staged, file) is State.filled
                self.fds[name] = self._open_staged(staged, file, is_new=not is_filled)
                self._open.callback(os.close, self.fds[name])
                if is_filled:
                    self._ready[name] = "resumed"
                    continue
                with open_read(file.path, file.id) as source:
                    if clone(source, self.fds[name]):
                        self._ready[name] = "reflink"
            self._open = self._open.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def copy_all(self, crew: Crew) -> dict[str, Carried]:
        """Carry every file over, a task of ``crew``; how, file by file."""
        means: dict[str, str] = {}
        # The disk is waited for alongside, while the next file is copied.
        later: dict[str, Future[str | None]] = {}
        for name, file in self._plan.model.checkpoint.files.items():
            if name in self.fds:
                means[name] = self._fill(file, crew)
                later[name] = crew.start(partial(self._finish_filled, file))
            else:
                means[name], fd = self._copy(file, crew)
                later[name] = crew.start(partial(self._finish_copied, file, fd))
        return {name: Carried(means[name], sha256.result()) for name, sha256 in later.items()}

    def _fill(self, file: SourceFile, crew: Crew) -> str:
        """Copy what the edit does not write."""
        if file.name in self._ready:
            self._observer.copied(file.size)
            return self._ready[file.name]
        used = "none"
        with open_read(file.path, file.id) as source:
            position = 0
            for begin, end in [*self._plan.written_ranges(file.name), (file.size, file.size)]:
                if begin > position:
                    progress = partial(self._progress, crew)
                    used = copy_range(source, self.fds[file.name], position, begin, file.path, progress)
                self._observer.copied(end - begin)
                position = end
        return used

    def _finish_filled(self, file: SourceFile) -> None:
        if self._ready.get(file.name) != "resumed":
            _sync(self.fds[file.name], self._staging / file.name)
            self._journal.note(self.fds[file.name], file, State.filled)

    def _copy(self, file: SourceFile, crew: Crew) -> tuple[str, int | None]:
        """Copy or link one file; the means, and the open copy where there is something left to do with it."""
        staged = self._staging / file.name
        if self._journal.state(staged, file) is State.copied:
            self._observer.copied(file.size)
            return "resumed", None
        if _may_link(file, self._writing) and _linked(file, staged):
            self._observer.copied(file.size)
            return "hardlink", None
        while not self._slots.acquire(timeout=0.1):
            crew.check()
        fd = self._open_staged(staged, file, is_new=True)
        self._copies.add(fd)
        with open_read(file.path, file.id) as source:
            if clone(source, fd):
                used = "reflink"
                self._observer.copied(file.size)
            else:
                used = copy_range(source, fd, 0, file.size, file.path, partial(self._progress, crew))
        return used, fd

    def _finish_copied(self, file: SourceFile, fd: int | None) -> str | None:
        """Wait for the disk; the file's digest, where one is wanted."""
        sha256 = self._file_sum(file, fd) if self._writing.digest is Digest.files else None
        if fd is not None:
            _sync(fd, self._staging / file.name)
            self._journal.note(fd, file, State.copied)
            self._copies.remove(fd)
            os.close(fd)
            self._slots.release()
        return sha256

    def _close_copies(self) -> None:
        """After a failure: tasks that were never begun leave theirs open."""
        for fd in self._copies:
            os.close(fd)

    def _prune(self) -> None:
        """Remove from a staging directory that was taken over what does not come from SOURCE, such as a manifest."""
        checkpoint = self._plan.model.checkpoint
        known = {*checkpoint.files, *checkpoint.directories, JOURNAL_NAME}
        for path in self._staging.rglob("*") if self._writing.resume else ():
            if path.relative_to(self._staging).as_posix() not in known:
                with os_errors("remove", path):
                    path.unlink()

    def _open_staged(self, path: Path, file: SourceFile, *, is_new: bool) -> int:
        """A file in staging, open for reading and writing, with the mode of the one it stands for."""
        if is_new:
            self._journal.forget(file)
        with os_errors("create", path):
            if is_new:
                path.unlink(missing_ok=True)  # left by a run that is resumed, and of no use
            flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if is_new else 0)
            # The owner may always write, so that edits can be made in a copy of a read-only file.
            return os.open(path, flags, file.mode & 0o777 | 0o200)

    def _file_sum(self, file: SourceFile, fd: int | None) -> str:
        # Files in the Hub cache that came by its large-file storage are named by their digest.
        real = Path(os.path.realpath(file.path))
        if is_cached(real) and re.fullmatch("[0-9a-f]{64}", real.name):
            return real.name
        if fd is not None:
            return sha256_range(fd, 0, file.size, file.path)
        with open_read(self._staging / file.name) as again:
            return sha256_range(again, 0, file.size, file.path)

    def _progress(self, crew: Crew, n_bytes: int) -> None:
        crew.check()
        self._observer.copied(n_bytes)

    def source_sum(self, ref: TensorRef) -> str:
        """SHA-256 of a tensor's bytes in SOURCE."""
        file = self._plan.model.checkpoint.files[ref.shard]
        with open_read(file.path, file.id) as fd:
            return sha256_range(fd, ref.begin, ref.end, file.path)

    def staged_sum(self, ref: TensorRef) -> str:
        """SHA-256 of an edited tensor's bytes as they reached the file."""
        return sha256_range(self.fds[ref.shard], ref.begin, ref.end, ref.shard)

    def edited_sums(self, crew: Crew) -> dict[str, str]:
        """SHA-256 of the edited files as they are now, where digests of files are wanted."""
        if self._writing.digest is not Digest.files:
            return {}
        sizes = self._plan.model.checkpoint.files
        sums = crew.map(lambda name: sha256_range(self.fds[name], 0, sizes[name].size, name), self.fds)
        return dict(zip(self.fds, sums, strict=True))

    def sync_edited(self) -> None:
        """Wait until the edited files are on the disk."""
        for name, fd in self.fds.items():
            _sync(fd, self._staging / name)

    def write_new(self, name: str, data: bytes) -> None:
        """Write a file that SOURCE does not have, and sync it."""
        path = self._staging / name
        with os_errors("write", path), open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def is_cached(real: Path) -> bool:
    """Whether a file lies in the Hub cache, ``models--org--name/blobs``, which is huggingface_hub's to change."""
    return real.parent.name == "blobs" and real.parent.parent.name.startswith(("models--", "datasets--"))


def _may_link(file: SourceFile, writing: Writing) -> bool:
    return writing.link_cache or (writing.link and not is_cached(Path(os.path.realpath(file.path))))


def _linked(file: SourceFile, staged: Path) -> bool:
    """Make ``staged`` a hard link to ``file``, links resolved; False where the file system cannot."""
    with os_errors("link", staged):
        staged.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(file.path), staged)
    except OSError:
        return False  # another file system, too many links, not permitted: copying will do
    if FileId.of(staged.stat()) != file.id:
        staged.unlink()
        return False  # it changed meanwhile, which copying will tell
    return True


def _sync(fd: int, path: Path) -> None:
    with os_errors("sync", path):
        os.fsync(fd)


def space_needed(plan: EditPlan, staging: Path, journal: Journal, writing: Writing) -> int:
    """Bytes that are still to be written: without what a resumed run has, and what is to be linked."""
    return sum(
        file.size
        for name, file in plan.model.checkpoint.files.items()
        if journal.state(staging / name, file) is None
        and (name in plan.edits_by_shard or not _may_link(file, writing))
    )
