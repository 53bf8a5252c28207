"""Proof that OUT is SOURCE plus the edit its manifest declares: bytes and arithmetic. Reads both, writes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qkpatch.checkpoint.names import CLAIM, UNDO, UNFINISHED, is_private, usual_beside
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import Present, PresentHere
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME, half_written, open_checkpoint, unfinished
from qkpatch.common.interrupts import import_torch
from qkpatch.common.json_text import Json
from qkpatch.common.number_ranges import abbreviate
from qkpatch.common.observer import Observer
from qkpatch.compare.byte_by_byte import Listing, Mismatch, library_verdict, side_by_side
from qkpatch.compare.manifest_against_plan import differences, open_questions, warnings_apart
from qkpatch.compare.recorded import another_source, check_edits, check_files, origin_mismatches
from qkpatch.errors import AmbiguousError, CheckpointError, FileSystemError, UnsupportedError, UsageError
from qkpatch.model.locate import Access, Source, locate, out_url
from qkpatch.output.layout import Output
from qkpatch.output.options import Digest
from qkpatch.planning.manifest import Manifest, planned_manifest
from qkpatch.planning.plan import EditPlan, make_plan
from qkpatch.publishing.card import CARD_NAME, CHECKED, card_text, has_results, is_card_of, is_ours
from qkpatch.publishing.front_matter import FrontMatter
from qkpatch.recipes.catalogue import get_recipe, shipped_recipes

if TYPE_CHECKING:
    from qkpatch.compare.recompute import Arithmetic


@dataclass(frozen=True)
class Verification:
    """What was checked, and every mismatch that was found."""

    files: int
    edited_tensors: int
    compared_bytes: int
    edited_bytes: int  # the planned rows, the only ones that may differ
    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]  # what was not checked, and need not be wrong
    arithmetic: Arithmetic | None  # of the planned heads computed anew; None where they were not
    plan: EditPlan | None  # what the recorded edit leads to on SOURCE; None where it cannot be made

    @property
    def ok(self) -> bool:
        """Whether OUT is exactly SOURCE plus the declared edit."""
        return not self.mismatches

    def to_json(self) -> dict[str, Json]:
        """Plain JSON values."""
        said = {key: value for key, value in vars(self).items() if key != "plan"}
        arithmetic = None if self.arithmetic is None else vars(self.arithmetic)
        mismatches = [vars(m) for m in self.mismatches]
        return {**said, "ok": self.ok, "mismatches": mismatches, "arithmetic": arithmetic}


def recorded(present: Present) -> Manifest:
    """The manifest in OUT.

    Raises:
        CheckpointError: OUT has none, or one that cannot be read.
    """
    if UNFINISHED in present.files:
        raise unfinished(present.address)
    if CLAIM in present.files and MANIFEST_NAME not in present.files:
        raise half_written(present.address)
    if MANIFEST_NAME not in present.files:
        odd = present.odd.get(MANIFEST_NAME)
        nothing = f"there is no {MANIFEST_NAME}, so nothing says what was edited"
        raise CheckpointError(
            f"{MANIFEST_NAME} {odd}" if odd else nothing,
            where=present.address,
            fix="is this the directory that qkpatch apply wrote?",
        )
    manifest = Manifest.loads(present.read(MANIFEST_NAME), f"{present.name}/{MANIFEST_NAME}")
    present.set_aside([file.name for file in manifest.files])
    return manifest


def n_heads(manifest: Manifest) -> int:
    """How many heads an edit is said to have."""
    return sum(len(edit.heads) for edit in manifest.edits)


@contextmanager
def opened_out(out: Path | str) -> Iterator[Present]:
    """What is at OUT, a directory or a folder in a store.

    Raises:
        FileSystemError: it is not there, or cannot be listed.
    """
    if (url := out_url(out)) is not None:
        from qkpatch.stores.present import PresentInStore

        yield PresentInStore(url)
        return
    with Rooted(Path(out)) as root:
        yield PresentHere(root)


def read_out(out: Path) -> tuple[Manifest, str | None]:
    """The manifest, and the card in OUT: SOURCE's as it was, or one over it.

    Raises:
        CheckpointError: there is no manifest that can be read.
        FileSystemError: the card is a link, whatever it leads to; or was emptied.
    """
    with Rooted(out) as root:
        present = PresentHere(root)
        manifest, card = recorded(present), present.read(CARD_NAME) if CARD_NAME in present.files else b""
        odd = present.odd.get(CARD_NAME)
        if odd is None and not card and any(file.name == CARD_NAME and file.size for file in manifest.files):
            odd = "is empty, or gone, and had the text of SOURCE's"
        if odd is not None:
            fix = "copy SOURCE's there, then write the card: qkpatch card OUT --write"
            raise FileSystemError(f"{CARD_NAME} {odd}", where=present.where(CARD_NAME), fix=fix)
        return manifest, card_text(card) if card else None


def check(
    present: Present,
    source: str,
    observer: Observer,
    recipe: str | None = None,
    access: Access = Access.ranges,
    *,
    as_written: bool = False,
    recomputed: bool = True,
    any_card: bool = True,
) -> Verification:
    """Check OUT against SOURCE and its own manifest.

    The recorded edit is planned anew on SOURCE, and the manifest must agree with that plan in all but its
    figures, and with where SOURCE is from. The same files, all of them regular; every byte equal but the rows of the
    planned heads, beside SOURCE's own or by the Hub's digests of it; each edited tensor's digest before and after as
    recorded; the rows of the planned heads, and their figures, as the engine computes them anew; every shard accepted
    by the safetensors library too. A model card that is not SOURCE's is compared with the one that qkpatch would
    write, and what people made of it is named. Where OUT was published, what is not published may be missing.

    Args:
        present: OUT.
        source: SOURCE.
        observer: hears of bytes compared, and heads computed.
        recipe: where a recipe of the user's own is.
        access: how SOURCE is read where it is on the Hub.
        as_written: what nothing records, and what people may change afterwards, is a mismatch as well.
        recomputed: the planned heads are computed anew; else their bytes are believed where their digests are right.
        any_card: a README.md that people wrote or edited is named; else it is a mismatch.

    Raises:
        CheckpointError: OUT has no manifest, or one that cannot be read.
        QKPatchError: SOURCE cannot be opened.
    """
    manifest = recorded(present)
    if manifest.adapter is not None:
        what = "it is an adapter, which holds nothing of SOURCE to compare"
        raise CheckpointError(what, where=present.address, fix="make it anew: the bytes are the same")
    if recipe is not None:
        get_recipe(recipe)  # a slip of whoever asks is none of OUT's
    request = replace(manifest.request(), recipe=recipe or manifest.recipe.name)
    if recipe is None and request.recipe not in shipped_recipes():
        raise CheckpointError(
            f"it was made with a recipe of its own, {request.recipe!r}",
            where=f"{present.name}/{MANIFEST_NAME}",
            fix="say where that is: --recipe FILE.yaml",
        )
    usual = usual_beside(file.name for file in manifest.files)
    found = [Mismatch(name, f"{what}, which qkpatch never writes") for name, what in present.odd.items()]
    plan, planned, fault = None, None, None
    try:
        plan = make_plan(source, request, access, usual)
    except (UsageError, AmbiguousError, UnsupportedError, CheckpointError) as error:
        fault = error
        found.append(Mismatch(MANIFEST_NAME, f"its edit cannot be made on SOURCE: {error}"))
        located = locate(source, access)
        checkpoint = open_checkpoint(located.place, (*usual, *(request.exclude or ())))
        output = Output.copy_of(checkpoint)
    else:
        located, checkpoint, output = plan.model.source, plan.model.checkpoint, plan.output
        planned = planned_manifest(plan, "")
    found += origin_mismatches(manifest, located)
    card = _other_card(manifest, output, present)
    if as_written and card is not None and card.note is not None:
        card = None  # people's work, which is not as qkpatch left it
    is_published = card is not None and card.is_ours and not as_written
    if card is not None and card.is_edited and not any_card:
        found.append(Mismatch(CARD_NAME, str(card.note)))
    # A commit on the Hub has a card of its own there, and not what is never published.
    unpublished: set[str] = set()
    if is_published:
        strays = set() if planned is None else {file.name for file in planned.files if file.outside}
        unpublished = {
            name
            for name in output.files
            if (is_private(name) or name in strays or name == SUMS_NAME) and name not in present.files
        }
    if plan is not None and planned is not None:
        found += differences(manifest, planned, plan, unpublished)
    own = {MANIFEST_NAME, *({SUMS_NAME} - output.files.keys()), *(() if card is None else {CARD_NAME})}
    names = present.files.keys() - own
    found += _file_sets(output, names, {*unpublished, *own, *present.odd})
    found += check_files(manifest, present, output, is_published=is_published, is_other_card=card is not None)
    common = sorted(output.files.keys() & names)
    shards = output.made_of(checkpoint.headers)
    for name in common:
        wanted = output.files[name]
        found += side_by_side(wanted, present, _planned(plan, name), checkpoint, observer.copied)
        if wanted.size == present.files[name].size and name in shards:
            found += library_verdict(wanted, present)
    listing = Listing(checkpoint, plan, output, present)
    wrong = [*listing.check(observer.copied)]
    found += wrong
    arithmetic = None
    if found and (other := another_source(manifest, located, checkpoint, listing, fault)) is not None:
        found = [other]
    elif plan is not None and planned is not None:
        found += check_edits(manifest, plan, present, listing, as_written=as_written)
        # A part of SOURCE is read out of OUT, where it is known to be that.
        if recomputed and plan.edits and not wrong and not listing.lost & checkpoint.headers.keys():
            import_torch()
            from qkpatch.compare.recompute import recompute

            arithmetic, off = recompute(manifest, planned, plan, present, listing.open, observer)
            found += off
    more: list[str] = []
    if not found and plan is not None and planned is not None and (arithmetic is not None or not plan.edits):
        lacking, more = warnings_apart(manifest, planned, plan)
        found += [Mismatch(MANIFEST_NAME, f"its warnings leave out: {warning}") for warning in lacking]
    present.check_still()
    checkpoint.check_still()
    return Verification(
        files=len(names),
        edited_tensors=len(manifest.edits),
        compared_bytes=sum(present.files[name].size for name in names),
        edited_bytes=sum(end - begin for name in common for begin, end in _planned(plan, name)),
        mismatches=tuple(found),
        notes=(
            *_notes(manifest, located, unpublished, present.aside, card, arithmetic),
            *(() if planned is None else open_questions(manifest, planned, more)),
        ),
        arithmetic=arithmetic,
        plan=plan,
    )


def _planned(plan: EditPlan | None, name: str) -> list[tuple[int, int]]:
    return [] if plan is None else plan.written_ranges(name)


def _notes(
    manifest: Manifest,
    found: Source,
    unpublished: Collection[str],
    aside: list[str],
    card: _Card | None,
    arithmetic: Arithmetic | None,
) -> Iterator[str]:
    said = manifest.source
    if said.address is not None and found.kind != "hub":
        yield (
            f"SOURCE is a {found.kind}, which does not show that OUT was made from {said.name}: "
            f"--source {said.address} does"
        )
    if manifest.output.exclude:
        yield f"left out of OUT on demand: {abbreviate(manifest.output.exclude, 50)}"
    if UNDO in aside:
        aside = [name for name in aside if name != UNDO]
        yield f"edited in place: {UNDO} leads back (qkpatch revert), and is no part of the checkpoint"
    elif manifest.run.copied_by is None:
        yield f"recorded as edited in place, and there is no {UNDO} to lead back"
    if aside:
        yield f"not looked at, since systems leave such things anywhere: {abbreviate(aside, 5)}"
    if unpublished:
        yield f"not in OUT, since it is not published: {abbreviate(sorted(unpublished), 5)}"
    if card is not None and card.note is not None:
        yield f"{CARD_NAME} {card.note}"
    if arithmetic is None and manifest.edits and manifest.output.digest is Digest.none:
        yield "there are no digests, and nothing was computed anew: the planned rows may hold anything"
    if arithmetic is not None and arithmetic.not_reproducible:
        heads = abbreviate(arithmetic.not_reproducible, 8)
        yield f"the cut falls among modes of one size, so not reproducible elsewhere (layer.head): {heads}"


@dataclass(frozen=True)
class _Card:
    """A README.md that is not SOURCE's."""

    is_ours: bool  # says that qkpatch made it: OUT was published
    is_edited: bool  # people wrote in it
    note: str | None  # None where it is just what qkpatch would write


