"""Proof that OUT is SOURCE plus the edit its manifest declares, byte for byte. Reads both sides, writes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qkpatch.checkpoint.files import Progress
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import Present
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME, Checkpoint, open_checkpoint
from qkpatch.checkpoint.tree import LocalFile
from qkpatch.common.json_text import Json
from qkpatch.common.number_ranges import abbreviate
from qkpatch.compare.byte_by_byte import Listing, Mismatch, library_verdict, side_by_side, tensor_digest
from qkpatch.compare.manifest_against_plan import differences, origin_mismatches
from qkpatch.errors import AmbiguousError, CheckpointError, FileSystemError, UnsupportedError, UsageError
from qkpatch.model.locate import Access, Source, locate
from qkpatch.output.layout import Output
from qkpatch.planning.manifest import Manifest, planned_manifest
from qkpatch.planning.plan import EditPlan, make_plan
from qkpatch.planning.sha256sums import sums_text
from qkpatch.publishing.card import CARD_NAME, card_text, is_card_over
from qkpatch.publishing.private_files import is_private
from qkpatch.recipes.catalogue import shipped_recipes

GIT_NAME = ".gitattributes"


@dataclass(frozen=True)
class Verification:
    """What was checked, and every mismatch that was found."""

    files: int
    edited_tensors: int
    compared_bytes: int
    edited_bytes: int  # the planned rows, the only ones that may differ
    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]  # what was not checked, and need not be wrong
    plan: EditPlan | None  # what the recorded edit leads to on SOURCE; None where it cannot be made

    @property
    def ok(self) -> bool:
        """Whether OUT is exactly SOURCE plus the declared edit."""
        return not self.mismatches

    def to_json(self) -> dict[str, Json]:
        """Plain JSON values."""
        said = {key: value for key, value in vars(self).items() if key != "plan"}
        return {**said, "ok": self.ok, "mismatches": [vars(m) for m in self.mismatches]}


def recorded(present: Present) -> Manifest:
    """The manifest in OUT.

    Raises:
        CheckpointError: OUT has none, or one that cannot be read.
    """
    if MANIFEST_NAME not in present.files:
        odd = present.odd.get(MANIFEST_NAME)
        raise CheckpointError(
            f"{MANIFEST_NAME} {odd}"
            if odd
            else f"there is no {MANIFEST_NAME}, so nothing says what should differ",
            where=str(present.root.path),
            fix="is this the directory that qkpatch apply wrote?",
        )
    return Manifest.loads(present.read(MANIFEST_NAME), f"{present.root.path.name}/{MANIFEST_NAME}")


def read_out(out: Path) -> tuple[Manifest, str | None]:
    """The manifest, and the card in OUT: SOURCE's as it was, or one over it.

    Raises:
        CheckpointError: there is no manifest that can be read.
        FileSystemError: the card is a link, whatever it leads to; or was emptied.
    """
    with Rooted(out) as root:
        present = Present(root)
        manifest, card = recorded(present), present.read(CARD_NAME) if CARD_NAME in present.files else b""
        odd = present.odd.get(CARD_NAME)
        if odd is None and not card and any(file.name == CARD_NAME and file.size for file in manifest.files):
            odd = "is empty, or gone, and had the text of SOURCE's"
        if odd is not None:
            raise FileSystemError(
                f"{CARD_NAME} {odd}",
                where=present.where(CARD_NAME),
                fix="copy SOURCE's there, then write the card: qkpatch card OUT --write",
            )
        return manifest, card_text(card) if card else None


def check(
    present: Present,
    source: str,
    progress: Progress,
    recipe: str | None = None,
    access: Access = Access.ranges,
    *,
    as_written: bool = False,
) -> Verification:
    """Check OUT against SOURCE and its own manifest.

    The recorded edit is planned anew on SOURCE, and the manifest must agree with that plan in all but its
    figures, and with where SOURCE is from. The same files, all of them regular; every byte equal but the rows of the
    planned heads, beside SOURCE's own or by the Hub's digests of it; each edited tensor's digest before and after as
    recorded; every shard accepted by the safetensors library too. Where OUT was published, its model card is another,
    and has SOURCE's text below its own, and what is not published may be missing.

    Args:
        present: OUT.
        source: SOURCE.
        progress: hears of bytes compared.
        recipe: where a recipe of the user's own is.
        access: how SOURCE is read where it is on the Hub.
        as_written: what nothing records, and what only publishing changes, is a mismatch as well.

    Raises:
        CheckpointError: OUT has no manifest, or one that cannot be read.
        QKPatchError: SOURCE cannot be opened.
    """
    manifest = recorded(present)
    request = replace(manifest.request(), recipe=recipe or manifest.recipe.name)
    if recipe is None and request.recipe not in shipped_recipes():
        raise CheckpointError(
            f"it was made with a recipe of its own, {request.recipe!r}",
            where=f"{present.root.path.name}/{MANIFEST_NAME}",
            fix="say where that is: --recipe FILE.yaml",
        )
    found = [Mismatch(name, f"{what}, which qkpatch never writes") for name, what in present.odd.items()]
    plan = None
    try:
        plan = make_plan(source, request, access)
    except (UsageError, AmbiguousError, UnsupportedError, CheckpointError) as error:
        found.append(Mismatch(MANIFEST_NAME, f"its edit cannot be made on SOURCE: {error}"))
        located = locate(source, access)
        checkpoint = open_checkpoint(located.place)
        output, planned = Output.copy_of(checkpoint), None
    else:
        located, checkpoint, output = plan.model.source, plan.model.checkpoint, plan.output
        planned = planned_manifest(plan, "")
    found += origin_mismatches(manifest, located)
    has_own_card = not as_written and _has_own_card(output, present)
    # A commit on the Hub has a card of its own there, and not what is never published.
    unpublished: set[str] = set()
    if has_own_card:
        strays = set() if planned is None else {file.name for file in planned.files if file.outside}
        unpublished = {
            name
            for name in output.files
            if (is_private(name) or name in strays or name == SUMS_NAME) and name not in present.files
        }
    if plan is not None and planned is not None:
        found += differences(manifest, planned, plan, unpublished)
    is_ours = {MANIFEST_NAME, *({SUMS_NAME} - output.files.keys()), *({CARD_NAME} if has_own_card else ())}
    added = {GIT_NAME} if has_own_card else set()
    names = present.files.keys() - is_ours - (added - output.files.keys())
    found += _file_sets(output, names, {*unpublished, *is_ours, *present.odd})
    found += _check_sums(manifest, present, output, is_published=has_own_card)
    common = sorted(output.files.keys() & names)
    found += _compare(common, plan, present, output, checkpoint, progress)
    before, wrong = _listed(plan, present, output, checkpoint, progress)
    found += wrong
    if plan is not None:
        found += _check_edits(manifest, plan, present, before, as_written=as_written)
    return Verification(
        files=len(names),
        edited_tensors=len(manifest.edits),
        compared_bytes=sum(present.files[name].size for name in names),
        edited_bytes=sum(end - begin for name in common for begin, end in _planned(plan, name)),
        mismatches=tuple(found),
        notes=tuple(_notes(manifest, located, unpublished)),
        plan=plan,
    )


def _planned(plan: EditPlan | None, name: str) -> list[tuple[int, int]]:
    return [] if plan is None else plan.written_ranges(name)


def _compare(
    names: Collection[str],
    plan: EditPlan | None,
    present: Present,
    output: Output,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Iterator[Mismatch]:
    """Files that are on both sides, beside what of SOURCE is on this machine."""
    shards = output.made_of(checkpoint.headers)
    for name in names:
        wanted = output.files[name]
        yield from side_by_side(wanted, present, _planned(plan, name), checkpoint, progress)
        if wanted.size == present.files[name].size and name in shards:
            yield from library_verdict(wanted, present)


def _listed(
    plan: EditPlan | None, present: Present, output: Output, checkpoint: Checkpoint, progress: Progress
) -> tuple[dict[str, str], list[Mismatch]]:
    """What of SOURCE is elsewhere, by the Hub's digests: those of its edited tensors, and what is wrong."""
    listing = Listing(output, present, partial(_planned, plan))
    edited: dict[str, list[TensorRef]] = {}
    for target in () if plan is None else plan.edits:
        for ref in target.written:
            edited.setdefault(ref.shard, []).append(ref)
    before: dict[str, str] = {}
    found: list[Mismatch] = []
    for file in checkpoint.files.values():
        wrong, digests = listing.check(file, edited.get(file.name, []), progress)
        found += wrong
        before |= digests
    return before, found


