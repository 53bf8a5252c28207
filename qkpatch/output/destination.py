"""What OUT may be: a name of its own, apart from SOURCE, and nothing in it that qkpatch did not write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qkpatch.checkpoint.files import FileId, os_errors
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import Present, first_change
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME, Checkpoint
from qkpatch.checkpoint.tree import LocalFile
from qkpatch.common.json_text import load_json
from qkpatch.errors import FileSystemError, QKPatchError, UsageError

# File systems allow 255 bytes; the names of staging and of a replaced output are OUT's and up to 19 more.
_MAX_NAME = 255 - len("..replaced-00000000")


def destination_path(out: Path) -> Path:
    """OUT with a link-free parent, so that staging and OUT are on one file system whatever links lead there."""
    return Path(os.path.realpath(out.absolute().parent)) / out.name


def check_out(out: Path, source: Path | None, *, overwrite: bool, force: bool = False) -> None:
    """Refuse an OUT that is known to be wrong before anything is read or downloaded.

    Args:
        out: OUT.
        source: SOURCE's path where it is one, None for something on the Hub.
        overwrite: an earlier output may be replaced.
        force: whatever is there may be.

    Raises:
        UsageError: OUT has no name of its own (``.``), overlaps SOURCE, is a file, is not empty, or with
            ``overwrite`` holds files that qkpatch plainly did not write.
        FileSystemError: OUT's parent is missing or not writable.
    """
    if source is not None:
        _refuse_overlap(out, inside=[source], holding=[source])
    if out.name in ("", ".."):
        raise UsageError(
            "OUT needs a name of its own", where=str(out), fix="name a new directory: -o patched"
        )
    if len(os.fsencode(out.name)) > _MAX_NAME:
        raise UsageError(
            f"the name of OUT is longer than {_MAX_NAME} bytes", where=out.name[:40] + "…", fix="shorten it"
        )
    if out.name.endswith(".safetensors"):
        raise UsageError(
            "OUT is a directory; the patched files keep their names in it",
            where=str(out),
            fix=f"write -o {out.with_suffix('')}",
        )
    parent = out.absolute().parent
    if not parent.is_dir():
        raise FileSystemError(
            "its parent is not a directory", where=str(out), fix=f"create it first: mkdir -p {parent}"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FileSystemError("no permission to write in its parent", where=str(out), fix="choose another -o")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError("exists and is not a directory", where=str(out), fix="choose another -o")
    with os_errors("look into it", out):
        names = os.listdir(out)
    if not names:
        return
    if not overwrite:
        raise UsageError(
            "exists and is not empty", where=str(out), fix="choose another -o, or add --overwrite"
        )
    if not force:
        refuse_foreign_files(out)


def check_apart(out: Path, checkpoint: Checkpoint) -> None:
    """Refuse an OUT that overlaps any part of SOURCE, wherever its links lead.

    Raises:
        UsageError: they overlap.
    """
    if checkpoint.root is None:
        return
    directories = [checkpoint.root / name for name in checkpoint.directories]
    files = [file.path for file in checkpoint.files.values() if isinstance(file, LocalFile)]
    if not checkpoint.single_file:
        directories.append(checkpoint.root)
    _refuse_overlap(out, inside=directories, holding=[*directories, *files])


def _refuse_overlap(out: Path, *, inside: Iterable[Path], holding: Iterable[Path]) -> None:
    real_out = Path(os.path.realpath(out))
    relation = None
    for place in inside:
        real = Path(os.path.realpath(place))
        if real_out == real or real in real_out.parents:
            relation = "OUT is SOURCE" if real_out == real else "OUT lies in SOURCE"
    for part in holding:
        if real_out in Path(os.path.realpath(part)).parents:
            relation = f"OUT holds SOURCE or a part of it ({part.name})"
    if relation:
        raise UsageError(
            f"{relation}, which is never written to", where=str(out), fix="choose an OUT beside SOURCE"
        )


def refuse_foreign_files(out: Path) -> None:
    """Raise where ``out`` is not, by names, kinds and sizes alone, what a manifest in it lists: content is not read.

    Raises:
        UsageError: it is not.
    """
    with Rooted(out) as root:
        present = Present(root)
        try:
            files = load_json(present.read(MANIFEST_NAME), MANIFEST_NAME)["files"]
            known = {str(file["name"]): file["size"] for file in files}
        except (QKPatchError, KeyError, TypeError):
            known = {}
    ours = {MANIFEST_NAME, SUMS_NAME} if known else set()
    for name in sorted({*present.odd, *present.files} - (ours - present.odd.keys())):
        if name in present.odd:
            raise foreign(out, f"{name}, which {present.odd[name]}")
        if name not in known:
            raise foreign(out, f"{name}, which qkpatch did not write")
        if present.files[name].size != known[name]:
            raise foreign(out, f"{name}, which is not as qkpatch left it: it had {known[name]} bytes")
    if lost := sorted(known.keys() - present.files.keys()):
        raise foreign(out, f"no {lost[0]}, which qkpatch wrote")


@dataclass(frozen=True)
class Replaced:
    """An OUT that may be replaced, as it was when that was found."""

    out: Path
    entries: Mapping[str, FileId]

    def check(self) -> None:
        """Raise :class:`UsageError` where anything in it has changed since."""
        with Rooted(self.out) as root:
            changed = first_change(self.entries, Present(root).identities)
        if changed is not None:
            raise foreign(self.out, f"{ascii(changed)[1:-1]}, which changed while qkpatch was running")


def foreign(out: Path, what: str) -> UsageError:
    """The error for an OUT that holds ``what``, which qkpatch did not leave there."""
    return UsageError(
        f"holds {what}",
        where=str(out),
        fix="--overwrite replaces only what qkpatch wrote; remove OUT yourself, choose another -o, or insist: "
        "--overwrite --force",
    )
