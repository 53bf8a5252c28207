"""``Stored`` and ``Checkpoint``: what SOURCE holds, known from headers, index and config alone, and only read."""

from __future__ import annotations

import os
import shlex
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.cache import leads_out
from qkpatch.checkpoint.files import OpenFile, os_errors
from qkpatch.checkpoint.header import Header, TensorRef, read_header
from qkpatch.checkpoint.names import CLAIM, RUBBISH, UNFINISHED, USUAL, matching
from qkpatch.checkpoint.recognised import ADAPTER, no_weights, refuse_folder
from qkpatch.checkpoint.tree import (
    MAX_CONFIG_BYTES,
    LocalFile,
    Repository,
    SourceFile,
    source_file,
    walk_files,
)
from qkpatch.checkpoint.weights import Weights, find_weights
from qkpatch.common.json_text import load_json
from qkpatch.common.text import Warned
from qkpatch.errors import AmbiguousError, CheckpointError, FileSystemError

MANIFEST_NAME = "qkpatch.json"
SUMS_NAME = "SHA256SUMS"

# Files that hold weights in a form qkpatch does not edit; a loader might pick them instead.
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz",
)  # fmt: skip

_OPEN_AT_A_TIME = 16
_MOST_HEADERS = 64 << 10  # bytes: most headers are shorter, and the rest of a longer one is read after


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Tensors and other files of a directory, a repository, or one ``.safetensors`` file; of what model is not said."""

    where: str  # what messages call it
    root: Path | None  # the directory; None where it is elsewhere
    headers: Mapping[str, Header]  # weight shards, by file name
    files: Mapping[str, SourceFile]  # all files to carry over, shards included, sorted by name
    single_file: bool = False
    index: str | None = None  # the file that says which shard holds which tensor
    # All sub-directories and their modes, each after the one that it lies in.
    directories: Mapping[str, int] = field(default_factory=dict)
    mode: int = 0o777  # of the directory itself
    twins: tuple[str, ...] = ()  # other files that look like weights and will stay as they are
    previous_manifest: bytes | None = None  # SOURCE was itself written by qkpatch
    stem: str = ""  # what names of weights begin with
    exclude: Collection[str] = ()  # globs of what is left out
    left_out: Mapping[str, int] = field(default_factory=dict)  # that, with bytes
    disputed: Mapping[str, str] = field(default_factory=dict)  # what the index says wrongly, by tensor
    notes: tuple[Warned, ...] = ()  # what people should know of the choice of weights
    elsewhere: Repository | None = None  # where it is on no disk of this machine

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """All tensors by name."""
        return {ref.name: ref for header in self.headers.values() for ref in header.tensors.values()}

    @property
    def lacks_index(self) -> bool:
        """Whether names are those of shards, and nothing says which tensor is where."""
        return bool(self.stem) and self.index is None and f"{self.stem}.safetensors" not in self.headers

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def opened(self, name: str, ranges: Sequence[tuple[int, int]] = ()) -> AbstractContextManager[OpenFile]:
        """A file for reading, as :meth:`SourceFile.open`."""
        return self.files[name].open(ranges)

    def sha256(self, ref: TensorRef) -> str:
        """The digest of a tensor's bytes."""
        with self.opened(ref.shard, [(ref.begin, ref.end)]) as opened:
            return opened.sha256(ref.begin, ref.end)

    @cached_property
    def from_outside(self) -> tuple[str, ...]:
        """Files that are links to something outside the directory, other than to a snapshot's own blobs."""
        if self.root is None or self.single_file:
            return ()
        local = (file for file in self.files.values() if isinstance(file, LocalFile))
        return tuple(file.name for file in local if leads_out(file.path, self.root))

    def check_still(self) -> None:
        """Raise :class:`FileSystemError` where a file is another by now, or one more is there."""
        if self.elsewhere is not None:
            self.elsewhere.check_still(self.files)
        if self.root is not None and not self.single_file:
            files = walk_files(self.root, self.exclude).files
            if new := sorted(files.keys() - {*self.files, MANIFEST_NAME, SUMS_NAME}):
                what = "it came into being while qkpatch was running, or after it had planned"
                raise FileSystemError(what, where=str(self.root / new[0]), fix="plan again")
        for file in self.files.values():
            if isinstance(file, LocalFile):
                with file.open():
                    pass


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Stored):
    """A checkpoint with what ``config.json`` says of its model; beside a single file, too."""

    config: Mapping[str, Any]


