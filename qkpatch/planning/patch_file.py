"""``Patch``: rows of tensors in a safetensors file, with digests of their bytes and of those that they replace.

A patch file holds what an edit writes; an undo file what it overwrote. Rows are found by the names of their tensors,
``q_proj.weight[first:last]``, however a checkpoint is sharded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from qkpatch.checkpoint.files import LocalOpenFile, OpenFile, write_exact
from qkpatch.checkpoint.header import TensorRef, read_header
from qkpatch.checkpoint.tree import LocalFile, is_plain_relative, source_file
from qkpatch.common.json_text import canonical_json, load_json
from qkpatch.common.text import cut
from qkpatch.common.typed_json import as_json, from_json
from qkpatch.errors import CheckpointError, HeaderError, QKPatchError, UsageError
from qkpatch.model.locate import Access
from qkpatch.model.targets import LayerTarget
from qkpatch.output.reshard import shard_header
from qkpatch.planning.manifest import HeadRecord, Manifest
from qkpatch.planning.plan import EditPlan, make_plan
from qkpatch.planning.request import Request

FORMAT = "qkpatch-patch/1"
_ROWS = re.compile(r"(.+)\[(\d{1,19}):(\d{1,19})\]", re.ASCII | re.DOTALL)
_ANEW = "copy it anew from where it was made, or make it anew: qkpatch apply SOURCE --patch-only"
_SHA256 = re.compile("[0-9a-f]{64}")

Opened = Callable[[str, Sequence[tuple[int, int]]], AbstractContextManager[OpenFile]]


@dataclass(frozen=True)
class Record:
    """What a patch says besides the manifest of its edit."""

    digests: Mapping[str, tuple[str, str]]  # of rows: SHA-256 of what they replace, and of themselves
    # By edited tensor, SHA-256 of all that its edit was computed from; of an undo, less the rows, and of config.json.
    reads: Mapping[str, str] = field(default_factory=dict)
    # Of an undo: the mtime_ns of files before the edit and after; of the manifest, whether there was one.
    former: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Patch:
    """A patch file, or an undo file, that was read and is whole."""

    file: LocalFile
    manifest: Manifest  # of the edit
    record: Record
    rows: Mapping[str, TensorRef]

    @property
    def heads(self) -> dict[str, tuple[HeadRecord, ...]]:
        """Figures of the heads, by edited tensor."""
        return {edit.tensor: edit.heads for edit in self.manifest.edits}

    def placed(self, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
        """The rows as a checkpoint stores them; raises :class:`UsageError` where it has no such rows."""
        found = {}
        for name, ref in self.rows.items():
            match = _ROWS.fullmatch(name)
            tensor = tensors.get(match[1]) if match else None
            first, last = map(int, match.groups()[1:]) if match else (0, 0)
            if tensor is None or not tensor.nbytes or not first < last <= (*tensor.shape, 0)[0]:
                raise self.unfit(f"{cut(name, 200)} is not there")
            row = tensor.nbytes // tensor.shape[0]
            found[name] = there = rows_of(tensor, tensor.begin + first * row, tensor.begin + last * row)
            if (ref.dtype, ref.shape) != (there.dtype, there.shape):
                forms = [f"{one.dtype} {list(one.shape)}" for one in (there, ref)]
                raise self.unfit(f"{cut(name, 200)} is {forms[0]} there, and {forms[1]} in the patch")
        return found

    def plan(self, source: str, besides: Request, access: Access) -> EditPlan:
        """The plan that its edit leads to on SOURCE, written from its rows; ``besides`` says how, and no edit.

        Raises as :func:`make_plan`, and :class:`UsageError` where SOURCE has other rows.
        """
        made, recipe = self.manifest, besides.recipe or self.manifest.recipe.name
        how = Request(max_shard_size=besides.max_shard_size, exclude=besides.exclude)
        if self.record.former or replace(besides, recipe=None) != how:
            what = "undo files are for qkpatch revert" if self.record.former else "a patch has its edit in it"
            raise UsageError(what, where="--patch", fix="leave out --patch, or what says another edit")
        request = how.over(replace(made.request(), recipe=recipe, max_shard_size=None, exclude=None))
        try:
            plan = make_plan(source, request, access)
        except UsageError as error:
            if str(error.where).startswith(("--layers", "--heads", "--modes")):  # which nobody gave
                raise self.unfit(error.what) from error
            raise
        figures = {tensor: tuple(head.head for head in heads) for tensor, heads in self.heads.items()}
        is_same = figures == {target.query.name: plan.settings.heads for target in plan.edits}
        if self.placed(plan.model.checkpoint.tensors) != planned_rows(plan) or not is_same:
            raise self.unfit("its edit leads to other rows there")
        return replace(plan, patch=self, settings=replace(plan.settings, from_recipe=made.edit.from_recipe))

    def check_source(self, plan: EditPlan) -> None:
        """Raise :class:`UsageError` where SOURCE is not what the edit was computed from."""
        for name, ref in planned_rows(plan).items():
            with plan.model.checkpoint.opened(ref.shard, [(ref.begin, ref.end)]) as source:
                if source.sha256(ref.begin, ref.end) != self.record.digests[name][0]:
                    raise self.unfit(f"{name} has other values there")
        for target in plan.edits:
            found = read_digest(target, plan.settings.heads, plan.model.checkpoint.opened)
            if found != self.record.reads.get(target.query.name):
                raise self.unfit(f"keys, norms or scales of layer {target.layer} have other values there")

    def unfit(self, what: str) -> UsageError:
        """The error for a checkpoint that these are no rows of."""
        source = self.manifest.source.address or self.manifest.source.name
        fix = f"use it on {source}, which it was made from; or make the edit itself"
        return UsageError(f"the patch is of another SOURCE: {what}", where=str(self.file.path), fix=fix)


def rows_of(ref: TensorRef, begin: int, end: int) -> TensorRef:
    """Whole rows of a tensor, at bytes of its shard, as a tensor by themselves."""
    row = ref.nbytes // ref.shape[0]
    first, last = ((at - ref.begin) // row for at in (begin, end))
    shape = (last - first, *ref.shape[1:])
    return replace(ref, name=f"{ref.name}[{first}:{last}]", shape=shape, begin=begin, end=end)


def planned_rows(plan: EditPlan) -> dict[str, TensorRef]:
    """What ``plan`` writes of SOURCE's tensors, by name: rows of each head, and its scales."""
    heads = ((target, head) for target in plan.edits for head in plan.settings.heads)
    found = [rows_of(*part) for target, head in heads for part in target.written_ranges(head)]
    return {rows.name: rows for rows in found}


