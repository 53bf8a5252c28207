"""``Arrival``: bytes of a file elsewhere on their way to an open one; and which way a file takes."""

from __future__ import annotations

from qkpatch.checkpoint.copying import Lane, Passage
from qkpatch.checkpoint.files import Digesting, Progress, Readable, Remote, write_exact


class Arrival:
    """From a file elsewhere to an open one, in order; a few pieces are in memory and none is on the disk twice."""

    def __init__(self, source: Remote, target: int, where: str) -> None:
        self._source, self._target, self._where = source, target, where

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open but what the caller opened."""

    def copy(self, begin: int, end: int, at: int, progress: Progress, digest: Digesting | None = None) -> str:
        """As :meth:`Passage.copy`.

        Raises:
            HubError: they do not come.
            FileSystemError: writing fails.
        """
        for piece in self._source.pieces(begin, end):
            if digest is not None:
                digest.update(piece)
            write_exact(self._target, piece, at, self._where)
            at += len(piece)
            progress(len(piece))
        return "download"


def way(lane: Lane, source: Readable, target: int, where: str) -> Passage | Arrival:
    """What carries bytes from ``source`` to ``target``."""
    return Passage(lane, source, target, where) if isinstance(source, int) else Arrival(source, target, where)
