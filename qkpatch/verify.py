"""Proof that OUT is SOURCE plus the edit its manifest declares, byte for byte. Reads both sides, writes nothing."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qkpatch.canonical import canonical_json
from qkpatch.card import is_card_over
from qkpatch.catalogue import shipped_recipes
from qkpatch.checkpoint.files import Progress, Readable, read_exact, sha256_range
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.output import Extent, Output, OutputFile
from qkpatch.checkpoint.side_by_side import Reader, Span
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME, Checkpoint, open_checkpoint
from qkpatch.checkpoint.tree import LocalFile, SourceFile, source_file, walk_files
from qkpatch.errors import AmbiguousError, CheckpointError, UnsupportedError, UsageError
from qkpatch.locate import locate
from qkpatch.manifest import FileRecord, Manifest, planned_manifest
from qkpatch.plan import EditPlan, make_plan
from qkpatch.sums import sums_text

CARD_NAME, GIT_NAME = "README.md", ".gitattributes"

# What of a recipe decides an edit; the rest is for people, and may change from version to version.
_RECIPE_KEYS = ("name", "prefix", "config", "tensors", "others")


@dataclass(frozen=True)
class Mismatch:
    """One way in which OUT is not what it should be."""

    where: str
    what: str


@dataclass(frozen=True)
class Verification:
    """What was checked, and every mismatch that was found."""

    files: int
    edited_tensors: int
    compared_bytes: int
    edited_bytes: int  # the planned rows, the only ones that may differ
    mismatches: tuple[Mismatch, ...]

    @property
    def ok(self) -> bool:
        """Whether OUT is exactly SOURCE plus the declared edit."""
        return not self.mismatches


def verify(out: Path, source: str, progress: Progress, recipe: str | None = None) -> Verification:
    """Check OUT against SOURCE and its own manifest.

    The recorded edit is planned anew on SOURCE, and the manifest must agree with that plan in all but its
    figures. The same files; every byte equal but the rows of the planned heads; each edited tensor's digest
    before and after as recorded; every shard accepted by the safetensors library too. Where OUT was published,
    its model card is another, and has SOURCE's text below its own. ``progress`` hears of
    bytes compared. ``recipe`` says where a recipe of the user's own is.

    Raises:
        CheckpointError: OUT has no manifest, or one that cannot be read.
        QKPatchError: SOURCE cannot be opened.
    """
    if not (out / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"there is no {MANIFEST_NAME}, so nothing says what should differ",
            where=str(out),
            fix="is this the directory that qkpatch apply wrote?",
        )
    manifest = Manifest.loads(
        source_file(out / MANIFEST_NAME, MANIFEST_NAME).read(), f"{out.name}/{MANIFEST_NAME}"
    )
    request = replace(manifest.request(), recipe=recipe or manifest.recipe["name"])
    if recipe is None and request.recipe not in shipped_recipes():
        raise CheckpointError(
            f"it was made with a recipe of its own, {request.recipe!r}",
            where=f"{out.name}/{MANIFEST_NAME}",
            fix="say where that is: --recipe FILE.yaml",
        )
    found: list[Mismatch] = []
    plan = None
    try:
        plan = make_plan(source, request)
    except (UsageError, AmbiguousError, UnsupportedError, CheckpointError) as error:
        found.append(Mismatch(MANIFEST_NAME, f"its edit cannot be made on SOURCE: {error}"))
    else:
        found += _differences(manifest, planned_manifest(plan, ""), plan)
    checkpoint = open_checkpoint(locate(source).place) if plan is None else plan.model.checkpoint
    output = Output.copy_of(checkpoint) if plan is None else plan.output
    present, _ = walk_files(out, skip=())
    present.pop(MANIFEST_NAME, None)
    sums = present.pop(SUMS_NAME, None) if SUMS_NAME not in output.files else None
    is_published = _has_own_card(output, present)
    if is_published:  # on the Hub, which adds its own .gitattributes
        for name in (CARD_NAME, GIT_NAME):
            if name == CARD_NAME or name not in output.files:
                present.pop(name, None)
    found += _file_sets(output, present, {CARD_NAME} if is_published else set())
    if sums is not None or not is_published:
        found += _check_sums(manifest, out, sums, present)
    edited_bytes = 0
    for name in sorted(output.files.keys() & present.keys()):
        allowed = [] if plan is None else plan.written_ranges(name)
        edited_bytes += sum(end - begin for begin, end in allowed)
        found += _compare(output.files[name], present[name], allowed, checkpoint, progress)
        if any(extent.file.name in checkpoint.headers for extent in output.files[name].extents):
            found += _library_verdict(output.files[name], present[name])
    if plan is not None:
        found += _check_edits(manifest, plan, present)
    return Verification(
        files=len(present),
        edited_tensors=len(manifest.edits),
        compared_bytes=sum(file.size for file in present.values()),
        edited_bytes=edited_bytes,
        mismatches=tuple(found),
    )


def _check_sums(
    manifest: Manifest, out: Path, sums: LocalFile | None, present: dict[str, LocalFile]
) -> Iterator[Mismatch]:
    """Digests of whole files, where the manifest has them: they, SHA256SUMS and the files must agree."""
    wanted = [file for file in manifest.files if file.sha256 is not None]
    if not wanted and sums is None:
        return
    record = source_file(out / MANIFEST_NAME, MANIFEST_NAME).read()
    if sums is None or len(wanted) < len(manifest.files):
        yield Mismatch(SUMS_NAME, "is there for some files only, or not at all")
    elif sums.read() != sums_text(manifest, record).encode():
        yield Mismatch(SUMS_NAME, "does not say what the manifest says")
    for file in wanted:
        found = present.get(file.name)
        if found is not None:
            with found.open() as fd:
                if sha256_range(fd, 0, found.size, found.path) != file.sha256:
                    yield Mismatch(file.name, "does not have the recorded digest (sha256)")


def _has_own_card(output: Output, present: dict[str, LocalFile]) -> bool:
    """Whether OUT was published: its card is qkpatch's, with the text of SOURCE's below."""
    card, base = present.get(CARD_NAME), output.files.get(CARD_NAME)
    original = None if base is None else base.original
    texts = [None if f is None else f.read().decode("utf-8", "replace") for f in (card, original)]
    return texts[0] is not None and texts[0] != texts[1] and is_card_over(texts[0], texts[1])


def _file_sets(
    output: Output, present: dict[str, LocalFile], replaced: Collection[str]
) -> Iterator[Mismatch]:
    for name in sorted(output.files.keys() - present.keys() - set(replaced)):
        yield Mismatch(name, "is missing from OUT")
    for name in sorted(present.keys() - output.files.keys()):
        yield Mismatch(name, "is in OUT and not in SOURCE")


def _differences(manifest: Manifest, planned: Manifest, plan: EditPlan) -> Iterator[Mismatch]:
    """Where the manifest is not the plan that its own edit leads to; figures and digests aside."""
    ours, theirs = (json.loads(canonical_json(m.to_json())) for m in (planned, manifest))
    other = [key for key in _RECIPE_KEYS if theirs["recipe"].get(key) != ours["recipe"][key]]
    if other:
        yield Mismatch(
            MANIFEST_NAME,
            f"it was made with another recipe called {ours['recipe']['name']} ({', '.join(other)} differ); "
            "if that is a file of yours, say --recipe FILE.yaml",
        )
    for block, keys in (
        ("edit", ours["edit"].keys() - {"from_recipe"}),  # the flags may have said the same
        ("model", ours["model"].keys()),
    ):
        for key in sorted(keys):
            if theirs[block].get(key) != ours[block][key]:
                yield Mismatch(
                    MANIFEST_NAME,
                    f"{block}.{key} is {theirs[block].get(key)!r}, planned {ours[block][key]!r}",
                )
    files = {file.name: file for file in manifest.files}
    for file in planned.files:
        noted = files.pop(file.name, None)
        if noted is None or _known_first(noted) != _known_first(file):
            yield Mismatch(file.name, "the manifest's record of this file is not what it should be")
    for name in files:
        yield Mismatch(name, "is in the manifest only")
    recorded = {edit.tensor: edit for edit in manifest.edits}
    layouts = {target.query.name: target.layout for target in plan.edits}
    for edit in planned.edits:
        heads = [(head, layouts[edit.tensor].kv_head(head)) for head in plan.settings.heads]
        record = recorded.pop(edit.tensor, None)
        if record is None:
            yield Mismatch(edit.tensor, "should be edited, and the manifest has no record of it")
        elif record.without_figures() != edit:
            yield Mismatch(edit.tensor, "the manifest's record of this tensor is not what SOURCE stores")
        elif [(head.head, head.kv_head) for head in record.heads] != heads:
            yield Mismatch(edit.tensor, "the manifest's heads of this tensor are not the planned ones")
    for name in recorded:
        yield Mismatch(name, "the manifest records an edit that its own settings do not lead to")


def _known_first(file: FileRecord) -> FileRecord:
    """The record without digests: one is taken last, the other only where SOURCE lies in the Hub cache."""
    return replace(file, sha256=None, source_sha256=None)


def _compare(
    wanted: OutputFile,
    out: LocalFile,
    allowed: list[tuple[int, int]],
    checkpoint: Checkpoint,
    progress: Progress,
) -> Iterator[Mismatch]:
    """The first byte outside ``allowed`` that is neither SOURCE's nor our own header's."""
    if wanted.size != out.size:
        yield Mismatch(wanted.name, f"has {out.size} bytes, and should have {wanted.size}")
        return
    with out.open() as b:
        if bytes(read_exact(b, len(wanted.own), 0, out.path)) != wanted.own:
            yield Mismatch(wanted.name, "the header or index is not as qkpatch writes it")
            return
        for source, extents in groupby(wanted.around(allowed), attrgetter("file")):
            with source.open() as a:
                for extent in extents:
                    difference = _first_difference(a, b, extent, wanted.name, progress)
                    if difference is not None:
                        place = _place(checkpoint, source.name, difference - extent.at + extent.begin)
                        yield Mismatch(
                            wanted.name,
                            f"differs outside the planned rows, first at byte {difference}{place}",
                        )
                        return
        progress(len(wanted.own) + sum(end - begin for begin, end in allowed))


def _check_edits(manifest: Manifest, plan: EditPlan, present: dict[str, LocalFile]) -> Iterator[Mismatch]:
    """The digests of edited tensors, on both sides, and that an edit is there at all."""
    sources, recorded = plan.model.checkpoint.files, {edit.tensor: edit for edit in manifest.edits}
    for target in plan.edits:
        record = recorded.get(target.query.name)
        for ref, written in zip(target.written, record.written if record else (), strict=False):
            place = plan.output.place(ref)
            out = present.get(place.shard)
            if out is None or out.size != plan.output.files[place.shard].size:
                continue  # told already
            before = _digest(sources[ref.shard], ref)
            after = _digest(out, place)
            if written.sha256_before is not None and before != written.sha256_before:
                yield Mismatch(ref.name, "SOURCE does not hold the values that were edited (sha256_before)")
            if written.sha256_after is not None and after != written.sha256_after:
                yield Mismatch(ref.name, "OUT does not hold the values that were written (sha256_after)")
            if before == after and not written.may_stay:
                yield Mismatch(ref.name, "is the same in SOURCE and OUT: the edit is not there")


def _digest(file: SourceFile, ref: TensorRef) -> str:
    with file.open() as fd:
        return sha256_range(fd, ref.begin, ref.end, file.where)


def _first_difference(a: Readable, b: Readable, extent: Extent, where: str, progress: Progress) -> int | None:
    """The offset in OUT."""
    offset = extent.at
    pairs = Reader().pairs(
        Span(a, extent.begin, extent.end, extent.file.name), Span(b, extent.at, extent.upto, where)
    )
    for x, y in pairs:
        if x != y:
            return offset + next(i for i in range(len(x)) if x[i] != y[i])
        offset += len(x)
        progress(len(x))
    return None


def _place(checkpoint: Checkpoint, shard: str, offset: int) -> str:
    """What lies at an offset of a file of SOURCE."""
    header = checkpoint.headers.get(shard)
    if header is not None:
        if offset < header.data_start:
            return ", in its header"
        for ref in header.tensors.values():
            if ref.begin <= offset < ref.end:
                return f", in {ref.name}"
    return ""


def _library_verdict(wanted: OutputFile, out: LocalFile) -> Iterator[Mismatch]:
    """The safetensors library must open what it opened in SOURCE; it does not know every dtype we carry over."""
    sources = [extent.file for extent in wanted.extents]
    accepted = all(isinstance(file, LocalFile) and _library_accepts(file.path) for file in sources)
    if accepted and not _library_accepts(out.path):
        yield Mismatch(out.name, "the safetensors library opens it in SOURCE and refuses it in OUT")


def _library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False
