"""``StoreFolder``: a folder of a store as SOURCE: files that are read by byte ranges, without a download."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

from qkpatch.checkpoint.tree import Repository, SourceFile
from qkpatch.errors import StoreError
from qkpatch.stores.errors import changed_object
from qkpatch.stores.range_reader import Fetchers, RangeReader
from qkpatch.stores.store import Entry, Store, open_store
from qkpatch.stores.url import StoreUrl

_MODE = 0o644  # stores know of no other


@dataclass(frozen=True)
class StoreFile(SourceFile):
    """An object, as it was when it was listed."""

    entry: Entry
    store: Store = field(compare=False, repr=False)
    fetchers: Fetchers = field(compare=False, repr=False)

    @property
    def content(self) -> str:
        """What the store says of this version of it: an ETag, a generation, a time."""
        return self.entry.identity

    @contextmanager
    def open(self, ranges: Sequence[tuple[int, int]] = ()) -> Iterator[RangeReader]:
        """A reader; ``ranges`` begin to arrive at once. That the object is still the same is known on leaving."""
        fetch = partial(self.store.fetch, self.entry)
        with closing(RangeReader(self.where, self.size, fetch, self.fetchers, ranges)) as reader:
            yield reader
            if not self.store.is_pinned:
                self.store.still(self.entry)


@dataclass(frozen=True)
class StoreFolder(Repository):
    """All files of a folder, as they were when they were listed."""

    where: str
    files: Mapping[str, StoreFile]
    store: Store = field(compare=False, repr=False)

    @classmethod
    def at(cls, url: StoreUrl) -> StoreFolder:
        """The files below a URL.

        Raises:
            UsageError: a scheme that nobody knows, or a client that is not installed.
            StoreError: they cannot be listed, or there are none.
        """
        store = open_store(url)
        listed, fetchers = store.listing(), Fetchers()
        if not listed:
            fix = "check the URL"
            if url.scheme in ("http", "https"):
                fix += "; a web server must show an index of the folder"
            if url.name.endswith(".safetensors"):
                fix = "of a store, name the folder that the file lies in"
            raise StoreError(
                "there is nothing: no such bucket or folder, or an empty one", where=url.text, fix=fix
            )
        files = {}
        for name, entry in listed.items():
            files[name] = StoreFile(name, entry.size, _MODE, store.where(name), entry, store, fetchers)
        return cls(url.text, files, store)

    def check_still(self, names: Collection[str]) -> None:
        """Raise :class:`StoreError` where one of these files is another by now, or one more is there."""
        now = self.store.listing()
        before = {name: file.entry for name, file in self.files.items()}
        for name in sorted({*names, *(now.keys() - before.keys())}):
            if now.get(name) != before.get(name):
                raise changed_object(self.store.where(name))
