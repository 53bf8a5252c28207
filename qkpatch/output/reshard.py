"""Re-sharding: the same tensors, byte for byte and in their order, in shards of another size. Headers are ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from qkpatch.checkpoint.header import MAX_HEADER_SIZE, TensorRef
from qkpatch.checkpoint.source import Stored
from qkpatch.checkpoint.weights import index_name
from qkpatch.common.dtypes import DTYPE_BITS
from qkpatch.errors import CheckpointError, UsageError
from qkpatch.output.layout import Extent, Output, OutputFile, index_file

_FORMAT_ALIGNMENT = 8  # of the data, as the safetensors library pads its headers
MOST_SHARDS = 99_999  # five digits, as huggingface_hub names them


def reshard(source: Stored, max_bytes: int) -> Output:
    """OUT with shards of at most ``max_bytes`` of tensors; a larger tensor has a shard to itself.

    Tensors keep their order (shards by name, within them by offset), but for one thing: in each new shard the
    dtypes of more bytes come first, so that every tensor is aligned, as the library writes them. One shard needs
    no index; of more, the index of SOURCE is kept but for what it says of places and sizes.

    Raises:
        UsageError: absurdly many shards.
        CheckpointError: the shards' metadata contradict each other; a name is taken by another file of SOURCE.
    """
    groups = list(_groups(_in_order(source), max_bytes))
    n, stem = len(groups), source.stem
    if n > MOST_SHARDS:
        raise UsageError(f"that makes {n} shards", where="--max-shard-size", fix="allow larger ones")
    names = (
        [f"{stem}-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)] if n > 1 else [f"{stem}.safetensors"]
    )
    replaced = {*source.headers, source.index, index_name(stem)}
    kept = {name: OutputFile.copy_of(file) for name, file in source.files.items() if name not in replaced}
    moved: dict[str, TensorRef] = {}
    made: dict[str, OutputFile] = {}
    mode = source.files[next(iter(source.headers))].mode
    for name, group in zip(names, groups, strict=True):
        own, places = shard_header(name, group, _metadata(source, group))
        moved.update(places)
        made[name] = OutputFile(name, mode, own, tuple(_extents(source, group, places)))
    if n > 1:
        index = index_file(source, moved)
        made[index.name] = index
    if taken := sorted(made.keys() & kept.keys()):
        what = "a new shard would bear the name of this file, which is none of the weights qkpatch reads"
        raise CheckpointError(what, where=taken[0], fix="move it out of SOURCE")
    return Output(dict(sorted({**kept, **made}.items())), moved)


def _in_order(source: Stored) -> Iterator[TensorRef]:
    for _, header in sorted(source.headers.items()):
        yield from sorted(header.tensors.values(), key=lambda ref: (ref.begin, ref.end))


def _groups(refs: Iterable[TensorRef], max_bytes: int) -> Iterator[list[TensorRef]]:
    group: list[TensorRef] = []
    size = 0
    for ref in refs:
        if group and size + ref.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(ref)
        size += ref.nbytes
    yield group  # of a checkpoint without tensors, one shard that holds none


def _alignment(ref: TensorRef) -> int:
    """Bytes of an element; 1 for packed ones and those of a dtype nobody knows."""
    return max(1, DTYPE_BITS.get(ref.dtype, 8) // 8)


def shard_header(
    name: str, group: list[TensorRef], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorRef]]:
    """A shard's header, and where its tensors are; brings ``group`` into the order of their bytes."""
    group.sort(key=_alignment, reverse=True)  # stable
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets, position = {}, 0
    for ref in group:
        offsets[ref.name] = (position, position + ref.nbytes)
        position += ref.nbytes
        entries[ref.name] = {"dtype": ref.dtype, "shape": ref.shape, "data_offsets": offsets[ref.name]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _FORMAT_ALIGNMENT)
    if len(text) > MAX_HEADER_SIZE:
        what = f"a header of {len(text)} bytes, more than the format allows"
        raise UsageError(what, where="--max-shard-size", fix="allow smaller ones")
    own = len(text).to_bytes(8, "little") + text
    places = {}
    for ref in group:
        begin, end = (len(own) + offset for offset in offsets[ref.name])
        places[ref.name] = replace(ref, shard=name, begin=begin, end=end)
    return own, places


def _metadata(source: Stored, group: Sequence[TensorRef]) -> dict[str, str]:
    """The ``__metadata__`` of all shards that a new one takes tensors from.

    Raises:
        CheckpointError: they say different things.
    """
    merged: dict[str, str] = {}
    for shard in dict.fromkeys(ref.shard for ref in group):
        for key, value in (source.headers[shard].metadata or {}).items():
            if merged.setdefault(key, value) != value:
                what = f"the shards' headers disagree on {key!r} in __metadata__, so they cannot be joined"
                raise CheckpointError(what, where=shard, fix="leave --max-shard-size out")
    return merged


def _extents(source: Stored, group: Sequence[TensorRef], places: Mapping[str, TensorRef]) -> Iterator[Extent]:
    """The tensors' bytes, neighbours joined."""
    last: Extent | None = None
    for ref in group:
        if not ref.nbytes:
            continue
        if last is not None and last.file.name == ref.shard and last.end == ref.begin:
            last = replace(last, end=ref.end)
            continue
        if last is not None:
            yield last
        last = Extent(source.files[ref.shard], ref.begin, ref.end, places[ref.name].begin)
    if last is not None:
        yield last
