"""The undo file of an edit in place: it leads back byte for byte, from wherever the edit, or a kill, left SOURCE.

Its name says how far things are. ``qkpatch.undo.unfinished`` is on the disk before the first row is touched, and stays
until rows are all of one side; ``qkpatch.undo`` stands beside rows that are all edited, and the small files that the
edit replaced are beside it under such names.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qkpatch.checkpoint.files import LocalOpenFile, OpenFile, os_errors, synced
from qkpatch.checkpoint.header import TensorRef, read_header
from qkpatch.checkpoint.names import PART, UNDO, UNFINISHED
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.checkpoint.tree import walk_files
from qkpatch.common.interrupts import signals_held, signals_let_through
from qkpatch.errors import UsageError
from qkpatch.output.destination import check_out, places
from qkpatch.output.layout import OutputFile
from qkpatch.output.space import check_space
from qkpatch.output.staging import Staging
from qkpatch.planning.patch_file import Patch, read_patch

Shards = Mapping[str, LocalOpenFile]
_LOST = "the way back is lost: take SOURCE from a backup, or fetch it again; qkpatch verify or diff tell what differs"
SMALL = {name: f"{UNDO}.{name}" for name in (MANIFEST_NAME, SUMS_NAME)}  # and where they are kept


@contextmanager
def locked(place: Path) -> Iterator[Rooted]:
    """The folder of a checkpoint, for one qkpatch alone, without what a kill left of files that were never whole."""
    with Rooted(Path(os.path.realpath(place))) as folder:
        if not folder.lock():
            what = "another qkpatch edits or restores it"
            raise UsageError(what, where=str(place), fix="wait until that is done")
        for name in folder.names():
            if name.startswith(PART):
                folder.discard(name)
        yield folder


def move(folder: Rooted, name: str, new: str) -> None:
    """Rename a file of a folder, if it is there, once all before is on the disk; and wait until that is, too."""
    folder.sync()
    with os_errors("rename", folder.path / name), suppress(FileNotFoundError):
        os.rename(name, new, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
    folder.sync()


def undo_in(folder: Rooted) -> Patch:
    """The undo file of a folder, of an edit that is whole or not; raises :class:`UsageError` where there is none."""
    name = UNDO if folder.status(UNFINISHED) is None else UNFINISHED
    status, here = folder.status(name), Path(os.path.realpath(folder.as_path))
    undo = read_patch(here / name, _LOST) if status is not None and stat.S_ISREG(status.st_mode) else None
    if undo is None or MANIFEST_NAME not in undo.record.former:
        what = f"there is no {UNDO} of an edit in place, so nothing says what was before"
        fix = "what `apply -o` wrote is a copy: its SOURCE is as it was"
        if status is not None:
            what, fix = f"what is called {name} is no undo file of an edit in place", "move it out of SOURCE"
        raise UsageError(what, where=str(folder.path), fix=fix)
    return undo


@contextmanager
def writable(folder: Rooted, names: Collection[str]) -> Iterator[dict[str, LocalOpenFile]]:
    """Files of a folder, open for reading and writing; raises :class:`UsageError` where one is not to be rewritten."""
    with ExitStack() as stack:
        found = {}
        for name in sorted(names):
            status, why = folder.status(name), None
            if status is None or not stat.S_ISREG(status.st_mode):
                why = "it is gone, or a link"
            elif status.st_nlink > 1:
                why = "it has other names (hard links), under which it would change as well"
            elif not status.st_mode & 0o222:
                why = "it is read-only"
            if why:
                fix = "edit a copy (-o OUT), or put a file of its own there that may be written"
                raise UsageError(f"not to be rewritten: {why}", where=str(folder.path / name), fix=fix)
            with os_errors("open for writing", folder.path / name):
                fd = folder.open(name, os.O_RDWR | os.O_NONBLOCK)
            stack.callback(os.close, fd)
            found[name] = LocalOpenFile(fd, str(folder.path / name))
        yield found


def shards_of(undo: Patch) -> set[str]:
    """The files that hold the rows of an edit."""
    return {written.shard for edit in undo.manifest.edits for written in edit.written}


def rows_in(shards: Mapping[str, OpenFile], undo: Patch) -> dict[str, TensorRef]:
    """The rows of an undo file, as the open shards have them."""
    headers = [read_header(opened, name) for name, opened in shards.items()]
    return undo.placed({ref.name: ref for header in headers for ref in header.tensors.values()})


def write_rows(shards: Shards, rows: Mapping[str, TensorRef], patch: Patch, times: Mapping[str, int]) -> None:
    """Write rows of shards as ``patch`` has them, with ``times``, and wait until they are on the disk."""
    with patch.file.open() as opened:
        for name, to in rows.items():
            opened.copy_to(shards[to.shard], patch.rows[name].begin, patch.rows[name].end, to.begin)
    for name, shard in shards.items():
        with suppress(KeyError, OSError):  # a file system without times
            os.utime(shard.fd, ns=2 * (times[name],))
        synced(shard.fd, shard.where)


def check_as_left(folder: Rooted) -> None:
    """Raise :class:`UsageError` where rows are not what the edit in place made them."""
    undo = undo_in(folder)
    with ExitStack() as stack:
        shards = {name: stack.enter_context(folder.reading(name)) for name in shards_of(undo)}
        for name, ref in rows_in(shards, undo).items():
            if shards[ref.shard].sha256(ref.begin, ref.end) != undo.record.digests[name][0]:
                what = "somebody has changed it since the edit in place, and the way back would undo that"
                fix = f"copy what is to be kept; if you insist, rename {UNDO} to {UNFINISHED} first"
                raise UsageError(what, where=f"{name} in {shards[ref.shard].where}", fix=fix)


def begin(folder: Rooted) -> list[str]:
    """Say by the undo file's name that rows are of both sides; returns files of another time than the edit left."""
    undo, is_whole = undo_in(folder), folder.status(UNFINISHED) is None
    asked = undo.record.former.keys() - SMALL.keys() - (set() if is_whole else shards_of(undo))
    now = {name: getattr(folder.status(name), "st_mtime_ns", None) for name in sorted(asked)}
    changed = [name for name in now if now[name] != undo.record.former[name][1]]
    if is_whole and shards_of(undo) & {*changed}:
        # So after a kill, too, no former time is set over a change.
        with writable(folder, [UNDO]) as files, suppress(OSError):
            os.utime(files[UNDO].fd, ns=(0, 0))
            synced(files[UNDO].fd, UNDO)
    if is_whole:
        move(folder, UNDO, UNFINISHED)
    return changed


