"""The files of a checkpoint, as they lie on disk: which there are, what identifies them, the small ones whole."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.files import FileId, open_read, os_errors, read_exact
from qkpatch.checkpoint.header import half_surrogate
from qkpatch.errors import CheckpointError, FileSystemError

BOOKKEEPING = (".git", ".cache/huggingface")  # of git and huggingface_hub, not the model's
MAX_JSON_BYTES = 256 << 20  # an index of 10^6 tensors is about 100 MB
MAX_CONFIG_BYTES = (
    16 << 20
)  # parsed, JSON takes up to 25 times its size; the largest real ones are below 1 MB


@dataclass(frozen=True)
class SourceFile:
    """One file to carry over, by its POSIX path relative to the checkpoint root."""

    name: str
    path: Path
    id: FileId
    mode: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.id.size


def walk_files(
    root: Path, skip: Collection[str] = BOOKKEEPING
) -> tuple[dict[str, SourceFile], tuple[str, ...]]:
    """All regular files below ``root`` with links followed, sorted by name, and all sub-directories, less ``skip``."""
    files: dict[str, SourceFile] = {}
    directories: list[str] = []

    def visit(directory: Path, prefix: str, ancestors: tuple[Path, ...]) -> None:
        real = directory.resolve()
        if real in ancestors:
            raise FileSystemError("a link leads back to a directory above it", where=str(directory))
        with os_errors("list", directory):
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        for entry in entries:
            name = prefix + entry.name
            if name in skip:
                continue
            if any("\ud800" <= c <= "\udfff" for c in name):  # how Python holds bytes that are not UTF-8
                raise FileSystemError(
                    "the file's name is not UTF-8", where=ascii(entry.path), fix="rename it"
                )
            with os_errors("read (is it a dangling link?)", entry.path):
                is_dir = stat.S_ISDIR(entry.stat().st_mode)
            if not is_dir:
                files[name] = source_file(Path(entry.path), name, fix="move it out of SOURCE")
            else:
                directories.append(name)
                visit(Path(entry.path), f"{name}/", (*ancestors, real))

    visit(root, "", ())
    return dict(sorted(files.items())), tuple(directories)


def source_file(path: Path, name: str, fix: str | None = None) -> SourceFile:
    """The regular file at ``path``, links followed; anything else is a :class:`FileSystemError`."""
    with os_errors("read", path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileSystemError("not a regular file", where=str(path), fix=fix)
    return SourceFile(name, path, FileId.of(status), stat.S_IMODE(status.st_mode))


def read_whole(path: Path, expected: FileId | None = None, limit: int = MAX_JSON_BYTES) -> bytes:
    """A small file's bytes."""
    with open_read(path, expected) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CheckpointError(f"{size} bytes, more than any real file of this kind", where=str(path))
        return bytes(read_exact(fd, size, 0, path))


def load_json(raw: bytes, where: str, *, unique: bool = False) -> Any:
    """Parse JSON; ``unique`` refuses what readers could disagree on: repeated keys, NaN and Infinity."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if unique and len(result) != len(items):
            raise CheckpointError("a key appears twice in one JSON object", where=where)
        return result

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        constant = refuse if unique else float  # transformers writes Infinity into some config.json
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        if (half := half_surrogate(text)) is not None:
            raise ValueError(f"half a surrogate pair (char {half})")
        return value
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", where=where) from error
