"""Parts of an OUT in a store: each an OUT by itself in ``.OUT.qkpatch-parts`` beside it, which the store joins.

What parts agree on is ``plan.json`` there, and part ``i`` is the folder ``i``, made as any OUT in a store: its manifest
last, and gone on with after a kill. ``finish`` has the store copy all objects to OUT, what loaders begin with at the
end, then the manifest; what parts left goes when OUT is whole, ``plan.json`` last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from qkpatch.checkpoint.names import CLAIM
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.checkpoint.tree import SourceFile
from qkpatch.cluster.finish import Parts, all_parts, is_of, no_part, whole
from qkpatch.cluster.part import Left
from qkpatch.cluster.place import AGREED, agreement, check_same
from qkpatch.cluster.share import share_of
from qkpatch.common.interrupts import signals_held, signals_let_through
from qkpatch.common.observer import Observer
from qkpatch.common.part import Part
from qkpatch.compare.overwrite import already_done
from qkpatch.compare.verify import recorded
from qkpatch.errors import CheckpointError, StoreError, UsageError, refuse_warnings
from qkpatch.output.options import Digest, Writing
from qkpatch.patching.apply import check_run, editor_of
from qkpatch.planning.manifest import FileRecord, Manifest
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.sha256sums import sums_text
from qkpatch.stores.parts import Part as Bytes
from qkpatch.stores.present import PresentInStore
from qkpatch.stores.store import Entry, Store, open_store
from qkpatch.stores.url import StoreUrl
from qkpatch.uploads.apply import check_free, check_url, claimed, fetched, into_store
from qkpatch.uploads.claim import Claim, Done
from qkpatch.uploads.objects import lateness


def place_in_store(out: StoreUrl) -> StoreUrl:
    """The folder that parts of ``out`` share.

    Raises:
        UsageError: OUT is a whole bucket, beside which there is nothing.
    """
    above, _, name = out.text.rpartition("/")
    place = StoreUrl.parse(f"{above}/.{name}.qkpatch-parts") if out.name != out.place else None
    if place is None:
        what = "parts wait in a folder beside OUT, and beside a bucket there is none"
        raise UsageError(what, where=out.text, fix="name a folder of it")
    return place


def apply_part_in_store(
    plan: EditPlan,
    out: StoreUrl,
    part: Part,
    *,
    download: Callable[[EditPlan], EditPlan] | None,
    observer: Observer,
    device: str,
    threads: int,
    writing: Writing,
) -> Manifest:
    """Write a part of ``out``, and return the manifest of its share; ``run.already_done`` where it was there.

    Raises:
        UsageError: parts of another plan are there; OUT is there, and is another.
        QKPatchError: as :func:`into_store`.
    """
    check_url(out, plan.model.source.text, writing)
    place = place_in_store(out)
    if open_store(out).read(MANIFEST_NAME) is not None:
        return already_done(PresentInStore(out), plan, writing, observer)
    check_run(plan, device, threads)
    plan, editor = fetched(plan, download), editor_of(plan, device)
    agreed = agreement(plan, part.total, str(editor.device), editor.tool, editor.stack, writing)
    room = open_store(place)
    if (raw := room.read(AGREED)) is None:
        try:
            room.put(AGREED, agreed.dumps().encode(), is_new=True)
        except StoreError as error:
            if not isinstance(error.__cause__, FileExistsError):  # another part was faster
                raise
        raw = room.read(AGREED) or b""
    check_same(Manifest.loads(raw, room.where(AGREED)), agreed, out.text, place.text)
    try:
        done = _read_part(place, part, agreed, observer)
    except CheckpointError:  # damaged: it is made anew
        done = None
        _remove(open_store(_folder(place, part)), lambda name: name != MANIFEST_NAME)
    if done is not None:
        return done
    said = {"part": part.number, **agreed.run.further}
    how: dict[str, Any] = {"download": download, "observer": observer, "device": device, "threads": threads}
    # What a run before has left is gone on with: any part may die.
    writing = replace(writing, resume=True)
    return into_store(share_of(plan, part), _folder(place, part), writing=writing, part=said, **how)


def finish_in_store(out: StoreUrl, *, strict: bool, observer: Observer) -> Manifest:
    """As :func:`qkpatch.cluster.finish.finish`, in a store.

    Raises:
        UsageError: parts are missing; OUT is another, or none was begun.
        CheckpointError: a part is not as it was left.
        StoreError: the store does not give, copy or take something; another run has claimed OUT.
        WarnedError: there is a warning, and ``strict``.
    """
    out.check_writable()
    store, place = open_store(out), place_in_store(out)
    room = open_store(place)
    raw, is_there = room.read(AGREED), store.read(MANIFEST_NAME) is not None
    if raw is None and not is_there:
        raise no_part(out.text)
    agreed = None if raw is None else Manifest.loads(raw, room.where(AGREED))
    if agreed is not None and not is_there:
        read, listed = partial(_read_part, place), room.listing()
        parts = all_parts(
            agreed, place.text, out.text, lambda n: f"{n}/{MANIFEST_NAME}" in listed, read, observer
        )
        manifest = _publish(store, room, agreed, parts, strict, observer)
    else:
        manifest = recorded(PresentInStore(out)).telling(already_done=True)
        if agreed is not None and not is_of(manifest, agreed):
            what = "there is an OUT that is of another plan than the parts"
            raise UsageError(what, where=out.text, fix="choose another -o, or remove it yourself")
        store.remove([CLAIM])  # of a run that was killed when OUT was whole
    _remove(room, lambda name: name == AGREED)
    return manifest


def _folder(place: StoreUrl, part: Part) -> StoreUrl:
    return replace(place, place=f"{place.place}/{part.number}", text=f"{place.text}/{part.number}")


def _remove(store: Store, is_late: Callable[[str], bool]) -> None:
    """Remove all that is there, what ``is_late`` after the rest."""
    store.abort_left()
    store.remove(sorted(store.listing(), key=is_late))


def _read_part(place: StoreUrl, part: Part, agreed: Manifest, observer: Observer) -> Manifest | None:
    """As :func:`qkpatch.cluster.part.read_part`; of files without a digest, what the store says of them is compared."""
    folder = _folder(place, part)
    if open_store(folder).read(MANIFEST_NAME) is None:
        return None
    present = PresentInStore(folder)
    manifest = recorded(present)
    said = manifest.run.further.get("written")
    written = said if isinstance(said, dict) else {}

    def is_as_written(file: FileRecord) -> bool:
        found = present.files.get(file.name)
        as_written = (file.size, written.get(file.name))
        return isinstance(found, SourceFile) and (found.size, found.content) == as_written

    left = Left(folder.text, {*present.files} - {CLAIM}, is_as_written, present.open)
    return left.checked(manifest, part, agreed, observer)


def _publish(
    store: Store, room: Store, agreed: Manifest, parts: Parts, strict: bool, observer: Observer
) -> Manifest:
    """Have the objects of the parts copied to OUT; its manifest."""
    manifest = whole(agreed, parts)
    refuse_warnings(manifest.warnings, strict=strict)
    fingerprint = hashlib.sha256(agreed.dumps().encode()).hexdigest()
    claim = Claim(store, fingerprint, tuple(file.name for file in manifest.files))
    found, there = Claim.found(store), store.listing()
    if found is None:
        check_free(store.url, there)
    elif found.fingerprint != fingerprint:
        what = "an OUT that these parts are not of was not finished, or is being written by another run"
        raise UsageError(what, where=store.url.text, fix="end it, or remove it yourself")
    observer.begins("join", sum(file.size for file in manifest.files), 0)
    left, made = room.listing(), dict[str, Entry]()
    files = [(number, file) for number, part in parts.items() for file in part.files]
    files.sort(key=lambda one: (not one[1].name.endswith(".safetensors"), *lateness(one[1].name)))
    with signals_held(), claimed(claim, found, Writing(resume=True)):
        with signals_let_through():
            for number, file in files:
                claim.check()
                if claim.state(file.name, there) is None:
                    entry = left[f"{number}/{file.name}"]
                    made[file.name] = _copied(store, room, file, entry, observer.copied)
                    claim.note(file.name, Done(made[file.name].identity, file.size, file.sha256, None))
                else:
                    made[file.name] = there[file.name]
                    observer.copied(file.size)
            record = manifest.dumps().encode()
            if manifest.output.digest is Digest.files:
                store.put(SUMS_NAME, sums_text(manifest, record).encode())
                made[SUMS_NAME] = store.stat(SUMS_NAME)
            _check_left(room, left)
            claim.check_made(made)
        claim.publish(record)
    return manifest


def _copied(
    store: Store, room: Store, file: FileRecord, entry: Entry, progress: Callable[[int], None]
) -> Entry:
    """One object of OUT, by the store itself where it can."""

    def read(begin: int, end: int) -> bytearray:
        buffer = bytearray(end - begin)
        room.fetch(entry, begin, end, memoryview(buffer), lambda: False)
        return buffer

    source = entry if store.copies_from(room) else None
    return store.assemble(file.name, [Bytes(0, file.size, source)] if file.size else [], read, progress)


def _check_left(room: Store, left: Mapping[str, Entry]) -> None:
    """Raise :class:`StoreError` where what was copied is not what was checked."""
    now = room.listing()
    if changed := next((name for name in left if now.get(name) != left[name]), None):
        what = "what a part left changed while it was copied"
        raise StoreError(what, where=room.where(changed), fix="finish again; it says which part to run again")
