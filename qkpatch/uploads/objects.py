"""``Objects``: the files of OUT as objects of a store, each of SOURCE's bytes around the edited rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from qkpatch.checkpoint.content import HeldFile
from qkpatch.checkpoint.files import OpenFile
from qkpatch.common.observer import Observer
from qkpatch.output.layout import Extent, OutputFile
from qkpatch.output.options import Digest, Writing
from qkpatch.planning.plan import EditPlan
from qkpatch.stores.parts import Part
from qkpatch.stores.remote import StoreFile
from qkpatch.stores.store import Entry
from qkpatch.uploads.claim import Claim, Done
from qkpatch.uploads.rows import Rows

_LAST = ("config.json", "model_index.json")  # what makes a folder a model


def lateness(name: str) -> tuple[bool, bool, str]:
    """Of a file that is no weight: what loaders begin with comes last."""
    return name in _LAST, name.endswith(".index.json"), name


class Objects:
    """What is made of OUT, by any number of threads."""

    def __init__(
        self,
        plan: EditPlan,
        claim: Claim,
        rows: Rows,
        writing: Writing,
        observer: Observer,
        check: Callable[[], None],
    ) -> None:
        """``check`` raises where the run is to stop."""
        self._plan, self._claim, self._store, self._rows = plan, claim, claim.store, rows
        self._is_hashed, self._observer, self._check = writing.digest is Digest.files, observer, check
        self._listed: Mapping[str, Entry] = claim.store.listing()
        self.made: dict[str, Entry] = {}
        self.sha256: dict[str, str | None] = {}
        self.means: Counter[str] = Counter()

    def in_order(self) -> tuple[list[OutputFile], list[OutputFile], list[OutputFile]]:
        """Weights that no edit writes to; those that one does; and the rest, what loaders begin with at the end."""
        output, headers = self._plan.output, self._plan.model.checkpoint.headers
        weights, edited = output.made_of(headers), self._plan.edits_by_file
        untouched = [file for name, file in output.files.items() if name in weights and name not in edited]
        others = [file for name, file in output.files.items() if name not in weights]
        others.sort(key=lambda file: lateness(file.name))
        return untouched, [output.files[name] for name in edited], others

    def make(self, files: Iterable[OutputFile]) -> None:
        """Make each, in order, unless a run before has made it.

        Raises:
            StoreError: the store does not take one, or SOURCE changed.
        """
        for file in files:
            rows, done = self._rows.digest(file.name), self._claim.state(file.name, self._listed)
            if done is not None and done.rows == rows and (done.sha256 is not None or not self._is_hashed):
                entry, sha256, means = self._listed[file.name], done.sha256, "resumed"
                self._observer.copied(file.size)
            else:
                entry, sha256, means = self._one(file)
                self._claim.note(file.name, Done(entry.identity, entry.size, sha256, rows))
            self.made[file.name], self.sha256[file.name] = entry, sha256
            self.means[means] += 1

    def put(self, name: str, data: bytes) -> None:
        """Make a small object that SOURCE does not have."""
        self._claim.check()
        self._store.put(name, data)
        self.made[name] = self._store.stat(name)

    def _one(self, file: OutputFile) -> tuple[Entry, str | None, str]:
        spans = self._spans(file)
        digest = hashlib.sha256() if self._is_hashed else None
        left = file.size
        self._claim.check()
        with ExitStack() as stack:
            # What is copied on the store's side is never opened here.
            opened: list[OpenFile] = []

            def read(begin: int, end: int) -> bytearray:
                self._check()
                if not opened:
                    opened.append(self._whole(file, stack))
                data = opened[0].read(end - begin, begin)
                if digest is not None:
                    digest.update(data)
                return data

            def progress(n_bytes: int) -> None:
                nonlocal left
                self._check()
                left -= n_bytes
                if not left:  # what was sent is about to be seen: another run may have published meanwhile
                    self._claim.check()
                self._observer.copied(n_bytes)

            entry = self._store.assemble(file.name, spans, read, progress)
        sent = {span.source is None for span in spans}
        means = "upload" if sent <= {True} else "store_copy" if sent == {False} else "part_copy"
        return entry, None if digest is None else digest.hexdigest(), means

    def _spans(self, file: OutputFile) -> list[Part]:
        """All bytes of a file in order, and which of them the store has already."""
        rows = self._rows.ranges(file.name)
        spans = [Part(0, len(file.own)), *(Part(*span) for span in rows)]
        for extent in file.around(rows):
            source = self._copied(file, extent)
            spans.append(Part(extent.at, extent.upto, source, extent.begin if source else 0))
        return sorted(span for span in spans if span.size)

    def _copied(self, file: OutputFile, extent: Extent) -> Entry | None:
        source = extent.file
        if self._is_hashed or not isinstance(source, StoreFile) or not self._store.copies_from(source.store):
            return None
        is_whole = file.original is not None and file.name not in self._plan.edits_by_file
        return source.entry if is_whole or self._store.copies_parts else None

    def _whole(self, file: OutputFile, stack: ExitStack) -> OpenFile:
        pieces = list(self._rows.pieces(file.name))
        opened: dict[str, OpenFile] = {}
        for extent in file.around(self._rows.ranges(file.name)):
            if extent.file.name not in opened:
                opened[extent.file.name] = stack.enter_context(extent.file.open())
            pieces.append((extent.at, extent.upto, opened[extent.file.name], extent.begin))
        if file.own:
            pieces.append((0, len(file.own), _Own(file), 0))
        return HeldFile(file.name, file.size, pieces)


class _Own(OpenFile):
    """A file's own bytes, such as its header."""

    def __init__(self, file: OutputFile) -> None:
        self.where, self._own = file.name, file.own

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._own)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """As :meth:`OpenFile.read_into`."""
        buffer[:] = self._own[offset : offset + len(buffer)]