def read_digest(target: LayerTarget, heads: Sequence[int], opened: Opened, *, is_done: bool = False) -> str:
    """SHA-256 of all that an edit of ``heads`` is computed from; once it is done, of what it leaves of that."""
    digest, rows = hashlib.sha256(), {part for head in heads for part in target.written_ranges(head)}
    for ref, ranges in target.read_rows(heads).items():
        with opened(ref.shard, ranges) as source:
            for begin, end in ranges:
                if not is_done or (ref, begin, end) not in rows:
                    source.feed(digest, begin, end)
    return digest.hexdigest()


def read_patch(path: Path, fix: str = _ANEW) -> Patch:
    """A patch or undo file, its header in memory; raises :class:`CheckpointError` where it is none, or damaged."""
    file = source_file(path, path.name, fix="name a file that --patch-only made")
    try:
        with file.open() as opened:
            header = read_header(opened, path.name)
            said = dict(header.metadata or {})
            if said.get("format") != FORMAT:
                raise ValueError(f"its metadata does not say {FORMAT}")
            manifest = Manifest.loads(said["manifest"].encode(), str(path))
            record: Record = from_json(Record, load_json(said["record"].encode(), str(path), unique=True))
            times = [time for both in record.former.values() for time in both]
            if not all(map(is_plain_relative, record.former)) or any(abs(time) >= 2**63 for time in times):
                raise ValueError("files and times that it names are none")
            if record.digests.keys() != header.tensors.keys():
                raise ValueError("its rows are not those that its digests are of")
            for name, ref in header.tensors.items():
                digests = record.digests[name]
                is_whole = all(map(_SHA256.fullmatch, digests))
                if not is_whole or opened.sha256(ref.begin, ref.end) != digests[1]:
                    raise ValueError(f"{cut(name, 200)} is not what its digest says")
    except (HeaderError, CheckpointError, ValueError, KeyError) as error:
        what = error.what if isinstance(error, QKPatchError) else str(error)
        raise CheckpointError(f"no patch file, or a damaged one: {what}", where=str(path), fix=fix) from error
    return Patch(file, manifest, record, header.tensors)


def patch_header(
    name: str, rows: Iterable[TensorRef], manifest: Manifest, record: Record
) -> tuple[bytes, dict[str, TensorRef]]:
    """The header of a patch file called ``name``, and where ``rows`` are in it."""
    said = {"format": FORMAT, "manifest": manifest.dumps(), "record": canonical_json(as_json(record))}
    return shard_header(name, list(rows), said)


def write_patch(
    out: LocalOpenFile, rows: Sequence[tuple[TensorRef, OpenFile]], manifest: Manifest, record: Record
) -> None:
    """Write a patch file: ``rows`` by their names, and where their bytes are."""
    own, places = patch_header(out.where, [ref for ref, _ in rows], manifest, record)
    write_exact(out.fd, own, 0, out.where)
    for ref, opened in rows:
        opened.copy_to(out, ref.begin, ref.end, places[ref.name].begin)
