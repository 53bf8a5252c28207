"""What differs between two checkpoints, tensor by tensor and file by file, however either is divided into shards.

Bytes are compared first, side by side; only chunks that differ are looked at as numbers, and torch is imported
only then. Neither side has bytes that escape: a shard in which no tensor owns a byte is refused on opening.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from qkpatch.checkpoint.files import Progress
from qkpatch.checkpoint.header import Header, TensorRef
from qkpatch.checkpoint.names import BOOKKEEPING
from qkpatch.checkpoint.pairs import Reader, Span
from qkpatch.checkpoint.source import MANIFEST_NAME, Stored, open_stored
from qkpatch.checkpoint.tree import SourceFile
from qkpatch.common.dtypes import FLOATS
from qkpatch.common.interrupts import import_torch
from qkpatch.common.observer import Observer
from qkpatch.compare.diff_types import (
    Difference,
    FileDifference,
    Files,
    Layout,
    MetadataDifference,
    TensorDifference,
    Uncompared,
    natural,
)
from qkpatch.compare.renaming import spelled_as
from qkpatch.model.locate import Source

if TYPE_CHECKING:
    from qkpatch.compare.values import Change

_T = TypeVar("_T")
_Pair = tuple[TensorRef, TensorRef]

# The formats that are compared by value where dtypes differ; ``spectral.change`` knows them, but is torch.


def compare(source_a: Source, source_b: Source, observer: Observer) -> Difference:
    """As :func:`difference`, of tensors under A's names where B spells them with other prefixes."""
    a = open_stored(source_a.place)
    b, renamed = spelled_as(a, open_stored(source_b.place))
    observer.begins("compare", bytes_to_compare(a, b), 0)
    return replace(difference(a, b, observer.copied), renamed=renamed)


def bytes_to_compare(a: Stored, b: Stored) -> int:
    """What :func:`difference` reads of A, and so what its progress adds up to."""
    tensors = sum(x.nbytes for x, y in _common(a.tensors, b.tensors) if _is_comparable(x, y))
    pairs = () if a.single_file or b.single_file else _common(_others(a), _others(b))
    return tensors + sum(min(x.size, y.size) for x, y in pairs)


def difference(a: Stored, b: Stored, progress: Progress) -> Difference:
    """Compare everything in A and B; ``progress`` hears of the bytes of A that were compared.

    Each side is read once, but for the bytes of A before a tensor's first difference, whose norm is wanted then.

    Raises:
        FileSystemError: a file cannot be read, or changed meanwhile.
    """
    reader = Reader()
    differing: dict[str, TensorDifference] = {}
    for (shard_a, shard_b), pairs in _by_shards(_common(a.tensors, b.tensors)).items():
        with a.files[shard_a].open() as opened_a, b.files[shard_b].open() as opened_b:
            for x, y in pairs:
                change = None
                if _is_comparable(x, y):
                    span_a = Span(opened_a, x.begin, x.end)
                    span_b = Span(opened_b, y.begin, y.end)
                    change = _change(reader, span_a, span_b, x.dtype, y.dtype, progress)
                if change is not None or not _is_same_type(x, y):
                    differing[x.name] = TensorDifference(x, y, change)
    ordered = [differing[name] for name in sorted(differing, key=natural)]
    n_common = len(a.tensors.keys() & b.tensors.keys())
    return Difference(
        equal_tensors=n_common - len(ordered),
        changed=tuple(d for d in ordered if _is_same_type(d.a, d.b)),
        retyped=tuple(d for d in ordered if not _is_same_type(d.a, d.b)),
        only_in_a=_only(a.tensors, b.tensors),
        only_in_b=_only(b.tensors, a.tensors),
        metadata=tuple(_metadata(a.headers.values(), b.headers.values())),
        files=None if a.single_file or b.single_file else _files(reader, _others(a), _others(b), progress),
        layout=_layout(reader, a, b),
        uncompared=tuple(_uncompared(a, b)),
        compared_bytes=bytes_to_compare(a, b),
    )


def _change(
    reader: Reader, a: Span, b: Span, dtype_a: str, dtype_b: str, progress: Progress
) -> Change | None:
    """What differs between two versions of a tensor; None where all bytes are equal, or there are none."""
    position = 0
    if dtype_a == dtype_b:
        for x, y in reader.pairs(a, b):
            if x != y:
                break
            position += len(x)
            progress(len(x))
    if position == a.end - a.begin:
        return None
    import_torch()
    from qkpatch.compare.values import changed, recast, unchanged

    total = None
    for x in reader.chunks(a._replace(end=a.begin + position)):
        part = unchanged(x, dtype_a)
        total = part if total is None else total + part
    rest_a, rest_b = a._replace(begin=a.begin + position), b._replace(begin=b.begin + position)
    for x, y in reader.pairs(rest_a, rest_b):
        if dtype_a != dtype_b:
            part = recast(x, y, dtype_a, dtype_b)
        else:
            part = unchanged(x, dtype_a) if x == y else changed(x, y, dtype_a)
        total = part if total is None else total + part
        progress(len(x))
    return total


