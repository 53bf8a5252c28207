"""Edits without a copy: all new rows are computed into a patch file, and with the undo file there, go into SOURCE."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.cache import is_in_cache
from qkpatch.checkpoint.files import LocalOpenFile, os_errors, write_exact
from qkpatch.checkpoint.names import PART, UNDO, UNFINISHED
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.checkpoint.tree import source_file
from qkpatch.common.interrupts import signals_held, signals_let_through
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.errors import FileSystemError, UsageError, refuse_warnings
from qkpatch.output.destination import check_apart
from qkpatch.output.options import Digest, Writing
from qkpatch.output.space import free_bytes
from qkpatch.patches import undo
from qkpatch.patching.apply import check_run, done_manifest, editor_of, now
from qkpatch.patching.threads import Crew
from qkpatch.planning.manifest import Manifest, planned_manifest
from qkpatch.planning.memory import choose_threads
from qkpatch.planning.patch_file import (
    Record,
    patch_header,
    planned_rows,
    read_digest,
    read_patch,
    write_patch,
)
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.request import check_device_name


def make_patch(
    plan: EditPlan,
    file: Path | str | None = None,
    *,
    strict: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    observer: Observer = UNSEEN,
    editor: Any = None,
) -> Path:
    """Write no OUT but a patch file, whole or not at all: the planned rows' new bytes, and digests of both sides.

    Args:
        plan: of :func:`qkpatch.plan`; of a repository, only what the edit reads is fetched.
        file: which, not there yet; by default ``plan.default_name`` and ``.qkpatch``.
        strict: whether a warning is an error, and there is no file.
        device: as of :func:`qkpatch.apply`.
        threads: as of :func:`qkpatch.apply`.
        observer: hears of heads.
        editor: where new rows come from, if they are not to be computed; to be asked as an editor is.

    Raises:
        UsageError: it is there already, or lies in SOURCE; the plan is of a patch, or says how OUT is written.
        QKPatchError: as :func:`qkpatch.apply`.
    """
    path = Path(f"{plan.default_name}.qkpatch" if file is None else file)
    checkpoint, rows, heads = plan.model.checkpoint, planned_rows(plan), plan.settings.heads
    undo.check_absent(path)
    if not path.name.startswith(PART):  # of an edit in place
        check_apart(path, checkpoint)
    if plan.patch is not None or plan.max_shard_size is not None or plan.request.exclude is not None:
        what = "a patch file has the edited rows alone: no shards, no other files, no other patch"
        fix = "leave out --max-shard-size, --exclude and --patch; the first two go with --patch FILE -o OUT"
        raise UsageError(what, where="--patch-only", fix=fix)
    refuse_warnings(plan.warnings, strict=strict)
    check_device_name(device)
    n_threads = choose_threads(threads, plan.head_memory, len(checkpoint.tensors))
    check_run(plan, device, n_threads)
    checkpoint.check_still()
    held, places, size = {}, {}, 0  # where rows are in a file without a name, which a kill removes
    for name, ref in rows.items():
        held[name], places[ref.shard, ref.begin] = replace(ref, begin=size, end=size + ref.nbytes), size
        size += ref.nbytes
    if (free := free_bytes(path)) is not None and free < 2 * size:
        raise FileSystemError(f"{2 * size:,} bytes are needed, and {free:,} are free", where=str(path.parent))
    with Rooted(path.absolute().parent) as folder, ExitStack() as stack:
        with os_errors("create a file", folder.path):
            rows_file = stack.enter_context(tempfile.TemporaryFile(prefix=path.name, dir=folder.path))
        new = LocalOpenFile(rows_file.fileno(), str(folder.path))

        def write(shard: str, data: bytes | bytearray, begin: int) -> None:
            write_exact(new.fd, data, places[shard, begin], new.where)

        observer.begins("", 0, len(plan.edits) * len(heads))
        with Crew(n_threads) as crew:
            editor = editor or editor_of(plan, device)
            edited = dict(editor.edited(plan, checkpoint.opened, crew, write, observer))
        done = {t: (2 * [None], 2 * [None], edited[t]) for t in plan.edits}
        manifest = done_manifest(plan, editor, done)
        refuse_warnings(manifest.warnings, strict=strict)
        digests = {}
        for name, ref in rows.items():
            with checkpoint.opened(ref.shard, [(ref.begin, ref.end)]) as source:
                before = source.sha256(ref.begin, ref.end)
            digests[name] = before, new.sha256(held[name].begin, held[name].end)
        record = Record(digests, {t.query.name: read_digest(t, heads, checkpoint.opened) for t in plan.edits})
        checkpoint.check_still()
        parts = [(ref, new) for ref in held.values()]
        folder.create(path.name, lambda out: write_patch(out, parts, manifest, record))
        folder.sync()
    return path


def apply_in_place(
    plan: EditPlan, *, digest: Digest = Digest.edited, strict: bool = False, **how: Any
) -> Manifest:
    """Rewrite the planned rows of SOURCE itself, write ``SOURCE/qkpatch.json``, and return that manifest.

    First ``SOURCE/qkpatch.undo`` is on the disk, by which :func:`revert` leads back. What fails or interrupts this
    leaves SOURCE as it was; after a kill, :func:`revert` and plan again. Where this very edit was made in place
    before, nothing is done. ``strict`` and ``how`` (``device``, ``threads``, ``observer``): as of :func:`make_patch`.

    Raises:
        UsageError: SOURCE cannot be edited in place, or was already, by another edit.
        QKPatchError: as :func:`qkpatch.apply`.
    """
    root, checkpoint, started = check_in_place(plan), plan.model.checkpoint, now()
    if Writing(digest).digest is Digest.files:
        raise UsageError("digests of all files are those of a copy", where="--digest", fix="use -o OUT")
    refuse_warnings(plan.warnings, strict=strict)
    with signals_held(), undo.locked(root) as folder, ExitStack() as stack:
        if folder.status(UNDO) is not None:
            return _done(folder, plan)
        checkpoint.check_still()
        shards = stack.enter_context(undo.writable(folder, plan.edits_by_file))
        new = folder.path / f"{PART}.new"
        try:
            with signals_let_through():
                patch = plan.patch or read_patch(make_patch(plan, new, **how))
                refuse_warnings(patch.manifest.warnings, strict=strict)
                patch.check_source(plan)
                before = _digests(plan, shards, digest)
                checkpoint.check_still()
                times = _write_undo(folder, plan, patch.record, shards)
            folder.sync()
            undo.write_rows(shards, planned_rows(plan), patch, times)
            # SHA256SUMS of an edit before becomes untrue; SOURCE's own is one of its files.
            for name, kept in undo.SMALL.items() if checkpoint.previous_manifest is not None else ():
                undo.move(folder, name, kept)
            after, figures = _digests(plan, shards, digest), [patch.heads[t.query.name] for t in plan.edits]
            done = dict(zip(plan.edits, zip(before, after, figures, strict=True), strict=True))
            manifest = done_manifest(plan, editor_of(replace(plan, patch=patch), ""), done)
            manifest = manifest.telling(started=started, finished=now())
            manifest = replace(manifest, output=replace(manifest.output, digest=digest))
            folder.replace(MANIFEST_NAME, manifest.dumps().encode(), PART)
            undo.move(folder, UNFINISHED, UNDO)
        except BaseException:
            folder.discard(new.name)  # whose room the way back may need
            if folder.status(UNFINISHED) is not None:
                undo.restore(folder)
            raise
        finally:
            folder.discard(new.name)
    return manifest


def check_in_place(plan: EditPlan) -> Path:
    """The folder of a SOURCE that may be edited in place; raises :class:`UsageError` where it may not."""
    source, root = plan.model.source, plan.model.source.path
    if plan.max_shard_size is not None or plan.request.exclude is not None:
        why = "nothing is copied that --max-shard-size or --exclude could be of"
    elif root is None or source.kind == "hub" or is_in_cache(root):
        why = "it is in a store, on the Hub, or in the Hub cache, whose files others rely on"
    elif source.kind == "file":
        why = "it is one file, and its undo file belongs in the folder of a model"
    elif outside := plan.model.checkpoint.from_outside:
        why = f"{outside[0]} leads out of it by a link"
    elif any(file.original is None for file in plan.output.files.values()):
        why = "it lacks an index of its shards, which OUT would get"
    else:
        return root
    raise UsageError(f"SOURCE cannot be edited in place: {why}", where=source.name, fix="edit a copy: -o OUT")


@dataclass(frozen=True)
class Foreseen:
    """What :func:`apply_in_place` would do."""

    undo: Path
    undo_bytes: int  # what leads back, which stays
    room: int  # bytes that must be free while rows are written
    is_done: bool  # whether SOURCE has this very edit already


def foresee_in_place(plan: EditPlan) -> Foreseen:
    """What :func:`apply_in_place` would do; nothing is written.

    Raises:
        UsageError: as :func:`apply_in_place`.
    """
    root, rows = check_in_place(plan), planned_rows(plan)
    with Rooted(Path(os.path.realpath(root))) as folder:
        is_done = folder.status(UNDO) is not None and bool(_done(folder, plan))
        with undo.writable(folder, plan.edits_by_file):
            pass
    digest, time = "0" * 64, 10**18  # as long as any
    reads = {"config.json": digest, **{target.key.name: digest for target in plan.edits}}
    former = {**dict.fromkeys(plan.model.checkpoint.files, (time, time)), MANIFEST_NAME: (0, 0)}
    record = Record(dict.fromkeys(rows, (digest, digest)), reads, former)
    header, _ = patch_header(UNDO, rows.values(), planned_manifest(plan, ""), record)
    size = plan.edited_bytes
    return Foreseen(root / UNDO, len(header) + size, size if plan.patch else 2 * size, is_done)


def _done(folder: Rooted, plan: EditPlan) -> Manifest:
    """The manifest of the edit in place that was made, where that is this very one."""
    way_back, planned = undo.undo_in(folder), planned_manifest(plan, "")
    if (way_back.manifest.edit, way_back.manifest.recipe) != (planned.edit, planned.recipe):
        what = f"it has an edit in place, and {UNDO} leads back from that alone"
        fix = "qkpatch revert SOURCE first; or edit a copy: -o OUT"
        raise UsageError(what, where=str(folder.path), fix=fix)
    undo.check_as_left(folder)
    for name, digest in _reads(folder, plan).items():
        if way_back.record.reads.get(name) != digest:
            what = f"what its edit in place was computed from has changed since: {name}, or what goes with it"
            fix = "qkpatch revert SOURCE takes back the edited rows alone; then make the edit anew"
            raise UsageError(what, where=str(folder.path), fix=fix)
    with folder.reading(MANIFEST_NAME) as opened:
        return Manifest.loads(opened.whole(), opened.where).telling(already_done=True)


def _reads(folder: Rooted, plan: EditPlan) -> dict[str, str]:
    """Digests of what the edit was computed from, and leaves."""

    def opened(name: str, _: Any = ()) -> AbstractContextManager[LocalOpenFile]:
        return source_file(folder.path / name, name).open()

    with opened("config.json") as config:
        found = {"config.json": config.sha256(0, config.size)}
    return found | {t.key.name: read_digest(t, plan.settings.heads, opened, is_done=True) for t in plan.edits}


def _digests(plan: EditPlan, shards: undo.Shards, digest: Digest) -> list[list[str | None]]:
    """SHA-256 of each written tensor as it is now, by edit."""
    if digest is Digest.none:
        return [[None] * len(target.written) for target in plan.edits]
    return [[shards[ref.shard].sha256(ref.begin, ref.end) for ref in t.written] for t in plan.edits]


def _write_undo(folder: Rooted, plan: EditPlan, record: Record, shards: undo.Shards) -> dict[str, int]:
    """Put what leads back into the folder, and on the disk; returns what will be the shards' times."""
    rows = [(ref, shards[ref.shard]) for ref in planned_rows(plan).values()]
    digests = {r.name: (record.digests[r.name][1], shard.sha256(r.begin, r.end)) for r, shard in rows}
    # Chosen now, to be known later; even seconds, which every file system keeps.
    times = dict.fromkeys(shards, time.time_ns() // (2 * 10**9) * 2 * 10**9)
    found = {name: folder.status(name) for name in plan.model.checkpoint.files}
    stay = {name: was.st_mtime_ns for name, was in found.items() if was and stat.S_ISREG(was.st_mode)}
    former = {name: (before, times.get(name, before)) for name, before in stay.items()}
    former[MANIFEST_NAME] = int(folder.status(MANIFEST_NAME) is not None), 0
    said = Record(digests, _reads(folder, plan), former)
    mode = min((os.fstat(file.fd).st_mode & 0o777 for file in shards.values()), default=0o600) | 0o200

    def write(out: LocalOpenFile) -> None:
        with suppress(OSError):  # a file system without modes
            os.fchmod(out.fd, mode)  # for whoever may read the rows where they come from
        write_patch(out, rows, planned_manifest(plan, ""), said)

    folder.replace(UNFINISHED, write, PART)
    return times
