"""One part: its share of the files written into the shared directory, or found there as it was left."""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qkpatch.checkpoint.files import OpenFile
from qkpatch.checkpoint.header import read_header
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.cluster.place import agreement, as_agreed, different, joined, read_manifest
from qkpatch.cluster.share import share_of
from qkpatch.common.observer import Observer
from qkpatch.common.part import Part
from qkpatch.errors import CheckpointError, QKPatchError, UsageError
from qkpatch.output.options import Writing
from qkpatch.patching.apply import PartOf, apply_plan, editor_of, numerical_warnings
from qkpatch.planning.manifest import FileRecord, Manifest
from qkpatch.planning.plan import EditPlan


def apply_part(
    plan: EditPlan,
    out: Path,
    part: Part,
    *,
    observer: Observer,
    device: str,
    threads: int,
    writing: Writing,
) -> Manifest:
    """Write a part of ``out``, and return the manifest of its share; ``run.already_done`` where it was there.

    Raises:
        UsageError: parts of another plan are there.
        QKPatchError: as :func:`apply_plan`.
    """
    editor = editor_of(plan, device)
    agreed = agreement(plan, part.total, str(editor.device), editor.tool, editor.stack, writing)
    share, name = share_of(plan, part), str(part.number)
    with joined(out, agreed) as room:
        try:
            done = read_part(room, part, agreed, observer)
        except QKPatchError:  # damaged: it is made anew
            room.remove_tree(name)
            done = None
        if done is not None:
            return done
        n_heads = len(share.edits) * len(share.settings.heads)
        observer.begins(f"part {part}: copy", share.output_bytes, n_heads)
        said = PartOf(room, {"part": part.number, **agreed.run.further})
        how: dict[str, Any] = {"device": device, "threads": threads, "writing": writing}
        try:
            return apply_plan(share, room.path / name, observer=observer, part=said, **how)
        except UsageError:
            # Another run of this part may have been faster.
            if (done := read_part(room, part, agreed, observer)) is None:
                raise
            return done


def read_part(room: Rooted, part: Part, agreed: Manifest, observer: Observer) -> Manifest | None:
    """The manifest of a part that is done, whose every file is as it was left; None where it is not done.

    Each recorded digest is taken again, of edited tensors or of all files; of other files, size and mtime are compared.

    Raises:
        CheckpointError: it is not as it was left.
        FileSystemError: it cannot be read.
    """
    name = str(part.number)
    if room.status(name) is None:
        return None
    with Rooted(room.path / name, within=room, name=name) as root:
        manifest = read_manifest(root, MANIFEST_NAME)
        names = {name for name, status in root.walk() if not stat.S_ISDIR(status.st_mode)}
        left = Left(str(root.path), names, partial(is_as_written, root, part=manifest), root.reading)
        return left.checked(manifest, part, agreed, observer)


class Left(NamedTuple):
    """What a part has left, wherever that is."""

    where: str
    names: Collection[str]  # of all files
    is_as_written: Callable[[FileRecord], bool]
    reading: Callable[[str], AbstractContextManager[OpenFile]]

    def checked(self, manifest: Manifest, part: Part, agreed: Manifest, observer: Observer) -> Manifest:
        """Its manifest; raises as :func:`read_part`."""
        if (wrong := next(_wrong(self, manifest, agreed, observer), None)) is not None:
            what, fix = f"part {part} is not as it was left: {wrong}", f"run it again: --part {part}"
            raise CheckpointError(what, where=self.where, fix=fix)
        return manifest.telling(already_done=True)


def _wrong(left: Left, manifest: Manifest, agreed: Manifest, observer: Observer) -> Iterator[str]:
    """Where a part is not what its manifest, and what was agreed on, say."""
    bare = as_agreed(manifest, agreed)
    yield from different(replace(bare, edits=agreed.edits, files=agreed.files), agreed)
    if not ({*bare.files} <= {*agreed.files} and {*bare.edits} <= {*agreed.edits}):
        yield "it has what is not planned"
    if manifest.warnings != (*agreed.warnings, *numerical_warnings(manifest.edits, agreed.edit.rule_of)):
        yield "its warnings are not those of its plan and its figures"
    if not manifest.run.is_over(len(manifest.files)):
        yield "it does not say when it was written, or how each file came"
    made = {MANIFEST_NAME, *(file.name for file in bare.files)}
    yield from sorted(f"{name} came from elsewhere" for name in {*left.names} - made)
    for file in manifest.files:
        if not left.is_as_written(file):
            yield f"{file.name} is gone, or was changed"
        elif file.sha256 is not None:
            with left.reading(file.name) as opened:
                if opened.sha256(0, file.size) != file.sha256:
                    yield f"{file.name} has another digest (sha256)"
        observer.copied(file.size)
    for written in (written for edit in manifest.edits for written in edit.written):
        if written.sha256_after is not None:
            with left.reading(written.shard) as opened:
                ref = read_header(opened, written.shard).tensors.get(written.tensor)
                if ref is None or opened.sha256(ref.begin, ref.end) != written.sha256_after:
                    yield f"{written.tensor} has another digest (sha256)"


def is_as_written(root: Rooted, file: FileRecord, part: Manifest) -> bool:
    """Whether a file of a part is there, with the size and mtime that it had when the part was done.

    Not its ctime: what a killed :func:`finish` linked has another. Nor its inode: behind another mount it is another.
    """
    status, written = root.status(file.name), part.run.further.get("written")
    if status is None or not stat.S_ISREG(status.st_mode) or not isinstance(written, dict):
        return False
    return (status.st_size, status.st_mtime_ns) == (file.size, written.get(file.name))
