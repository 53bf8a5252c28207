"""``Stored`` and ``Checkpoint``: what SOURCE holds, known from headers, index and config alone, and only read."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.cache import leads_out
from qkpatch.checkpoint.files import OpenFile, os_errors
from qkpatch.checkpoint.header import Header, TensorRef, read_header
from qkpatch.checkpoint.tree import (
    MAX_CONFIG_BYTES,
    LocalFile,
    Repository,
    SourceFile,
    is_plain_relative,
    source_file,
    walk_files,
)
from qkpatch.common.json_text import load_json
from qkpatch.common.number_ranges import some
from qkpatch.errors import AmbiguousError, CheckpointError, FileSystemError, UnsupportedError

MANIFEST_NAME = "qkpatch.json"
SUMS_NAME = "SHA256SUMS"
INDEX_SUFFIX = ".safetensors.index.json"
PREFERRED_INDEX = "model.safetensors.index.json"
PREFERRED_SINGLE = "model.safetensors"

# Files that hold weights in a form qkpatch does not edit; a loader might pick them instead.
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz",
)  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_OPEN_AT_A_TIME = 16
_MOST_HEADERS = 64 << 10  # bytes: most headers are shorter, and the rest of a longer one is read after


@dataclass(frozen=True)
class Stored:
    """Tensors and other files of a directory, a repository, or one ``.safetensors`` file; of what model is not said."""

    where: str  # what messages call it
    root: Path | None  # the directory; None where it is on the Hub
    single_file: bool
    index: str | None  # the file that says which shard holds which tensor
    headers: Mapping[str, Header]  # weight shards, by file name
    files: Mapping[str, SourceFile]  # all files to carry over, shards included, sorted by name
    directories: Mapping[str, int]  # all sub-directories and their modes, each after the one that it lies in
    mode: int  # of the directory itself
    twins: tuple[str, ...]  # other files that look like weights and will stay as they are
    previous_manifest: bytes | None  # SOURCE was itself written by qkpatch

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """All tensors by name."""
        return {ref.name: ref for header in self.headers.values() for ref in header.tensors.values()}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def opened(self, name: str, ranges: Sequence[tuple[int, int]] = ()) -> AbstractContextManager[OpenFile]:
        """A file for reading, as :meth:`SourceFile.open`."""
        return self.files[name].open(ranges)

    @cached_property
    def from_outside(self) -> tuple[str, ...]:
        """Files that are links to something outside the directory, other than to a snapshot's own blobs."""
        if self.root is None or self.single_file:
            return ()
        local = (file for file in self.files.values() if isinstance(file, LocalFile))
        return tuple(file.name for file in local if leads_out(file.path, self.root))

    def check_still(self) -> None:
        """Raise :class:`FileSystemError` where a file on this machine is another by now, or one more is there."""
        if self.root is not None and not self.single_file:
            files, _ = walk_files(self.root)
            if new := sorted(files.keys() - {*self.files, MANIFEST_NAME, SUMS_NAME}):
                raise FileSystemError(
                    "it came into being while qkpatch was running, or after it had planned",
                    where=str(self.root / new[0]),
                    fix="plan again",
                )
        for file in self.files.values():
            if isinstance(file, LocalFile):
                with file.open():
                    pass

    def has_entry(self, name: str) -> bool:
        """Whether the directory holds something of that name, be it one of :attr:`files` or not."""
        return not self.single_file and self.root is not None and (self.root / name).exists()


@dataclass(frozen=True)
class Checkpoint(Stored):
    """A checkpoint with what ``config.json`` says of its model; beside a single file, too."""

    config: Mapping[str, Any]


def open_checkpoint(place: Path | Repository) -> Checkpoint:
    """As :func:`open_stored`, and ``config.json``.

    Raises:
        CheckpointError: also, no config.json, or one that is not an object.
        QKPatchError: as :func:`open_stored`.
    """
    stored = open_stored(place)
    config = _read_config(_config_file(stored))
    return Checkpoint(**{field.name: getattr(stored, field.name) for field in fields(stored)}, config=config)