def open_checkpoint(place: Path | Repository, exclude: Collection[str] = USUAL) -> Checkpoint:
    """As :func:`open_stored`, and ``config.json``.

    Raises:
        AmbiguousError: also, transformers would load something else, or something on top.
        CheckpointError: also, no config.json, or one that is not an object.
        QKPatchError: as :func:`open_stored`.
    """
    stored = open_stored(place, exclude)
    if stored.single_file and stored.root is not None:
        _refuse_part(stored.root, stored.files)
    config = _read_config(_config_file(stored))
    named, chosen = config.get("transformers_weights"), stored.index or next(iter(stored.headers))
    if not stored.single_file and named not in (None, chosen):
        what = f"transformers_weights in config.json makes transformers load {named}, not {chosen}"
        raise AmbiguousError(what, where=stored.where, fix="take that key out, or point qkpatch at the file")
    if ADAPTER in stored.files:
        what = f"{ADAPTER} beside the weights: transformers loads that adapter on top of them, edited or not"
        fix = "merge the adapter first, or leave it out: --exclude 'adapter_*'"
        raise AmbiguousError(what, where=stored.where, fix=fix)
    return Checkpoint(**{field.name: getattr(stored, field.name) for field in fields(stored)}, config=config)


def open_stored(place: Path | Repository, exclude: Collection[str] = tuple(RUBBISH)) -> Stored:
    """Read all headers at ``place``, less what ``exclude`` means, and check them against index and file sizes.

    Raises:
        UnsupportedError: no safetensors weights, such as pickles only.
        AmbiguousError: more than one set of weights.
        CheckpointError: shards are missing, a tensor is there twice, or a path leaves the directory.
        HeaderError: a shard breaks the format.
        FileSystemError: something cannot be read.
    """
    files: dict[str, SourceFile]
    left_out: dict[str, int] = {}
    root: Path | None = None
    mode = 0o777
    if isinstance(place, Repository):
        files, directories, where = dict(place.files), dict(place.directories), place.where
        for name in list(files):
            if (entry := matching(name, exclude)) is not None:
                left_out[entry] = left_out.get(entry, 0) + files.pop(name).size
    else:
        with os_errors("read", place):
            status = place.stat()
        if stat.S_ISREG(status.st_mode):
            return _open_single(place)
        if not stat.S_ISDIR(status.st_mode):
            raise FileSystemError("neither a directory nor a file", where=str(place))
        found, directories, left_out = walk_files(place, exclude)
        files, where, root, mode = {**found}, str(place), place, status.st_mode & 0o777
    if UNFINISHED in {*files, *left_out}:
        raise unfinished(where)
    if CLAIM in {*files, *left_out} and MANIFEST_NAME not in files:
        raise half_written(where)
    # A folder of nothing but what is left out is left out.
    inside = Counter(name.rpartition("/")[0] for name in (*files, *directories))
    for folder in (entry.rpartition("/")[0] for entry in left_out):
        while not inside[folder] and directories.pop(folder, None) is not None:
            folder = folder.rpartition("/")[0]
            inside[folder] -= 1
    previous = files.pop(MANIFEST_NAME, None)
    if previous is not None:
        files.pop(SUMS_NAME, None)  # of that edit, and untrue of the next
    if MANIFEST_NAME in directories:
        what = f"{MANIFEST_NAME} is a directory, and OUT's manifest bears that name"
        raise CheckpointError(what, where=where, fix="rename it")
    weights = find_weights(where, files, left_out)
    headers = _headers([files[name] for name in weights.shards])
    disputed = _check_index(_check_homes(headers), weights)
    return Stored(
        where=where,
        root=root,
        index=weights.index,
        headers=headers,
        files=files,
        directories=directories,
        mode=mode,
        twins=tuple(n for n in files if n.endswith(WEIGHT_SUFFIXES) and n not in headers),
        previous_manifest=None if previous is None else previous.read(),
        stem=weights.stem,
        exclude=exclude,
        left_out=left_out,
        disputed=disputed,
        notes=weights.notes,
        elsewhere=place if isinstance(place, Repository) else None,
    )


