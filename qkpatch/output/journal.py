"""``Journal``: which files of a staged output are done, so that a later run may take them over after a kill."""

from __future__ import annotations

import json
import os
from enum import Enum
from typing import Any

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.errors import FileSystemError
from qkpatch.output.layout import OutputFile

NAME = "journal"  # in the staging directory, beside the files
_BEGINS = '{"fingerprint": "'


class State(str, Enum):
    """How far a staged file is. Either state is noted only once the file is on the disk."""

    copied = "copied"  # as in SOURCE, to stay so
    filled = "filled"  # all but the planned rows are there; those are written anew whatever they hold


class Journal:
    """Notes for one staging directory; the first line says for which plan and which source files it is."""

    def __init__(self, room: Rooted, fingerprint: str) -> None:
        self._where = room.path / NAME
        self._done = _read(room, fingerprint) or {}
        with os_errors("open", self._where):
            self._fd = room.open(NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            self._begin(fingerprint)
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self, fingerprint: str) -> None:
        with os_errors("write", self._where):
            # A last line that the kill cut short: what follows is a line of its own.
            text = os.pread(self._fd, os.fstat(self._fd).st_size, 0) if self._done else b""
            os.ftruncate(self._fd, text.rfind(b"\n") + 1)
        if not self._done:
            self._append({"fingerprint": fingerprint})

    def state(self, status: os.stat_result | None, file: OutputFile) -> State | None:
        """How far the staged copy of ``file`` was when the journal was left; None where nothing is sure."""
        note = self._done.get(file.name)
        if status is None or note is None or status.st_size != file.size:
            return None
        if note != {**note, **_facts(status)}:
            return None
        state = State(note["state"])
        # ctime cannot be set by hand: nothing has touched the copy since. The rows of the others may have changed.
        return state if state is State.filled or status.st_ctime_ns == note["ctime_ns"] else None

    def forget(self, file: OutputFile) -> None:
        """Take back what was noted of ``file``, which is about to be made anew: perhaps under the same inode number."""
        if self._done.pop(file.name, None) is not None:
            self._append({"name": file.name, "state": None})

    def note(self, fd: int, file: OutputFile, state: State) -> None:
        """Say that the open copy of ``file`` is on the disk in ``state``."""
        status = os.fstat(fd)
        note = {"state": state.value, **_facts(status), "ctime_ns": status.st_ctime_ns}
        self._done[file.name] = note
        self._append({"name": file.name, **note})

    @property
    def sizes(self) -> dict[str, int]:
        """The files that are noted, and their bytes."""
        return {name: note["size"] for name, note in self._done.items()}

    def _append(self, line: dict[str, Any]) -> None:
        with os_errors("write", self._where):
            os.write(self._fd, (json.dumps(line) + "\n").encode())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def done_bytes(room: Rooted, fingerprint: str | None) -> int:
    """What is done in a staging directory; -1 where no run of the same plan on the same source files left it."""
    notes = _read(room, fingerprint)
    return -1 if notes is None else sum(note["size"] for note in notes.values())


def is_one(room: Rooted) -> bool:
    """Whether there is a journal: one that begins as ours do, or that a kill left empty."""
    try:
        lines = _lines(room)
    except (FileSystemError, ValueError):
        return False
    return not lines or lines[0][: len(_BEGINS)] == _BEGINS[: len(lines[0])]


def _facts(status: os.stat_result) -> dict[str, int]:
    return {"inode": status.st_ino, "size": status.st_size, "mode": status.st_mode}


def _lines(room: Rooted) -> list[str]:
    with room.reading(NAME) as opened:
        return opened.read(opened.size, 0).decode("utf-8").splitlines()


def _read(room: Rooted, fingerprint: str | None) -> dict[str, dict[str, Any]] | None:
    """The notes by file; None where there is no journal of this fingerprint."""
    try:
        lines = _lines(room)
        if not lines or json.loads(lines[0]) != {"fingerprint": fingerprint}:
            return None
    except (FileSystemError, ValueError, RecursionError):
        return None
    notes: dict[str, dict[str, Any]] = {}
    for line in lines[1:]:
        try:
            note = json.loads(line)
            if note["state"] is None:
                notes.pop(str(note["name"]), None)
                continue
            facts = {key: int(note[key]) for key in ("inode", "size", "mode", "ctime_ns")}
            notes[str(note["name"])] = {"state": State(note["state"]).value, **facts}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            break  # cut short by the kill
    return notes
