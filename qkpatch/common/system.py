"""The one module that names what only Linux has: each call by itself, with a portable form for where it is missing.

Whether a call is there is asked each time, so that tests can take all of them away (``make test-portable``). Where one
raises ``ENOSYS``, its caller goes on as on a file system that cannot do it. What is here for macOS follows its manuals;
nobody has run it on one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import secrets
import signal
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

IS_LINUX = sys.platform == "linux"
NOREPLACE, EXCHANGE = 1, 2  # of renameat2
_MAC_FLAGS = {NOREPLACE: 4, EXCHANGE: 2}  # RENAME_EXCL and RENAME_SWAP of sys/stdio.h
_FICLONE = 0x40049409  # linux/fs.h; in the fcntl module only since Python 3.12
_GETFLAGS, _APPEND_ONLY = 0x80086601, 0x20  # of linux/fs.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
_KEPT = 32 << 20  # bytes: the largest that malloc.h allows
_NEVER = 1 << 30  # no run has as much to give back
_READ_AHEAD = 128 << 10  # bytes; of one call, Linux takes no more than a disk's own, and says nothing


def _missing() -> OSError:
    return OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _libc(name: str) -> Any:
    """A function of the C library for which Python has no name; None where there is none."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _proc(name: str) -> str:
    """What the kernel tells in a file of /proc; empty where it does not."""
    if IS_LINUX:
        with suppress(OSError):
            return Path("/proc", name).read_text("utf-8", "replace")
    return ""


def _sysctl(name: str) -> str:
    """What macOS's kernel tells by a name; empty where it does not."""
    call, value, size = _libc("sysctlbyname"), ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    if call is None or call(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return ""
    return value.value.decode("utf-8", "replace")


# -------- bytes


def clone(source: int, destination: int) -> bool:
    """Let ``destination`` share all blocks of ``source``; False where the file system cannot (btrfs and xfs can)."""
    if not IS_LINUX:
        return False  # macOS clones to a new name, not into a file that is open
    try:
        fcntl.ioctl(destination, _FICLONE, source)
    except OSError:
        return False  # whatever it is, copying will meet it again, or not
    return True


def copy_file_range(source: int, destination: int, offset: int, at: int, count: int) -> int:
    """Copy in the kernel, within a file system. Portable: read and write."""
    if not hasattr(os, "copy_file_range"):
        raise _missing()
    return int(os.copy_file_range(source, destination, count, offset, at))


def sendfile(source: int, destination: int, offset: int, at: int, count: int) -> int:
    """Copy in the kernel, across file systems; elsewhere it sends to sockets alone. Portable: read and write."""
    if not IS_LINUX:
        raise _missing()
    os.lseek(destination, at, os.SEEK_SET)
    return os.sendfile(destination, source, offset, count)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read from ``offset`` on into ``buffer``; how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def will_read(fd: int, begin: int, end: int) -> None:
    """Have the disk bring bytes that are read soon, while something else is done. Portable: nothing."""
    if hasattr(os, "posix_fadvise"):
        soon = getattr(os, "POSIX_FADV_WILLNEED", 0)
        with suppress(OSError):
            for at in range(begin, end, _READ_AHEAD):
                os.posix_fadvise(fd, at, min(_READ_AHEAD, end - at), soon)


def data_at(fd: int, offset: int) -> tuple[int, int]:
    """The first bytes from ``offset`` on that are no hole; raises ``ENXIO`` where there are none. Portable: all are.

    macOS has the calls, but APFS has called data a hole that were not on the disk yet.
    """
    if not (IS_LINUX and hasattr(os, "SEEK_DATA")):
        raise _missing()
    first = os.lseek(fd, offset, os.SEEK_DATA)
    return first, os.lseek(fd, first, os.SEEK_HOLE)


def open_direct(fd: int, access: int) -> int | None:
    """An open file once more, past the page cache; None where that is not to be had."""
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", access | os.O_DIRECT | os.O_CLOEXEC)
    return None


def is_cached(fd: int, offset: int) -> bool:
    """Whether the page cache holds a byte; False where nobody can tell."""
    if hasattr(os, "RWF_NOWAIT"):
        with suppress(OSError):  # EAGAIN; or the file system cannot tell
            return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    return False


def sync(fd: int) -> None:
    """Wait until an open file or directory is on the disk."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS's fsync waits for the drive's cache alone
        with suppress(OSError):  # not every file system has it
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


# -------- names


def renameat2(old_folder: int, old: str, new_folder: int, new: str, flag: int) -> None:
    """Rename, at once, to a name that is free (``NOREPLACE``), or exchange two. Portable: rename after a look."""
    call, flags = _libc("renameat2"), flag
    if call is None:
        call, flags = _libc("renameatx_np"), _MAC_FLAGS[flag]
    if call is None:
        raise _missing()
    if call(old_folder, os.fsencode(old), new_folder, os.fsencode(new), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), new)


def open_unnamed(folder: int) -> int:
    """A new file of an open directory, to be written and read, without a name. Portable: one with a name of its own."""
    if not hasattr(os, "O_TMPFILE"):
        raise _missing()
    return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666, dir_fd=folder)


def name_unnamed(fd: int, folder: int, name: str) -> None:
    """Give a file of :func:`open_unnamed` a name that is free."""
    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder, dst_dir_fd=folder)


def path_of(fd: int, remembered: str | Path) -> str:
    """A path to an open file or directory, whatever it is called by now. Portable: what it was called."""
    if IS_LINUX and os.path.lexists(path := f"/proc/self/fd/{fd}"):
        return path
    if hasattr(fcntl, "F_GETPATH"):
        with suppress(OSError):
            return os.fsdecode(fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).partition(b"\0")[0])
    return str(remembered)


def is_append_only(fd: int) -> bool:
    """Whether in an open directory nothing can be renamed (``chattr +a``, ``chflags uappnd``)."""
    if IS_LINUX:
        with suppress(OSError):  # not every file system has such flags
            return bool(fcntl.ioctl(fd, _GETFLAGS, bytes(8))[0] & _APPEND_ONLY)
    return bool(getattr(os.fstat(fd), "st_flags", 0) & (stat.UF_APPEND | stat.SF_APPEND))


def lock(fd: int, *, shared: bool = False, wait: bool = False) -> None:
    """Hold an open directory; raises ``BlockingIOError`` where another does and it is not waited for."""
    fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def umask(folder: int) -> int:
    """Of this process; ``os.umask`` would change it for other threads. Portable: as a new directory shows."""
    if found := re.search(r"^Umask:\s*([0-7]+)", _proc("self/status"), re.M):
        return int(found[1], 8)
    name = f".qkpatch-{secrets.token_hex(4)}"
    os.mkdir(name, 0o777, dir_fd=folder)
    try:
        return 0o777 & ~os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    finally:
        os.rmdir(name, dir_fd=folder)


# -------- the process and the machine


def ending_signals() -> tuple[signal.Signals, ...]:
    """Those that ask a process to end: Ctrl-C, ``kill``, a closed terminal."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd" if IS_LINUX else "/dev/fd"))