def open_stored(place: Path | Repository) -> Stored:
    """Read all headers at ``place`` and check them against index and file sizes.

    Raises:
        UnsupportedError: no safetensors weights, such as pickles only.
        AmbiguousError: more than one set of weights.
        CheckpointError: index and headers disagree, or a path leaves the directory.
        HeaderError: a shard breaks the format.
        FileSystemError: something cannot be read.
    """
    files: dict[str, SourceFile]
    if isinstance(place, Repository):
        files, directories, where, root = dict(place.files), place.directories, place.where, None
        mode = 0o777
    else:
        with os_errors("read", place):
            status = place.stat()
        if stat.S_ISREG(status.st_mode):
            return _open_single(place)
        if not stat.S_ISDIR(status.st_mode):
            raise FileSystemError("neither a directory nor a file", where=str(place))
        found, directories = walk_files(place)
        files, where, root, mode = {**found}, str(place), place, status.st_mode & 0o777
    previous = files.pop(MANIFEST_NAME, None)
    if previous is not None:
        files.pop(SUMS_NAME, None)  # of that edit, and untrue of the next
    if MANIFEST_NAME in directories:
        raise CheckpointError(
            f"{MANIFEST_NAME} is a directory, and OUT's manifest bears that name",
            where=where,
            fix="rename it",
        )
    shards, index = _find_shards(where, files)
    headers = _headers([files[name] for name in shards])
    _check_homes(headers)
    if index is not None:
        _check_index(headers, index)
    return Stored(
        where=where,
        root=root,
        single_file=False,
        index=None if index is None else index.name,
        headers=headers,
        files=files,
        directories=directories,
        mode=mode,
        twins=tuple(n for n in files if n.endswith(WEIGHT_SUFFIXES) and n not in headers),
        previous_manifest=None if previous is None else previous.read(),
    )


def _open_single(path: Path) -> Stored:
    if not path.name.endswith(".safetensors"):
        raise UnsupportedError(
            "not a .safetensors file",
            where=str(path),
            fix="convert it with the safetensors library, or point qkpatch at the directory",
        )
    file = source_file(path, path.name)
    return Stored(
        where=str(path),
        root=path.parent,
        single_file=True,
        index=None,
        headers=_headers([file]),
        files={file.name: file},
        directories={},
        mode=0o777,
        twins=(),
        previous_manifest=None,
    )


@dataclass(frozen=True)
class _Index:
    name: str
    weight_map: Mapping[str, str]  # tensor -> shard


def _find_shards(where: str, files: Mapping[str, SourceFile]) -> tuple[list[str], _Index | None]:
    """File names of the weight shards, and the index where there is one."""
    top = [name for name in files if "/" not in name]
    indices = [name for name in top if name.endswith(INDEX_SUFFIX)]
    if PREFERRED_INDEX in indices:
        indices = [PREFERRED_INDEX]
    if len(indices) > 1:
        raise AmbiguousError(
            f"several indices: {', '.join(indices)}", where=where, fix="keep the one to patch in SOURCE"
        )
    singles = [name for name in top if name.endswith(".safetensors")]
    if indices:
        index = _read_index(files[indices[0]])
        shards = sorted(set(index.weight_map.values()))
        missing = [name for name in shards if name not in files]
        if missing:
            raise CheckpointError(
                f"the index names {len(missing)} file(s) that are not there: {some(missing)}",
                where=index.name,
                fix="download the missing shards",
            )
        if PREFERRED_SINGLE in singles and PREFERRED_SINGLE not in shards:
            # No twin to be listed and left: transformers looks for this name before it looks for an index.
            raise AmbiguousError(
                f"{PREFERRED_SINGLE} beside {index.name}, which does not name it: transformers loads it instead of "
                "the shards, so an edit of the shards would do nothing there",
                where=where,
                fix="remove the stale one, or point qkpatch at a single file",
            )
        return shards, index
    if PREFERRED_SINGLE in singles:
        return [PREFERRED_SINGLE], None
    if len(singles) == 1:
        return singles, None
    if singles:
        raise AmbiguousError(
            f"{len(singles)} .safetensors files and no index: {some(singles)}",
            where=where,
            fix=f"restore {PREFERRED_INDEX}, or point qkpatch at one file",
        )
    pickles = [name for name in files if name.endswith(PICKLE_SUFFIXES)]
    others = [name for name in files if name.endswith(WEIGHT_SUFFIXES)]
    if pickles:
        raise UnsupportedError(
            f"only pickled weights: {some(pickles)}; qkpatch never unpickles",
            where=where,
            fix="convert them: load the model in transformers and call save_pretrained(..., safe_serialization=True)",
        )
    raise UnsupportedError(
        f"no .safetensors weights, only {some(others or sorted(files) or ['an empty folder'])}",
        where=where,
        fix="point SOURCE at a Hugging Face checkpoint directory or a .safetensors file",
    )


