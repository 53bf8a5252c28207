"""What a manifest records beside its edit: where SOURCE is from, and digests of both sides."""

from __future__ import annotations

from collections.abc import Iterator

from qkpatch.checkpoint.present_files import Present
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME, Checkpoint
from qkpatch.compare.byte_by_byte import Listing, Mismatch
from qkpatch.errors import QKPatchError
from qkpatch.model.locate import Source
from qkpatch.output.layout import Output
from qkpatch.planning.manifest import Manifest
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.sha256sums import sums_text
from qkpatch.publishing.card import CARD_NAME


def origin_mismatches(manifest: Manifest, found: Source) -> Iterator[Mismatch]:
    """Where the manifest says that OUT was made of a repository, SOURCE is that one, where it is one at all."""
    said = manifest.source
    if said.kind != "hub" or found.kind != "hub":
        return
    here, there = (found.name.lower(), found.commit), (said.name.lower(), said.commit)
    if here != there:
        keys = [f"source.{key}" for key, a, b in zip(("name", "commit"), here, there, strict=True) if a != b]
        yield Mismatch(MANIFEST_NAME, f"{_both(manifest, found)} ({' and '.join(keys)})")


def another_source(
    manifest: Manifest,
    found: Source,
    checkpoint: Checkpoint,
    listing: Listing,
    fault: QKPatchError | None,
) -> Mismatch | None:
    """One mismatch for all, where SOURCE is not what OUT was made from; None where it may be.

    ``fault`` is why the recorded edit cannot be made on it, where it cannot.
    """
    if "file" in (kinds := {manifest.source.kind, found.kind}) and len(kinds) > 1:
        return Mismatch(MANIFEST_NAME, f"{_both(manifest, found)}: verify it against what it was made from")
    why = None
    for edit in manifest.edits:
        ref, query = checkpoint.tensors.get(edit.tensor), edit.written[0]
        if ref is None or (ref.dtype, ref.shape) != (edit.dtype, edit.shape):
            why = why or f"{edit.tensor} is {'not' if ref is None else 'of another dtype or shape'} there"
            continue
        digest = listing.sha256(ref)
        if None in (query.sha256_before, digest) or query.sha256_before == digest:
            return None
        here, there = (str(sha256)[:12] for sha256 in (digest, query.sha256_before))
        why = why or f"{edit.tensor} has SHA-256 {here}… there, and had {there}…"
    if why is None:
        return None
    cannot = "" if fault is None else f"; its edit cannot be made there: {fault.what}"
    return Mismatch(MANIFEST_NAME, f"{_both(manifest, found)}: {why}{cannot}")


def _both(manifest: Manifest, found: Source) -> str:
    said = manifest.source
    here = f"{found.name}@{found.commit}" if found.kind == "hub" else f"the {found.kind} {found.name!r}"
    return f"OUT was made from {said.address or f'the {said.kind} {said.name!r}'}, and this is {here}"


def check_files(
    manifest: Manifest, present: Present, output: Output, *, is_published: bool, is_other_card: bool
) -> Iterator[Mismatch]:
    """Digests of whole files, where the manifest has them: they, SHA256SUMS and the files must agree."""
    wanted = {file.name: file.sha256 for file in manifest.files if file.sha256 is not None}
    has_sums = SUMS_NAME in present.files and SUMS_NAME not in output.files
    if not is_published or has_sums:
        yield from sums_mismatches(manifest, present, has_sums=has_sums)
    for name in sorted(wanted.keys() & present.files.keys()):
        if not (is_other_card and name == CARD_NAME) and present.sha256(name) != wanted[name]:
            yield Mismatch(name, "does not have the recorded digest (sha256)")


def sums_mismatches(manifest: Manifest, present: Present, *, has_sums: bool) -> Iterator[Mismatch]:
    """SHA256SUMS is there where every file has a digest, and says just that."""
    n_wanted = sum(file.sha256 is not None for file in manifest.files)
    if not n_wanted and not has_sums:
        return
    if not has_sums or n_wanted < len(manifest.files):
        yield Mismatch(SUMS_NAME, "is there for some files only, or not at all")
    elif present.read(SUMS_NAME) != sums_text(manifest, present.read(MANIFEST_NAME)).encode():
        yield Mismatch(SUMS_NAME, "does not say what the manifest says")


def check_edits(
    manifest: Manifest, plan: EditPlan, present: Present, listing: Listing, *, as_written: bool
) -> Iterator[Mismatch]:
    """The digests of edited tensors, on both sides, and that an edit is there at all."""
    recorded = {edit.tensor: edit for edit in manifest.edits}
    files = {file.name: file for file in manifest.files}
    for target in plan.edits:
        record = recorded.get(target.query.name)
        for ref, written in zip(target.written, record.written if record else (), strict=False):
            place = plan.output.place(ref)
            out = present.files.get(place.shard)
            if out is None or out.size != plan.output.files[place.shard].size:
                continue  # told already
            before = listing.sha256(ref)
            with present.open(place.shard) as opened:
                after = opened.sha256(place.begin, place.end)
            if before is not None and written.sha256_before not in (None, before):
                yield Mismatch(ref.name, "SOURCE does not hold the values that were edited (sha256_before)")
            if written.sha256_after not in (None, after):
                yield Mismatch(ref.name, "OUT does not hold the values that were written (sha256_after)")
            if before == after and not written.may_stay:
                yield Mismatch(ref.name, "is the same in SOURCE and OUT: the edit is not there")
            if as_written and written.sha256_after is None and files[place.shard].sha256 is None:
                yield Mismatch(ref.name, "no digest of it is recorded: nothing shows that it is as written")
