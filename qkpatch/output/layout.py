"""``Output``: the files that OUT consists of, each as pieces of SOURCE's files. No byte is read or written here."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qkpatch.checkpoint.content import Held
from qkpatch.checkpoint.files import gaps
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.source import Stored
from qkpatch.checkpoint.tree import SourceFile
from qkpatch.checkpoint.weights import index_name
from qkpatch.common.json_text import load_json


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes ``begin:end`` of a file of SOURCE, and the offset ``at`` which they get in a file of OUT."""

    file: SourceFile
    begin: int
    end: int
    at: int

    @property
    def upto(self) -> int:
        """Where they end in the file of OUT."""
        return self.at + self.end - self.begin

    def within(self, first: int, last: int) -> Extent:
        """The part that gets the offsets ``first:last``."""
        return replace(self, begin=self.begin + first - self.at, end=self.begin + last - self.at, at=first)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of OUT: bytes of our own, such as a header, and after them, without a gap, what SOURCE gives."""

    name: str
    mode: int
    own: bytes
    extents: tuple[Extent, ...]

    @classmethod
    def copy_of(cls, file: SourceFile) -> OutputFile:
        """A file as it is in SOURCE."""
        return cls(file.name, file.mode, b"", (Extent(file, 0, file.size, 0),))

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.extents[-1].upto if self.extents else len(self.own)

    @property
    def original(self) -> SourceFile | None:
        """The file of SOURCE that this is a copy of, all of it and nothing else."""
        only = self.extents[0] if len(self.extents) == 1 and not self.own else None
        return only.file if only is not None and only.end - only.begin == only.file.size else None

    def inside(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Extent]:
        """The parts of the extents that lie in ``ranges`` of this file, which are ascending and apart."""
        for extent in self.extents:
            for begin, end in ranges:
                first, last = max(begin, extent.at), min(end, extent.upto)
                if first < last:
                    yield extent.within(first, last)

    def around(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Extent]:
        """The extents less ``ranges`` of this file."""
        for extent in self.extents:
            for first, last in gaps(extent.at, extent.upto, ranges):
                yield extent.within(first, last)


@dataclass(frozen=True)
class Output:
    """All files of OUT but those that say what was done, and where in them SOURCE's tensors are."""

    files: Mapping[str, OutputFile]
    moved: Mapping[str, TensorRef] | None = None  # None: every tensor stays where it is

    @classmethod
    def copy_of(cls, source: Stored) -> Output:
        """The files of SOURCE, as they are; and of shards without an index, one."""
        files = {name: OutputFile.copy_of(file) for name, file in source.files.items()}
        if source.lacks_index:
            index = index_file(source, source.tensors)
            files[index.name] = index
        return cls(dict(sorted(files.items())))

    def held(self, leave_out: Callable[[str], Sequence[tuple[int, int]]]) -> dict[str, list[Held]]:
        """What OUT holds of each file of SOURCE, less the ranges of OUT's files that ``leave_out`` gives."""
        held: dict[str, list[Held]] = {}
        for name, file in self.files.items():
            for extent in file.around(leave_out(name)):
                part = Held(extent.begin, extent.end, name, extent.at)
                held.setdefault(extent.file.name, []).append(part)
        return held

    def place(self, ref: TensorRef) -> TensorRef:
        """A tensor of SOURCE as OUT stores it: in which file, and at which bytes."""
        return ref if self.moved is None else self.moved[ref.name]

    def made_of(self, names: Collection[str]) -> set[str]:
        """The files of OUT that have something of these files of SOURCE."""
        return {name for name, file in self.files.items() if any(e.file.name in names for e in file.extents)}

    @property
    def size(self) -> int:
        """The size of all files of OUT in bytes."""
        return sum(file.size for file in self.files.values())


def index_file(source: Stored, places: Mapping[str, TensorRef]) -> OutputFile:
    """The index of OUT: ``weight_map`` and ``total_size`` by ``places``; whatever else SOURCE's says, as it is."""
    document: dict[str, object] = {}
    if source.index is not None:
        file = source.files[source.index]
        document = load_json(file.read(), file.name, unique=True)
    metadata = document.get("metadata")
    total = sum(ref.nbytes for ref in places.values())
    document["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    document["weight_map"] = {name: places[name].shard for name in sorted(places)}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    mode = source.files[next(iter(source.headers))].mode
    return OutputFile(source.index or index_name(source.stem), mode, text.encode(), ())
