"""Proof that OUT is SOURCE plus the edit its manifest declares, byte for byte. Reads both sides, writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qkpatch.checkpoint.files import READ_CHUNK, Progress, open_read, read_exact, sha256_range
from qkpatch.checkpoint.source import MANIFEST_NAME, Checkpoint, open_checkpoint
from qkpatch.checkpoint.tree import SourceFile, read_whole, walk_files
from qkpatch.errors import CheckpointError
from qkpatch.heads import HeadLayout
from qkpatch.locate import locate
from qkpatch.manifest import EditRecord, Manifest
from qkpatch.rows import RowLayout


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


def verify(out: Path, source: str, progress: Progress) -> Verification:
    """Check OUT against SOURCE and its own manifest.

    The same files; every byte equal but the rows of the planned heads; each edited tensor's digest before and
    after as recorded; every shard accepted by the safetensors library too. ``progress`` hears of bytes compared.

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
    checkpoint = open_checkpoint(locate(source).path)
    present, _ = walk_files(out)
    present.pop(MANIFEST_NAME, None)
    found = [*_file_sets(manifest, checkpoint, present), *_declared(manifest)]
    planned = {edit.tensor: edit for edit in manifest.edits}
    found += _tensor_records(planned, checkpoint)
    edited_bytes = 0
    for name in sorted(checkpoint.files.keys() & present.keys()):
        edits = [edit for edit in manifest.edits if _home(edit, checkpoint) == name]
        allowed = _planned_ranges(edits, manifest, checkpoint)
        edited_bytes += sum(end - begin for begin, end in allowed)
        found += _compare(checkpoint.files[name], present[name], edits, allowed, checkpoint, progress)
        if name in checkpoint.headers:
            found += _library_verdict(checkpoint.files[name], present[name])
    return Verification(
        files=len(present),
        edited_tensors=len(planned),
        compared_bytes=sum(file.size for file in present.values()),
        edited_bytes=edited_bytes,
        mismatches=tuple(found),
    )


def _file_sets(
    manifest: Manifest, checkpoint: Checkpoint, present: dict[str, SourceFile]
) -> Iterator[Mismatch]:
    recorded = {file.name for file in manifest.files}
    for file in manifest.files:
        if file.name in present and present[file.name].size != file.size:
            yield Mismatch(file.name, f"has {present[file.name].size} bytes, {file.size} in the manifest")
    for name in sorted(checkpoint.files.keys() - present.keys()):
        yield Mismatch(name, "is in SOURCE and missing from OUT")
    for name in sorted(present.keys() - checkpoint.files.keys()):
        yield Mismatch(name, "is in OUT and not in SOURCE")
    for name in sorted(recorded ^ checkpoint.files.keys()):
        yield Mismatch(name, f"is in {'the manifest' if name in recorded else 'SOURCE'} only")


def _declared(manifest: Manifest) -> Iterator[Mismatch]:
    """The edit that the manifest declares must be the edit that it records, layer by layer and head by head."""
    edit = manifest.edit
    layers = [] if edit.get("alpha") == 1 else edit.get("layers")
    recorded = [record.layer for record in manifest.edits]
    if recorded != layers:
        yield Mismatch(MANIFEST_NAME, f"declares layers {layers} and records edits of layers {recorded}")
    for record in manifest.edits:
        heads = [head.head for head in record.heads]
        if heads != edit.get("heads"):
            yield Mismatch(
                record.tensor, f"the manifest declares heads {edit.get('heads')} and records {heads}"
            )


def _tensor_records(planned: dict[str, EditRecord], checkpoint: Checkpoint) -> Iterator[Mismatch]:
    """Each record must describe the tensor that SOURCE stores under its name."""
    for name, edit in planned.items():
        ref = checkpoint.tensors.get(name)
        if ref is None:
            yield Mismatch(name, "is edited by the manifest and not in SOURCE")
            continue
        recorded = (edit.shard, edit.dtype, edit.shape, edit.byte_range)
        stored = (ref.shard, ref.dtype, ref.shape, (ref.begin, ref.end))
        if recorded != stored:
            yield Mismatch(name, f"the manifest says {recorded}, SOURCE stores {stored}")


def _planned_ranges(
    edits: list[EditRecord], manifest: Manifest, checkpoint: Checkpoint
) -> list[tuple[int, int]]:
    """Byte ranges of the planned heads' rows, ascending; nothing else may differ."""
    model = manifest.model
    layout = HeadLayout(
        model["num_attention_heads"],
        model["num_key_value_heads"],
        model["head_dim"],
        model["hidden_size"],
        RowLayout(model["rows"]),
    )
    ranges = []
    for edit in edits:
        ref = checkpoint.tensors[edit.tensor]
        if ref.shape == layout.query_shape:
            ranges += [
                layout.query_range(ref, head.head) for head in edit.heads if 0 <= head.head < layout.n_heads
            ]
    return sorted(ranges)


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
        for edit in edits:
            ref = checkpoint.tensors[edit.tensor]
            before = sha256_range(a, ref.begin, ref.end, source.name)
            after = sha256_range(b, ref.begin, ref.end, source.name)
            if before != edit.sha256_before:
                yield Mismatch(
                    edit.tensor, "SOURCE does not hold the values that were edited (sha256_before)"
                )
            if after != edit.sha256_after:
                yield Mismatch(edit.tensor, "OUT does not hold the values that were written (sha256_after)")
            if before == after:
                yield Mismatch(edit.tensor, "is the same in SOURCE and OUT: the edit is not there")


def _first_difference(a: int, b: int, begin: int, end: int, where: str, progress: Progress) -> int | None:
    for offset in range(begin, end, READ_CHUNK):
        size = min(READ_CHUNK, end - offset)
        x, y = read_exact(a, size, offset, where), read_exact(b, size, offset, where)
        if x != y:
            return offset + next(i for i in range(size) if x[i] != y[i])
        progress(size)
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


def _home(edit: EditRecord, checkpoint: Checkpoint) -> str | None:
    """The shard in which SOURCE stores the edited tensor, whatever the record says."""
    ref = checkpoint.tensors.get(edit.tensor)
    return None if ref is None else ref.shard


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
