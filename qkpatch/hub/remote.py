"""``RemoteRepo``: a repository on the Hub as files that are read by byte ranges, without a download."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

from qkpatch.checkpoint.content import Content, damaged
from qkpatch.checkpoint.files import MAX_JSON_BYTES, check_size
from qkpatch.checkpoint.tree import Repository, SourceFile
from qkpatch.hub.listing import Listed
from qkpatch.hub.transfer import Transfer
from qkpatch.stores.range_reader import Fetchers, RangeReader

_MODE = 0o644  # the Hub knows of no other


@dataclass(frozen=True)
class RemoteFile(SourceFile):
    """A file of a repository at one commit."""

    entry: Listed
    transfer: Transfer = field(compare=False, repr=False)
    fetchers: Fetchers = field(compare=False, repr=False)

    @property
    def content(self) -> str:
        """The digest by which Git names the file's content."""
        return self.entry.blob

    @property
    def listed(self) -> Content:
        """Its SHA-256, or of small files Git's name."""
        entry = self.entry
        return Content("git", entry.blob) if entry.sha256 is None else Content("sha256", entry.sha256)

    @property
    def is_known_by_digest(self) -> bool:
        """It is."""
        return True

    @contextmanager
    def open(self, ranges: Sequence[tuple[int, int]] = ()) -> Iterator[RangeReader]:
        """A reader; ``ranges`` begin to arrive at once, and are kept until it is closed."""
        fetch = partial(self.transfer.fetch, self.entry)
        with closing(RangeReader(self.where, self.size, fetch, self.fetchers, ranges)) as reader:
            yield reader

    def read(self, limit: int = MAX_JSON_BYTES) -> bytes:
        """All of a small file, in one request: the Hub may not know ranges of those that are in Git itself.

        Raises:
            HubError: it does not come, or is not what was listed.
        """
        check_size(self.size, limit, self.where)
        data = self.transfer.whole(self.entry)
        if not self.listed.is_of(data):
            raise damaged(self.where)
        return data


@dataclass(frozen=True)
class RemoteRepo(Repository):
    """All files of a repository at one commit."""

    where: str
    files: Mapping[str, RemoteFile]

    @classmethod
    def of(cls, repo: str, commit: str, listed: Sequence[Listed]) -> RemoteRepo:
        """The files that the Hub lists."""
        transfer, fetchers = Transfer(repo, commit), Fetchers()
        files = {}
        for file in listed:
            where = f"{repo}@{commit[:12]}: {file.name}"
            files[file.name] = RemoteFile(file.name, file.size, _MODE, where, file, transfer, fetchers)
        return cls(repo, files)

    def check_still(self, names: Collection[str]) -> None:
        """A commit stays what it is."""