def processors() -> int:
    """How many this process may use. Portable: how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """By the numbers that BLAS chooses its kernels by. Portable: its kind alone.

    macOS has the BLAS within, and chips of one kind have others.
    """
    told = _proc("cpuinfo").partition("\n\n")[0]
    numbers = re.findall(r"(?m)^(?:vendor_id|cpu family|model|CPU \w+)\s*: (.+)$", told)
    chip = _sysctl("machdep.cpu.brand_string") or platform.processor()
    return " ".join(numbers) if IS_LINUX else f"{chip} {platform.mac_ver()[0]}".strip()


def boot_id() -> str:
    """Another each time this machine starts; empty where it has none, and its name is all that tells it from others."""
    return _proc("sys/kernel/random/boot_id") or _sysctl("kern.bootsessionuuid")


def share_free_memory() -> None:
    """Let all threads of this process allocate from one pool, which keeps what is freed for the next head.

    Otherwise each thread keeps arrays of its own (80 MB more at 7B sizes), and gives others back to the system only
    to fault them in again. For a process that is qkpatch's own.
    """
    if (mallopt := _libc("mallopt")) is not None:  # glibc alone has it
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _KEPT)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def load_library(path: str) -> None:
    """Map a library, without the suffix that this system's have, into the process, while other threads run."""
    if (dlopen := _libc("dlopen")) is not None:
        dlopen(os.fsencode(path + (".so" if IS_LINUX else ".dylib")), os.RTLD_NOW)
