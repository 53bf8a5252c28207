"""A machine without what only Linux, or macOS, has: `make test-portable`."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from qkpatch.common import system

# In `os`; `qkpatch.common.system` alone may name them, as `test_architecture` sees to.
OF_LINUX = {
    "O_DIRECT", "O_TMPFILE", "RWF_NOWAIT", "SEEK_DATA", "SEEK_HOLE", "copy_file_range", "posix_fadvise", "preadv",
    "sched_getaffinity", "sendfile",
}  # fmt: skip


class Without:
    """A module that lacks some names; what tests put into the module itself is seen here."""

    def __init__(self, module: Any, lacks: set[str]) -> None:
        self._module, self._lacks = module, lacks

    def __getattr__(self, name: str) -> Any:
        if name in self._lacks:
            raise AttributeError(name)
        return getattr(self._module, name)


def take_away(put: Callable[[Any, str, Any], object] = setattr) -> None:
    """Take all of it from qkpatch, and from no library; and on macOS, what that has instead."""
    put(system, "IS_LINUX", False)
    put(system, "os", Without(os, OF_LINUX))
    put(system, "fcntl", Without(fcntl, {"F_FULLFSYNC", "F_GETPATH"}))
    put(system, "signal", Without(signal, {"SIGHUP"}))
    put(system, "_libc", lambda name: None)


def taken_away_where_asked() -> None:
    """From here on, in this process, where `make test-portable` started it."""
    if os.environ.get("QKPATCH_TEST_PORTABLE"):
        take_away()


class Mac:
    """On top of that, what macOS has instead, as far as Linux can stand for it; ``asked`` is what was called."""

    def __init__(self, put: Callable[[Any, str, Any], object]) -> None:
        self.asked: list[Any] = []
        self._rename = system._libc("renameat2")
        take_away(put)
        names = {name: getattr(fcntl, name) for name in ("flock", "LOCK_EX", "LOCK_NB", "LOCK_SH")}
        put(system, "fcntl", SimpleNamespace(**names, F_GETPATH=50, F_FULLFSYNC=51, fcntl=self._fcntl))
        put(system, "_libc", {"renameatx_np": self._renameatx_np, "sysctlbyname": self._sysctlbyname}.get)

    def _fcntl(self, fd: int, command: int, data: bytes = b"") -> bytes | int:
        self.asked.append(command)
        if command == 51:
            os.fsync(fd)
            return 0
        return os.fsencode(os.path.realpath(f"/proc/self/fd/{fd}")).ljust(len(data), b"\0")

    def _sysctlbyname(self, name: bytes, value: Any, *_: object) -> int:
        told = {b"kern.bootsessionuuid": b"5E55", b"machdep.cpu.brand_string": b"Apple M9"}
        value.value = told.get(name, b"")
        return -(name not in told)

    def _renameatx_np(self, *arguments: Any) -> int:
        *names, flag = arguments
        self.asked.append(("renameatx_np", flag))
        return int(self._rename(*names, {4: 1, 2: 2}[flag]))
