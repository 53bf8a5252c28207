"""The planned heads computed anew, by the engine of ``apply``, beside what OUT stores and its manifest says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any

from qkpatch.checkpoint.files import OpenFile
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.present_files import Present
from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.common.number_ranges import some
from qkpatch.common.observer import Observer
from qkpatch.compare.byte_by_byte import Mismatch
from qkpatch.compare.values import FLOATS, apart
from qkpatch.errors import NumericalError
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.apply import numerical_warnings
from qkpatch.patching.edit_heads import Editor, product_distance
from qkpatch.patching.head_products import Opened, open_layer
from qkpatch.patching.threads import Crew
from qkpatch.planning.manifest import EditRecord, HeadRecord, Manifest
from qkpatch.planning.memory import choose_threads
from qkpatch.planning.plan import EditPlan

ARBITRARY_GAP = 1e-9  # relative, at the cut: below it another stack takes other vectors
# What float64 leaves open of a row, relative; where the cut is narrow, more.
_OPEN, _OPEN_AT_GAP = 1e-12, 1e-14
_FIGURES = 1e-6  # of figures that another stack measured, relative to the largest
_SHOWN = 4


@dataclass(frozen=True)
class Arithmetic:
    """What came out of the planned heads computed anew."""

    heads: int
    stack: str  # "same", "other" or "unknown", beside the one that made OUT
    differing_values: int  # that are other bits, and as near as another stack's can be
    not_reproducible: tuple[
        str, ...
    ]  # "layer.head" whose cut is arbitrary, which another stack makes otherwise


@dataclass(frozen=True)
class _Apart:
    """How far the stored rows of a head are from those of the edit."""

    values: int
    off: float


def recompute(
    manifest: Manifest,
    planned: Manifest,
    plan: EditPlan,
    present: Present,
    opened: Opened,
    observer: Observer,
) -> tuple[Arithmetic, list[Mismatch]]:
    """Make the edit again, head by head, and compare.

    On the stack that the manifest names every bit is the same. On another, numbers are at most one ULP apart, or as
    near as float64 is exact; and a head whose cut is arbitrary has the same product but for a turn among equal modes.

    Args:
        manifest: of OUT.
        planned: what this qkpatch would record of ``plan``.
        plan: what its settings lead to on SOURCE.
        present: OUT.
        opened: opens a shard of SOURCE for reading some ranges.
        observer: hears of heads.
    """
    editor = Editor.on("cpu")
    # What was made by this version, on what computes here, has the same bits.
    stack = "unknown" if manifest.run.stack is None else "other"
    if manifest.run.stack == editor.stack and (manifest.tool.version, manifest.compute.device) == (
        planned.tool.version,
        "cpu",
    ):
        stack = "same"
    rows = {
        (plan.output.place(ref).shard, at): (target, head, ref)
        for target in plan.edits
        for head in plan.settings.heads
        for ref, _, _, at in plan.head_ranges(target, head)
    }
    differing: dict[tuple[str, int], _Apart] = {}

    def compare(name: str, data: bytes | bytearray, at: int) -> None:
        target, head, ref = rows[name, at]
        with present.open(name) as out:
            theirs = out.read(len(data), at)
        if theirs != data:
            known = differing.get((target.query.name, head), _Apart(0, 0.0))
            values, off = 1, math.inf
            if ref == target.query and ref.dtype in FLOATS:
                values, off = apart(bytearray(data), theirs, ref.dtype, target.layout.d_model)
            differing[target.query.name, head] = _Apart(known.values + values, max(known.off, off))

    made: list[EditRecord] = []
    found: list[Mismatch] = []
    arbitrary: list[str] = []
    n_values = 0
    threads = choose_threads(None, plan.head_memory, len(plan.model.checkpoint.tensors))
    try:
        with Crew(threads) as crew:
            for target, records in editor.edited(plan, opened, crew, compare, observer):
                made.append(replace(EditRecord.planned(target, plan.output), heads=records))
                wrong = []
                for record in records:
                    if is_arbitrary := record.gap is not None and record.gap < ARBITRARY_GAP:
                        arbitrary.append(f"{target.layer}.{record.head}")
                    one = differing.get((target.query.name, record.head))
                    if one is None:
                        continue
                    what = _judge(one, record, is_same=stack == "same")
                    if what and is_arbitrary and math.isfinite(one.off) and stack != "same":
                        what = _by_product(plan, target, record.head, present, opened)
                    n_values += 0 if what else one.values
                    wrong += [f"head {record.head} {what}"] if what else []
                if wrong:
                    what = f"OUT does not hold the edit as it is computed anew: {some(wrong, _SHOWN, '; ')}"
                    found.append(Mismatch(target.query.name, what))
    except NumericalError as error:
        found.append(Mismatch(MANIFEST_NAME, f"its edit cannot be made on SOURCE: {error}"))
    else:
        found += _figures(manifest, made, set(arbitrary), stack)
        if stack == "same":
            lost = [w for w in numerical_warnings(made, plan) if w not in manifest.warnings]
            found += [Mismatch(MANIFEST_NAME, f"warnings leave out: {warning}") for warning in lost]
    return Arithmetic(sum(len(r.heads) for r in made), stack, n_values, tuple(arbitrary)), found


def _judge(one: _Apart, record: HeadRecord, *, is_same: bool) -> str | None:
    """What is wrong with the rows of a head, if anything is."""
    if not math.isfinite(one.off):
        return "has NaN, Inf or another scale"
    if is_same:
        return f"has {one.values} other number(s), on the stack that made it"
    if one.off > max(_OPEN, _OPEN_AT_GAP / record.gap if record.gap else 0.0):
        return f"has {one.values} other number(s), up to {one.off:.2g} of a row's norm away"
    return None


def _by_product(
    plan: EditPlan, target: LayerTarget, head: int, present: Present, opened: Opened
) -> str | None:
    def stored(name: str, _: object) -> AbstractContextManager[OpenFile]:
        return present.open(name)

    named = {f.name: getattr(target, f.name) for f in fields(target)}
    moved: dict[str, Any] = {
        name: plan.output.place(ref) for name, ref in named.items() if isinstance(ref, TensorRef)
    }
    device = Editor.on("cpu").device
    with (
        open_layer(opened, target, device, (head,)) as ours,
        open_layer(stored, replace(target, **moved), device, (head,)) as theirs,
    ):
        W_Q = theirs.stored.queries((head,))
        distance, noise = product_distance(ours, head, plan.settings.rule, plan.settings.seed, W_Q)
    return (
        None
        if distance <= noise
        else f"has another product, by {distance:.2g} where rounding makes {noise:.2g}"
    )


def _figures(
    manifest: Manifest, made: list[EditRecord], arbitrary: set[str], stack: str
) -> Iterator[Mismatch]:
    """Recorded figures that are not those of the edit."""
    recorded = {(e.tensor, head.head): head for e in manifest.edits for head in e.heads}
    for edit in made:
        wrong = []
        for ours in edit.heads:
            theirs = recorded.get((edit.tensor, ours.head))
            near = 0.0 if stack == "same" else _FIGURES
            if stack != "same" and f"{edit.layer}.{ours.head}" in arbitrary:
                near += 4 * ours.rounding_error * ours.relative_change
            if theirs is not None and (names := _differing(ours, theirs, near)):
                wrong.append(f"head {ours.head} {', '.join(names)}")
        if wrong:
            what = f"the manifest's figures are not those of its edit: {some(wrong, _SHOWN, '; ')}"
            yield Mismatch(edit.tensor, what)


def _differing(ours: HeadRecord, theirs: HeadRecord, near: float) -> list[str]:
    largest = max(ours.values_before, default=0.0)
    sizes = {"values_before": largest, "values_after": largest, "frobenius_before": ours.frobenius_before}
    sizes["frobenius_after"] = ours.frobenius_before
    return [
        field.name
        for field in fields(ours)
        if not _near(
            getattr(ours, field.name), getattr(theirs, field.name), near * sizes.get(field.name, 1.0)
        )
    ]


def _near(a: object, b: object, most: float) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_near(x, y, most) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, int | float):
        return abs(a - b) <= most
    return a == b
