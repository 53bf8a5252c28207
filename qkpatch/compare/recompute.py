"""The planned heads computed anew, by the engine of ``apply``, beside what OUT stores and its manifest says of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.present_files import Present
from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.common.number_ranges import some
from qkpatch.common.observer import Observer
from qkpatch.compare.byte_by_byte import Mismatch
from qkpatch.compare.values import apart
from qkpatch.errors import NumericalError
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.edit_heads import Editor, edit_batch
from qkpatch.patching.head_bytes import StoredHeads, roundoff
from qkpatch.patching.head_products import Opened, open_layer
from qkpatch.patching.threads import Crew
from qkpatch.planning.manifest import HeadRecord, Manifest
from qkpatch.planning.memory import choose_threads
from qkpatch.planning.plan import EditPlan

ARBITRARY_GAP = 1e-9  # relative, at the cut: below it another stack takes other vectors
# What float64 leaves open of a row, relative; where the cut is narrow, more.
_OPEN, _OPEN_AT_GAP = 1e-12, 1e-14
_FIGURES = 1e-6  # of figures that another stack measured, relative to the largest
_FEW, _MARGIN = 8, 100  # numbers of a head that may be rounded otherwise, beside the share that is expected
_SHOWN = 4


@dataclass(frozen=True)
class Arithmetic:
    """What came out of the planned heads computed anew."""

    heads: int
    stack: str  # "same", "other" or "unknown", beside the one that made OUT
    differing_values: int  # that are other bits, and as near as another stack's can be
    # "layer.head" whose cut is arbitrary, which another stack makes otherwise.
    not_reproducible: tuple[str, ...]


def recompute(
    manifest: Manifest,
    planned: Manifest,
    plan: EditPlan,
    present: Present,
    opened: Opened,
    observer: Observer,
) -> tuple[Arithmetic, list[Mismatch]]:
    """Make the edit again, head by head, and compare rows and figures; ``planned``: as this qkpatch would record it.

    On the stack that the manifest names every bit is the same. On another, numbers are at most one ULP apart, or as
    near as float64 is exact; and a head whose cut is arbitrary has the same product but for a turn among equal modes.
    """
    editor = Editor.on("cpu")
    stack = "unknown" if manifest.run.stack is None else "other"
    ours = (editor.stack, planned.tool.version, "cpu")
    if (manifest.run.stack, manifest.tool.version, manifest.compute.device) == ours:
        stack = "same"
    rows = {
        (plan.output.place(ref).shard, at): (target, head, ref)
        for target in plan.edits
        for head in plan.settings.heads
        for ref, _, _, at in plan.head_ranges(target, head)
    }
    differing: dict[tuple[str, int], tuple[int, float]] = {}  # how many numbers, and how far at most

    def compare(name: str, data: bytes | bytearray, at: int) -> None:
        target, head, ref = rows[name, at]
        with present.open(name) as out:
            theirs = out.read(len(data), at)
        if theirs != data:
            n, off = 1, math.inf
            if ref == target.query:
                n, off = apart(bytearray(data), theirs, ref.dtype, target.layout.d_model)
            known = differing.get((target.query.name, head), (0, 0.0))
            differing[target.query.name, head] = known[0] + n, max(known[1], off)

    recorded = {(edit.tensor, head.head): head for edit in manifest.edits for head in edit.heads}
    found: list[Mismatch] = []
    arbitrary: list[str] = []
    n_heads = n_values = 0
    threads = choose_threads(None, plan.head_memory, len(plan.model.checkpoint.tensors))
    try:
        with Crew(threads) as crew:
            for target, heads in editor.edited(plan, opened, crew, compare, observer):
                n_heads += len(heads)
                wrong: list[str] = []
                for head in heads:
                    near = 0.0 if stack == "same" else _FIGURES
                    n, off = differing.get((target.query.name, head.head), (0, 0.0))
                    what = _judge(n, off, head.gap, stack, target)
                    if is_arbitrary := head.gap is not None and head.gap < ARBITRARY_GAP:
                        arbitrary.append(f"{target.layer}.{head.head}")
                    if is_arbitrary and stack != "same":
                        near += 4 * head.rounding_error * head.relative_change
                        if what and math.isfinite(off):
                            lost = _other_product(plan, target, head, near, present, opened)
                            what = f"has another product ({', '.join(lost)})" if lost else None
                    n_values += 0 if what else n
                    others = _other_figures(head, recorded.get((target.query.name, head.head), head), near)
                    told = (what, others and f"has other figures than recorded ({', '.join(others)})")
                    wrong += [f"head {head.head} {one}" for one in told if one]
                if wrong:
                    what = f"OUT does not have the edit as it is computed anew: {some(wrong, _SHOWN, '; ')}"
                    found.append(Mismatch(target.query.name, what))
    except NumericalError as error:
        found.append(Mismatch(MANIFEST_NAME, f"its edit cannot be made on SOURCE: {error}"))
    return Arithmetic(n_heads, stack, n_values, tuple(arbitrary)), found


def _judge(n: int, off: float, gap: float | None, stack: str, target: LayerTarget) -> str | None:
    """What is wrong with the rows of a head in which ``n`` numbers are others."""
    if not math.isfinite(off):
        return "has NaN, Inf or another scale"
    if n and stack == "same":
        return f"has {n} other number(s), on the stack that made it"
    left_open = max(_OPEN, _OPEN_AT_GAP / gap if gap else 0.0)
    if off > left_open:
        return f"has {n} other number(s), up to {off:.2g} of a row's norm away"
    # Only what lies that near the middle between two numbers of the format is rounded otherwise elsewhere.
    size, dtype = target.layout.d_head * target.layout.d_model, target.query.dtype
    if dtype != "F64" and n > _FEW + size * min(1.0, _MARGIN * left_open / roundoff(dtype)):
        return f"has {n} other number(s), each the next one, more than another stack rounds otherwise"
    return None


def _other_product(
    plan: EditPlan, target: LayerTarget, head: HeadRecord, near: float, present: Present, opened: Opened
) -> list[str]:
    """What of the stored head's product, as far as no choice among equal modes decides it, is not as it should be."""
    named = {f.name: getattr(target, f.name) for f in fields(target)}
    moved: dict[str, Any] = {
        n: plan.output.place(ref) for n, ref in named.items() if isinstance(ref, TensorRef)
    }
    device, at = Editor.on("cpu").device, (head.head,)
    with (
        open_layer(opened, target, device, at) as ours,
        open_layer(lambda name, _: present.open(name), replace(target, **moved), device, at) as theirs,
    ):
        (batch,), known = ours.batches(at, 1), StoredHeads(theirs.stored.queries(at), ())
        _, (found,) = edit_batch(ours, batch, plan.settings.rule_of(target.layer), plan.settings.seed, known)
    size = head.frobenius_before
    wanted = {"values_after": near * size, "frobenius_after": near * size, "relative_change": near}
    return [n for n, most in wanted.items() if not _is_near(getattr(found, n), getattr(head, n), most)]


def _other_figures(ours: HeadRecord, theirs: HeadRecord, near: float) -> list[str]:
    """The figures that are not ``near`` each other, as a share of ‖M‖ where they are of M."""
    size = {name: ours.frobenius_before for name in vars(ours) if name.startswith(("values", "frobenius"))}
    return [
        name
        for name, value in vars(ours).items()
        if not _is_near(value, vars(theirs)[name], near * size.get(name, 1.0))
    ]


def _is_near(a: object, b: object, most: float) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_is_near(x, y, most) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, int | float):
        return abs(a - b) <= most
    return a == b