def unfinished(where: str) -> CheckpointError:
    """The error for a checkpoint of which some rows are edited and others are not."""
    fix = f"qkpatch revert {shlex.quote(where)}; or run that edit again"
    return CheckpointError("an edit in place was cut short here", where=where, fix=fix)


def half_written(where: str) -> CheckpointError:
    """The error for an OUT in a store that no run has finished."""
    fix = "finish it, by the same command with --resume"
    return CheckpointError("an OUT that was not finished, or is being written", where=where, fix=fix)


def _open_single(path: Path) -> Stored:
    file = source_file(path, path.name)
    if os.path.lexists(path.with_name(UNFINISHED)):
        raise unfinished(str(path.parent))
    if not path.name.endswith(".safetensors"):
        raise no_weights(str(path), {path.name: file})
    return Stored(
        where=str(path),
        root=path.parent,
        single_file=True,
        headers=_headers([file]),
        files={file.name: file},
        stem=path.name.removesuffix(".safetensors"),
    )


def _check_homes(headers: Mapping[str, Header]) -> dict[str, str]:
    """Which shard stores each tensor: each is stored once, since which copy a loader takes is not defined."""
    home: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            if name in home:
                what = f"stored twice, in {home[name]} and {shard}, as where one replaces values of another"
                fix = "make one of them: load the model as you use it, and save_pretrained(...)"
                raise CheckpointError(what, where=name, fix=fix)
            home[name] = shard
    return home


def _check_index(home: Mapping[str, str], weights: Weights) -> dict[str, str]:
    """What the index says otherwise than the headers, by tensor; loaders read what shards hold, whatever it says."""
    said, index = weights.weight_map, weights.index
    return {
        name: f"{index} {f'has it in {said[name]}' if name in said else 'does not list it'}, and "
        f"{home.get(name) or 'no shard'} has it"
        for name in (dict.fromkeys([*said, *home]) if index else ())
        if home.get(name) != said.get(name)
    }


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


def _refuse_part(folder: Path, files: Mapping[str, SourceFile]) -> None:
    """As of the folder that one file lies in, where that file is what makes it no model's."""
    (name,) = files
    beside = [ADAPTER] if name.startswith("adapter_model") else ["params.json"]
    there = {n: source_file(folder / n, n) for n in beside if (folder / n).is_file()}
    refuse_folder(str(folder / name), {**files, **there})


def _config_file(stored: Stored) -> SourceFile:
    name = "config.json"
    file = stored.files.get(name)
    if stored.single_file and stored.root is not None and (stored.root / name).exists():
        file = source_file(stored.root / name, name)
    if file is None:
        where = str(stored.root or stored.where)
        refuse_folder(where, stored.files)
        left_out = name in stored.left_out
        cure = "leave it in: what --exclude says means it" if left_out else "put it beside the weights"
        raise CheckpointError(
            f"there is no {name}, which says how many heads the model has", where=where, fix=cure
        )
    return file


def _read_config(file: SourceFile) -> Mapping[str, Any]:
    config = load_json(file.read(MAX_CONFIG_BYTES), file.name)
    if not isinstance(config, dict):
        raise CheckpointError("not a JSON object", where=file.name, fix="download it again")
    if not isinstance(config.get("model_type"), str | None):
        raise CheckpointError("not a text", where=f"{file.name}: model_type")
    return config
