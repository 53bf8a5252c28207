"""The engine: files are copied while heads are edited, and OUT is published last. Success is the last act."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from statistics import mean

import torch

from qkpatch.canonical import canonical_json
from qkpatch.checkpoint.files import write_exact
from qkpatch.checkpoint.journal import Journal
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.checkpoint.space import check_space
from qkpatch.checkpoint.staging import Staging
from qkpatch.checkpoint.target import check_apart, check_out
from qkpatch.copier import Copier, Observer, space_needed
from qkpatch.crew import Crew
from qkpatch.device import heads_together, own_stream
from qkpatch.errors import NumericalError
from qkpatch.interrupts import signals_held, signals_let_through
from qkpatch.manifest import EditRecord, HeadRecord, Manifest, planned_manifest
from qkpatch.plan import EditPlan
from qkpatch.selection import abbreviate
from qkpatch.spectral.edit import Folding, HeadError, edit_and_round
from qkpatch.sums import refuse_own_sums, sums_text
from qkpatch.targets import LayerTarget
from qkpatch.weights import LayerWeights, open_layer
from qkpatch.writing import PLAIN, Digest, Writing

GAP_WARNING = 1e-3
ROUNDING_WARNING = 0.1  # FP8 has three bits: a small change drowns in its rounding
_NAMED = 8  # heads that a warning names
_HEADS_AT_A_TIME = 4  # of one tensor, by one thread: enough to share keys and open files


def apply_plan(
    plan: EditPlan,
    out: Path,
    *,
    device: torch.device,
    observer: Observer,
    threads: int = 1,
    writing: Writing = PLAIN,
) -> Manifest:
    """Write the edited checkpoint to ``out`` and return its manifest; the same bytes whatever ``threads``.

    SOURCE is only read. OUT appears whole, by one rename, or not at all.

    Raises:
        UsageError: OUT is not acceptable.
        FileSystemError: reading, writing or space.
        NumericalError: NaN or Inf, or a tensor that the edit would leave as it was.
    """
    checkpoint = plan.model.checkpoint
    check_out(out, plan.model.source.path, overwrite=writing.overwrite)
    check_apart(out, checkpoint)
    if writing.digest is Digest.files:
        refuse_own_sums(checkpoint)
    planned = planned_manifest(plan, str(device))
    fingerprint = _fingerprint(planned, plan)
    started = _now()
    with signals_held(), ExitStack() as stack:
        staging = stack.enter_context(Staging(out, fingerprint if writing.resume else None))
        journal = stack.enter_context(Journal(staging.path, fingerprint))
        check_space(out, space_needed(plan, staging.path, journal, writing), checkpoint.files.values())
        copier = stack.enter_context(Copier(plan, staging.path, journal, writing, observer))
        crew = stack.enter_context(Crew(threads))
        with signals_let_through():  # but not while any of the above begins or ends
            copying = crew.start(functools.partial(copier.copy_all, crew))
            edits = dict(_edited(plan, crew, copier, device, observer))
            carried = copying.result()
            tensor_sums = crew.map(functools.partial(_digests, copier, writing), plan.edits)
            done = tuple(
                EditRecord.planned(target).done(before, after, edits[target])
                for target, (before, after) in zip(plan.edits, tensor_sums, strict=True)
            )
            sums = {**{name: how.sha256 for name, how in carried.items()}, **copier.edited_sums(crew)}
            copier.sync_edited()
            manifest = replace(
                planned,
                tool={**planned.tool, "torch": str(torch.__version__), "python": platform.python_version()},
                edits=done,
                files=tuple(replace(file, sha256=sums[file.name]) for file in planned.files),
                warnings=(*planned.warnings, *_numerical_warnings(done, plan)),
                run={
                    "started": started,
                    "finished": _now(),
                    "copied_by": dict(Counter(how.means for how in carried.values())),
                },
            )
            record = manifest.dumps().encode()
            if writing.digest is Digest.files:
                copier.write_new(SUMS_NAME, sums_text(manifest, record).encode())
            copier.write_new(MANIFEST_NAME, record)
            journal.remove()
            staging.publish(checkpoint.directories, overwrite=writing.overwrite)
    return manifest


@dataclass(frozen=True)
class _Chunk:
    """A few heads of one tensor, edited by one thread."""

    target: LayerTarget
    heads: tuple[int, ...]


def _chunks(plan: EditPlan, at_least: int) -> Iterator[_Chunk]:
    """All heads to edit; those that share a key head stay together."""
    for target in plan.edits:
        chunk: list[int] = []
        for _, group in groupby(plan.settings.heads, target.layout.kv_head):
            chunk += group
            if len(chunk) >= at_least:
                yield _Chunk(target, tuple(chunk))
                chunk = []
        if chunk:
            yield _Chunk(target, tuple(chunk))


def _edited(
    plan: EditPlan, crew: Crew, copier: Copier, device: torch.device, observer: Observer
) -> Iterator[tuple[LayerTarget, tuple[HeadRecord, ...]]]:
    """Edit all planned heads; each target with its heads' records when it is done."""
    together = heads_together(device, plan.head_memory, crew.threads)

    def edit(chunk: _Chunk) -> tuple[LayerTarget, list[tuple[HeadRecord, bool]]]:
        with own_stream(device), open_layer(plan.model, chunk.target, device) as weights:
            done = []
            for record in _edit_heads(plan, chunk, together, weights, copier):
                crew.check()
                observer.edited(1)
                done.append(record)
        return chunk.target, done

    results = crew.map(edit, _chunks(plan, max(together, _HEADS_AT_A_TIME)))
    for target, parts in groupby(results, lambda result: result[0]):
        heads = [head for _, part in parts for head in part]
        if not any(is_changed for _, is_changed in heads):
            query = target.query
            raise NumericalError(
                f"the edit leaves every value as it is: it rounds away in {query.dtype}, or the product is zero",
                where=f"{query.name} in {query.shard}",
                fix=f"use a smaller --alpha, or leave layer {target.layer} out; --alpha 1 is the declared no-op",
            )
        yield target, tuple(record for record, _ in heads)


