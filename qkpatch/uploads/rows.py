"""``Rows``: the edited tensors of OUT on this machine, in files without names; the rest is never here."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

from qkpatch.checkpoint.content import Held, held_file
from qkpatch.checkpoint.files import LocalOpenFile, OpenFile, os_errors, write_exact
from qkpatch.checkpoint.header import TensorRef
from qkpatch.errors import FileSystemError
from qkpatch.patching.threads import Crew
from qkpatch.planning.plan import EditPlan


class Rows:
    """For each patched file of OUT one of its size, in which only the tensors that an edit writes to take room."""

    def __init__(self, plan: EditPlan) -> None:
        """Raises :class:`FileSystemError` where there is no room for them."""
        self._plan = plan
        self._refs = [ref for target in plan.edits for ref in target.written]
        self._held: dict[str, list[Held]] = {}
        self._files: dict[str, LocalOpenFile] = {}
        self._open = ExitStack()
        for ref in self._refs:
            place = plan.output.place(ref)
            held = Held(ref.begin, ref.end, place.shard, place.begin)
            self._held.setdefault(ref.shard, []).append(held)
        folder, needed = tempfile.gettempdir(), sum(ref.nbytes for ref in self._refs)
        free = shutil.disk_usage(folder).free
        if free < needed:
            what = f"the edited tensors need {needed:,} bytes until they are sent, and {free:,} are free"
            raise FileSystemError(what, where=folder, fix="set TMPDIR to a directory with more room")

    def __enter__(self) -> Rows:
        for name in self._plan.edits_by_file:
            with os_errors("create a file", tempfile.gettempdir()):
                file = self._open.enter_context(tempfile.TemporaryFile(prefix="qkpatch-"))
                os.ftruncate(file.fileno(), self._plan.output.files[name].size)
            self._files[name] = LocalOpenFile(file.fileno(), f"the rows of {name}")
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def fill(self, crew: Crew) -> None:
        """Fetch the tensors as SOURCE has them."""
        list(crew.map(self._fetch, self._refs))

    def _fetch(self, ref: TensorRef) -> None:
        place = self._plan.output.place(ref)
        with self._plan.model.checkpoint.files[ref.shard].open() as source:
            source.copy_to(self._files[place.shard], ref.begin, ref.end, place.begin)

    def open(self, name: str, ranges: Sequence[tuple[int, int]] = ()) -> AbstractContextManager[OpenFile]:
        """A shard of SOURCE for reading; what of it is here is read here."""
        file = self._plan.model.checkpoint.files[name]
        return held_file(file, self._held.get(name, []), ranges, lambda out: nullcontext(self._files[out]))

    def write(self, name: str, data: bytes | bytearray, at: int) -> None:
        """Write planned rows of the file ``name`` of OUT, at its offset ``at``."""
        write_exact(self._files[name].fd, data, at, self._files[name].where)

    def sha256(self, ref: TensorRef) -> str:
        """Of an edited tensor, as it is now."""
        place = self._plan.output.place(ref)
        return self._files[place.shard].sha256(place.begin, place.end)

    def digest(self, name: str) -> str | None:
        """Of all planned rows of a file of OUT; None where nothing of it is edited."""
        if name not in self._files:
            return None
        digest = hashlib.sha256()
        for begin, end in self.ranges(name):
            self._files[name].feed(digest, begin, end)
        return digest.hexdigest()

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """The planned rows of a file of OUT, neighbours joined."""
        joined: list[tuple[int, int]] = []
        for begin, end in self._plan.written_ranges(name):
            if joined and joined[-1][1] == begin:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((begin, end))
        return joined

    def pieces(self, name: str) -> Iterator[tuple[int, int, OpenFile, int]]:
        """The same, as what :class:`HeldFile` reads from."""
        for begin, end in self.ranges(name):
            yield begin, end, self._files[name], begin