def _notes(manifest: Manifest, found: Source, unpublished: Collection[str]) -> Iterator[str]:
    said = manifest.source
    if said.address is not None and found.kind != "hub":
        yield (
            f"SOURCE is a {found.kind}, which does not show that OUT was made from {said.name}: "
            f"--source {said.address} does"
        )
    if unpublished:
        yield f"not in OUT, since it is not published: {abbreviate(sorted(unpublished), 5)}"


def _check_sums(
    manifest: Manifest, present: Present, output: Output, *, is_published: bool
) -> Iterator[Mismatch]:
    """Digests of whole files, where the manifest has them: they, SHA256SUMS and the files must agree."""
    wanted = {file.name: file.sha256 for file in manifest.files if file.sha256 is not None}
    has_sums = SUMS_NAME in present.files and SUMS_NAME not in output.files
    if not is_published or has_sums:
        yield from sums_mismatches(manifest, present, has_sums=has_sums)
    for name in sorted(wanted.keys() & present.files.keys()):
        if not (is_published and name == CARD_NAME) and present.sha256(name) != wanted[name]:
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


def _has_own_card(output: Output, present: Present) -> bool:
    """Whether OUT was published: its card is qkpatch's, with the text of SOURCE's below."""
    if CARD_NAME not in present.files:
        return False
    base = output.files.get(CARD_NAME)
    original = None if base is None else base.original
    card = card_text(present.read(CARD_NAME))
    text = None if original is None else card_text(original.read())
    return card != text and is_card_over(card, text)


