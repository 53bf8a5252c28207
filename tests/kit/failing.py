"""What fails at a given moment: a disk that is full, and a user who interrupts."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from typing import Any

import pytest


def path_of(fd: int) -> str:
    """What an open file is called by now, on Linux and on macOS."""
    if hasattr(fcntl, "F_GETPATH"):
        return os.fsdecode(fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).partition(b"\0")[0])
    return os.path.realpath(f"/proc/self/fd/{fd}")


def fill_disk(monkeypatch: pytest.MonkeyPatch, at: int, suffix: str = "") -> Callable[[], int]:
    """From here on, write number ``at`` to a file whose name ends in ``suffix`` finds no space; how many are left."""
    pwrite, left = os.pwrite, at

    def full(fd: int, data: Any, where: int) -> int:
        nonlocal left
        if path_of(fd).endswith(suffix):
            left -= 1
            if left == 0:
                raise OSError(28, "No space left on device")
        return pwrite(fd, data, where)

    monkeypatch.setattr(os, "pwrite", full)
    return lambda: left


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, after: int) -> None:
    """From here on, whoever calls a method more than ``after`` times is interrupted."""
    before, left = getattr(owner, method), iter(range(after))

    def stopping(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return before(*arguments)

    monkeypatch.setattr(owner, method, stopping)
