"""The figure of `inspect --plot`: what is drawn, and what is refused before a weight is read."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO, Tiny
from safetensors.torch import load_file
from test_spectra_page import spectra

from qkpatch.patching.device import choose_device
from qkpatch.patching.inspection import Inspection
from qkpatch.patching.spectra import head_channels
from qkpatch.planning.request import Request
from qkpatch.reports import plot
from qkpatch.reports.spectra_page import Side
from qkpatch.spectral.rule import Channel

Run = Callable[..., Any]
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="there is no matplotlib"
)
CHANNELS = [channel.value for channel in Channel]
STARTS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


DRAW = """
import hashlib
from types import SimpleNamespace as One
from qkpatch.reports import plot
heads = [One(head=h, energy_share=0.1 * h, modes=2) for h in range(3)]
side = One(name="x", layers=[One(layer=n, attention="self", heads=heads) for n in range(4)])
curve = One(layer=1, attention="self", head=2, modes=dict.fromkeys(plot.CURVES, 2))
curve.values = {channel: (3.0, 2.0, 1.0 / (1 + i)) for i, channel in enumerate(plot.CURVES)}
for suffix in plot.FORMATS:
    drawn = plot.figure(suffix, [side], [[curve]], "energy", by_modes=False)
    print(suffix, plot.is_ours(drawn), hashlib.sha256(drawn).hexdigest())
"""


@pytest.mark.long
@needs_matplotlib
def test_the_same_bytes_from_every_process_and_whatever_matplotlibrc(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.grid: True\n")
    said = []
    for more in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path)}):
        environment = {**os.environ, "PYTHONPATH": str(REPO), **more}
        done = subprocess.run([sys.executable, "-c", DRAW], env=environment, check=True, capture_output=True)
        said.append(done.stdout.decode().splitlines())
    assert said[0] == said[1]
    assert [line.split()[:2] for line in said[0]] == [[suffix, "True"] for suffix in STARTS]


@pytest.mark.long
@needs_matplotlib
def test_a_figure_replaces_a_figure_and_nothing_else(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    look = ("inspect", tiny.path, "--modes", 2, "--quiet", "--plot")
    for _ in range(2):
        assert run(*look, tmp_path / "ours.svg").exit_code == 0
    (tmp_path / "mine.svg").write_text("<svg/>")
    assert run(*look, tmp_path / "mine.svg").exit_code == 2
    assert (tmp_path / "mine.svg").read_text() == "<svg/>"
    assert run(*look, tiny.path / "ours.svg").exit_code == 2
    assert not (tiny.path / "ours.svg").exists()


def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that a figure shows, once it is drawn."""
    from matplotlib import text

    shown, draw = list[str](), text.Text.draw
    monkeypatch.setattr(
        text.Text, "draw", lambda self, *a, **k: (shown.append(self.get_text()), draw(self, *a, **k))[1]
    )
    return shown


@pytest.mark.long
@needs_matplotlib
def test_the_heads_that_are_named_are_drawn_and_a_name_is_no_formula(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("apply", tiny.path, "-o", tmp_path / "o$_{$", "--layers", 1, "--modes", 2).exit_code == 0
    shown = words(monkeypatch)
    both = ("inspect", tiny.path, "--against", tmp_path / "o$_{$", "--modes", 2)
    result = run(*both, "--plot", tmp_path / "x.png", "--curves", "1.3,0.0")
    assert result.exit_code == 0, result.output
    assert {"a   layer 1, head 3", "b   layer 0, head 0", "r = 2"} <= {*shown}
    assert "energy in the top 2 modes" in shown
    assert "change of it in o$_{$" in shown


@needs_matplotlib
def test_a_large_model_and_layers_of_different_widths_are_drawn() -> None:
    large = spectra(80, 64, 4)
    narrow = [*large[:3], *spectra(1, 40, 4)]
    for layers in (large, narrow):
        one = [
            plot_channels(layer.layer, head.head)
            for layer in layers[:1]
            for head in layer.heads[: plot.MOST_CURVES]
        ]
        assert plot.figure(".png", [Side("x", layers)], [one], "energy", by_modes=False).startswith(
            STARTS[".png"]
        )


def plot_channels(layer: int, head: int) -> Any:
    from qkpatch.patching.spectra import HeadChannels

    return HeadChannels(
        layer, "self", head, dict.fromkeys(CHANNELS, (2.0, 1.0, 0.0)), dict.fromkeys(CHANNELS, 1)
    )


def test_heads_that_nobody_named_are_the_ends_and_the_middle() -> None:
    layers = spectra(5, 8, 4)
    assert len(plot.remarkable(layers)) == 3
    assert plot.remarkable(spectra(1, 4, 4)) == [(0, head) for head in range(4)]


def test_channels_are_those_of_the_matrix(tiny: Tiny) -> None:
    tensors = {n: t.double().numpy() for n, t in load_file(tiny.path / "model.safetensors").items()}
    looked_at = Inspection.of(str(tiny.path), Request(modes=3))
    (found,) = head_channels(looked_at, [(1, 2)], choose_device("cpu"))
    M = tensors[tiny.name(1, "q")][16:24].T @ tensors[tiny.name(1, "k")][8:16]
    halves = dict(zip(CHANNELS, (M, (M + M.T) / 2, (M - M.T) / 2), strict=True))
    for channel, matrix in halves.items():
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(found.values[channel], values[: len(found.values[channel])], atol=1e-12)
    assert found.modes == dict(zip(CHANNELS, (3, 3, 4), strict=True))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--plot", "x.jpg"], ".png, .svg or .pdf"),
        (["--plot", "x"], ".png, .svg or .pdf"),
        (["--curves", "1.0"], "add --plot"),
        (["--plot", "x.png", "--curves", "1"], "no LAYER.HEAD"),
        (["--plot", "x.png", "--curves", "1.9"], "1.9 is not looked at"),
        (["--plot", "x.png", "--curves", "0.0,0.1,0.2,0.3,1.0,1.1,1.2"], "more than 6"),
        (["--plot", "x.png", "--csv"], "--csv is of one checkpoint"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_weight_is_read(
    flags: list[str], says: str, tiny: Tiny, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Inspection, "spectra", lambda *_: pytest.fail("it computes"))
    result = run("inspect", tiny.path, "--modes", 2, *flags)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert not [*tmp_path.glob("x*")]


def test_without_matplotlib_the_extra_is_named(tiny: Tiny, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(Inspection, "spectra", lambda *_: pytest.fail("it computes"))
    result = run("inspect", tiny.path, "--modes", 2, "--plot", "x.png", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["fix"] == "pip install 'qkpatch[plot]'"
