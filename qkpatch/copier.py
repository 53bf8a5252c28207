"""``Copier``: carries every file of SOURCE over into staging, all but the bytes that the edit writes itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

from qkpatch.checkpoint.files import clone, copy_range, open_read, os_errors, sha256_range
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.tree import SourceFile
from qkpatch.crew import Crew
from qkpatch.plan import EditPlan

Range = tuple[int, int]


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

    def __init__(self, plan: EditPlan, staging: Path, observer: Observer) -> None:
        self.fds: dict[str, int] = {}  # edited files in staging, open for reading and writing
        self._plan, self._staging, self._observer = plan, staging, observer
        self._cloned: set[str] = set()
        self._open = ExitStack()

    def __enter__(self) -> Copier:
        checkpoint = self._plan.model.checkpoint
        with self._open:  # closed again where the rest fails
            for name in checkpoint.directories:
                with os_errors("create a directory", self._staging / name):
                    (self._staging / name).mkdir()
            for name in self._plan.edits_by_shard:
                file = checkpoint.files[name]
                self.fds[name] = self._open.enter_context(_created(self._staging / name, file))
                with open_read(file.path, file.id) as source:
                    if clone(source, self.fds[name]):
                        self._cloned.add(name)
            self._open = self._open.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def copy_all(self, crew: Crew) -> list[str]:
        """Copy every file, a task of ``crew``; the means, file by file."""
        means, syncs = [], []
        for name, file in self._plan.model.checkpoint.files.items():
            if name in self.fds:
                means.append(self._fill(file, crew))
            else:
                used, sync = self._copy(file, crew)
                means.append(used)
                syncs.append(sync)
        for sync in syncs:
            sync.result()
        return means

    def _fill(self, file: SourceFile, crew: Crew) -> str:
        """Copy what the edit does not write; synced when the edit is done."""
        if file.name in self._cloned:
            self._observer.copied(file.size)
            return "reflink"
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

    def _copy(self, file: SourceFile, crew: Crew) -> tuple[str, Future[None]]:
        target = self._staging / file.name
        with ExitStack() as stack:
            fd = stack.enter_context(_created(target, file))
            with open_read(file.path, file.id) as source:
                if clone(source, fd):
                    used = "reflink"
                    self._observer.copied(file.size)
                else:
                    used = copy_range(source, fd, 0, file.size, file.path, partial(self._progress, crew))
            # The disk is waited for alongside, while the next file is copied.
            return used, crew.start(partial(_sync_and_close, fd, target, stack.pop_all()))

    def _progress(self, crew: Crew, n_bytes: int) -> None:
        crew.check()
        self._observer.copied(n_bytes)

    def source_digest(self, ref: TensorRef) -> str:
        """SHA-256 of a tensor's bytes in SOURCE."""
        file = self._plan.model.checkpoint.files[ref.shard]
        with open_read(file.path, file.id) as fd:
            return sha256_range(fd, ref.begin, ref.end, file.path)

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


@contextmanager
def _created(path: Path, file: SourceFile) -> Iterator[int]:
    """A new file in staging, open for reading and writing, with the mode of the one it stands for."""
    with os_errors("create", path):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        # The owner may always write, so that edits can be made in a copy of a read-only file.
        fd = os.open(path, flags, file.mode & 0o777 | 0o200)
    try:
        yield fd
    finally:
        os.close(fd)


def _sync(fd: int, path: Path) -> None:
    with os_errors("sync", path):
        os.fsync(fd)


def _sync_and_close(fd: int, path: Path, opened: ExitStack) -> None:
    with opened:
        _sync(fd, path)
