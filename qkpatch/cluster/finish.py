"""``finish``: all parts are there and as they were left, and their files become OUT; it may die, and run again.

Parts stay as they are until OUT is published: files are linked into a directory beside them, or copied where the file
system has no links, and that becomes OUT as the output of a single run does.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from qkpatch.checkpoint.files import changed, synced
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import PresentHere
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.checkpoint.tree import source_file
from qkpatch.cluster.part import is_as_written, read_part
from qkpatch.cluster.place import AGREED, as_agreed, opened, place_of, read_manifest
from qkpatch.common.interrupts import signals_held, signals_let_through
from qkpatch.common.number_ranges import format_ranges
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.common.part import Part
from qkpatch.common.text import Warned, warned
from qkpatch.compare.verify import recorded
from qkpatch.errors import CheckpointError, FileSystemError, QKPatchError, UsageError, refuse_warnings
from qkpatch.model.locate import out_url
from qkpatch.output.destination import destination_path, occupied
from qkpatch.output.layout import OutputFile
from qkpatch.output.options import Digest
from qkpatch.output.passage import copy_range
from qkpatch.output.staged_files import StagedFiles
from qkpatch.output.staging import Staging, clear_shared
from qkpatch.patching.apply import now, numerical_warnings
from qkpatch.patching.threads import Crew
from qkpatch.planning.blocks import RunBlock
from qkpatch.planning.manifest import FileRecord, Manifest
from qkpatch.planning.memory import choose_threads
from qkpatch.planning.sha256sums import sums_text

Parts = Mapping[int, Manifest]


def finish(out: str | Path, *, strict: bool = False, observer: Observer = UNSEEN) -> Manifest:
    """Publish what the parts of ``out`` have written, and return its manifest: that of a single run, but for ``run``.

    Every digest that parts have recorded is taken again first; of files without one, size and mtime are compared.

    Args:
        out: as of :func:`qkpatch.apply` with a ``part``, a directory or a URL.
        strict: a warning is an error, and there is no OUT.
        observer: hears of bytes.

    Raises:
        UsageError: parts are missing; OUT is another, or none was begun.
        CheckpointError: a part is not as it was left.
        FileSystemError: reading, linking or publishing fails.
        WarnedError: there is a warning, and ``strict``.
    """
    if (url := out_url(out)) is not None:
        from qkpatch.cluster.in_store import finish_in_store

        return finish_in_store(url, strict=strict, observer=observer)
    out, place = destination_path(Path(out)), place_of(Path(out))
    with Rooted(out.parent) as parent:
        has_parts = parent.status(f"{place.name}/{AGREED}") is not None
        if not has_parts and not os.path.lexists(out / MANIFEST_NAME):
            raise no_part(str(out))
        agreed = manifest = None
        try:
            if has_parts:
                with opened(parent, place) as room:
                    agreed = read_manifest(room, AGREED)
                    if not _is_there(out):
                        read, is_done = partial(read_part, room), partial(_has, room)
                        parts = all_parts(agreed, str(room.path), str(out), is_done, read, observer)
                        manifest = _publish(out, parent, room, agreed, parts, strict)
        except QKPatchError:
            if not _is_there(out):  # else another run of this was faster
                raise
        manifest = manifest or _done(out, agreed)
        weaker = [*(manifest.run.weaker or ()), *_clear(out, parent, place)]
    return manifest.telling(weaker=tuple(weaker) or None)


def _clear(out: Path, parent: Rooted, place: Path) -> Iterator[Warned]:
    """Remove what the parts of a published OUT left; what is said where some of it stays."""
    try:
        for path in (out, place):
            clear_shared(parent, path)
        if parent.status(place.name) is not None:
            with opened(parent, place):
                parent.remove_tree(place.name)
    except FileSystemError as error:
        if parent.status(place.name) is not None:
            yield warned(f"what the parts left stays until `qkpatch finish` is run again: {error}")


def no_part(out: str) -> UsageError:
    """What is said where there is nothing to finish."""
    fix = "write its parts first: qkpatch apply SOURCE -o OUT --part 1/8, ...; what ends a sweep, or an "
    fix += "evaluation, is its own command, without --part"
    return UsageError("no part of an OUT was written there", where=out, fix=fix)


def _has(room: Rooted, number: int) -> bool:
    return room.status(str(number)) is not None


def _is_there(out: Path) -> bool:
    return os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir()))


def _done(out: Path, agreed: Manifest | None) -> Manifest:
    """The manifest in OUT, which is what was agreed on."""
    with Rooted(out) as root:
        manifest = recorded(PresentHere(root))
    if agreed is not None and not is_of(manifest, agreed):
        raise occupied(out, MANIFEST_NAME, "it is of another plan than the parts", overwrite=False)
    return manifest.telling(already_done=True)


def is_of(manifest: Manifest, agreed: Manifest) -> bool:
    """Whether an OUT is what was agreed on."""
    return replace(as_agreed(manifest, agreed), run=agreed.run).dumps() == agreed.dumps()


def all_parts(
    agreed: Manifest,
    place: str,
    out: str,
    is_done: Callable[[int], bool],
    read: Callable[[Part, Manifest, Observer], Manifest | None],
    observer: Observer,
) -> Parts:
    """The manifest of each part, every one of which ``is_done`` and, as it is ``read``, as it was left."""
    try:
        count = Part.of((1, agreed.run.further.get("parts", 0))).total
    except UsageError as error:
        what = "it does not say how many parts there are"
        fix = f"remove {place}, and run all parts again"
        raise CheckpointError(what, where=f"{place}/{AGREED}", fix=fix) from error
    observer.begins("check", sum(file.size for file in agreed.files), 0)
    numbers = range(1, count + 1)
    if missing := [number for number in numbers if not is_done(number)]:
        what = f"of its {count} parts these are not done: {format_ranges(missing)}"
        fix = f"run what is missing as before, with --part {missing[0]}/{count}; then finish again"
        raise UsageError(what, where=out, fix=fix)
    with Crew(min(choose_threads(None, 0, 0), count)) as crew:
        found = list(
            crew.map(lambda part: read(part, agreed, observer), [Part(number, count) for number in numbers])
        )
    return {number: part for number, part in zip(numbers, found, strict=True) if part is not None}


def whole(agreed: Manifest, parts: Parts) -> Manifest:
    """The manifest of OUT."""
    edits = {edit.tensor: edit for part in parts.values() for edit in part.edits}
    files = {file.name: file for part in parts.values() for file in part.files}
    is_whole = len(edits) == len(agreed.edits) and len(files) == len(agreed.files)
    if not is_whole or not all(edit.heads for edit in edits.values()):
        raise UsageError("the parts together are not the whole", fix="run all parts again, with another -o")
    ordered = tuple(edits[edit.tensor] for edit in agreed.edits)
    runs = [part.run for part in parts.values()]
    checked = {part.source.checked for part in parts.values()}
    how: Counter[str] = sum((Counter(run.copied_by) for run in runs), Counter())
    return replace(
        agreed,
        source=replace(agreed.source, checked=None if None in checked else all(checked)),
        edits=ordered,
        files=tuple(files[file.name] for file in agreed.files),
        warnings=(*agreed.warnings, *numerical_warnings(ordered, agreed.edit.rule_of)),
        run=RunBlock(min(run.started or "" for run in runs), now(), how, agreed.run.stack),
    )


def _publish(
    out: Path, parent: Rooted, room: Rooted, agreed: Manifest, parts: Parts, strict: bool
) -> Manifest:
    """Make the files of the parts OUT; its manifest."""
    manifest = whole(agreed, parts)
    with _part(room, 1) as one:  # each part has made all directories
        mode, below = os.fstat(one.fd).st_mode & 0o777, [*one.walk()]
    directories = {name: status.st_mode & 0o777 for name, status in below if stat.S_ISDIR(status.st_mode)}
    with signals_held(), Staging(out, None, mode, parent) as staging:
        staged = StagedFiles(staging.files)
        with signals_let_through():
            staged.make_directories([*directories.items()])
            for number, part in parts.items():
                with _part(room, number) as root:
                    for file in part.files:
                        _take(root, file, part, staged)
            refuse_warnings((*manifest.warnings, *staging.lacks), strict=strict)
            record = manifest.dumps().encode()
            if manifest.output.digest is Digest.files:
                staged.write_new(SUMS_NAME, sums_text(manifest, record).encode())
            staged.write_new(MANIFEST_NAME, record)
            staged.check([*directories])
            staging.publish([*directories], None)
    return manifest.telling(weaker=tuple(staging.lacks) or None)


def _part(room: Rooted, number: int) -> Rooted:
    return Rooted(room.path / str(number), within=room, name=str(number))


def _take(root: Rooted, file: FileRecord, part: Manifest, staged: StagedFiles) -> None:
    """Make a part's file one of OUT's, and leave it to the part."""
    found = source_file(root.path / file.name, file.name)
    if not is_as_written(root, file, part):
        raise changed("the part's file changed while qkpatch was running", found.where)
    if staged.link(found, file.name):
        return
    fd = staged.create(OutputFile.copy_of(found))
    try:
        with found.open() as source:
            copy_range(source, fd, 0, file.size, lambda _: None, where=staged.where(file.name))
        synced(fd, staged.where(file.name))
        staged.is_done(file.name, os.fstat(fd))
    finally:
        os.close(fd)
