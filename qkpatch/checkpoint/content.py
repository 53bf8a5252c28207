"""``Content``: what a store says a file holds, by digest; and whether OUT still holds it, but for the planned rows."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple

from qkpatch.checkpoint.files import Digesting, OpenFile, gaps
from qkpatch.errors import HubError

if TYPE_CHECKING:
    from qkpatch.checkpoint.tree import SourceFile


@dataclass(frozen=True)
class Content:
    """The name of some bytes: a SHA-256, or where Git holds them itself, Git's SHA-1."""

    algorithm: str  # "sha256" or "git"
    digest: str

    @classmethod
    def of_name(cls, name: str) -> Content | None:
        """What a blob of that name in the Hub cache is: 64 hexadecimal digits are a SHA-256, 40 are Git's."""
        if not set(name) <= set("0123456789abcdef"):
            return None
        kind = {64: "sha256", 40: "git"}.get(len(name))
        return None if kind is None else cls(kind, name)

    @property
    def sha256(self) -> str | None:
        """The digest in hexadecimal where it is a SHA-256, None where it is Git's."""
        return self.digest if self.algorithm == "sha256" else None

    def hasher(self, size: int) -> hashlib._Hash:
        """What computes a digest of this kind of ``size`` bytes that are still to be fed."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def is_in(self, opened: OpenFile) -> bool:
        """Whether a file holds that content and nothing else."""
        digest = self.hasher(opened.size)
        opened.feed(digest, 0, opened.size)
        return digest.hexdigest() == self.digest

    def is_of(self, data: bytes) -> bool:
        """Whether ``data`` has this digest."""
        digest = self.hasher(len(data))
        digest.update(data)
        return digest.hexdigest() == self.digest


def damaged(where: str) -> HubError:
    """What is said of a file that came with other bytes than the Hub lists."""
    fix = "run again; if it stays, the file on the Hub is damaged, or something on the way changes it"
    return HubError("what came is not what the Hub lists: its digest is another", where=where, fix=fix)


class Parts:
    """A digest of a file that is fed from its beginning on, and the SHA-256 of parts of it."""

    def __init__(self, whole: Digesting, parts: Iterable[tuple[int, int]]) -> None:
        self._whole, self._position = whole, 0
        self._parts = [(begin, end, hashlib.sha256()) for begin, end in parts]

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take more bytes in."""
        self._whole.update(data)
        view, first = memoryview(data), self._position
        self._position += len(view)
        for begin, end, digest in self._parts:
            if begin < self._position and first < end:
                digest.update(view[max(begin - first, 0) : end - first])

    def digests(self) -> list[str]:
        """The SHA-256 of each part, in the order in which they were given."""
        return [digest.hexdigest() for _, _, digest in self._parts]


class Held(NamedTuple):
    """The bytes ``begin:end`` of a file of SOURCE, which OUT holds in ``name`` from ``at`` on."""

    begin: int
    end: int
    name: str
    at: int


Opened = Callable[[str], AbstractContextManager[OpenFile]]


def feed_source(digest: Digesting, source: OpenFile, held: Sequence[Held], opened: Opened) -> None:
    """Feed a file of SOURCE to ``digest``, as OUT has it: what OUT does not hold is read from ``source``.

    Where the digest is that of SOURCE's file, OUT's bytes are SOURCE's, whatever is read from where.
    """
    taken = ((part.begin, part.end) for part in held)
    rest = [
        Held(begin, end, "", begin) for begin, end in gaps(0, source.size, taken)
    ]  # no file has that name
    for name, parts in groupby(sorted([*held, *rest]), attrgetter("name")):
        with opened(name) if name else nullcontext(source) as file:
            for begin, end, _, at in parts:
                file.feed(digest, at, at + end - begin)


class HeldFile(OpenFile):
    """A file of SOURCE to be read out of what OUT holds of it, and for the rest, such as a header, out of itself."""

    def __init__(self, where: str, size: int, parts: Iterable[tuple[int, int, OpenFile, int]]) -> None:
        """Of ``parts``, each the bytes ``begin:end``, and an open file that has them from an offset on."""
        self.where, self._size = where, size
        self._parts = sorted(parts, key=itemgetter(0))

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """As :meth:`OpenFile.read_into`."""
        done = 0
        while done < len(buffer):
            position = offset + done
            part = bisect_right(self._parts, position, key=itemgetter(0)) - 1
            begin, end, file, at = self._parts[part]
            if not begin <= position < end:
                raise ValueError(f"byte {position} is not held")
            n = min(end - position, len(buffer) - done)
            file.read_into(buffer[done : done + n], at + position - begin)
            done += n


@contextmanager
def held_file(
    file: SourceFile, held: Sequence[Held], ranges: Sequence[tuple[int, int]], opened: Opened
) -> Iterator[OpenFile]:
    """A file of SOURCE for reading ``ranges``, apart, or all, out of what OUT holds of it; only the rest is fetched."""
    spans = ranges or [(0, file.size)]
    taken = [(part.begin, part.end) for part in held]
    missing = sorted({gap for span in spans for gap in gaps(*span, taken)})
    needed = [part for part in held if any(b < part.end and part.begin < e for b, e in spans)]
    with ExitStack() as stack:
        places = {name: stack.enter_context(opened(name)) for name in {part.name for part in needed}}
        parts = [(begin, end, places[name], at) for begin, end, name, at in needed]
        if missing:
            elsewhere = stack.enter_context(file.open(missing))
            parts += [(begin, end, elsewhere, begin) for begin, end in missing]
        yield HeldFile(file.where, file.size, parts)
