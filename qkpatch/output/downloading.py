"""``Arrival``: bytes of a file elsewhere on their way to an open one; and what carries a file."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from qkpatch.checkpoint.files import Digesting, LocalOpenFile, OpenFile, Progress, write_exact
from qkpatch.output.copying import Lane, Passage


@dataclass(frozen=True)
class Arrival:
    """From a file elsewhere to an open one, in order; a few pieces are in memory and none is on the disk twice."""

    source: OpenFile
    destination: int
    where: str  # what messages call the destination

    def copy(self, begin: int, end: int, at: int, progress: Progress, digest: Digesting | None = None) -> str:
        """As :meth:`Passage.copy`.

        Raises:
            HubError: they do not come.
            FileSystemError: writing fails.
        """
        for piece in self.source.pieces(begin, end):
            if digest is not None:
                digest.update(piece)
            write_exact(self.destination, piece, at, self.where)
            at += len(piece)
            progress(len(piece))
        return "download"


def passage_for(
    lane: Lane, source: OpenFile, destination: int, where: str
) -> AbstractContextManager[Passage | Arrival]:
    """What copies from ``source`` to ``destination``, both open; through ``lane`` where both are on this machine."""
    if isinstance(source, LocalOpenFile):
        return Passage(lane, source, destination, where)
    return nullcontext(Arrival(source, destination, where))
