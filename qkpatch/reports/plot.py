"""The figure of ``qkpatch inspect --plot``: a map of layers and heads, and spectra of some of them, for a paper."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkpatch.errors import UsageError, plain

if TYPE_CHECKING:
    from qkpatch.patching.spectra import HeadChannels, LayerSpectra
    from qkpatch.reports.spectra_page import Side

FORMATS = (".png", ".svg", ".pdf")
MARK = "qkpatch inspect --plot"  # in every figure, by which one of ours is known
MOST_CURVES = 6
_WIDTH = 7.0  # inches: both columns of a page
# Of Okabe and Ito, told apart by all eyes; and by their dashes in print.
CURVES = {"full": ("#000000", "-"), "symmetric": ("#0072B2", "--"), "antisymmetric": ("#D55E00", ":")}
_STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1.1, "axes.spines.top": False,
    "axes.spines.right": False, "pdf.fonttype": 42, "svg.hashsalt": "qkpatch", "savefig.dpi": 300,
}  # fmt: skip
# What would differ from one run to the next, or from one machine to another.
_METADATA = {
    ".png": {"Software": MARK},
    ".svg": {"Creator": MARK, "Date": None},
    ".pdf": {"Creator": MARK, "Producer": None, "CreationDate": None},
}
_LOWEST = 1e-6  # of the largest value: what is below is rounding, and would flatten the rest
_TICKS = 10  # on an axis of the map
_ALL = 4  # heads, which are all drawn
_LONGEST = 40  # characters of a name
_SECOND = {"linestyle": "-", "linewidth": 2.0, "alpha": 0.35}


def check_can_plot(file: Path) -> None:
    """Refuse, before anything is computed, a kind of file that is not drawn, and a machine without matplotlib.

    Raises:
        UsageError: one of both.
    """
    if file.suffix not in FORMATS:
        what = "a plot is a .png, .svg or .pdf file"
        raise UsageError(what, where=f"--plot {file}", fix="name it spectra.pdf")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        what = f"matplotlib draws it, and cannot be imported: {error}"
        raise UsageError(what, where="--plot", fix="pip install 'qkpatch[plot]'") from error


def is_ours(content: bytes) -> bool:
    """Whether a file is such a figure."""
    return MARK.encode() in content


def remarkable(layers: Sequence[LayerSpectra]) -> list[tuple[int, int]]:
    """Heads to draw where nobody names any: all of a few, else those of the most, the middle and the least energy."""
    shares = {(layer.layer, head.head): head.energy_share for layer in layers for head in layer.heads}
    if len(shares) <= _ALL:
        return list(shares)
    by_share = sorted(shares, key=lambda at: (-shares[at], at))
    return [by_share[0], by_share[len(by_share) // 2], by_share[-1]]


def figure(
    suffix: str,
    sides: Sequence[Side],
    curves: Sequence[Sequence[HeadChannels]],
    label: str,
    *,
    by_modes: bool,
) -> bytes:
    """The file: the map of the first side and, where there is a second, of what it adds to it; the curves of both.

    Args:
        suffix: one of :data:`FORMATS`.
        sides: one or two.
        curves: the same heads of each side.
        label: what the map shows.
        by_modes: it shows how many modes are taken, and else the share of energy that they hold.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    # One map has its curves beside it, two have theirs below.
    n, is_beside = len(curves[0]), len(sides) == 1
    n_across = min(n, 3) if not is_beside else 1 if n < 3 else 2
    n_down = -(-n // n_across)
    of_map = min(max(2.2, 1.2 + 0.055 * len(sides[0].layers)), 6.0 if is_beside else 4.5)
    of_curves = 0.6 + 1.5 * n_down
    height = max(of_map, of_curves) if is_beside else of_map + of_curves
    with style.context(["default", _STYLE]):
        drawn: Any = Figure(figsize=(_WIDTH, height), layout="constrained")
        shape = (1, 2) if is_beside else (2, 1)
        ratios = {"width_ratios": (1.1, 1.3)} if is_beside else {"height_ratios": (of_map, of_curves)}
        for_maps, for_curves = drawn.subfigures(*shape, **ratios)
        maps = for_maps.subplots(1, len(sides), squeeze=False)[0]
        values = [_values(side.layers, by_modes=by_modes) for side in sides]
        _draw_map(maps[0], sides[0], values[0], label, "viridis")
        for axis in maps[1:]:
            change = [[b - a for a, b in zip(*both, strict=True)] for both in zip(*values, strict=True)]
            _draw_map(axis, sides[1], change, f"change of it in {_name(sides[1])}", "PuOr")
        for letter, one in zip("abcdefgh", curves[0], strict=False):
            _mark(maps[0], sides[0], one, letter)
        panels = for_curves.subplots(n_down, n_across, squeeze=False, sharex=True)
        _draw_curves(for_curves, panels, curves, [_name(side) for side in sides])
        out = io.BytesIO()
        drawn.savefig(out, format=suffix[1:], metadata=_METADATA[suffix])
    return out.getvalue()


def _name(side: Side) -> str:
    text = plain(side.name)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _values(layers: Sequence[LayerSpectra], *, by_modes: bool) -> list[list[float]]:
    """What the map shows, layers down; not a number where a layer has fewer heads than another."""
    rows = [
        [float(head.modes) if by_modes else head.energy_share for head in layer.heads] for layer in layers
    ]
    most = max(map(len, rows))
    return [row + [math.nan] * (most - len(row)) for row in rows]


def _draw_map(axis: Any, side: Side, values: Sequence[Sequence[float]], label: str, colours: str) -> None:
    heads = max((layer.heads for layer in side.layers), key=len)
    limits = {}
    if colours != "viridis":  # whose middle is no change
        most = max((abs(x) for row in values for x in row if not math.isnan(x)), default=0.0) or 1.0
        limits = {"vmin": -most, "vmax": most}
    image = axis.imshow(values, cmap=colours, aspect="auto", interpolation="nearest", **limits)
    axis.set(xlabel="head", ylabel="layer")
    for set_ticks, names in (
        (axis.set_xticks, [head.head for head in heads]),
        (axis.set_yticks, [layer.layer for layer in side.layers]),
    ):
        at = range(0, len(names), -(-len(names) // _TICKS))
        set_ticks(list(at), [str(names[i]) for i in at])
    bar = axis.figure.colorbar(image, ax=axis, location="top", shrink=0.9, aspect=30)
    bar.ax.locator_params(nbins=5)
    bar.set_label(label, parse_math=False)
    bar.outline.set_visible(False)


def _mark(axis: Any, side: Side, one: HeadChannels, letter: str) -> None:
    """Where in the map a head is whose curves are drawn."""
    for y, layer in enumerate(side.layers):
        numbers = [head.head for head in layer.heads]
        if (layer.layer, layer.attention) == (one.layer, one.attention) and one.head in numbers:
            box = {
                "boxstyle": "circle,pad=0.15",
                "facecolor": "white",
                "edgecolor": "black",
                "linewidth": 0.5,
            }
            middle = {"ha": "center", "va": "center"}
            axis.annotate(letter, (numbers.index(one.head), y), fontsize=6, bbox=box, **middle)


def _draw_curves(
    figure: Any, panels: Any, curves: Sequence[Sequence[HeadChannels]], names: Sequence[str]
) -> None:
    has_sets = len({one.attention for one in curves[0]}) > 1
    axes = list(panels.flat)
    for axis in axes[len(curves[0]) :]:
        axis.set_axis_off()
    for letter, axis, *both in zip("abcdefgh", axes, *curves, strict=False):
        for side, one in enumerate(both):
            _draw_curve(axis, one, is_second=side > 0)
        where = f"layer {both[0].layer}, head {both[0].head}" + (
            f" ({both[0].attention})" if has_sets else ""
        )
        axis.set_title(f"{letter}   {where}", loc="left")
    for axis in panels[:, 0]:
        axis.set_ylabel("singular value")
    for column in range(panels.shape[1]):
        last = [axis for axis in panels[:, column] if axis.axison][-1:]
        for axis in last:
            axis.set_xlabel("mode")
            axis.tick_params(labelbottom=True)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(names) > 1:
        (second,) = axes[0].plot([], [], color="#000000", **_SECOND)
        handles, labels = [*handles, second], [*labels, f"pale: {names[1]}"]
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_curve(axis: Any, one: HeadChannels, *, is_second: bool) -> None:
    """Values against their places, both in logarithms, and the last mode that each channel's cut takes."""
    largest = max((values[0] for values in one.values.values() if values), default=0.0) or 1.0
    for channel, (colour, dashes) in CURVES.items():
        values = [value for value in one.values[channel] if value > _LOWEST * largest]
        modes = one.modes[channel]
        how = {"color": colour, **(_SECOND if is_second else {"linestyle": dashes})}
        axis.plot(range(1, len(values) + 1), values, label="" if is_second else channel, **how)
        if modes <= len(values) and not is_second:
            axis.plot(modes, values[modes - 1], "o", ms=3.5, color=colour, markerfacecolor="white")
    if not is_second:
        cuts = sorted(set(one.modes.values()))
        for cut in cuts:
            axis.axvline(cut + 0.5, color="#767676", linewidth=0.6, linestyle=(0, (1, 1.5)), zorder=0)
        where = {
            "xytext": (2, -2),
            "textcoords": "offset points",
            "va": "top",
            "color": "#595959",
            "fontsize": 6.5,
        }
        said = f"r = {cuts[0]}" + "".join(f", {cut}" for cut in cuts[1:])
        axis.annotate(said, (cuts[-1] + 0.5, 1), xycoords=axis.get_xaxis_transform(), **where)
        axis.set(xscale="log", yscale="log")
        most = max(map(len, one.values.values()))
        places = [2**i for i in range(0, most.bit_length(), 1 if most <= 32 else 2)]
        axis.set_xticks(places, list(map(str, places)))
        axis.minorticks_off()