def _is_same_type(a: TensorRef, b: TensorRef) -> bool:
    return (a.dtype, a.shape, a.nbytes) == (b.dtype, b.shape, b.nbytes)


def _is_comparable(a: TensorRef, b: TensorRef) -> bool:
    return _is_same_type(a, b) or (a.shape == b.shape and a.dtype in FLOATS and b.dtype in FLOATS)


def _common(a: Mapping[str, _T], b: Mapping[str, _T]) -> list[tuple[_T, _T]]:
    return [(value, b[name]) for name, value in a.items() if name in b]


def _only(a: Mapping[str, TensorRef], b: Mapping[str, TensorRef]) -> tuple[TensorRef, ...]:
    return tuple(a[name] for name in sorted(a.keys() - b.keys(), key=natural))


def _by_shards(pairs: Iterable[_Pair]) -> dict[tuple[str, str], list[_Pair]]:
    """Pairs of tensors by the two files they are in, of which no more are open at a time; in A's order on disk."""
    groups: dict[tuple[str, str], list[_Pair]] = {}
    for a, b in sorted(pairs, key=lambda pair: (pair[0].shard, pair[0].begin)):
        groups.setdefault((a.shard, b.shard), []).append((a, b))
    return groups


def _others(stored: Stored) -> dict[str, SourceFile]:
    """The files that are neither shards nor their index."""
    return {n: f for n, f in stored.files.items() if n not in stored.headers and n != stored.index}


def _files(
    reader: Reader, a: Mapping[str, SourceFile], b: Mapping[str, SourceFile], progress: Progress
) -> Files:
    changed = []
    pairs = _common(a, b)
    for x, y in pairs:
        first = _first_difference(reader, x, y, progress)
        if first is not None:
            changed.append(FileDifference(x.name, x.size, y.size, first))
    return Files(
        equal=len(pairs) - len(changed),
        changed=tuple(sorted(changed, key=lambda file: natural(file.name))),
        only_in_a=tuple(sorted(a.keys() - b.keys(), key=natural)),
        only_in_b=tuple(sorted(b.keys() - a.keys(), key=natural)),
    )


def _first_difference(
    reader: Reader, a: SourceFile, b: SourceFile, progress: Progress, end: int | None = None
) -> int | None:
    """Where two files begin to differ, or one ends; with ``end``, before that byte."""
    size = min(a.size, b.size) if end is None else end
    with a.open() as opened_a, b.open() as opened_b:
        first = reader.first_difference(Span(opened_a, 0, size), Span(opened_b, 0, size), progress)
    return size if first is None and end is None and a.size != b.size else first


def _metadata(a: Iterable[Header], b: Iterable[Header]) -> Iterator[MetadataDifference]:
    sides = [[header.metadata or {} for header in side] for side in (a, b)]
    keys = {key for side in sides for metadata in side for key in metadata}
    for key in sorted(keys, key=natural):
        of_a, of_b = (
            sorted({metadata.get(key) for metadata in side}, key=lambda v: (v is not None, v or ""))
            for side in sides
        )
        if of_a != of_b:
            yield MetadataDifference(key, tuple(of_a), tuple(of_b))


def _layout(reader: Reader, a: Stored, b: Stored) -> Layout:
    pairs = [(name, name) for name in a.headers if name in b.headers]
    if len(a.headers) == len(b.headers) == 1:
        pairs = list(zip(a.headers, b.headers, strict=True))  # whatever they are called
    same = [(x, y) for x, y in pairs if _contents(a.headers[x]) == _contents(b.headers[y])]
    rewritten = []
    for x, y in same:
        end = a.headers[x].data_start
        if _first_difference(reader, a.files[x], b.files[y], lambda _: None, end) is not None:
            rewritten.append(x)
    equal = len(same) == len(a.headers) == len(b.headers)
    return Layout(equal, len(a.headers), len(b.headers), tuple(sorted(rewritten, key=natural)))


def _contents(header: Header) -> tuple[object, ...]:
    """All that a header says, but for the name of its file."""
    tensors = {name: (ref.dtype, ref.shape, ref.begin, ref.end) for name, ref in header.tensors.items()}
    return header.data_start, header.metadata, tensors


def _uncompared(a: Stored, b: Stored) -> Iterator[Uncompared]:
    if (a.previous_manifest, b.previous_manifest) != (None, None):
        in_a, in_b = (side.previous_manifest is not None for side in (a, b))
        yield Uncompared(MANIFEST_NAME, in_a, in_b, "qkpatch's record of an edit")
    for name in sorted({side.index for side in (a, b) if side.index is not None}):
        yield Uncompared(name, a.index == name, b.index == name, "the division into shards")
    for name in BOOKKEEPING:
        in_a, in_b = (name in side.left_out for side in (a, b))
        if in_a or in_b:
            yield Uncompared(name, in_a, in_b, "bookkeeping")
