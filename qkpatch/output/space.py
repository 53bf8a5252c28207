"""Is there room for OUT, and may this process do what it takes? Asked before the first byte is written."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from qkpatch.checkpoint.tree import LocalFile, SourceFile
from qkpatch.errors import FileSystemError
from qkpatch.output.copying import clone
from qkpatch.output.destination import present_parent
from qkpatch.output.layout import Output, OutputFile
from qkpatch.output.options import Writing
from qkpatch.output.staging import left_bytes

_PROBE = 64 << 10  # bytes; a file of a few could be kept in its directory's entry, and shared by nobody


def free_bytes(out: Path) -> int | None:
    """Free space, in bytes, on the file system where OUT will be; None where that does not know."""
    try:
        usage = shutil.disk_usage(present_parent(out))
    except OSError:
        return None
    return usage.free if usage.total else None


def check_space(
    out: Path, output: Output, edited: Collection[str], writing: Writing, *, is_cached: bool
) -> None:
    """Refuse an OUT that does not fit, unless the file system shares the copied blocks.

    Args:
        out: where.
        output: its files.
        edited: the names of those that are edited, which are never links.
        writing: how it is written.
        is_cached: files that are elsewhere come into the Hub cache first.

    Raises:
        FileSystemError: it does not fit.
    """
    free = free_bytes(out)
    if free is None:
        return
    needed = sum(
        _written_bytes(file)
        for name, file in output.files.items()
        if name in edited or file.original is None or not writing.may_link(file.original)
    )
    # What dead runs left is taken over, or removed.
    if needed <= free or needed <= free + left_bytes(out):
        return
    sources = [extent.file for file in output.files.values() for extent in file.extents]
    if _shares_blocks(present_parent(out), sources, is_cached=is_cached):
        return
    raise FileSystemError(
        f"OUT needs {needed:,} bytes, and {free:,} are free",
        where=str(out.absolute().parent),
        fix="free some space, or write to another file system with -o",
    )


def _written_bytes(file: OutputFile) -> int:
    """Its size without holes."""
    total = len(file.own)
    for extent in file.extents:
        with extent.file.open() as opened:
            total += sum(last - first for first, last in opened.data(extent.begin, extent.end))
    return total


def _shares_blocks(place: Path, files: Collection[SourceFile], *, is_cached: bool) -> bool:
    """Whether the largest source file can be cloned to ``place`` (btrfs, xfs); tried on a file without a name.

    Of files that are still to come into the Hub cache, whether anything can be.
    """
    local = (file for file in files if isinstance(file, LocalFile))
    largest = max(local, key=lambda file: file.size, default=None)
    if largest is None and not is_cached:
        return False
    try:
        with (
            tempfile.TemporaryFile(dir=place) as probe,
            tempfile.TemporaryFile(dir=place) if largest is None else open(largest.path, "rb") as source,
        ):
            if largest is None:
                source.write(bytes(_PROBE))
                source.flush()
            return clone(source.fileno(), probe.fileno())
    except OSError:
        return False


def check_limits(files: int, memory: int) -> bool:
    """Whether this process may take only so much address space, so that libraries that are loaded later may not fit.

    Raises:
        FileSystemError: it may not open so many more files, or take so many bytes.
    """
    files += len(os.listdir("/proc/self/fd"))
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)]
    needs = (files, "open files", "ulimit -n"), (memory, "bytes of memory", "ulimit -v")
    for limit, (needed, what, command) in zip(limits, needs, strict=True):
        if limit != resource.RLIM_INFINITY and limit < needed:
            what = f"{needed:,} {what} are needed, and {limit:,} are allowed"
            raise FileSystemError(what, fix=f"raise the limit: {command}")
    return limits[1] != resource.RLIM_INFINITY
