"""``Replaced``: proof that what ``--overwrite`` is about to replace is what qkpatch wrote, and still is at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from qkpatch.checkpoint.files import Progress
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import Present
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.common.json_text import canonical_json, load_json
from qkpatch.common.observer import Observer
from qkpatch.compare.byte_by_byte import Mismatch
from qkpatch.compare.recorded import sums_mismatches
from qkpatch.compare.verify import check, recorded
from qkpatch.errors import CheckpointError, FileSystemError
from qkpatch.output.destination import Replaced, destination_path, foreign
from qkpatch.output.options import Writing
from qkpatch.planning.manifest import Manifest
from qkpatch.planning.plan import EditPlan
from qkpatch.recipes.catalogue import shipped_recipes


def replaceable(out: Path, plan: EditPlan, writing: Writing, observer: Observer) -> Replaced | None:
    """What ``plan`` will replace; None where there is nothing, or nothing is to be replaced.

    Every file whose digest is recorded has it. What else there is, is what the recorded edit makes of this SOURCE, by
    ``verify``, and the edited tensors have their digests. ``writing.force`` takes it as it is.

    Raises:
        UsageError: OUT holds something else.
    """
    if not writing.overwrite or not out.is_dir():
        return None
    with Rooted(out) as root:
        present = Present(root)
        if not present.identities:
            return None
        observer.begins("look at OUT:", present.size, 0)
        replaced = Replaced(destination_path(out), present.identities)
        try:
            first = None if writing.force else next(_foreign(present, plan, observer), None)
        except FileSystemError:
            replaced.check()  # which says so, where another run has replaced OUT meanwhile
            raise
    if first is not None:
        raise foreign(out, f"{first.where}, which is not as qkpatch left it: {first.what}")
    return replaced


def _foreign(present: Present, plan: EditPlan, observer: Observer) -> Iterator[Mismatch]:
    try:
        manifest = recorded(present)
    except CheckpointError as error:
        yield Mismatch(MANIFEST_NAME, str(error))
        return
    known = {str(parent) for file in manifest.files for parent in PurePosixPath(file.name).parents}
    for name in present.directories:
        if name not in known | plan.model.checkpoint.directories.keys():
            yield Mismatch(name, "is a directory that qkpatch did not make")
    raw = present.read(MANIFEST_NAME)
    # Not `manifest.dumps()`, which gives an older manifest the keys that it did not have.
    if canonical_json(load_json(raw, MANIFEST_NAME)).encode() != raw:
        yield Mismatch(MANIFEST_NAME, "somebody has edited it")
    elif all(file.sha256 is not None for file in manifest.files):
        yield from _by_digest(manifest, present, observer.copied)
    else:
        source = plan.model.source
        where = str(source.path) if source.path is not None else f"{source.name}@{source.commit}"
        own = None if manifest.recipe.name in shipped_recipes() else plan.model.recipe_file
        try:
            # Bytes alone: whether qkpatch left them so is the question, not whether it computed well.
            result = check(present, where, observer, own, as_written=True, recomputed=False)
            yield from result.mismatches
        except CheckpointError as error:
            yield Mismatch(MANIFEST_NAME, str(error))


def _by_digest(manifest: Manifest, present: Present, progress: Progress) -> Iterator[Mismatch]:
    """All that is there has a digest on record, so that SOURCE need not be asked."""
    known = {file.name: file.sha256 for file in manifest.files}
    has_sums = SUMS_NAME in present.files and SUMS_NAME not in known
    for name, what in present.odd.items():
        yield Mismatch(name, what)
    for name in sorted({*present.files, *known} - {MANIFEST_NAME, *({SUMS_NAME} if has_sums else ())}):
        if name not in known or name not in present.files:
            yield Mismatch(
                name, "is not one of the files that the manifest lists" if name not in known else "is gone"
            )
        elif present.sha256(name) != known[name]:
            yield Mismatch(name, "does not have the recorded digest (sha256)")
        else:
            progress(present.files[name].size)
    yield from sums_mismatches(manifest, present, has_sums=has_sums)
