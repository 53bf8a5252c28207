"""``SWEEP/report.html``: the variants of a sweep to look at."""

from __future__ import annotations

from qkpatch.common.json_text import exact
from qkpatch.common.number_ranges import format_ranges
from qkpatch.planning.blocks import LayersBlock
from qkpatch.reports.sweep_page import Mark, sweep_page
from qkpatch.spectral.rule import Select
from qkpatch.sweeps.record import Sweep, VariantRecord

REPORT_NAME = "report.html"


def report(sweep: Sweep) -> str:
    """The page of all variants that are done."""
    return sweep_page(sweep.source.name, [mark for v in sweep.variants if (mark := _mark(v)) is not None])


def _mark(variant: VariantRecord) -> Mark | None:
    of, parts = variant.figures, variant.edit.parts
    if of is None:
        return None
    edit = "; ".join(
        f"layers {format_ranges(part.layers)}, {_kind(part)}, {part.channel.value} channel" for part in parts
    )
    return Mark(
        name=variant.name,
        edit=edit,
        select=parts[0].select.value,
        channel=parts[0].channel.value,
        removed=of.energy_removed,
        change=of.relative_change,
        realised=of.realised_share,
        layers=[(one.layer or 0, one.relative_change) for one in variant.layers],
    )


def _kind(part: LayersBlock) -> str:
    if part.select is Select.shrink:
        return f"shrunk by as much as {part.modes} dominant mode(s) × {exact(part.alpha)} would move it"
    return f"{part.counted} {part.select.value} mode(s) × {exact(part.alpha)}"