def _edit_heads(
    plan: EditPlan, chunk: _Chunk, together: int, weights: LayerWeights, copier: Copier
) -> Iterator[tuple[HeadRecord, bool]]:
    """Edit and write a few heads; each one's record, and whether any value changed."""
    target, settings, gain = chunk.target, plan.settings, weights.invertible_gain()
    for of in weights.batches(chunk.heads, together):
        generators = [head_generator(settings.seed, target, head) for head in of.heads]
        folding = None if gain is None else Folding(of.W_Q, gain)
        try:
            store = functools.partial(weights.store, of.heads)
            stored, reports = edit_and_round(of.product, settings.rule, store, generators, folding)
        except HeadError as error:
            where = f"head {of.heads[error.index]} of {target.query.name}, {target.query.dtype}"
            raise NumericalError(error.what, where=where, fix=error.fix) from error
        for i, head in enumerate(of.heads):
            # By value: a −0.0 that became 0.0 is no edit, and stays.
            is_changed = not torch.equal(stored.values[i], of.W_Q[i])
            for ref, begin, end in target.written_ranges(head):
                data = stored.pieces[i][ref] if is_changed else weights.raw(ref, begin, end)
                write_exact(copier.fds[ref.shard], data, begin, ref.shard)
            record = HeadRecord(head=head, kv_head=target.layout.kv_head(head), **vars(reports[i]))
            yield record, is_changed
        del of, stored, store, folding  # before the next heads are read


def head_generator(seed: int, target: LayerTarget, head: int) -> torch.Generator:
    """Random numbers of one head: the same whichever other heads and layers are edited, in whatever order."""
    name = f"qkpatch:{seed}:{target.attention}:{target.layer}:{head}"
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _fingerprint(planned: Manifest, plan: EditPlan) -> str:
    """What a run must have in common with one that it resumes: the plan, the stack, and the very files of SOURCE."""
    files = {name: str(file.id) for name, file in plan.model.checkpoint.files.items()}
    return hashlib.sha256(canonical_json({**planned.to_json(), "source_files": files}).encode()).hexdigest()


def _digests(
    copier: Copier, writing: Writing, target: LayerTarget
) -> tuple[list[str | None], list[str | None]]:
    """SHA-256 of each written tensor in SOURCE, and of what reached the file in OUT."""
    if writing.digest is Digest.none:
        return [None] * len(target.written), [None] * len(target.written)
    before: list[str | None] = [copier.source_sum(ref) for ref in target.written]
    after: list[str | None] = [copier.staged_sum(ref) for ref in target.written]
    return before, after


def _numerical_warnings(edits: Sequence[EditRecord], plan: EditPlan) -> list[str]:
    """What a user should know about the spectra that were met."""
    modes = plan.settings.rule.paired_modes
    narrow, short = [], []
    for edit in edits:
        for head in edit.heads:
            if head.gap is not None and head.gap < GAP_WARNING:
                narrow.append(f"{edit.layer}.{head.head}")
            expected = len(head.modes) if plan.settings.rule.takes_modes else head.rank
            if expected < modes:
                short.append(f"{edit.layer}.{head.head}")
    warnings = []
    if narrow:
        warnings.append(
            f"relative gap under {GAP_WARNING:g} at the cut, so the choice of modes is nearly arbitrary, "
            f"in {len(narrow)} head(s) (layer.head): {abbreviate(narrow, _NAMED)}"
        )
    if short:
        warnings.append(
            f"there are fewer than {modes} such modes above rounding, so fewer were edited, "
            f"in {len(short)} head(s) (layer.head): {abbreviate(short, _NAMED)}"
        )
    coarse = [edit for edit in edits if _mean_rounding(edit) > ROUNDING_WARNING]
    if coarse:
        worst = max(_mean_rounding(edit) for edit in coarse)
        warnings.append(
            f"rounding to {coarse[0].dtype} adds noise of up to {worst:.0%} of the edit's size (mean over heads), "
            f"in {len(coarse)} tensor(s)"
        )
    return warnings


def _mean_rounding(edit: EditRecord) -> float:
    return mean(head.rounding_error for head in edit.heads)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
