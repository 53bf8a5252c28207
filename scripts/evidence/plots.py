"""The figures of the report, as PNG files that do not change where their numbers do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One colour per kind in all figures; kinds without one are not drawn.
COLOURS = {
    "dominant": "#c1272d",
    "symmetric": "#e88a1a",
    "antisymmetric": "#7a5195",
    "random": "#999999",
    "subspace": "#6baed6",
    "equal-norm": "#2171b5",
    "noise": "#08306b",
    "bottom": "#74a63b",
    "shrink": "#000000",
}


@dataclass(frozen=True)
class Point:
    """One setting: how far the weights moved, what came of it, and whether it may be drawn as usable."""

    kind: str
    change: float
    effect: float


def effect_by_change(
    panels: Mapping[str, Sequence[Point]], path: Path, *, ylabel: str, ylim: tuple[float, float] | None = None
) -> None:
    """Effect against ‖ΔW_Q‖ / ‖W_Q‖, all kinds on one axis, a panel per layer range."""
    figure, axes = _canvas(len(panels))
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for kind, colour in COLOURS.items():
            mine = sorted((p.change, p.effect) for p in points if p.kind == kind)
            if mine:
                marker = "x" if kind == "shrink" else "o"
                axis.plot(*zip(*mine, strict=True), marker, ms=4.5, color=colour, label=kind, alpha=0.85)
        axis.axhline(0, color="#bbbbbb", lw=0.8, zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("‖ΔW_Q‖ / ‖W_Q‖ of all layers")
        if ylim:
            axis.set_ylim(*ylim)
    axes[0].set_ylabel(ylabel)
    axes[-1].legend(fontsize=7, frameon=False, loc="best")
    _save(figure, path)


def trade_off(
    curve: Sequence[tuple[float, float]], points: Mapping[str, Sequence[tuple[float, float]]], path: Path
) -> None:
    """CHAIR_s against recall: the stop-bias curve of the unedited model, and settings by kind."""
    figure, (axis,) = _canvas(1)
    axis.plot(
        *zip(*curve, strict=True), "-", color="#444444", lw=1.2, marker="+", label="no edit, stopping earlier"
    )
    for kind, colour in COLOURS.items():
        if points.get(kind):
            axis.plot(*zip(*points[kind], strict=True), "o", ms=5, color=colour, label=kind, alpha=0.85)
    axis.set_xlabel("recall")
    axis.set_ylabel("CHAIR_s")
    axis.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _canvas(panels: int) -> tuple[Any, Sequence[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1,
        panels,
        figsize=(4.2 * panels if panels > 1 else 6, 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
