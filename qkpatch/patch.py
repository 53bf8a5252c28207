"""The one loop: carry every file over, edit the planned rows in place, publish. Success is the last act."""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import torch

from qkpatch.checkpoint.files import copy_content, open_read, os_errors, sha256_range, write_exact
from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.checkpoint.space import check_space
from qkpatch.checkpoint.staging import Staging
from qkpatch.checkpoint.target import check_apart, check_out
from qkpatch.checkpoint.tree import SourceFile
from qkpatch.errors import NumericalError
from qkpatch.manifest import EditRecord, HeadRecord, Manifest, planned_manifest
from qkpatch.plan import EditPlan
from qkpatch.selection import abbreviate
from qkpatch.spectral.edit import edit_and_round
from qkpatch.targets import LayerTarget
from qkpatch.weights import DTYPES, one_thread, open_layer, to_bytes

GAP_WARNING = 1e-3
_NAMED = 8  # heads that a warning names


class Observer(Protocol):
    """Hears of progress; the surface draws it."""

    def copied(self, n_bytes: int) -> None:
        """``n_bytes`` more were copied."""

    def edited(self, n_heads: int) -> None:
        """``n_heads`` more were edited."""


def apply_plan(
    plan: EditPlan, out: Path, *, device: torch.device, observer: Observer, overwrite: bool = False
) -> Manifest:
    """Write the edited checkpoint to ``out`` and return its manifest.

    SOURCE is only read. OUT appears whole, by one rename, or not at all.

    Raises:
        UsageError: OUT is not acceptable.
        FileSystemError: reading, writing or space.
        NumericalError: NaN or Inf, or a tensor that the edit would leave as it was.
    """
    checkpoint = plan.model.checkpoint
    check_out(out, plan.model.source.path, overwrite=overwrite)
    check_apart(out, checkpoint)
    check_space(out, plan.output_bytes, checkpoint.files.values())
    planned = planned_manifest(plan, str(device))
    started = _now()
    with one_thread(), Staging(out) as staging:
        for name in checkpoint.directories:
            with os_errors("create a directory", out / name):
                (staging.path / name).mkdir()
        means, records = [], {}
        for name, file in checkpoint.files.items():
            how, edits = _carry_over(file, staging.path / name, plan, device, observer)
            means.append(how)
            records.update({edit.tensor: edit for edit in edits})
        edits_done = tuple(records[edit.tensor] for edit in planned.edits)
        manifest = replace(
            planned,
            tool={**planned.tool, "torch": str(torch.__version__), "python": platform.python_version()},
            edits=edits_done,
            warnings=(*planned.warnings, *_numerical_warnings(edits_done, plan)),
            run={
                "started": started,
                "finished": _now(),
                "copied_by": dict(Counter(means)),
            },
        )
        _write_synced(staging.path / MANIFEST_NAME, manifest.dumps().encode())
        staging.publish(checkpoint.directories, overwrite=overwrite)
    return manifest


def edit_layer(
    plan: EditPlan, target: LayerTarget, out_fd: int, device: torch.device, observer: Observer
) -> EditRecord:
    """Edit the planned heads of one layer in the open output shard, which holds the source's bytes so far."""
    layout, query, settings = target.layout, target.query, plan.settings
    heads = []
    with open_layer(plan.model, target, device) as weights:
        before = sha256_range(weights.fds[query.shard], query.begin, query.end, query.shard)
        is_changed = False
        for of in weights.heads(settings.heads):
            generator = head_generator(settings.seed, target, of.head)
            try:
                stored, report = edit_and_round(
                    of.product, settings.rule, DTYPES[query.dtype], generator, weights.input_gain
                )
            except NumericalError as error:
                where = f"head {of.head} of {query.name}"
                raise NumericalError(error.what, where=where, fix=error.fix) from error
            # By value: a −0.0 that became 0.0 is no edit, and stays.
            if not torch.equal(stored.to(of.W_Q.dtype), of.W_Q):
                is_changed = True
                write_exact(out_fd, to_bytes(stored), layout.query_range(query, of.head)[0], query.shard)
            heads.append(HeadRecord(head=of.head, kv_head=layout.kv_head(of.head), **vars(report)))
            observer.edited(1)
    if not is_changed:
        raise NumericalError(
            f"the edit leaves every value as it is: it rounds away in {query.dtype}, or the product is zero",
            where=f"{query.name} in {query.shard}",
            fix=f"use a smaller --alpha, or leave layer {target.layer} out; --alpha 1 is the declared no-op",
        )
    after = sha256_range(out_fd, query.begin, query.end, query.shard)  # what reached the file
    return replace(EditRecord.planned(target), sha256_before=before, sha256_after=after, heads=tuple(heads))


def head_generator(seed: int, target: LayerTarget, head: int) -> torch.Generator:
    """Random numbers of one head: the same whichever other heads and layers are edited, in whatever order."""
    name = f"qkpatch:{seed}:{target.attention}:{target.layer}:{head}"
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _carry_over(
    file: SourceFile,
    target: Path,
    plan: EditPlan,
    device: torch.device,
    observer: Observer,
) -> tuple[str, list[EditRecord]]:
    """Copy one file into staging, edit the copy, sync it; returns the means of copying and the edits made."""
    with open_read(file.path, file.id) as source_fd, os_errors("create", target):
        # The owner may always write, so that edits can be made in a copy of a read-only file.
        out_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file.mode & 0o777 | 0o200)
        try:
            means = copy_content(source_fd, out_fd, file.size, file.path, observer.copied)
            edits = plan.edits_by_shard.get(file.name, ())
            records = [edit_layer(plan, edit, out_fd, device, observer) for edit in edits]
            with os_errors("sync", target):
                os.fsync(out_fd)
        finally:
            os.close(out_fd)
    return means, records


def _numerical_warnings(edits: Iterable[EditRecord], plan: EditPlan) -> list[str]:
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
    return warnings


def _write_synced(path: Path, data: bytes) -> None:
    with os_errors("write", path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
