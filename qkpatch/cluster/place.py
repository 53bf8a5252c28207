"""The directory that all parts of one OUT share: ``.OUT.qkpatch-parts`` beside it, and what they agree on.

It appears whole, with ``plan.json`` in it: the manifest of the plan as it was before any weight was read, by which a
part of another plan is known before it writes a byte. Done parts are directories ``1`` to ``N``, each with a manifest
of its own files and edits; each appears by one rename, so that of two runs of one part the first to end has made it.
Nobody but its owner may enter. No clock of one machine is compared with another's.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.tree import SourceFile
from qkpatch.common.json_text import Json, canonical_json
from qkpatch.errors import FileSystemError, UsageError
from qkpatch.output.destination import destination_path
from qkpatch.output.options import Writing
from qkpatch.output.staged_files import StagedFiles
from qkpatch.output.staging import Staging
from qkpatch.planning.blocks import RunBlock, ToolBlock
from qkpatch.planning.manifest import Manifest, planned_manifest
from qkpatch.planning.plan import EditPlan

AGREED = "plan.json"
# What may differ between two plans, in the words of the message.
_DIFFERENT = {
    "parts": "another number of parts",
    "edit": "another edit",
    "source": "another SOURCE",
    "source_files": "other files of SOURCE, which must be one place, or one commit, for all machines",
    "recipe": "another recipe",
    "output": "another --max-shard-size, --exclude or --digest",
    "tool": "another version of qkpatch, torch or Python",
    "stack": "a machine with another CPU, card, BLAS or torch, whose bytes may differ",
    "compute": "another --device",
}


def place_of(out: Path) -> Path:
    """The directory that parts of ``out`` share."""
    out = destination_path(out)
    return out.with_name(f".{out.name}.qkpatch-parts")


def agreement(
    plan: EditPlan, count: int, device: str, tool: ToolBlock, stack: Json, writing: Writing
) -> Manifest:
    """What all parts have in common: all of the manifest but what is found out while it is carried out."""
    files = {name: _identity(file, writing) for name, file in plan.model.checkpoint.files.items()}
    digest = hashlib.sha256(canonical_json(files).encode()).hexdigest()
    planned = planned_manifest(plan, device)
    run = RunBlock(stack=stack, further={"parts": count, "source_files": digest})
    return replace(planned, tool=tool, output=replace(planned.output, digest=writing.digest), run=run)


def _identity(file: SourceFile, writing: Writing) -> Json:
    """What identifies a file of SOURCE on every machine."""
    if writing.may_link(file):  # links that other parts make move its ctime
        file = replace(file, id=file.id.but_for_links)
    return file.everywhere


@contextmanager
def joined(out: Path, agreed: Manifest) -> Iterator[Rooted]:
    """The shared directory, made with ``agreed`` in it, or found with just that.

    Raises:
        UsageError: there are parts of another plan.
        FileSystemError: it cannot be made, or is not the caller's alone.
    """
    place = place_of(out)
    with os_errors("create a directory", place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
    with Rooted(place.parent) as parent:
        if parent.status(f"{place.name}/{AGREED}") is None:
            with suppress(UsageError), Staging(place, mode=0o700, shared=parent) as staging:
                StagedFiles(staging.files).write_new(AGREED, agreed.dumps().encode())
                staging.publish((), None)  # unless another part was faster
        with opened(parent, place) as room:
            check_same(read_manifest(room, AGREED), agreed, str(out), str(place))
            yield room


def check_same(found: Manifest, agreed: Manifest, out: str, place: str) -> None:
    """Raise :class:`UsageError` where the parts in ``place`` are of another plan."""
    if others := different(found, agreed):
        what = f"the parts that are there are of {', and '.join(others)}"
        fix = f"choose another -o, or, where they are not wanted, remove {place}"
        raise UsageError(what, where=out, fix=fix)


@contextmanager
def opened(parent: Rooted, place: Path) -> Iterator[Rooted]:
    """The shared directory, which is the caller's alone.

    Raises:
        FileSystemError: it is not, or is a link.
    """
    with Rooted(place, within=parent, name=place.name) as room:
        # Owned, and closed to others, as what we make there: some file systems have numbers, or modes, of their own.
        probe = f".{secrets.token_hex(8)}"
        with os_errors("create a directory", room.path):
            room.mkdir(probe, 0o700)
        ours, status = room.status(probe), os.fstat(room.fd)
        room.discard(probe)
        if ours is None or status.st_uid != ours.st_uid or status.st_mode & ~ours.st_mode & 0o077:
            what = "the directory of the parts is not yours alone"
            raise FileSystemError(what, where=str(place), fix="choose an -o where only you may write")
        yield room


def read_manifest(root: Rooted, name: str) -> Manifest:
    """A manifest in an open directory."""
    with root.reading(name) as found:
        return Manifest.loads(found.whole(), found.where)


def different(found: Manifest, wanted: Manifest) -> list[str]:
    """In what two plans differ, in words; nothing where they do not."""
    if found.dumps() == wanted.dumps():
        return []
    a, b = ({**one, **one["run"]} for one in (found.to_json(), wanted.to_json()))
    return [said for key, said in _DIFFERENT.items() if a.get(key) != b.get(key)] or ["another plan"]


def as_agreed(manifest: Manifest, agreed: Manifest) -> Manifest:
    """A manifest without what is found out while a plan is carried out, to be compared with ``agreed``."""
    further = {key: manifest.run.further.get(key) for key in agreed.run.further}
    return replace(
        manifest,
        source=replace(manifest.source, checked=None),
        edits=tuple(edit.without_figures() for edit in manifest.edits),
        files=tuple(replace(file, sha256=None) for file in manifest.files),
        warnings=agreed.warnings,
        run=RunBlock(stack=manifest.run.stack, further=further),
    )
