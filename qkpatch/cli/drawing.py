"""Spectra in characters, and what is remarkable in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean, median
from typing import TYPE_CHECKING

from qkpatch.common.number_ranges import format_ranges
from qkpatch.patching.apply import GAP_WARNING

if TYPE_CHECKING:
    from qkpatch.patching.spectra import HeadSpectrum, LayerSpectra

_ROWS = 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_ASCII = "    #####"
# A layer stands out where its share is this many times as far from the median as half of the layers are.
_FAR = 6


def draw_spectrum(head: HeadSpectrum, modes: int, width: int, *, is_ascii: bool) -> Iterator[str]:
    """Lines of bars, strongest mode first, their heights logarithms; a mark below the modes before the cut.

    Args:
        head: whose.
        modes: where the cut is.
        width: columns there are.
        is_ascii: draw with what every terminal has.
    """
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
    yield f"{'':>9} {('^' if is_ascii else '▔') * max(1, modes // each)} r = {modes}"


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