def _other_card(manifest: Manifest, output: Output, present: Present) -> _Card | None:
    """OUT's README.md, where it is not SOURCE's."""
    if CARD_NAME not in present.files:
        return None
    base = output.files.get(CARD_NAME)
    original = None if base is None else base.original
    raw, theirs = present.read(CARD_NAME), None if original is None else original.read()
    if raw == theirs:
        return None
    card, text = card_text(raw), None if theirs is None else card_text(theirs)
    if not is_ours(FrontMatter.of(card)):
        return _Card(False, True, "is neither SOURCE's nor a card of qkpatch's: somebody wrote it")
    if any(is_card_of(card, manifest, base_card) for base_card in (text, None)):
        notes = (
            "reports results, which are its author's" if has_results(card) else None,
            "says that it was checked, which its author says" if CHECKED in card else None,
            None if is_card_of(card, manifest, text) else "lacks SOURCE's card, its license among it",
        )
        return _Card(True, False, "; it ".join(note for note in notes if note) or None)
    return _Card(True, True, "is not the card that qkpatch writes of this edit: somebody has edited it")


def _file_sets(output: Output, names: Collection[str], excused: Collection[str]) -> Iterator[Mismatch]:
    for name in sorted(output.files.keys() - set(names) - set(excused)):
        yield Mismatch(name, "is missing from OUT")
    for name in sorted(set(names) - output.files.keys()):
        yield Mismatch(name, "is in OUT and not in SOURCE")
