"""``Store``: a folder of a store, through fsspec's client: what is in it, and exact byte ranges of what that was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from qkpatch.checkpoint.open_directory import MOST_NAMES
from qkpatch.checkpoint.tree import is_plain_relative
from qkpatch.common.interrupts import is_own_process, pause
from qkpatch.common.waiting import waiting_for
from qkpatch.errors import CheckpointError, StoreError, UsageError
from qkpatch.stores.errors import (
    ShortAnswerError,
    changed_object,
    has_changed,
    is_passing,
    is_unreached,
    says,
    store_errors,
)
from qkpatch.stores.range_reader import IN_FLIGHT
from qkpatch.stores.url import EXTRAS, StoreUrl
from qkpatch.stores.web import crawled

if TYPE_CHECKING:
    from qkpatch.stores.parts import Part

T = TypeVar("T")
Read = Callable[[int, int], bytearray]

# What clients say of an object that is another once it was written again; the first that one says is enough.
_IDENTITIES = ("ETag", "etag", "generation", "md5Hash", "content_md5", "Last-Modified", "LastModified",
               "last_modified", "updated", "mtime", "created")  # fmt: skip
_COPYING = ("s3", "gs", "memory")  # whole objects within the store; others would have to be waited for
PIECE = 16 << 20  # bytes that are sent at a time
_FIRST_WAIT = 0.5  # seconds; each further one is twice as long


class Entry(NamedTuple):
    """An object, as the store lists it."""

    name: str  # relative to the folder
    path: str  # as the client has it
    size: int
    identity: str


class Store:
    """A folder; any number of threads. Credentials are the client's own, and known to nobody here."""

    is_pinned = False  # whether each read says itself which version of the object is meant
    tries = 4  # of a call that fails for a reason that may pass
    has_answered = False  # what never did has most likely a wrong address
    copies_parts = False  # whether an object may be made of parts of others, on the store's side

    def __init__(self, url: StoreUrl, fs: Any) -> None:
        self.url, self.fs = url, fs
        self.root = str(fs._strip_protocol(url.text)).rstrip("/")
        self._is_http = url.scheme in ("http", "https")

    def where(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.url.text}/{name}"

    def path(self, name: str) -> str:
        """What the client calls a file."""
        return f"{self.root}/{quote(name) if self._is_http else name}"

    def listing(self) -> dict[str, Entry]:
        """All objects below, by name, sorted.

        Raises:
            StoreError: they cannot be listed.
            CheckpointError: names that no checkpoint has.
        """
        found = self.attempt(self.url.text, self._find)
        if len(found) > MOST_NAMES:
            raise CheckpointError(
                f"more than {MOST_NAMES} files, which no checkpoint has", where=self.url.text
            )
        names = {self._name(path): path for path in found if path.startswith(f"{self.root}/")}
        named = {name: path for name, path in sorted(names.items()) if name and "?" not in name}
        facts = {name: found[path] for name, path in named.items()}
        unsized = [name for name in named if facts[name].get("size") is None]
        with ThreadPoolExecutor(IN_FLIGHT) as pool:  # many at once: of web pages only links are known
            facts |= zip(unsized, pool.map(lambda name: self._info(named[name]), unsized), strict=True)
        self._check(named)
        return {name: self._entry(name, path, facts[name]) for name, path in named.items()}

    def _find(self) -> Mapping[str, Any]:
        found: Any
        try:
            if self._is_http:
                found = crawled(self.fs, self.root, self.url.text)
            else:
                found = self.fs.find(self.root, detail=True)
        except FileNotFoundError:
            return {}
        if not isinstance(found, dict):  # how some say that it is an object
            return {}
        return {
            path: info for path, info in found.items() if info.get("type") != "directory" and path[-1:] != "/"
        }

    def _name(self, path: str) -> str:
        name = path[len(self.root) + 1 :]
        return unquote(name.partition("?")[0] if "?" not in name else "") if self._is_http else name

    def _info(self, path: str) -> Any:
        return self.attempt(path, lambda: self.fs.info(path))

    def _check(self, names: Iterable[str]) -> None:
        folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
        for name in names:
            why = "is no plain path" if not is_plain_relative(name) else "is a file, and a folder as well"
            if not is_plain_relative(name) or name in folders:
                raise CheckpointError(
                    f"it lists {name!r:.300}, which {why}", where=self.url.text, fix="rename it"
                )

    def _entry(self, name: str, path: str, info: Mapping[str, Any]) -> Entry:
        size, said = (
            info.get("size"),
            next((f"{k}={_plain(info[k])}" for k in _IDENTITIES if info.get(k)), ""),
        )
        if not isinstance(size, int) or info.get("partial") is False:
            what = "the server does not say how long it is, or has no byte ranges"
            raise StoreError(
                what, where=self.where(name), fix="download it, and point SOURCE at the directory"
            )
        return Entry(name, path, size, f"{size} bytes, {said or 'nothing else is known'}")

    def still(self, entry: Entry) -> None:
        """Raise :class:`StoreError` where an object is not, or no longer, the one that was listed."""
        with store_errors(self.where(entry.name)):
            try:
                info = self.fs.info(entry.path)
            except FileNotFoundError:
                info = {"size": -1}
        if self._entry(entry.name, entry.path, info) != entry:
            raise changed_object(self.where(entry.name))

    def fetch(
        self, entry: Entry, begin: int, end: int, buffer: memoryview, is_given_up: Callable[[], bool]
    ) -> None:
        """Fill ``buffer`` with the bytes ``begin:end`` of an object.

        Raises:
            StoreError: they do not come, or are not as many; the object was changed.
        """
        data = self.attempt(self.where(entry.name), lambda: self._checked(entry, begin, end), is_given_up)
        if data is not None:
            buffer[:] = data

    def _checked(self, entry: Entry, begin: int, end: int) -> bytes:
        try:
            data = self._get(entry, begin, end)
        except FileNotFoundError as error:  # it was listed
            raise changed_object(self.where(entry.name)) from error
        if len(data) != end - begin:
            raise ShortAnswerError(f"{end - begin} bytes were asked for, and {len(data)} came")
        return data

    def _get(self, entry: Entry, begin: int, end: int) -> bytes:
        if not self._is_http:
            return bytes(self.fs.cat_file(entry.path, start=begin, end=end))
        # This way an answer that is the whole file is refused by its headers, and never in memory.
        with self.fs.open(entry.path, "rb", size=entry.size, cache_type="none") as file:
            file.seek(begin)
            return bytes(file.read(end - begin))

    def stat(self, name: str) -> Entry:
        """An object as it is now.

        Raises:
            StoreError: there is none, or it cannot be told.
        """
        path = self.path(name)
        return self._entry(name, path, self._info(path))

    def read(self, name: str) -> bytes | None:
        """All of a small object; None where there is none of that name."""
        try:
            return self.attempt(self.where(name), lambda: bytes(self.fs.cat_file(self.path(name))))
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def put(self, name: str, data: bytes, *, is_new: bool = False) -> None:
        """Make, or replace, a small object, which is there whole or not at all.

        Raises:
            StoreError: it cannot be made; with ``is_new``, also where somebody has made it already.
        """
        where, path = self.where(name), self.path(name)
        if is_new:
            try:
                self.attempt(where, lambda: self.fs.pipe_file(path, data, mode="create"))
                return
            except StoreError as error:
                if not isinstance(error.__cause__, Exception) or not says(
                    error.__cause__, ("NotImplemented",)
                ):
                    raise
        self.attempt(where, lambda: self.fs.pipe_file(path, data))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, one after the other; one that is gone already is no failure."""
        for name in names:
            with store_errors(self.where(name)), suppress(FileNotFoundError):
                self.fs.rm_file(self.path(name))

    def copies_from(self, other: Store) -> bool:
        """Whether the store copies whole objects of ``other`` on its own side."""
        return self.url.scheme == other.url.scheme and self.url.scheme in _COPYING

    def assemble(
        self, name: str, spans: Sequence[Part], read: Read, progress: Callable[[int], None]
    ) -> Entry:
        """Make one object, which is there whole or not at all; a few parts of it are in memory.

        Args:
            name: the object.
            spans: all its bytes in order, and which of them another object of the store has.
            read: gives the bytes of a range that is sent; it is asked in order, and may raise to stop it.
            progress: hears of bytes.

        Raises:
            StoreError: the store does not take it, or what it copies was changed.
        """
        where, path = self.where(name), self.path(name)
        size = spans[-1].end if spans else 0
        if len(spans) == 1 and (whole := spans[0].source) is not None and whole.size == size:
            self._copy(where, whole, path)
            progress(size)
        elif size <= PIECE:
            self.put(name, bytes(read(0, size)) if size else b"")
            progress(size)
        else:
            self._stream(where, path, size, read, progress)
        made = self.stat(name)
        if made.size != size:
            raise StoreError(f"it has {made.size} bytes, and {size} were sent", where=where, fix="run again")
        return made

    def _copy(self, where: str, source: Entry, path: str) -> None:
        """Let the store copy a whole object."""
        self.attempt(where, lambda: self.fs.cp_file(source.path, path))
        self.still(source)

    def _stream(self, where: str, path: str, size: int, read: Read, progress: Callable[[int], None]) -> None:
        with store_errors(where):
            file = self.fs.open(path, "wb", block_size=PIECE)
            try:
                for begin in range(0, size, PIECE):
                    end = min(begin + PIECE, size)
                    file.write(bytes(read(begin, end)))
                    progress(end - begin)
                file.close()
            except BaseException:
                # Closing it would make an object of what came so far.
                with suppress(Exception):
                    file.discard()
                with suppress(AttributeError):
                    file.closed = True
                raise

    def abort_left(self) -> None:
        """Let go of what dead runs left unseen, where the store keeps that; it forgets it by itself elsewhere."""

    def attempt(
        self, where: str, call: Callable[[], T], is_given_up: Callable[[], bool] = lambda: False
    ) -> T:
        """What ``call`` returns; it is made again where that may help; None where nobody waits for it any more.

        Raises:
            StoreError: it failed.
        """
        with store_errors(where), nullcontext() if self.has_answered else waiting_for(where):
            for failures in range(1, self.tries + 1):
                try:
                    found = call()
                except Exception as error:
                    if has_changed(error):
                        raise changed_object(where) from error
                    is_dead = is_unreached(error) and not self.has_answered
                    if is_dead or failures == self.tries or not is_passing(error):
                        raise
                else:
                    self.has_answered = True
                    return found
                pause(_FIRST_WAIT * 2**failures / 2, is_given_up)
        raise AssertionError  # not reached


def _plain(said: Any) -> Any:
    """A time, however the client gives it."""
    return said.timestamp() if hasattr(said, "timestamp") else said


def open_store(url: StoreUrl) -> Store:
    """The folder at ``url``, through a client that remembers no listing.

    Raises:
        UsageError: nobody knows the scheme, or its client is not installed.
        StoreError: the client cannot be made.
    """
    import logging

    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    if is_own_process():
        logging.lastResort = None  # what clients log of each attempt; what comes of them is told here
    extra = EXTRAS.get(url.scheme)
    if extra is None and url.scheme not in known_implementations:
        what = f"no store is known for {url.scheme}://"
        raise UsageError(
            what, where=url.text, fix=f"known are {', '.join(f'{s}://' for s in EXTRAS)}, and fsspec's"
        )
    try:
        with store_errors(url.text):
            fs, _ = url_to_fs(url.text, use_listings_cache=False)
    except (ImportError, StoreError) as error:
        cause = error.__cause__ or error
        if not isinstance(cause, ImportError):
            raise
        fix = (
            f"pip install 'qkpatch[{extra}]'" if extra else str(known_implementations[url.scheme].get("err"))
        )
        what = f"the client of {url.text.partition(':')[0]}:// is not installed"
        raise UsageError(what, where=url.text, fix=fix) from error
    if url.scheme == "s3":
        from qkpatch.stores.s3 import S3Store

        return S3Store(url, fs)
    return Store(url, fs)
