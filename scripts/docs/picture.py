"""The README's picture: one head's spectrum before and after the edit, from the manifest of a real run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from qkpatch.cli import app

LAYER, HEAD = 3, 0
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 250, 40, 44, 34
STEP, BAR = 21, 15
BEFORE, AFTER, KEPT, INK = "#e3b7b9", "#c1272d", "#8a8f98", "#333333"


def page(repo: Path) -> str:
    """The picture as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "toy-0"
        arguments = ("apply", repo / "demo" / "toy-0", "-o", out, "--quiet")
        CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        manifest = json.loads((out / "qkpatch.json").read_text("utf-8"))
    layer = next(edit for edit in manifest["edits"] if edit["layer"] == LAYER)
    return draw(layer["heads"][HEAD], manifest["edit"]["alpha"])


def draw(head: Mapping[str, Any], alpha: float) -> str:
    """A bar per mode; those that were lowered in red, as they came out, over what they were."""
    values, gains = head["values_before"], dict(zip(head["modes"], head["gains"], strict=True))
    floor, scale = HEIGHT - BOTTOM, (HEIGHT - BOTTOM - TOP) / max(values)
    bars = []
    for mode, value in enumerate(values):
        x = LEFT + mode * STEP
        bars.append(_bar(x, floor, value * scale, BEFORE if mode in gains else KEPT))
        if mode in gains:
            bars.append(_bar(x, floor, gains[mode] * value * scale, AFTER))
    beside = LEFT + len(gains) * STEP + 8
    lowered = f"the {len(gains)} strongest modes × {alpha:g}, by a change of the queries alone"
    kept = "other modes, the keys, and every other byte of the checkpoint: as they were"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">',
        '<rect width="100%" height="100%" fill="white"/>',
        *bars,
        *(_text(LEFT - 8, floor - mark * scale + 4, f"{mark}", "end") for mark in range(int(max(values)) + 1)),
        _text(LEFT, 22, f"One head of demo/toy-0 (layer {LAYER}): the singular values of its query-key product"),
        _text(beside, TOP + 20, lowered, fill=AFTER),
        _text(beside, TOP + 42, kept, fill="#666666"),
        _text(LEFT, HEIGHT - 12, "mode 1"),
        _text(LEFT + (len(values) - 1) * STEP + BAR, HEIGHT - 12, f"mode {len(values)}", "end"),
        "</svg>",
    ]) + "\n"  # fmt: skip


def _bar(x: float, floor: float, height: float, fill: str) -> str:
    return f'<rect x="{x}" y="{floor - height:.1f}" width="{BAR}" height="{height:.1f}" fill="{fill}"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", fill: str = INK) -> str:
    return f'<text x="{x}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{words}</text>'
