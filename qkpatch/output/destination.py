"""What OUT may be: a name of its own, apart from SOURCE, and nothing in it that qkpatch did not write."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qkpatch.checkpoint.files import FileId, os_errors
from qkpatch.checkpoint.names import came_by_itself
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import PresentHere, first_change
from qkpatch.checkpoint.source import MANIFEST_NAME, Checkpoint
from qkpatch.checkpoint.tree import LocalFile
from qkpatch.common import system
from qkpatch.common.text import as_word, cut
from qkpatch.errors import FileSystemError, UsageError


def longest_name(parent: Path) -> int:
    """The most bytes of OUT's name, of which staging's is longer."""
    try:
        most = os.pathconf(parent, "PC_NAME_MAX")
    except OSError:
        most = 255  # as nearly everywhere
    return most - 19


def destination_path(out: Path) -> Path:
    """OUT with a link-free parent, so that staging and OUT are on one file system whatever links lead there."""
    return Path(os.path.realpath(out.absolute().parent)) / out.name


def present_parent(out: Path) -> Path:
    """The first of OUT's parents that is there; those below it are made when OUT is."""
    return next(path for path in out.absolute().parents if os.path.lexists(path))


def places(path: Path) -> list[object]:
    """What a path leads to and what that lies in, the same by whatever names: to macOS ``Model`` is ``model``."""
    found, real = list[object](), Path(os.path.realpath(path))
    for place in (real, *real.parents):
        try:
            status = place.stat()
            found.append((status.st_dev, status.st_ino))
        except OSError:  # nothing is there yet
            found.append(place)
    return found


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
    (real_out, *around), relation = places(out), None
    for part in (*directories, *files):
        real, *parents = places(part)
        if part in directories and real in (real_out, *around):
            relation = "OUT is SOURCE" if real_out == real else "OUT lies in SOURCE"
        if real_out in parents:
            relation = f"OUT holds SOURCE or a part of it ({part.name})"
    if relation:
        what = f"{relation}, which is never written to"
        raise UsageError(what, where=str(out), fix="choose an OUT beside SOURCE")


def check_out(out: Path, *, overwrite: bool, force: bool) -> None:
    """Refuse an OUT that is known to be wrong before anything is read, downloaded or asked of the Hub.

    Raises:
        UsageError: OUT has no name of its own (``.``), is a file, or holds what qkpatch did not write.
        FileSystemError: what is there of OUT's parents is no directory or not writable.
    """
    where, parent, name = str(out), present_parent(out), out.name
    if name in ("", ".."):
        raise UsageError("OUT needs a name of its own", where=where, fix="name a new directory: -o patched")
    if len(os.fsencode(name)) > (most := longest_name(parent)):
        raise UsageError(
            f"the name of OUT is longer than {most} bytes", where=cut(name, 40), fix="shorten it"
        )
    if name.endswith(".safetensors"):
        what = "OUT is a directory; the patched files keep their names in it"
        fix = f"write {shlex.join(['-o', as_word(str(out.with_suffix('')))])}"
        raise UsageError(what, where=where, fix=fix)
    if not parent.is_dir():
        raise FileSystemError(f"{parent} is not a directory", where=str(out), fix="choose another -o")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FileSystemError("no permission to write in its parent", where=str(out), fix="choose another -o")
    _check_renames(parent, out)
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError("exists and is not a directory", where=str(out), fix="choose another -o")
    with os_errors("look into OUT", out):
        names = [name for name in os.listdir(out) if not came_by_itself(name, ())]
    if names and not force and MANIFEST_NAME not in names:
        why = "there is none, so qkpatch did not write this"
        raise occupied(out, MANIFEST_NAME, why, overwrite=overwrite)


def _check_renames(parent: Path, out: Path) -> None:
    """Raise :class:`FileSystemError` where ``parent`` would not let OUT be put in its place, or staging be removed."""
    status, why = parent.stat(), ""
    owners = {0, status.st_uid, out.lstat().st_uid if os.path.lexists(out) else os.geteuid()}
    if status.st_mode & stat.S_ISVTX and os.geteuid() not in owners:
        why = "it is somebody else's, and in its parent (sticky) only owners replace what is theirs"
    with suppress(FileSystemError), Rooted(parent) as root:
        if system.is_append_only(root.fd):
            why = "in its parent nothing can be renamed (append-only: chattr +a)"
    if why:
        raise FileSystemError(why, where=str(out), fix="choose another -o")


@dataclass(frozen=True)
class Replaced:
    """An OUT that may be replaced, as it was when that was found."""

    out: Path
    entries: Mapping[str, FileId]

    def check(self, place: Path | None = None) -> None:
        """Raise :class:`UsageError` where anything in it, or in ``place`` where it now is, has changed since."""
        with Rooted(place or self.out) as root:
            changed = first_change(self.entries, PresentHere(root).identities)
        if changed is not None:
            why = "it changed while qkpatch was running"
            raise occupied(self.out, ascii(changed)[1:-1], why, overwrite=True)


def occupied(
    out: Path, name: str, why: str, *, overwrite: bool, by_edit: bool = False, or_source: bool = False
) -> UsageError:
    """The error for an OUT that is not to be replaced.

    Args:
        out: OUT.
        name: a file of it that is not as qkpatch left it or, to be kept, not what it would write.
        why: in what.
        overwrite: an earlier output may be replaced.
        by_edit: the file may be just what qkpatch left, of another edit.
        or_source: SOURCE may have been changed instead.
    """
    if overwrite:
        either = ", or SOURCE was changed since" if or_source else ""
        what = f"holds {name}, which is not as qkpatch left it{either}: {why}"
        fix = "--overwrite replaces only what qkpatch wrote; remove OUT yourself, choose another -o, or insist: "
        return UsageError(what, where=str(out), fix=f"{fix}--overwrite --force")
    what = f"exists and is not empty, nor what this edit would make of it: {name}: {why}"
    more = "add --overwrite" if by_edit else "replace it, whatever it holds: --overwrite --force"
    return UsageError(what, where=str(out), fix=f"choose another -o, or {more}")
