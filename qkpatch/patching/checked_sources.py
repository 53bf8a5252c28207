"""``Sources``: SOURCE's files as a run reads them, and which of them were found to be what the Hub lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from qkpatch.checkpoint.content import Content, Held, damaged, held_file
from qkpatch.checkpoint.files import OpenFile, changed
from qkpatch.checkpoint.header import TensorRef, read_header
from qkpatch.checkpoint.tree import LocalFile, SourceFile
from qkpatch.errors import FileSystemError, HubError
from qkpatch.output.options import Digest, Writing
from qkpatch.output.staged_files import StagedFiles
from qkpatch.patching.threads import Crew
from qkpatch.planning.plan import EditPlan


class Sources:
    """Files on this machine are read where they are; those that come from the Hub, where they then are in staging.

    So what an edit is computed from is what was hashed.
    """

    def __init__(self, plan: EditPlan, staged: StagedFiles, writing: Writing) -> None:
        self._plan, self._staged, self._writing = plan, staged, writing
        self._files = plan.model.checkpoint.files
        self.is_download = plan.model.source.path is None
        self.proven = set(plan.model.source.checked)  # files that are what the Hub lists
        # SHA-256 of tensors as they came, before they are edited where they are.
        self._digests: dict[TensorRef, str] = {}

    @property
    def is_checked(self) -> bool | None:
        """Whether each file that OUT has was found to be what the Hub lists; None where nothing is listed."""
        return None if self._plan.model.source.kind != "hub" else self.proven >= self._held.keys()

    def wanted(self, file: SourceFile) -> Content | None:
        """What a file is still to be compared with: it is downloaded, or in the Hub cache and digests are wanted."""
        is_cached = self._plan.model.source.kind == "hub" and self._writing.digest is Digest.files
        is_wanted = (self.is_download or is_cached) and file.name not in self.proven
        return file.listed if is_wanted else None

    def check(self, crew: Crew) -> None:
        """Read the files that must be what the Hub lists and were not read from end to end yet.

        Raises:
            HubError: one is not.
        """
        list(crew.map(self._check, [name for name in self._held if self.wanted(self._files[name])]))
        if not self.is_download:
            return
        for shard, header in self._plan.model.checkpoint.headers.items():
            with self.open(shard, [(0, header.data_start)]) as opened:
                if read_header(opened, shard) != header:  # the plan was made from another
                    raise damaged_file(self._files[shard])
        if self._writing.digest is not Digest.none:
            refs = [ref for target in self._plan.edits for ref in target.written]
            self._digests = dict(zip(refs, crew.map(self.tensor_digest, refs), strict=True))

    def _check(self, name: str) -> None:
        file = self._files[name]
        with self.open(name) as opened:
            if not is_listed(file, opened):
                raise damaged_file(file)
        self.proven.add(name)

    @cached_property
    def _held(self) -> dict[str, list[Held]]:
        """What OUT holds of each file of SOURCE; of files that are edited where they are, before that."""
        leave_out = (lambda name: []) if self.is_download else self._plan.written_ranges
        return self._plan.output.held(leave_out)

    @contextmanager
    def open(self, name: str, ranges: Sequence[tuple[int, int]] = ()) -> Iterator[OpenFile]:
        """A file of SOURCE for reading ``ranges``, or all; one that came from the Hub is read where it now is."""
        file = self._files[name]
        if not self.is_download:
            with file.open(ranges) as opened:
                yield opened
            return
        with held_file(file, self._held.get(name, []), ranges, self._staged.reading) as opened:
            yield opened

    def tensor_digest(self, ref: TensorRef) -> str:
        """SHA-256 of a tensor's bytes in SOURCE."""
        if ref in self._digests:
            return self._digests[ref]
        with self.open(ref.shard, [(ref.begin, ref.end)]) as opened:
            return opened.sha256(ref.begin, ref.end)


def is_listed(file: SourceFile, opened: OpenFile) -> bool:
    """Whether an open copy of a file holds what the Hub lists."""
    listed = file.listed
    return listed is not None and listed.is_in(opened)


def damaged_file(file: SourceFile) -> FileSystemError:
    """What is said of a file that is not what the Hub lists, here or in the Hub cache, or not what was planned."""
    if file.listed is None:
        return changed("the source changed while qkpatch was running", file.where)
    if not isinstance(file, LocalFile):
        return damaged(file.where)
    return HubError(
        "the file in the Hub cache is not what its name there says: its digest is another",
        where=str(file.path.resolve()),
        fix="delete it, and run again: it will be downloaded",
    )
