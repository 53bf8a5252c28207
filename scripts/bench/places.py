"""Where benchmarks run: a folder, memory, and file systems in an image that can share blocks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .measure import BenchError

MARGIN = 1.05  # of a file system's own bookkeeping


def kind_of(folder: Path) -> str:
    """The type of the file system that holds ``folder``."""
    found = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True).stdout.strip()
    return "ext4" if found == "ext2/ext3" else found or "unknown"


def check_free(folder: Path, needed: int) -> None:
    """Refuse what does not fit.

    Raises:
        BenchError: there is too little room.
    """
    free = shutil.disk_usage(folder).free
    if needed * MARGIN > free:
        raise BenchError(
            f"{needed * MARGIN / 1e9:.1f} GB are needed in {folder} and {free / 1e9:.1f} GB are free"
        )


def free_memory() -> int:
    """Bytes that processes and tmpfs can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


@contextmanager
def image_place(folder: Path, size: int, kind: str) -> Iterator[Path]:
    """A file system of a ``kind`` in an image file of ``size`` bytes below ``folder``, while the block runs.

    Raises:
        BenchError: it cannot be made or mounted here.
    """
    if os.geteuid():
        raise BenchError(f"{kind}: mounting an image takes root")
    make = shutil.which(f"mkfs.{kind}", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if make is None:
        raise BenchError(f"{kind}: mkfs.{kind} is not installed")
    image, mount = folder / f"{kind}.img", folder / f"{kind}.mount"
    image.unlink(missing_ok=True)
    mount.mkdir(exist_ok=True)
    with open(image, "wb") as file:
        file.truncate(size)
    try:
        _call(make, "-q", str(image))
        _call("mount", "-o", "loop", str(image), str(mount))
        try:
            yield mount
        finally:
            _call("umount", str(mount))
    finally:
        image.unlink()
        mount.rmdir()


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{Path(command[0]).name}: {done.stderr.strip()[-300:]}")
