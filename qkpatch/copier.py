"""``Copier``: carries every file of SOURCE over into staging, all but the rows that the edit writes itself."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from threading import BoundedSemaphore, Condition
from types import TracebackType
from typing import NamedTuple, Protocol

from qkpatch.checkpoint.arriving import way
from qkpatch.checkpoint.copying import Lane, clone, data_size
from qkpatch.checkpoint.files import open_read, os_errors, sha256_range, update_digest, write_exact
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.journal import NAME as JOURNAL_NAME
from qkpatch.checkpoint.journal import Journal, State
from qkpatch.checkpoint.linking import linkable, linked
from qkpatch.checkpoint.output import OutputFile
from qkpatch.checkpoint.tree import LocalFile, SourceFile
from qkpatch.crew import Crew
from qkpatch.errors import HubError
from qkpatch.plan import EditPlan
from qkpatch.writing import Digest, Writing

_COPIES_AHEAD = 64  # open files: far below the usual limit of 1024
_HASHING_LANES = 4  # SHA-256 is slower than a disk: several files at a time


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
        self._plan, self._staging, self._observer = plan, staging, observer
        self._journal, self._writing = journal, writing
        self._fds: dict[str, int] = {}  # edited files in staging, open for reading and writing
        # Edited files of which only the rows are to be written, and the means.
        self._ready: dict[str, str] = {}
        self._rows = _Rows()
        self._open = ExitStack()
        self._copies: set[int] = set()  # open copies, of which the disk is still to be waited for
        self._slots = BoundedSemaphore(_COPIES_AHEAD)

    @property
    def lanes(self) -> int:
        """Files that are copied side by side."""
        takes_sums = self._writing.digest is Digest.files
        return min(_HASHING_LANES, len(os.sched_getaffinity(0))) if takes_sums else 1

    def __enter__(self) -> Copier:
        with self._open:  # closed again where the rest fails
            self._open.callback(self._close_copies)
            self._prune()
            for name in self._plan.model.checkpoint.directories:
                with os_errors("create a directory", self._staging / name):
                    (self._staging / name).mkdir(exist_ok=self._writing.resume)
            for name in self._plan.edits_by_file:
                file = self._plan.output.files[name]
                is_filled = self._journal.state(self._staging / name, file) is State.filled
                self._fds[name] = self._open_staged(file, is_new=not is_filled)
                self._open.callback(os.close, self._fds[name])
                if is_filled:
                    self._ready[name] = "resumed"
                elif _cloned(file, self._fds[name]):
                    self._ready[name] = "reflink"
            self._open = self._open.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def start(self, crew: Crew) -> list[Future[dict[str, Carried]]]:
        """Begin to carry every file over, in tasks of ``crew``; how, file by file."""
        # What is edited comes last: by then most rows are written, and read from the page cache.
        files = deque(sorted(self._plan.output.files.values(), key=lambda file: file.name in self._fds))
        return [crew.start(partial(self._carry, files, crew)) for _ in range(self.lanes)]

    def write(self, name: str, data: bytes | bytearray, at: int) -> None:
        """Write planned rows of a file."""
        write_exact(self._fds[name], data, at, name)
        self._rows.add(name, at)

    def _carry(self, files: deque[OutputFile], crew: Crew) -> dict[str, Carried]:
        # The disk is waited for alongside, while the next file is copied.
        later: dict[str, tuple[str, Future[str | None]]] = {}
        with Lane() as lane:
            while files:
                try:
                    file = files.popleft()
                except IndexError:  # another lane was faster
                    break
                fd, means, sha256 = self._one(file, lane, crew)
                later[file.name] = means, crew.start(partial(self._finish, file, fd, sha256))
        return {name: Carried(means, sha256.result()) for name, (means, sha256) in later.items()}

    def _one(self, file: OutputFile, lane: Lane, crew: Crew) -> tuple[int | None, str, str | None]:
        """Copy, share or link one file: the open copy, unless nothing is left to do; the means; the digest taken."""
        means = None
        if file.name in self._fds:
            fd, means = self._fds[file.name], self._ready.get(file.name)
        elif self._journal.state(self._staging / file.name, file) is State.copied:
            fd, means = None, "resumed"
        elif (of := _linkable(file, self._writing)) and linked(of, self._staging / file.name):
            fd, means = None, "hardlink"
        else:
            while not self._slots.acquire(timeout=0.1):
                crew.check()
            fd = self._open_staged(file, is_new=True)
            self._copies.add(fd)
            means = "reflink" if _cloned(file, fd) else None
        if fd is None or means is not None:
            self._observer.copied(file.size)
            return fd, means or "none", None
        return fd, *self._fill(file, fd, lane, crew)

    def _fill(self, file: OutputFile, fd: int, lane: Lane, crew: Crew) -> tuple[str, str | None]:
        """Copy what the edit does not write; the means of most of it, and the digest of the whole, edited rows too."""
        takes_sum = self._writing.digest is Digest.files and self._known_sum(file) is None
        expected = self._expected_sum(file)
        digest = hashlib.sha256(file.own) if takes_sum or expected else None
        used: Counter[str] = Counter()
        ranges, position = self._plan.written_ranges(file.name), len(file.own)
        self._observer.copied(position)
        for source, extents in groupby(file.around(ranges), attrgetter("file")):
            with source.open() as opened, way(lane, opened, fd, source.where) as passage:
                for extent in extents:
                    self._pass(file, ranges, (position, extent.at), crew, digest)
                    progress = partial(self._progress, crew)
                    means = passage.copy(extent.begin, extent.end, extent.at, progress, digest)
                    used[means] += extent.end - extent.begin
                    position = extent.upto
        self._pass(file, ranges, (position, file.size), crew, digest)
        used.setdefault("none", 0)
        if expected and digest and digest.hexdigest() != expected:
            raise HubError(
                "what came is not what the Hub lists: its SHA-256 is another",
                where=file.name,
                fix="run again; if it stays, the file on the Hub is damaged",
            )
        return used.most_common(1)[0][0], digest.hexdigest() if digest and takes_sum else None

    def _pass(
        self,
        file: OutputFile,
        ranges: Sequence[tuple[int, int]],
        gap: tuple[int, int],
        crew: Crew,
        digest: hashlib._Hash | None,
    ) -> None:
        """Leave out rows; where a digest is taken, wait until they are written, and read them."""
        first, last = gap
        if digest is not None and first < last:
            for begin, _ in ranges:
                if first <= begin < last:
                    self._rows.wait_for(file.name, begin, crew)
            update_digest(digest, self._fds[file.name], first, last, file.name)
        self._observer.copied(last - first)

    def _finish(self, file: OutputFile, fd: int | None, sha256: str | None) -> str | None:
        """Wait for the disk; the file's digest, where one is wanted and no edit is still to come."""
        if self._writing.digest is Digest.files and sha256 is None and file.name not in self._fds:
            sha256 = self._known_sum(file)
            if sha256 is None:
                with open_read(self._staging / file.name) as again:
                    sha256 = sha256_range(again, 0, file.size, file.name)
        if fd is not None and self._ready.get(file.name) != "resumed":
            _sync(fd, self._staging / file.name)
            is_edited = file.name in self._fds
            self._journal.note(fd, file, State.filled if is_edited else State.copied)
            if not is_edited:
                self._copies.remove(fd)
                os.close(fd)
                self._slots.release()
        return sha256

    def _expected_sum(self, file: OutputFile) -> str | None:
        """What a file that comes from elsewhere, and is not edited, must have."""
        original = None if file.name in self._fds else file.original
        return None if original is None or isinstance(original, LocalFile) else _listed_sum(original)

    def _known_sum(self, file: OutputFile) -> str | None:
        return None if file.original is None or file.name in self._fds else _listed_sum(file.original)

    def _close_copies(self) -> None:
        """After a failure: tasks that were never begun leave theirs open."""
        for fd in self._copies:
            os.close(fd)

    def _prune(self) -> None:
        """Remove from a staging directory that was taken over what does not come from SOURCE, such as a manifest."""
        known = {*self._plan.output.files, *self._plan.model.checkpoint.directories, JOURNAL_NAME}
        for path in self._staging.rglob("*") if self._writing.resume else ():
            if path.relative_to(self._staging).as_posix() not in known:
                with os_errors("remove", path):
                    path.unlink()

    def _open_staged(self, file: OutputFile, *, is_new: bool) -> int:
        """A file in staging, open for reading and writing; a new one has its size, our own bytes, and else zeros."""
        path = self._staging / file.name
        if is_new:
            self._journal.forget(file)
        with os_errors("create", path):
            if is_new:
                path.unlink(missing_ok=True)  # left by a run that is resumed, and of no use
            flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if is_new else 0)
            # The owner may always write, so that edits can be made in a copy of a read-only file.
            fd = os.open(path, flags, file.mode & 0o777 | 0o200)
        try:
            if is_new:
                with os_errors("write", path):
                    os.ftruncate(fd, file.size)
                write_exact(fd, file.own, 0, path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _progress(self, crew: Crew, n_bytes: int) -> None:
        crew.check()
        self._observer.copied(n_bytes)

    def source_sum(self, ref: TensorRef) -> str:
        """SHA-256 of a tensor's bytes in SOURCE."""
        file = self._plan.model.checkpoint.files[ref.shard]
        with file.open() as fd:
            return sha256_range(fd, ref.begin, ref.end, file.where)

    def staged_sum(self, ref: TensorRef) -> str:
        """SHA-256 of an edited tensor's bytes as they reached the file."""
        at = self._plan.output.place(ref)
        return sha256_range(self._fds[at.shard], at.begin, at.end, at.shard)

    def edited_sums(self, crew: Crew, taken: dict[str, Carried]) -> dict[str, str]:
        """SHA-256 of the edited files, as they are now, of which none could be ``taken`` before they were edited."""
        if self._writing.digest is not Digest.files:
            return {}
        names = [name for name in self._fds if taken[name].sha256 is None]
        sizes = self._plan.output.files
        sums = crew.map(lambda name: sha256_range(self._fds[name], 0, sizes[name].size, name), names)
        return dict(zip(names, sums, strict=True))

    def sync_edited(self) -> None:
        """Wait until the edited files are on the disk."""
        for name, fd in self._fds.items():
            _sync(fd, self._staging / name)

    def write_new(self, name: str, data: bytes) -> None:
        """Write a file that SOURCE does not have, and sync it."""
        path = self._staging / name
        with os_errors("write", path), open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


class _Rows:
    """Which planned rows are written already: by file, and where they begin."""

    def __init__(self) -> None:
        self._written: set[tuple[str, int]] = set()
        self._changed = Condition()

    def add(self, name: str, at: int) -> None:
        with self._changed:
            self._written.add((name, at))
            self._changed.notify_all()

    def wait_for(self, name: str, at: int, crew: Crew) -> None:
        with self._changed:
            while (name, at) not in self._written:
                self._changed.wait(0.1)
                crew.check()


def _cloned(file: OutputFile, fd: int) -> bool:
    """Whether ``fd`` now shares all blocks of the file it is to be a copy of."""
    original = file.original
    if original is None or not file.size:
        return False
    with original.open() as source:
        return isinstance(source, int) and clone(source, fd)


def _listed_sum(file: SourceFile) -> str | None:
    return None if file.listed is None else file.listed.sha256


def _linkable(file: OutputFile, writing: Writing) -> LocalFile | None:
    if file.original is None or not (writing.link or writing.link_cache):
        return None
    return linkable(file.original, even_cached=writing.link_cache)


def _sync(fd: int, path: Path) -> None:
    with os_errors("sync", path):
        os.fsync(fd)


def space_needed(plan: EditPlan, staging: Path, journal: Journal, writing: Writing) -> int:
    """Bytes that are still to be written: without holes, what a resumed run has, and what is to be linked."""
    return sum(
        _written_bytes(file)
        for name, file in plan.output.files.items()
        if journal.state(staging / name, file) is None
        and (name in plan.edits_by_file or _linkable(file, writing) is None)
    )


def _written_bytes(file: OutputFile) -> int:
    total = len(file.own)
    for extent in file.extents:
        with extent.file.open() as fd:
            total += data_size(fd, extent.begin, extent.end)
    return total
