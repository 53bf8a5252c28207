"""Is there room for OUT, and may this process do what it takes? Asked before the first byte is written."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from qkpatch.checkpoint.tree import LocalFile, SourceFile
from qkpatch.common import system
from qkpatch.errors import FileSystemError
from qkpatch.output.destination import present_parent
from qkpatch.output.layout import OutputFile
from qkpatch.output.staging import left_bytes


def free_bytes(out: Path) -> int | None:
    """Free space, in bytes, on the file system where OUT will be; None where that does not know."""
    try:
        usage = shutil.disk_usage(present_parent(out))
    except OSError:
        return None
    return usage.free if usage.total else None


def check_space(out: Path, files: Collection[OutputFile]) -> None:
    """Refuse an OUT of which ``files`` are to be written and do not fit, unless the file system shares copied blocks.

    Raises:
        FileSystemError: they do not fit.
    """
    free, needed = free_bytes(out), sum(map(_written_bytes, files))
    # What dead runs left is taken over, or removed.
    if free is None or needed <= free or needed <= free + left_bytes(out):
        return
    if not _shares_blocks(present_parent(out), [extent.file for file in files for extent in file.extents]):
        what = f"OUT needs {needed:,} bytes, and {free:,} are free"
        fix = "free some space, or write to another file system with -o"
        raise FileSystemError(what, where=str(out.absolute().parent), fix=fix)


def _written_bytes(file: OutputFile) -> int:
    """Its size without holes."""
    total = len(file.own)
    for extent in file.extents:
        with extent.file.open() as opened:
            total += sum(last - first for first, last in opened.data(extent.begin, extent.end))
    return total


def _shares_blocks(place: Path, files: Collection[SourceFile]) -> bool:
    """Whether the largest source file can be cloned to ``place`` (btrfs, xfs); tried on a file without a name."""
    # Files that are still to be downloaded take as much room on the way, if it is the same file system at all.
    local = (file for file in files if isinstance(file, LocalFile))
    largest = max(local, key=lambda file: file.size, default=None)
    if largest is None:
        return False
    try:
        with tempfile.TemporaryFile(dir=place) as probe, open(largest.path, "rb") as source:
            return system.clone(source.fileno(), probe.fileno())
    except OSError:
        return False


def check_limits(files: int, memory: int) -> bool:
    """Whether this process may take only so much address space, so that libraries that are loaded later may not fit.

    Raises:
        FileSystemError: it may not open so many more files, or take so many bytes.
    """
    files += system.open_files()
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)]
    needs = (files, "open files", "ulimit -n"), (memory, "bytes of memory", "ulimit -v")
    for limit, (needed, what, command) in zip(limits, needs, strict=True):
        if limit != resource.RLIM_INFINITY and limit < needed:
            what = f"{needed:,} {what} are needed, and {limit:,} are allowed"
            raise FileSystemError(what, fix=f"raise the limit: {command}")
    return limits[1] != resource.RLIM_INFINITY
