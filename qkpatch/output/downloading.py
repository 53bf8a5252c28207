"""``Arrival``: bytes of a file elsewhere on their way to an open one; and what carries a file."""

from __future__ import annotations

from qkpatch.checkpoint.files import Digesting, LocalOpenFile, OpenFile, Progress, write_exact
from qkpatch.output.copying import Lane, Passage


class Arrival:
    """From a file elsewhere to an open one, in order; a few pieces are in memory and none is on the disk twice."""

    def __init__(self, source: OpenFile, destination: int, where: str) -> None:
        """``where`` is what messages call the destination."""
        self._source, self._destination, self._where = source, destination, where

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
            write_exact(self._destination, piece, at, self._where)
            at += len(piece)
            progress(len(piece))
        return "download"


def passage_for(lane: Lane, source: OpenFile, destination: int, where: str) -> Passage | Arrival:
    """What copies from ``source`` to ``destination``, both open; through ``lane`` where both are on this machine.

    ``where`` is what messages call the destination.
    """
    if isinstance(source, LocalOpenFile):
        return Passage(lane, source, destination, where)
    return Arrival(source, destination, where)
