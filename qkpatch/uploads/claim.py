"""``Claim``: the object that says whose an unfinished OUT is and what of it is done; first to come, last to go.

A store has no locks, and clocks of machines differ: what counts is the number of the run that is in the claim now.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock

from qkpatch.checkpoint.names import CLAIM
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.checkpoint.tree import is_plain_relative
from qkpatch.common.json_text import load_json
from qkpatch.common.typed_json import as_json, from_json
from qkpatch.errors import QKPatchError, StoreError, UsageError
from qkpatch.stores.store import Entry, Store

_NOTED = 1 << 20  # bytes; smaller objects are made again, which costs less than to note them


@dataclass(frozen=True)
class Done:
    """An object that is whole."""

    identity: str
    size: int
    sha256: str | None  # where digests of files are wanted
    rows: str | None  # SHA-256 of the rows that the edit wrote: another machine may round them otherwise


@dataclass(frozen=True)
class _Said:
    """A claim as it is written."""

    fingerprint: str
    run: str
    files: tuple[str, ...]
    done: Mapping[str, Done]


@dataclass
class Claim:
    """A claim as it was read, or made."""

    store: Store
    fingerprint: str
    files: tuple[str, ...]  # all that OUT will have
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    done: dict[str, Done] = field(default_factory=dict)
    is_lost: bool = False  # whether another run has taken it, or OUT may be whole: then nothing is removed
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def found(cls, store: Store) -> Claim | None:
        """What another run left, or is at; None where there is none.

        Raises:
            UsageError: it is none of ours.
        """
        raw = store.read(CLAIM)
        if raw is None:
            return None
        try:
            said: _Said = from_json(_Said, load_json(raw, CLAIM, unique=True))
            if all(map(is_plain_relative, said.files)):
                return cls(store, said.fingerprint, said.files, said.run, {**said.done})
        except (QKPatchError, ValueError):
            pass
        what = f"{CLAIM} is none that qkpatch wrote"
        raise UsageError(what, where=store.url.text, fix="choose another -o")

    def make(self) -> None:
        """Put it where nobody's is.

        Raises:
            StoreError: somebody's is there, or the store takes nothing.
        """
        try:
            self.store.put(CLAIM, self._dumps(), is_new=True)
        except StoreError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
        self.check()

    def take_over(self, found: Claim) -> None:
        """Put it in place of a dead run's, with what that had done."""
        self.done |= found.done
        self.store.put(CLAIM, self._dumps())
        self.check()

    def check(self) -> None:
        """Raise :class:`StoreError` where another run's claim is there."""
        now = Claim.found(self.store)
        if now is None or now.run != self.run:
            self.is_lost = True
            what = "another run has claimed this OUT, or removed the claim of this one; this one stops"
            raise StoreError(
                what, where=self.store.url.text, fix="one run at a time; then go on with --resume"
            )

    def note(self, name: str, done: Done) -> None:
        """Say that an object is whole, unless it is a small one."""
        if done.size < _NOTED:
            return
        with self._lock:
            self.check()
            self.done[name] = done
            self.store.put(CLAIM, self._dumps())

    def state(self, name: str, listed: Mapping[str, Entry]) -> Done | None:
        """What is noted of an object, where it is still that one."""
        done, entry = self.done.get(name), listed.get(name)
        return done if done and entry and (entry.identity, entry.size) == (done.identity, done.size) else None

    def check_made(self, made: Mapping[str, Entry]) -> None:
        """Raise :class:`StoreError` where what is in OUT is not just what this run has made."""
        self.check()
        now = self.store.listing()
        for name in sorted({*made, *now} - {CLAIM}):
            if name not in made or now.get(name) != made[name]:
                what = "an object of the unfinished OUT is gone, or is not the one that this run made"
                raise StoreError(what, where=self.store.where(name), fix="is another program writing there?")

    def publish(self, record: bytes) -> None:
        """Put the manifest, the last act: from here on OUT is whole, whatever comes."""
        self.is_lost = True
        try:
            self.store.put(MANIFEST_NAME, record, is_new=True)
        except StoreError:
            if self.store.read(MANIFEST_NAME) != record:  # its answer alone was lost
                raise
        with suppress(StoreError):
            self.release()

    def release(self) -> None:
        """Take it away: OUT is whole, or nothing is left of it."""
        self.store.remove([CLAIM])

    def remove_all(self, listed: Collection[str]) -> None:
        """Remove what runs with this claim have made, and at last the claim."""
        self.store.abort_left()
        made = {*self.files, SUMS_NAME} - {CLAIM, MANIFEST_NAME}
        self.store.remove(sorted(made & {*listed}))
        self.release()

    def _dumps(self) -> bytes:
        said = _Said(self.fingerprint, self.run, self.files, self.done)
        return json.dumps(as_json(said), indent=1).encode()
