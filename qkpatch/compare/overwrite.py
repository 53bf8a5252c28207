"""What OUT is to a plan: free, an earlier output that may be replaced, or done already; and whether it fits.

``plan`` and ``apply`` decide it here, both. What is to be replaced is proven to be what qkpatch wrote, and what is done
already to be what would be written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from qkpatch.checkpoint.files import Progress
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import Present, PresentHere
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.common.json_text import canonical_json, load_json
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.compare.byte_by_byte import Mismatch
from qkpatch.compare.manifest_against_plan import differences
from qkpatch.compare.recorded import origin_mismatches, sums_mismatches
from qkpatch.compare.verify import check, recorded
from qkpatch.errors import CheckpointError, FileSystemError, UsageError
from qkpatch.output.destination import Replaced, check_apart, check_out, destination_path, occupied
from qkpatch.output.options import Digest, Writing
from qkpatch.output.space import check_space
from qkpatch.planning.manifest import Manifest, planned_manifest
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.sha256sums import refuse_own_sums
from qkpatch.recipes.catalogue import shipped_recipes


class _ByEdit(Mismatch):
    """What another edit, or another way to write, explains."""


class _OrBySource(Mismatch):
    """What a SOURCE that was changed since explains as well."""


def standing(
    out: Path, plan: EditPlan, writing: Writing, observer: Observer = UNSEEN, *, is_whole: bool = True
) -> Replaced | Manifest | None:
    """What is at OUT: what ``plan`` will replace, the manifest of just what it would write, or None: nothing.

    Every file whose digest is recorded has it. What else there is, is what the recorded edit makes of this SOURCE, by
    ``verify``, and the edited tensors have their digests. ``writing.force`` takes it as it is.

    Raises:
        UsageError: OUT is no place to write to, or holds something else.
        FileSystemError: it does not fit.
    """
    check_apart(out, plan.model.checkpoint)
    check_out(out, overwrite=writing.overwrite, force=writing.force)
    if writing.digest is Digest.files:
        refuse_own_sums(plan.model.checkpoint)
    found = _present(out, plan, writing, observer) if out.is_dir() else None
    if is_whole and not isinstance(found, Manifest):
        check_fits(out, plan, writing)
    return found


def check_fits(out: Path, plan: EditPlan, writing: Writing) -> None:
    """Raise :class:`FileSystemError` where there is no room for OUT."""
    files = plan.output.files.values()
    written = [file for file in files if file.name in plan.edits_by_file or not writing.linkable(file)]
    check_space(out, written)


def _present(out: Path, plan: EditPlan, writing: Writing, observer: Observer) -> Replaced | Manifest | None:
    with Rooted(out) as root:
        present = PresentHere(root)
        if not present.identities:  # nothing, or what is nobody's wish
            return Replaced(destination_path(out), {}) if root.names() else None
        observer.begins("look at OUT:", present.size, 0)
        replaced = Replaced(destination_path(out), present.identities)
        try:
            first = None if writing.force else next(_foreign(present, plan, writing, observer), None)
            if first is None and not writing.overwrite:
                return recorded(present).telling(already_done=True)
        except FileSystemError:
            replaced.check()  # which says so, where another run has replaced OUT meanwhile
            raise
    if first is not None:
        by_edit, or_source = isinstance(first, _ByEdit), isinstance(first, _OrBySource)
        why = {"overwrite": writing.overwrite, "by_edit": by_edit, "or_source": or_source}
        raise occupied(out, first.where, first.what, **why)
    return replaced


def already_done(present: Present, plan: EditPlan, writing: Writing, observer: Observer) -> Manifest:
    """The manifest of an OUT in a store that is just what ``plan`` would write.

    Raises:
        UsageError: it is something else.
    """
    observer.begins("look at OUT:", present.size, 0)
    first = next(_foreign(present, plan, writing, observer), None)
    if first is not None:
        what = f"there is an OUT that is not what this edit would make of it: {first.where}: {first.what}"
        raise UsageError(what, where=present.address, fix="choose another -o, or remove it yourself")
    return recorded(present).telling(already_done=True)


def _foreign(present: Present, plan: EditPlan, writing: Writing, observer: Observer) -> Iterator[Mismatch]:
    """Where OUT is not what qkpatch left, and unless it is to be overwritten, not what ``plan`` would make it."""
    try:
        manifest = recorded(present)
    except CheckpointError as error:
        yield Mismatch(MANIFEST_NAME, str(error))
        return
    names = sorted(file.name for file in manifest.files)
    for name in present.directories:
        at = bisect_left(names, f"{name}/")
        if (
            not "".join(names[at : at + 1]).startswith(f"{name}/")
            and name not in plan.model.checkpoint.directories
        ):
            yield Mismatch(name, "is a directory that qkpatch did not make")
    if not writing.overwrite:
        if manifest.adapter is not None:
            yield Mismatch(MANIFEST_NAME, "it is of an adapter, which is made anew with --overwrite")
            return
        yield from origin_mismatches(manifest, plan.model.source)
        for other in differences(manifest, planned_manifest(plan, ""), plan, ()):
            yield _ByEdit(other.where, other.what)
        if writing.digest is Digest.files and any(file.sha256 is None for file in manifest.files):
            yield _ByEdit(SUMS_NAME, "is not there")
    raw = present.read(MANIFEST_NAME)
    # Not `manifest.dumps()`, which gives an older manifest the keys that it did not have.
    if canonical_json(load_json(raw, MANIFEST_NAME)).encode() != raw:
        yield Mismatch(MANIFEST_NAME, "somebody has edited it")
    elif all(file.sha256 is not None for file in manifest.files):
        yield from _by_digest(manifest, present, observer.copied)
    else:
        where = plan.model.source.address
        own = None if manifest.recipe.name in shipped_recipes() else plan.model.recipe_file
        try:
            # Bytes alone: whether qkpatch left them so is the question, not whether it computed well.
            result = check(present, where, observer, own, as_written=True, recomputed=False)
            for found in result.mismatches:
                yield _OrBySource(found.where, found.what)
        except CheckpointError as error:
            yield Mismatch(MANIFEST_NAME, str(error))


def _by_digest(manifest: Manifest, present: Present, progress: Progress) -> Iterator[Mismatch]:
    """All that is there has a digest on record, so that SOURCE need not be asked."""
    known = {file.name: file.sha256 for file in manifest.files}
    has_sums = SUMS_NAME in present.files and SUMS_NAME not in known
    for name, what in present.odd.items():
        yield Mismatch(name, what)
    for name in sorted({*present.files, *known} - {MANIFEST_NAME, *({SUMS_NAME} if has_sums else ())}):
        if name not in known:
            yield Mismatch(name, "is not one of the files that the manifest lists")
        elif name not in present.files:
            yield Mismatch(name, "is gone")
        elif present.sha256(name) != known[name]:
            yield Mismatch(name, "does not have the recorded digest (sha256)")
        else:
            progress(present.files[name].size)
    if manifest.adapter is None:
        yield from sums_mismatches(manifest, present, has_sums=has_sums)
