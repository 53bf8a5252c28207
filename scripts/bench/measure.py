"""Runs whole processes and notes what each took: wall and CPU time, peak memory, bytes read and written."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.01


class BenchError(RuntimeError):
    """Something that a figure needs did not work."""


@dataclass(frozen=True)
class Usage:
    """What one or several processes in a row took; memory is the largest, everything else the sum."""

    wall: float
    cpu: float
    user: float  # what of it was not the kernel's
    peak_rss: int  # VmHWM, in bytes
    peak_anonymous: int  # the largest RssAnon that was seen
    asked_read: int  # by system calls, from the page cache or not
    asked_written: int
    disk_read: int
    disk_written: int

    def then(self, other: Usage) -> Usage:
        """This one and then the other."""
        return Usage(
            wall=self.wall + other.wall,
            cpu=self.cpu + other.cpu,
            user=self.user + other.user,
            peak_rss=max(self.peak_rss, other.peak_rss),
            peak_anonymous=max(self.peak_anonymous, other.peak_anonymous),
            asked_read=self.asked_read + other.asked_read,
            asked_written=self.asked_written + other.asked_written,
            disk_read=self.disk_read + other.disk_read,
            disk_written=self.disk_written + other.disk_written,
        )


def measure(command: Sequence[str | Path]) -> tuple[Usage, str]:
    """Run ``command`` to its end; what it took, and its stdout.

    Memory is sampled, because ``ru_maxrss`` starts at the size of whoever started the process.

    Raises:
        BenchError: it failed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=err, stdin=subprocess.DEVNULL
        )
        watch = _Watch(process.pid)
        watch.start()
        try:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie still tells its I/O
        except BaseException:  # interrupted: nothing is left running
            watch.stopped.set()
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - started
        watch.stopped.set()
        watch.join()
        io = _numbers(Path(f"/proc/{process.pid}/io"))
        _, status, rusage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            err.seek(0)
            reason = " ".join(err.read().split("\n")[-4:]).strip()[-300:]
            raise BenchError(f"{Path(command[0]).name} exits with {process.returncode}: {reason}")
        out.seek(0)
        return Usage(
            wall=wall,
            cpu=rusage.ru_utime + rusage.ru_stime,
            user=rusage.ru_utime,
            peak_rss=watch.peak_rss,
            peak_anonymous=watch.peak_anonymous,
            asked_read=io.get("rchar", 0),
            asked_written=io.get("wchar", 0),
            disk_read=io.get("read_bytes", 0),
            disk_written=io.get("write_bytes", 0),
        ), out.read()


class _Watch(threading.Thread):
    """Samples the memory of a process."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self.peak_rss = self.peak_anonymous = 0
        self._status = Path(f"/proc/{pid}/status")

    def run(self) -> None:
        while True:
            kib = _numbers(self._status)
            self.peak_rss = max(self.peak_rss, kib.get("VmHWM", 0) << 10)
            self.peak_anonymous = max(self.peak_anonymous, kib.get("RssAnon", 0) << 10)
            if self.stopped.wait(SAMPLE_SECONDS):
                return


def _numbers(path: Path) -> dict[str, int]:
    try:
        return {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+)", path.read_text(), re.M)}
    except OSError:  # it has just gone, or is another user's
        return {}


class PageCache:
    """Brings a checkpoint into the page cache, or out of it."""

    def __init__(self) -> None:
        self.can_drop = os.access("/proc/sys/vm/drop_caches", os.W_OK)
        if self.can_drop:
            try:
                self._drop()
            except OSError:
                self.can_drop = False

    @property
    def means(self) -> str:
        """How caches are emptied."""
        return (
            "sync; echo 3 > /proc/sys/vm/drop_caches"
            if self.can_drop
            else "posix_fadvise(DONTNEED) on all files"
        )

    def empty(self, folder: Path) -> None:
        """The next reader of ``folder`` waits for the disk."""
        os.sync()
        if self.can_drop:
            self._drop()
            return
        for path in files_of(folder):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def fill(self, folder: Path) -> None:
        """Read everything once; it stays as far as memory goes."""
        os.sync()
        for path in files_of(folder):
            with open(path, "rb", buffering=0) as file:
                buffer = bytearray(8 << 20)
                while file.readinto(buffer):
                    pass

    def _drop(self) -> None:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")


def files_of(folder: Path) -> list[Path]:
    """All files below ``folder``."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]
