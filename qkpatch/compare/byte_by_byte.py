"""OUT's bytes against SOURCE's: side by side, or by the Hub's digests where those are on the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from safetensors import SafetensorError, safe_open

from qkpatch.checkpoint.content import Held, Parts, damaged, feed_source, held_file
from qkpatch.checkpoint.files import LocalOpenFile, OpenFile, Progress, os_errors
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.pairs import Reader, Span
from qkpatch.checkpoint.present_files import Present
from qkpatch.checkpoint.source import Stored
from qkpatch.checkpoint.tree import LocalFile
from qkpatch.common.system import path_of
from qkpatch.output.layout import Output, OutputFile
from qkpatch.planning.plan import EditPlan

_DIFFERS = "differs outside the planned rows"


@dataclass(frozen=True)
class Mismatch:
    """One way in which OUT is not what it should be."""

    where: str
    what: str


def side_by_side(
    wanted: OutputFile, present: Present, planned: list[tuple[int, int]], source: Stored, progress: Progress
) -> Iterator[Mismatch]:
    """The first byte of a file outside ``planned`` that is neither our own header's nor SOURCE's, if that is read."""
    reader, size = Reader(), present.files[wanted.name].size
    if wanted.size != size:
        yield Mismatch(wanted.name, f"has {size} bytes, and should have {wanted.size}")
        return
    with present.open(wanted.name) as b:
        if bytes(b.read(len(wanted.own), 0)) != wanted.own:
            yield Mismatch(wanted.name, "the header or index is not as qkpatch writes it")
            return
        for file, extents in groupby(wanted.around(planned), attrgetter("file")):
            if file.is_known_by_digest:
                continue
            with file.open() as a:
                for extent in extents:
                    theirs = Span(a, extent.begin, extent.end)
                    ours = Span(b, extent.at, extent.upto)
                    n_equal = reader.first_difference(theirs, ours, progress)
                    if n_equal is not None:
                        where = f"{extent.at + n_equal}{_place(source, file.name, extent.begin + n_equal)}"
                        yield Mismatch(wanted.name, f"{_DIFFERS}, first at byte {where}")
                        return
        progress(len(wanted.own) + sum(end - begin for begin, end in planned))


class Listing:
    """Files that are on the Hub, by its digests: OUT's bytes have them, once the planned rows are put back.

    Of SOURCE nothing is read but those rows, and the headers that a resharded OUT does not have.
    """

    def __init__(self, source: Stored, plan: EditPlan | None, output: Output, present: Present) -> None:
        self._files, self._present = source.files, present
        self._held = output.held((lambda _: []) if plan is None else plan.written_ranges)
        # Files of SOURCE of which OUT has a part not at all, which is told elsewhere.
        self.lost = {
            extent.file.name
            for name, wanted in output.files.items()
            if name not in present.files or present.files[name].size != wanted.size
            for extent in wanted.extents
        }
        # What more is to be known of a file while it is read: its edited tensors, and planned rows, which come again.
        self._parts: dict[str, list[tuple[int, int]]] = {}
        self._digests: dict[tuple[str, int, int], str] = {}
        edits, heads = ((), ()) if plan is None else (plan.edits, plan.settings.heads)
        for edit in edits:
            rows = (part for head in heads for part in edit.written_ranges(head))
            for ref, begin, end in [*((ref, ref.begin, ref.end) for ref in edit.written), *rows]:
                self._parts.setdefault(ref.shard, []).append((begin, end))

    def check(self, progress: Progress) -> Iterator[Mismatch]:
        """What is wrong with files of SOURCE as OUT has them."""
        for file in self._files.values():
            held = self._held.get(file.name, [])
            if file.name in self.lost or not held or not file.is_known_by_digest:
                continue
            whole, listed, is_same = [Held(0, file.size, held[0].name, 0)], file.listed, False
            if listed is not None and listed.sha256 is not None and held == whole:
                is_same = self._present.sha256(held[0].name) == listed.sha256
            elif listed is not None:
                wanted = self._parts.get(file.name, [])
                digest = listed.hasher(file.size)
                parts = Parts(digest, wanted)
                with file.open() as opened:
                    feed_source(parts, opened, held, self._present.open)
                if is_same := digest.hexdigest() == listed.digest:
                    met = zip(wanted, parts.digests(), strict=True)
                    self._digests |= {(file.name, *part): sha256 for part, sha256 in met}
            progress(sum(piece.end - piece.begin for piece in held))
            if not is_same:
                names = sorted({piece.name for piece in held})
                more = "" if len(names) == 1 else f" (and {len(names) - 1} more)"
                what = f"it is not {file.where} as the Hub lists it, by its digest"
                yield Mismatch(names[0], f"{_DIFFERS}: {what}{more}")

    @contextmanager
    def open(self, name: str, ranges: Sequence[tuple[int, int]] = ()) -> Iterator[OpenFile]:
        """A file of SOURCE for reading; one that is on the Hub out of OUT, once that was found to have it."""
        file, held = self._files[name], self._held.get(name, [])
        if not file.is_known_by_digest:
            with file.open(ranges) as opened:
                yield opened
            return
        with held_file(file, held, ranges, self._present.open) as opened:
            for part in ranges:  # what is fetched again is what it was
                if self._digests.get((name, *part), digest := opened.sha256(*part)) != digest:
                    raise damaged(file.where)
            yield opened

    def sha256(self, ref: TensorRef) -> str | None:
        """Of an edited tensor in SOURCE; None where it was not met there."""
        file = self._files[ref.shard]
        if file.is_known_by_digest:
            return self._digests.get((ref.shard, ref.begin, ref.end))
        with file.open([(ref.begin, ref.end)]) as opened:
            return opened.sha256(ref.begin, ref.end)


def _place(source: Stored, shard: str, offset: int) -> str:
    """What lies at an offset of a file of SOURCE."""
    header = source.headers.get(shard)
    if header is not None and offset < header.data_start:
        return ", in its header"
    refs = () if header is None else header.tensors.values()
    return next((f", in {ref.name}" for ref in refs if ref.begin <= offset < ref.end), "")


def library_verdict(wanted: OutputFile, present: Present) -> Iterator[Mismatch]:
    """The safetensors library must open what it opened in SOURCE; it does not know every dtype we carry over."""
    sources = [extent.file for extent in wanted.extents]
    if not all(isinstance(file, LocalFile) and _library_accepts(str(file.path)) for file in sources):
        return
    with present.open(wanted.name) as opened:
        if isinstance(opened, LocalOpenFile) and not _library_accepts(path_of(opened.fd, opened.where)):
            yield Mismatch(wanted.name, "the safetensors library opens it in SOURCE and refuses it in OUT")


def _library_accepts(path: str) -> bool:
    try:
        with os_errors("read", path), safe_open(path, framework="np"):
            return True
    except SafetensorError:
        return False