def _read_index(file: SourceFile) -> _Index:
    document = load_json(file.read(), file.name, unique=True)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("no weight_map, or an empty one", where=file.name)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_relative(shard):
            raise CheckpointError(
                f"tensor {tensor!r} is said to be in {shard!r}, not a plain path inside the checkpoint",
                where=file.name,
                fix="do not use this checkpoint: its index is broken or hostile",
            )
    return _Index(file.name, weight_map)


def _check_homes(headers: Mapping[str, Header]) -> None:
    """Each tensor is stored once: which copy a loader takes is not defined."""
    home: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            if name in home:
                raise CheckpointError(
                    f"stored twice, in {home[name]} and {shard}", where=name, fix="re-save the checkpoint"
                )
            home[name] = shard


def _check_index(headers: Mapping[str, Header], index: _Index) -> None:
    """Each tensor is exactly where the index says, and the index knows each tensor."""
    home = {name: shard for shard, header in headers.items() for name in header.tensors}
    wrong = [name for name, shard in index.weight_map.items() if home.get(name) != shard]
    unlisted = [name for name in home if name not in index.weight_map]
    parts = []
    if wrong:
        parts.append(f"{len(wrong)} tensor(s) are not in the shard it names: {some(wrong)}")
    if unlisted:
        parts.append(f"{len(unlisted)} stored tensor(s) are not in it: {some(unlisted)}")
    if parts:
        raise CheckpointError(
            f"the index disagrees with the shards' headers; {'; '.join(parts)}",
            where=index.name,
            fix="download the checkpoint again, or re-save it",
        )


def _headers(files: Sequence[SourceFile]) -> dict[str, Header]:
    """The headers, by file; a few files are open at a time, since those that are elsewhere come side by side."""
    headers = {}
    for at in range(0, len(files), _OPEN_AT_A_TIME):
        with ExitStack() as stack:
            some = files[at : at + _OPEN_AT_A_TIME]
            opened = [stack.enter_context(file.open([(0, min(file.size, _MOST_HEADERS))])) for file in some]
            for file, one in zip(some, opened, strict=True):
                headers[file.name] = read_header(one, file.name)
    return headers


def _config_file(stored: Stored) -> SourceFile:
    name = "config.json"
    file = stored.files.get(name)
    if stored.single_file and stored.root is not None and (stored.root / name).exists():
        file = source_file(stored.root / name, name)
    if file is None:
        raise CheckpointError(
            "there is no config.json, which says how many heads the model has",
            where=str(stored.root or stored.where),
            fix="put the model's config.json beside the weights",
        )
    return file


def _read_config(file: SourceFile) -> Mapping[str, Any]:
    config = load_json(file.read(MAX_CONFIG_BYTES), file.name)
    if not isinstance(config, dict):
        raise CheckpointError("not a JSON object", where=file.name)
    if not isinstance(config.get("model_type"), str | None):
        raise CheckpointError("not a text", where=f"{file.name}: model_type")
    return config
