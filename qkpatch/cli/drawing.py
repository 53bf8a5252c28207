"""Spectra for people: a table, a few drawn in characters, and what is remarkable in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean, median
from typing import TYPE_CHECKING

from rich.console import Console

from qkpatch.cli.console import results, safe
from qkpatch.cli.tables import plain_table, print_table, show_model
from qkpatch.common.json_text import exact
from qkpatch.common.number_ranges import format_ranges
from qkpatch.patching.apply import GAP_WARNING
from qkpatch.spectral.rule import Channel

if TYPE_CHECKING:
    from qkpatch.model.model import Model
    from qkpatch.patching.spectra import HeadSpectrum, LayerSpectra
    from qkpatch.planning.settings import EditSettings
    from qkpatch.reports.spectra_page import Side

_DRAWN = 4  # heads, each of ten lines
_ROWS = 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_ASCII = "    #####"
# A layer stands out where its share is this many times as far from the median as half of the layers are.
_FAR = 6


def draw_spectrum(head: HeadSpectrum, width: int, *, is_ascii: bool) -> Iterator[str]:
    """Lines of bars, strongest mode first, their heights logarithms; a mark below the modes before the cut."""
    values = [value for value in head.singular_values if value > 0] or [1.0]
    each = math.ceil(len(values) / max(1, width - 12))  # modes a column
    heights = [math.log10(values[i]) for i in range(0, len(values), each)]
    # Four decades: what is below is rounding, and would flatten the rest.
    low, high = max(heights[-1], heights[0] - 4), heights[0]
    span = high - low or 1.0
    signs = _ASCII if is_ascii else _EIGHTHS
    cells = [round(max(0.0, (h - low) / span) * (_ROWS * 8 - 1)) + 1 for h in heights]
    for row in range(_ROWS - 1, -1, -1):
        label = f"{10**high:.3g}" if row == _ROWS - 1 else f"{10**low:.3g}" if row == 0 else ""
        yield f"{label:>9} " + "".join(signs[min(8, max(0, cell - row * 8))] for cell in cells).rstrip()
    yield f"{'':>9} {('^' if is_ascii else '▔') * max(1, head.modes // each)} r = {head.modes}"


def remarks(layers: Sequence[LayerSpectra], modes: int) -> Iterator[str]:
    """What in the spectra a reader should not miss."""
    shares = {layer.layer: mean(head.energy_share for head in layer.heads) for layer in layers}
    middle = median(shares.values())
    spread = median(abs(share - middle) for share in shares.values())
    for layer, share in shares.items():
        if len(shares) > 4 and share - middle > max(_FAR * spread, 0.1):
            yield (
                f"layer {layer} stands out: {share:.0%} of its energy is in the top {modes} modes, "
                f"in the median layer {middle:.0%}"
            )
    heads = [(layer.layer, head) for layer in layers for head in layer.heads]
    narrow = {n for n, head in heads if head.gap is not None and head.gap < GAP_WARNING}
    if narrow:
        n_narrow = sum(head.gap is not None and head.gap < GAP_WARNING for _, head in heads)
        yield (
            f"{n_narrow} head(s) have a gap under {GAP_WARNING:g} after mode {modes}, so which modes are cut there is "
            f"nearly arbitrary: layers {format_ranges(sorted(narrow))}"
        )
    short = {
        n for n, head in heads if len(head.singular_values) < modes or not head.singular_values[modes - 1]
    }
    if short:
        yield f"heads with fewer than {modes} modes: layers {format_ranges(sorted(short))}"


def channel_told(settings: EditSettings) -> str:
    """What of the product was looked at, where it is not all of it."""
    channels = dict.fromkeys(rule.channel.value for _, rule in settings.edits)
    return "" if [*channels] == [Channel.full.value] else f", {' and '.join(channels)} channel"


def show_spectra(model: Model, settings: EditSettings, sides: Sequence[Side]) -> None:
    """What was looked at, and one row per layer, means over heads: of two sides ``a → b`` where they are not the same.

    There is a column for the set where there are several.
    """
    has_sets, r = len(model.sets) > 1, settings.modes
    energies = {rule.energy for _, rule in settings.edits}
    counted = ["modes"] if len(energies) > 1 else [f"modes for energy {exact(e)}" for e in energies if e]
    uneven = ["modes", "energy in these"] if energies == {None} else counted
    table = plain_table(
        "layer", *(["attention"] if has_sets else []), "σ₁ mean", "σ₁ max",
        *(uneven if r is None else [f"energy in top {r}"]), "effective rank", "symmetric share", "gap min",
    )  # fmt: skip
    for layers in zip(*(side.layers for side in sides), strict=True):
        each = [_figures(one, has_modes=r is None, has_energy=not any(energies)) for one in layers]
        figures = [dict.fromkeys(side) for side in zip(*each, strict=True)]
        table.add_row(
            str(layers[0].layer),
            *([layers[0].attention] if has_sets else []),
            *(" → ".join(figure) for figure in figures),
        )
    with results() as console:
        show_model(console, model)
        folded = ", the gain of the norm before attention folded in" if settings.fold_norm else ""
        heads = f"heads {format_ranges(settings.heads)}{channel_told(settings)}{folded}"
        console.print(f"Spectra: layers {format_ranges(settings.layers)}, {heads}")
        if len(sides) > 1:
            console.print(safe(f"{sides[0].name} → {sides[1].name}, where they differ"), soft_wrap=True)
        print_table(console, table)
        whole = "the channel's Σ s²" if channel_told(settings) else "‖M‖²"
        console.print(
            f"Means over heads. Energy: share of {whole}. Symmetric share 0.5: both halves weigh the same. "
            f"Gap: {'(s_r − s_r+1) / s_r' if r is None else f'(s_{r} − s_{r + 1}) / s_{r}'}.",
            style="dim",
        )
        few = [(layer, head) for layer in sides[0].layers for head in layer.heads][: _DRAWN + 1]
        for layer, head in few if len(few) <= _DRAWN else ():
            console.print(f"Layer {layer.layer}, head {head.head}: singular values")
            for line in draw_spectrum(head, console.width, is_ascii=_is_ascii(console)):
                console.print(line, highlight=False, markup=False)
        for remark in () if r is None else remarks(sides[0].layers, r):  # of one cut for all heads
            console.print(f"[yellow]Note:[/] {remark}", soft_wrap=True)


def _is_ascii(console: Console) -> bool:
    """Whether the terminal has nothing but ASCII."""
    return not console.encoding.startswith("utf")


def _figures(layer: LayerSpectra, *, has_modes: bool, has_energy: bool) -> Iterator[str]:
    heads = layer.heads
    gaps = [head.gap for head in heads if head.gap is not None]
    yield f"{mean(head.singular_values[0] for head in heads):.4g}"
    yield f"{max(head.singular_values[0] for head in heads):.4g}"
    if has_modes:
        yield format_ranges(sorted({head.modes for head in heads}))
    if has_energy:
        yield f"{mean(head.energy_share for head in heads):.3f}"
    yield f"{mean(head.effective_rank for head in heads):.1f}"
    yield f"{mean(head.symmetric_share for head in heads):.3f}"
    yield f"{min(gaps):.2g}" if gaps else "-"
