"""The one loop: carry every file over, edit the planned rows in place, publish. Success is the last act."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
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
from qkpatch.spectral.edit import Folding, edit_and_round
from qkpatch.targets import LayerTarget
from qkpatch.weights import one_thread, open_layer

GAP_WARNING = 1e-3
ROUNDING_WARNING = 0.1  # FP8 has three bits: a small change drowns in its rounding
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
        means = [
            _copy(file, staging.path / name, observer, then_edited=name in plan.edits_by_shard)
            for name, file in checkpoint.files.items()
        ]
        with _opened({name: staging.path / name for name in plan.edits_by_shard}) as fds:
            edits_done = tuple(edit_layer(plan, edit, fds, device, observer) for edit in plan.edits)
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
    plan: EditPlan, target: LayerTarget, out_fds: Mapping[str, int], device: torch.device, observer: Observer
) -> EditRecord:
    """Edit the planned heads of one layer in the open output shards, which hold the source's bytes so far."""
    query, settings = target.query, plan.settings
    heads = []
    with open_layer(plan.model, target, device) as weights:
        before = _digests(target, weights.fds)
        gain, is_changed = weights.invertible_gain(), False
        for of in weights.heads(settings.heads):
            generator = head_generator(settings.seed, target, of.head)
            try:
                store = functools.partial(weights.store, of.head)
                folding = None if gain is None else Folding(of.W_Q, gain)
                stored, report = edit_and_round(of.product, settings.rule, store, generator, folding)
            except NumericalError as error:
                where = f"head {of.head} of {query.name}, {query.dtype}"
                raise NumericalError(error.what, where=where, fix=error.fix) from error
            # By value: a −0.0 that became 0.0 is no edit, and stays.
            if not torch.equal(stored.values, of.W_Q):
                is_changed = True
                for ref, offset, data in stored.pieces:
                    write_exact(out_fds[ref.shard], data, offset, ref.shard)
            heads.append(HeadRecord(head=of.head, kv_head=target.layout.kv_head(of.head), **vars(report)))
            observer.edited(1)
    if not is_changed:
        raise NumericalError(
            f"the edit leaves every value as it is: it rounds away in {query.dtype}, or the product is zero",
            where=f"{query.name} in {query.shard}",
            fix=f"use a smaller --alpha, or leave layer {target.layer} out; --alpha 1 is the declared no-op",
        )
    after = _digests(target, out_fds)  # of what reached the file
    return EditRecord.planned(target).done(before, after, tuple(heads))


def head_generator(seed: int, target: LayerTarget, head: int) -> torch.Generator:
    """Random numbers of one head: the same whichever other heads and layers are edited, in whatever order."""
    name = f"qkpatch:{seed}:{target.attention}:{target.layer}:{head}"
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _digests(target: LayerTarget, fds: Mapping[str, int]) -> list[str]:
    return [sha256_range(fds[ref.shard], ref.begin, ref.end, ref.shard) for ref in target.written]


def _copy(file: SourceFile, target: Path, observer: Observer, *, then_edited: bool) -> str:
    """Copy one file into staging; it is synced here unless it is edited next. Returns the means of copying."""
    with open_read(file.path, file.id) as source_fd, os_errors("create", target):
        # The owner may always write, so that edits can be made in a copy of a read-only file.
        out_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file.mode & 0o777 | 0o200)
        try:
            means = copy_content(source_fd, out_fd, file.size, file.path, observer.copied)
            if not then_edited:
                with os_errors("sync", target):
                    os.fsync(out_fd)
        finally:
            os.close(out_fd)
    return means


@contextmanager
def _opened(paths: Mapping[str, Path]) -> Iterator[Mapping[str, int]]:
    """The copies that are edited, open for reading and writing, and synced in the end."""
    fds: dict[str, int] = {}
    try:
        for name, path in paths.items():
            with os_errors("open", path):
                fds[name] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        yield fds
        for name, fd in fds.items():
            with os_errors("sync", paths[name]):
                os.fsync(fd)
    finally:
        for fd in fds.values():
            os.close(fd)


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


def _write_synced(path: Path, data: bytes) -> None:
    with os_errors("write", path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
