"""``Journal``: which files of a staged output are done, so that a later run may take them over after a kill."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.output import OutputFile

NAME = ".qkpatch-journal"  # in the staging directory, never in OUT


class State(str, Enum):
    """How far a staged file is. Either state is noted only once the file is on the disk."""

    copied = "copied"  # as in SOURCE, to stay so
    filled = "filled"  # all but the planned rows are there; those are written anew whatever they hold


class Journal:
    """Notes for one staging directory; the first line says for which plan and which source files it is."""

    def __init__(self, staging: Path, fingerprint: str) -> None:
        self._path = staging / NAME
        self._done = _read(self._path, fingerprint) or {}
        with os_errors("write", self._path):
            if not self._done:
                self._path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
            else:  # a last line that the kill cut short: what follows is a line of its own
                os.truncate(self._path, self._path.read_bytes().rindex(b"\n") + 1)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def state(self, staged: Path, file: OutputFile) -> State | None:
        """How far ``staged``, the copy of ``file``, was when the journal was left; None where nothing is sure."""
        note = self._done.get(file.name)
        try:
            status = staged.lstat()
        except OSError:
            return None
        if note is None or (status.st_ino, status.st_size) != (note["inode"], file.size):
            return None
        state = State(note["state"])
        # ctime cannot be set by hand: nothing has touched the copy since. The rows of the others may have changed.
        return state if state is State.filled or status.st_ctime_ns == note["ctime_ns"] else None

    def forget(self, file: OutputFile) -> None:
        """Take back what was noted of ``file``, which is about to be made anew: perhaps under the same inode number."""
        if self._done.pop(file.name, None) is not None:
            with os_errors("write", self._path):
                os.write(self._fd, (json.dumps({"name": file.name, "state": None}) + "\n").encode())

    def note(self, fd: int, file: OutputFile, state: State) -> None:
        """Say that the open copy of ``file`` is on the disk in ``state``."""
        status = os.fstat(fd)
        line = {
            "name": file.name,
            "state": state.value,
            "inode": status.st_ino,
            "ctime_ns": status.st_ctime_ns,
        }
        with os_errors("write", self._path):
            os.write(self._fd, (json.dumps(line) + "\n").encode())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def remove(self) -> None:
        """Take the journal out of the directory, which is about to become OUT."""
        with os_errors("remove", self._path):
            self._path.unlink()


def is_of(staging: Path, fingerprint: str) -> bool:
    """Whether ``staging`` was left by a run of the same plan on the same source files."""
    return _read(staging / NAME, fingerprint) is not None


def _read(path: Path, fingerprint: str) -> dict[str, dict[str, Any]] | None:
    """The notes by file; None where there is no journal of this fingerprint."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines or json.loads(lines[0]) != {"fingerprint": fingerprint}:
            return None
    except (OSError, ValueError):
        return None
    notes: dict[str, dict[str, Any]] = {}
    for line in lines[1:]:
        try:
            note = json.loads(line)
            if note["state"] is None:
                notes.pop(str(note["name"]), None)
                continue
            State(note["state"])
            notes[str(note["name"])] = {
                **note,
                "inode": int(note["inode"]),
                "ctime_ns": int(note["ctime_ns"]),
            }
        except (ValueError, KeyError, TypeError):
            break  # cut short by the kill
    return notes