def restore(folder: Rooted) -> None:
    """Write what the undo file of an unfinished edit holds; killed at any moment, it can be done again."""
    undo = undo_in(folder)
    times = {name: before for name, (before, _) in undo.record.former.items() if undo.file.id.mtime_ns}
    with writable(folder, shards_of(undo)) as shards:
        write_rows(shards, rows_in(shards, undo), undo, times)
    if not undo.record.former[MANIFEST_NAME][0]:
        folder.discard(MANIFEST_NAME)
    for name, kept in SMALL.items():
        move(folder, kept, name)
    folder.discard(UNFINISHED)
    folder.sync()


def revert(source: Path | str, out: Path | str | None = None) -> list[str]:
    """Undo an edit in place, byte for byte, also one that was cut short; or write a copy of what was before to ``out``.

    Returns files of another time than the edit left: what else was changed in them, stays.

    Raises:
        UsageError: there is no undo file; somebody has changed since what was edited.
        QKPatchError: the undo file is damaged; reading or writing fails.
    """
    if source == "":
        raise UsageError("SOURCE is empty", fix="name the directory; is a variable unset?")
    with signals_held(), locked(Path(source)) as folder:
        if folder.status(UNFINISHED) is None:
            check_as_left(folder)
        if out is not None:
            return _write_copy(folder, Path(out))
        with writable(folder, shards_of(undo_in(folder))):  # refused now, or not at all
            changed = begin(folder)
        restore(folder)
        return changed


def _write_copy(folder: Rooted, out: Path) -> list[str]:
    """Write a copy, and restore that; it appears whole, or not at all. Returns as :func:`revert`."""
    check_absent(out)
    check_out(out, overwrite=False, force=False)
    if places(folder.path)[0] in places(out):
        raise UsageError("OUT lies in SOURCE", where=str(out), fix="choose an OUT beside SOURCE")
    check_space(out, [OutputFile.copy_of(file) for file in walk_files(folder.path).files.values()])

    def copy(here: str, there: str) -> None:
        with os_errors("copy", here, out):
            shutil.copy2(here, there)
            with open(there, "rb") as copied:
                synced(copied.fileno(), out)

    with Staging(out, mode=os.fstat(folder.fd).st_mode & 0o777) as staging:
        with signals_let_through(), os_errors("copy", folder.path, out):
            shutil.copytree(folder.path, staging.files.as_path, copy_function=copy, dirs_exist_ok=True)
            changed = begin(staging.files)
            restore(staging.files)
        directories = [name for name, status in staging.files.walk() if stat.S_ISDIR(status.st_mode)]
        staging.publish(directories, None)
    return changed


def check_absent(path: Path) -> None:
    """Raise :class:`UsageError` where there is something already."""
    if os.path.lexists(path):
        raise UsageError("exists already", where=str(path), fix="remove it, or choose another -o")
