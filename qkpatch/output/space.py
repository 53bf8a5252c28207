"""Is there room for OUT, and may this process do what it takes? Asked before the first byte is written."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.tree import LocalFile, SourceFile
from qkpatch.errors import FileSystemError
from qkpatch.output.copying import clone


def free_bytes(out: Path) -> int:
    """Free space, in bytes, on the file system where OUT will be."""
    with os_errors("look up the free space", out):
        return shutil.disk_usage(out.absolute().parent).free


def check_space(out: Path, needed: int, files: Collection[SourceFile]) -> None:
    """Raise :class:`FileSystemError` where OUT does not fit, unless the file system shares the copied blocks."""
    free = free_bytes(out)
    if needed <= free or _shares_blocks(out, files):
        return
    raise FileSystemError(
        f"OUT needs {needed:,} bytes, and {free:,} are free",
        where=str(out.absolute().parent),
        fix="free some space, or write to another file system with -o",
    )


def _shares_blocks(out: Path, files: Collection[SourceFile]) -> bool:
    """Whether the largest source file can be cloned beside OUT (btrfs, xfs); tried on a file without a name."""
    local = (file for file in files if isinstance(file, LocalFile))
    largest = max(local, key=lambda file: file.size, default=None)
    if largest is None:
        return False
    try:
        with tempfile.TemporaryFile(dir=out.absolute().parent) as probe, open(largest.path, "rb") as source:
            return clone(source.fileno(), probe.fileno()) and os.fstat(probe.fileno()).st_size == largest.size
    except OSError:
        return False


def is_memory_limited() -> bool:
    """Whether this process may take only so much address space: libraries that are loaded later may not fit."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def check_limits(files: int, memory: int) -> None:
    """Raise :class:`FileSystemError` where this process may not open so many more files, or take so many bytes."""
    files += len(os.listdir("/proc/self/fd"))
    for kind, flag, needed, what in (
        (resource.RLIMIT_NOFILE, "-n", files, "open files"),
        (resource.RLIMIT_AS, "-v", memory, "bytes of memory"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and limit < needed:
            raise FileSystemError(
                f"{needed:,} {what} are needed, and {limit:,} are allowed",
                fix=f"raise the limit: ulimit {flag}",
            )
