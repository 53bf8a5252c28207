"""``Arrival``: bytes of a file elsewhere on their way to an open one; and which way a file takes."""

from __future__ import annotations

from qkpatch.checkpoint.files import Digesting, LocalOpenFile, OpenFile, Progress, write_exact
from qkpatch.output.passage import Lane, Passage


class Arrival:
    """From a file elsewhere to an open one, in order; a few pieces are in memory and none is on the disk twice."""

    def __init__(self, source: OpenFile, target: int) -> None:
        self._source, self._target = source, target

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
            write_exact(self._target, piece, at, self._source.where)
            at += len(piece)
            progress(len(piece))
        return "download"


def way(lane: Lane, source: OpenFile, target: int) -> Passage | Arrival:
    """What carries bytes from ``source`` to ``target``."""
    return Passage(lane, source, target) if isinstance(source, LocalOpenFile) else Arrival(source, target)