def _file_sets(output: Output, names: Collection[str], excused: Collection[str]) -> Iterator[Mismatch]:
    for name in sorted(output.files.keys() - set(names) - set(excused)):
        yield Mismatch(name, "is missing from OUT")
    for name in sorted(set(names) - output.files.keys()):
        yield Mismatch(name, "is in OUT and not in SOURCE")


def _check_edits(
    manifest: Manifest, plan: EditPlan, present: Present, listed: Mapping[str, str], *, as_written: bool
) -> Iterator[Mismatch]:
    """The digests of edited tensors, on both sides, and that an edit is there at all.

    ``listed`` has those of tensors of SOURCE that are known already.
    """
    sources, recorded = plan.model.checkpoint.files, {edit.tensor: edit for edit in manifest.edits}
    files = {file.name: file for file in manifest.files}
    for target in plan.edits:
        record = recorded.get(target.query.name)
        for ref, written in zip(target.written, record.written if record else (), strict=False):
            place = plan.output.place(ref)
            out = present.files.get(place.shard)
            if out is None or out.size != plan.output.files[place.shard].size:
                continue  # told already
            source = sources[ref.shard]
            before = tensor_digest(source, ref) if isinstance(source, LocalFile) else listed.get(ref.name)
            with present.open(place.shard) as opened:
                after = opened.sha256(place.begin, place.end)
            if before is not None and written.sha256_before not in (None, before):
                yield Mismatch(ref.name, "SOURCE does not hold the values that were edited (sha256_before)")
            if written.sha256_after not in (None, after):
                yield Mismatch(ref.name, "OUT does not hold the values that were written (sha256_after)")
            if before == after and not written.may_stay:
                yield Mismatch(ref.name, "is the same in SOURCE and OUT: the edit is not there")
            if as_written and written.sha256_after is None and files[place.shard].sha256 is None:
                yield Mismatch(
                    ref.name, "no digest of it is recorded, so nothing shows that it is as written"
                )
