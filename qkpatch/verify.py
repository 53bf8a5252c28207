"""Proof that OUT is SOURCE plus the edit its manifest declares, byte for byte. Reads both sides, writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qkpatch.canonical import canonical_json
from qkpatch.catalogue import shipped_recipes
from qkpatch.checkpoint.files import Progress, open_read, sha256_range
from qkpatch.checkpoint.side_by_side import Reader, Span
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME, Checkpoint, open_checkpoint
from qkpatch.checkpoint.tree import SourceFile, read_whole, walk_files
from qkpatch.errors import AmbiguousError, CheckpointError, UnsupportedError, UsageError
from qkpatch.locate import locate
from qkpatch.manifest import EditRecord, Manifest, planned_manifest
from qkpatch.plan import EditPlan, make_plan
from qkpatch.sums import sums_text

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
    before and after as recorded; every shard accepted by the safetensors library too. ``progress`` hears of
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
    manifest = Manifest.loads(read_whole(out / MANIFEST_NAME), f"{out.name}/{MANIFEST_NAME}")
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
    checkpoint = open_checkpoint(locate(source).path) if plan is None else plan.model.checkpoint
    present, _ = walk_files(out, skip=())
    present.pop(MANIFEST_NAME, None)
    sums = present.pop(SUMS_NAME, None) if SUMS_NAME not in checkpoint.files else None
    found += _file_sets(checkpoint, present)
    found += _check_sums(manifest, out, sums, present)
    recorded = {edit.tensor: edit for edit in manifest.edits}
    edited_bytes = 0
    for name in sorted(checkpoint.files.keys() & present.keys()):
        allowed = [] if plan is None else plan.written_ranges(name)
        edited_bytes += sum(end - begin for begin, end in allowed)
        planned = () if plan is None else plan.edits_by_shard.get(name, ())
        edits = [recorded[target.query.name] for target in planned if target.query.name in recorded]
        found += _compare(checkpoint.files[name], present[name], edits, allowed, checkpoint, progress)
        if name in checkpoint.headers:
            found += _library_verdict(checkpoint.files[name], present[name])
    return Verification(
        files=len(present),
        edited_tensors=len(manifest.edits),
        compared_bytes=sum(file.size for file in present.values()),
        edited_bytes=edited_bytes,
        mismatches=tuple(found),
    )


def _check_sums(
    manifest: Manifest, out: Path, sums: SourceFile | None, present: dict[str, SourceFile]
) -> Iterator[Mismatch]:
    """Digests of whole files, where the manifest has them: they, SHA256SUMS and the files must agree."""
    wanted = [file for file in manifest.files if file.sha256 is not None]
    if not wanted and sums is None:
        return
    record = read_whole(out / MANIFEST_NAME)
    if sums is None or len(wanted) < len(manifest.files):
        yield Mismatch(SUMS_NAME, "is there for some files only, or not at all")
    elif read_whole(sums.path, sums.id) != sums_text(manifest, record).encode():
        yield Mismatch(SUMS_NAME, "does not say what the manifest says")
    for file in wanted:
        found = present.get(file.name)
        if found is not None:
            with open_read(found.path, found.id) as fd:
                if sha256_range(fd, 0, found.size, found.path) != file.sha256:
                    yield Mismatch(file.name, "does not have the recorded digest (sha256)")


def _file_sets(checkpoint: Checkpoint, present: dict[str, SourceFile]) -> Iterator[Mismatch]:
    for name in sorted(checkpoint.files.keys() - present.keys()):
        yield Mismatch(name, "is in SOURCE and missing from OUT")
    for name in sorted(present.keys() - checkpoint.files.keys()):
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
        if noted is None or replace(noted, sha256=None) != file:
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


def _compare(
    source: SourceFile,
    out: SourceFile,
    edits: list[EditRecord],
    allowed: list[tuple[int, int]],
    checkpoint: Checkpoint,
    progress: Progress,
) -> Iterator[Mismatch]:
    if source.size != out.size:
        yield Mismatch(source.name, f"has {out.size} bytes, {source.size} in SOURCE")
        return
    with open_read(source.path, source.id) as a, open_read(out.path, out.id) as b:
        position = 0
        for begin, end in [*allowed, (source.size, source.size)]:
            difference = _first_difference(a, b, position, begin, source.name, progress)
            if difference is not None:
                yield Mismatch(
                    source.name,
                    f"differs outside the planned rows, {_place(checkpoint, source.name, difference)}",
                )
                return
            progress(end - begin)
            position = end
        for written in (w for edit in edits for w in edit.written if w.shard == source.name):
            ref = checkpoint.tensors.get(written.tensor)
            if ref is None:
                yield Mismatch(written.tensor, "is recorded as edited, and SOURCE does not store it")
                continue
            before = sha256_range(a, ref.begin, ref.end, source.name)
            after = sha256_range(b, ref.begin, ref.end, source.name)
            if written.sha256_before is not None and before != written.sha256_before:
                yield Mismatch(ref.name, "SOURCE does not hold the values that were edited (sha256_before)")
            if written.sha256_after is not None and after != written.sha256_after:
                yield Mismatch(ref.name, "OUT does not hold the values that were written (sha256_after)")
            if before == after and not written.may_stay:
                yield Mismatch(ref.name, "is the same in SOURCE and OUT: the edit is not there")


def _first_difference(a: int, b: int, begin: int, end: int, where: str, progress: Progress) -> int | None:
    offset = begin
    for x, y in Reader().pairs(Span(a, begin, end, where), Span(b, begin, end, where)):
        if x != y:
            return offset + next(i for i in range(len(x)) if x[i] != y[i])
        offset += len(x)
        progress(len(x))
    return None


def _place(checkpoint: Checkpoint, shard: str, offset: int) -> str:
    header = checkpoint.headers.get(shard)
    if header is not None:
        if offset < header.data_start:
            return f"first at byte {offset}, in its header"
        for ref in header.tensors.values():
            if ref.begin <= offset < ref.end:
                return f"first at byte {offset}, in {ref.name}"
    return f"first at byte {offset}"


def _library_verdict(source: SourceFile, out: SourceFile) -> Iterator[Mismatch]:
    """The safetensors library must open what it opened in SOURCE; it does not know every dtype we carry over."""
    if _library_accepts(source.path) and not _library_accepts(out.path):
        yield Mismatch(out.name, "the safetensors library opens it in SOURCE and refuses it in OUT")


def _library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False
