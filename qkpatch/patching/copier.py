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
from threading import BoundedSemaphore, Condition
from typing import NamedTuple

from qkpatch.checkpoint.files import Digesting, Digests, LocalOpenFile, synced, write_exact
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.tree import LocalFile
from qkpatch.common import system
from qkpatch.common.observer import Observer
from qkpatch.errors import HubError
from qkpatch.output.journal import Journal, State
from qkpatch.output.layout import OutputFile
from qkpatch.output.options import Digest, Writing
from qkpatch.output.passage import Lane, passage_for
from qkpatch.output.staged_files import StagedFiles
from qkpatch.patching.checked_sources import Sources, damaged_file
from qkpatch.patching.recheck import is_as_noted
from qkpatch.patching.threads import Crew, Stopped
from qkpatch.planning.plan import EditPlan

COPIES_AHEAD = 64  # open files: far below the usual limit of 1024
_HASHING_LANES = 4  # SHA-256 is slower than a disk: several files at a time


class Carried(NamedTuple):
    """How one file came into staging: by which means, and its SHA-256 where one was taken on the way."""

    means: str
    sha256: str | None


class Copier:
    """The files of a plan, on their way into staging.

    Of files on this machine the planned rows are left out, for the edit to write: so neither has to wait for the
    other. Where the file system can share blocks, edited files are cloned whole before any edit. Files that come
    from the Hub come whole, are checked, and are edited where they then are.
    """

    def __init__(
        self,
        plan: EditPlan,
        sources: Sources,
        staged: StagedFiles,
        journal: Journal,
        writing: Writing,
        observer: Observer,
    ) -> None:
        self._plan, self._sources, self._staged, self._observer = plan, sources, staged, observer
        self._journal, self._writing = journal, writing
        self._edited: dict[str, LocalOpenFile] = {}  # in staging, open for reading and writing
        # Edited files of which only the rows are to be written, and the means.
        self._ready: dict[str, str] = {}
        self._taken_over: set[str] = set()  # files that a run before this one had copied
        self._rows = _Rows()
        self._open = ExitStack()
        self._copies: set[int] = set()  # open copies, of which the disk is still to be waited for
        self._slots = BoundedSemaphore(COPIES_AHEAD)

    @property
    def lanes(self) -> int:
        """How many files are copied side by side."""
        hashes_files = self._writing.digest is Digest.files
        return min(_HASHING_LANES, system.processors()) if hashes_files else 1

    def __enter__(self) -> Copier:
        self._open.callback(self._close_copies)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def prepare(self, crew: Crew) -> None:
        """Make the directories, look through what is taken over from a run before, and open the files to edit."""
        files, directories = self._plan.output.files, self._plan.model.checkpoint.directories
        if self._writing.resume:
            self._staged.prune(files, directories)
        self._staged.make_directories(directories.items())
        noted = [file for file in files.values() if self._state(file) is not None]
        is_still_good = partial(is_as_noted, self._plan, self._sources, self._staged, crew)
        is_good = crew.map(is_still_good, noted)
        self._taken_over = {file.name for file, good in zip(noted, is_good, strict=True) if good}
        for name in self._plan.edits_by_file:
            is_filled = name in self._taken_over
            if not is_filled:
                self._journal.forget(files[name])
            fd = self._staged.open(name) if is_filled else self._staged.create(files[name])
            self._open.callback(os.close, fd)
            self._edited[name] = LocalOpenFile(fd, self._staged.where(name))
            if is_filled:
                self._ready[name] = "resumed"
            elif _cloned(files[name], fd):
                self._ready[name] = "reflink"

    def _state(self, file: OutputFile) -> State | None:
        status = self._staged.status(file.name)
        state = self._journal.state(status, file)
        if status is None or status.st_nlink > 1 or status.st_uid != os.geteuid():
            return None  # one that has another name may be SOURCE's own
        wanted = State.filled if file.name in self._plan.edits_by_file else State.copied
        return state if state is wanted else None

    def start(self, crew: Crew) -> list[Future[dict[str, Carried]]]:
        """Begin to carry every file over, on threads of ``crew``; each task tells how its files came."""
        # What is edited comes last: by then most rows are written, and read from the page cache.
        files = deque(sorted(self._plan.output.files.values(), key=lambda file: file.name in self._edited))
        return [crew.start(partial(self._carry, files, crew)) for _ in range(self.lanes)]

    def wait(self, copying: list[Future[dict[str, Carried]]], crew: Crew) -> dict[str, Carried]:
        """How each file came, when all have come and are what the Hub lists, where that is to be known.

        Raises:
            HubError: one is not.
        """
        carried: dict[str, Carried] = {}
        for lane in copying:
            carried |= lane.result()
        try:
            self._sources.check(crew)
        except (HubError, Stopped) as error:  # of several that are checked at once, either may be met first
            # Made of several files, and some of them damaged: not to be taken over.
            made = [file for file in self._plan.output.files.values() if file.original is None]
            for file in made:
                self._journal.forget(file)
            if isinstance(error, HubError) and any(file.name in self._taken_over for file in made):
                what = "what an earlier run had left in staging is not, or no longer, what the Hub lists"
                raise HubError(what, where=error.where, fix="run again: it comes anew") from error
            raise
        return carried

    def write(self, name: str, data: bytes | bytearray, at: int) -> None:
        """Write planned rows of the file ``name`` of OUT, at its offset ``at``."""
        write_exact(self._edited[name].fd, data, at, self._edited[name].where)
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
        if file.name in self._edited:
            fd, means = self._edited[file.name].fd, self._ready.get(file.name)
        elif file.name in self._taken_over:
            fd, means = None, "resumed"
        elif (original := self._writing.linkable(file)) and self._staged.link(original, file.name):
            fd, means = None, "hardlink"
        else:
            while not self._slots.acquire(timeout=0.1):
                crew.check()
            self._journal.forget(file)
            fd = self._staged.create(file)
            self._copies.add(fd)
            means = "reflink" if _cloned(file, fd) else None
        if fd is None or means is not None:
            self._observer.copied(file.size)
            return fd, means or "none", None
        return fd, *self._fill(file, fd, lane, crew)

    def _fill(self, file: OutputFile, fd: int, lane: Lane, crew: Crew) -> tuple[str, str | None]:
        """Copy what is not left out; the means of most of it, and the digest of the whole, edited rows too."""
        ranges = [] if self._sources.is_download else self._plan.written_ranges(file.name)
        whole, is_hashed = file.original, self._writing.digest is Digest.files
        out = hashlib.sha256() if is_hashed and (ranges or file.name not in self._edited) else None
        wanted = None if whole is None or ranges else self._sources.wanted(whole)
        theirs = None if wanted is None else wanted.hasher(file.size)
        digest = Digests(one for one in (out, theirs) if one is not None) or None
        if digest is not None:
            digest.update(file.own)
        used: Counter[str] = Counter()
        position = len(file.own)
        self._observer.copied(position)
        for source, extents in groupby(file.around(ranges), attrgetter("file")):
            where = self._staged.where(file.name)
            with source.open() as opened, passage_for(lane, opened, fd, where) as passage:
                for extent in extents:
                    self._pass(file, ranges, (position, extent.at), crew, digest)
                    progress = partial(self._progress, crew)
                    means = passage.copy(extent.begin, extent.end, extent.at, progress, digest)
                    used[means] += extent.end - extent.begin
                    position = extent.upto
        self._pass(file, ranges, (position, file.size), crew, digest)
        if whole is not None and file.size == 0:
            with whole.open():  # nothing is read of it, and it must be empty still
                pass
        used.setdefault("none", 0)
        if whole is not None and wanted is not None and theirs is not None:
            if theirs.hexdigest() != wanted.digest:
                raise damaged_file(whole)
            self._sources.proven.add(whole.name)
        return used.most_common(1)[0][0], None if out is None else out.hexdigest()

    def _pass(
        self,
        file: OutputFile,
        ranges: Sequence[tuple[int, int]],
        gap: tuple[int, int],
        crew: Crew,
        digest: Digesting | None,
    ) -> None:
        """Leave out rows; where a digest is taken, wait until they are written, and read them."""
        first, last = gap
        if digest is not None and first < last:
            for begin, _ in ranges:
                if first <= begin < last:
                    self._rows.wait_for(file.name, begin, crew)
            self._edited[file.name].feed(digest, first, last)
        self._observer.copied(last - first)

    def _finish(self, file: OutputFile, fd: int | None, sha256: str | None) -> str | None:
        """Wait for the disk; the file's digest, where one is wanted and no edit is still to come."""
        is_edited = file.name in self._edited
        if fd is not None and self._ready.get(file.name) != "resumed":
            synced(fd, self._staged.where(file.name))
            self._journal.note(fd, file, State.filled if is_edited else State.copied)
            if not is_edited:
                self._staged.is_done(file.name, os.fstat(fd))
                self._copies.remove(fd)
                os.close(fd)
                self._slots.release()
        if self._writing.digest is Digest.files and sha256 is None and not is_edited:
            with self._staged.reading(file.name) as again:
                sha256 = again.sha256(0, file.size)
        return sha256

    def _close_copies(self) -> None:
        """After a failure: tasks that were never begun leave theirs open."""
        for fd in self._copies:
            os.close(fd)

    def _progress(self, crew: Crew, n_bytes: int) -> None:
        crew.check()
        self._observer.copied(n_bytes)

    def staged_digest(self, ref: TensorRef) -> str:
        """SHA-256 of an edited tensor's bytes as they reached the file."""
        at = self._plan.output.place(ref)
        return self._edited[at.shard].sha256(at.begin, at.end)

    def seal(self) -> None:
        """Say that nothing more will be written to the edited files, and wait until they are on the disk."""
        for name, opened in self._edited.items():
            synced(opened.fd, opened.where)
            self._staged.is_done(name, os.fstat(opened.fd))

    def edited_digests(self, crew: Crew, taken: dict[str, Carried]) -> dict[str, str]:
        """SHA-256 of the edited files, as they are now, of which none could be ``taken`` before they were edited."""
        if self._writing.digest is not Digest.files:
            return {}
        names = [name for name in self._edited if taken[name].sha256 is None]
        sizes = self._plan.output.files
        digests = crew.map(lambda name: self._edited[name].sha256(0, sizes[name].size), names)
        return dict(zip(names, digests, strict=True))


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
    if not isinstance(original, LocalFile) or not file.size:
        return False
    with original.open() as source:
        return system.clone(source.fd, fd)
