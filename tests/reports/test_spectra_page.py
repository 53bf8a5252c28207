"""The page of spectra: what is in it, and in a browser, what its controls do."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import drive, needs_browser
from conftest import REPO, Tiny, build_tiny
from typer.testing import Result

from qkpatch.errors import UsageError
from qkpatch.patching.spectra import HeadSpectrum, LayerSpectra
from qkpatch.reports.spectra_page import Side, check_alike, spectra_page

Run = Callable[..., Result]
TOY = REPO / "demo" / "toy-0"


def spectra(n_layers: int, n_heads: int, n: int, seed: int = 0) -> list[LayerSpectra]:
    """Spectra that decay."""
    drawn = np.sort(np.random.default_rng(seed).lognormal(size=(n_layers, n_heads, n)))[..., ::-1]
    return [
        LayerSpectra(
            layer,
            "self",
            tuple(
                HeadSpectrum(
                    head, head // 4, tuple(map(float, S)), float(np.linalg.norm(S)), 0.5, 0.1, 3.0, 0.1, 4
                )
                for head, S in enumerate(heads)
            ),
        )
        for layer, heads in enumerate(drawn)
    ]


def embedded(page: str) -> dict[str, Any]:
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert text
    document: dict[str, Any] = json.loads(text[1])
    return document


def values(side: dict[str, Any]) -> Sequence[float]:
    numbers: Sequence[float] = np.frombuffer(base64.b64decode(side["values"]), "<f4").tolist()
    return numbers


def test_values_are_those_of_inspect(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = run("inspect", TOY, "--layers", "3-4", "--report", page, "--json")
    shown = json.loads(result.stdout)
    assert f"Wrote {page}" in result.stderr
    (side,) = embedded(page.read_text())["sides"]
    heads = [head for layer in shown["layers"] for head in layer["heads"]]
    wanted = [value for head in heads for value in head["singular_values"]]
    assert values(side) == pytest.approx(wanted, rel=1e-6)
    told = [head for layer in side["layers"] for head in layer["heads"]]
    assert [head[:3] for head in told] == [
        [h["head"], h["kv_head"], len(h["singular_values"])] for h in heads
    ]
    assert [head[4] for head in told] == pytest.approx([h["symmetric_share"] for h in heads], rel=1e-6)


def test_nothing_is_fetched_and_no_name_ends_the_script() -> None:
    page = spectra_page("</script><script>alert(1)</script>", 4, [Side("<b>&", spectra(1, 2, 4))])
    assert "alert(1)</script>" not in page
    assert embedded(page)["sides"][0]["name"] == "<b>&"
    assert not re.search(r"https?://|@import|url\(", page)


def test_a_large_model_stays_small() -> None:
    assert len(spectra_page("large", 4, [Side("large", spectra(80, 64, 128))]).encode()) <= 4_000_000


def test_two_sides_must_be_alike(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    check_alike(Side("a", spectra(2, 4, 8)), Side("b", spectra(2, 4, 8, seed=1)))
    with pytest.raises(UsageError, match="have not the same layers and heads"):
        check_alike(Side("a", spectra(2, 4, 8)), Side("b", spectra(2, 4, 6)))
    wider = build_tiny(tmp_path / "wider", d_head=12)
    refused = run(
        "inspect", tiny.path, "--against", wider.path, "--modes", 2, "--report", tmp_path / "x.html"
    )
    assert refused.exit_code == 2
    assert not (tmp_path / "x.html").exists()


def test_a_patched_copy_beside_its_source(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    edit = ("--layers", 1, "--modes", 2, "--alpha", 0.1)
    assert run("apply", tiny.path, "-o", tmp_path / "out", *edit).exit_code == 0
    both = ("inspect", tiny.path, "--against", tmp_path / "out", "--modes", 2)
    found = json.loads(run(*both, "--json").stdout)
    first, second = found["layers"], found["against"]["layers"]
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]
    lines = run(*both).stdout.splitlines()
    assert "tiny → out, where they differ" in lines
    assert ["→" in line for line in lines if re.match(r" +\d", line)] == [False, True, False]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--report", "page.txt"], "a report is an .html file"),
        (["--report", "nowhere/page.html"], "cannot open the directory"),
        (["--csv", "--report", "page.html"], "--csv is of one checkpoint"),
        (["--csv", "--against", "other"], "--csv is of one checkpoint"),
    ],
)
def test_what_cannot_be_written_is_refused(tiny: Tiny, run: Run, flags: list[str], what: str) -> None:
    refused = run("inspect", tiny.path, "--modes", 2, *flags)
    assert refused.exit_code in (2, 4)
    assert what in refused.stderr.replace("\n", " ").lower() or what in refused.stderr


def test_no_page_is_written_into_what_it_is_of(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    other = build_tiny(tmp_path / "other").path
    for folder in (tiny.path, other):
        flags = ("--modes", 2, "--report", folder / "page.html")
        refused = run("inspect", tiny.path, "--against", other, *flags)
        assert (refused.exit_code, "OUT lies in SOURCE" in refused.stderr) == (2, True)
        assert not (folder / "page.html").exists()


DRIVE = """
const change = (id, value, kind) => { $(id).value = value; $(id).dispatchEvent(new Event(kind, {bubbles: true})); };
const facts = () => $("facts").textContent;
found.first = $("head").textContent;
const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + LEFT + 2.5 * maps[0].width,
  clientY: box.top + TOP + 1.5 * maps[0].height}));
found.clicked = $("head").textContent;
canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
found.walked = $("head").textContent;
found.group = $("group").textContent;
found.before = facts();
change("r", "1", "input");
found.after = facts();
found.r = $("r-out").textContent;
change("metric", "gap", "change");
found.caption = document.querySelector("figcaption").textContent;
found.maps = document.querySelectorAll("canvas").length;
found.csv = csv();
found.bars = document.querySelectorAll("#spectrum polyline").length;
found.wide = document.documentElement.scrollWidth <= innerWidth;
found.scale = Math.min(...[...document.querySelectorAll("svg")].map(s => s.clientWidth / s.viewBox.baseVal.width));
const pen = canvas.getContext("2d");
found.colours = new Set([...pen.getImageData(0, 0, canvas.width, canvas.height).data]).size;
performance.mark("end");
found.ms = performance.now();
"""


@needs_browser
@pytest.mark.parametrize("width", [400, 1200])
def test_the_controls_do_what_they_should(tmp_path: Path, width: int) -> None:
    layers = spectra(6, 8, 16)
    page = tmp_path / "page.html"
    page.write_text(spectra_page("a model", 4, [Side("model", layers)]))
    found = drive(page, DRIVE, width)
    assert found["errors"] == []
    assert [found[name] for name in ("first", "clicked", "walked")] == [
        "Layer 0, head 0", "Layer 1, head 2", "Layer 1, head 3",
    ]  # fmt: skip
    assert "Key head 0" in found["group"]
    head = layers[1].heads[3]
    S = np.array(head.singular_values)
    for r, told in ((4, found["before"]), (1, found["after"])):
        shown = float(re.search(r"energy in the top r([\d.]+)", told)[1])  # type: ignore[index]
        assert shown == pytest.approx((S[:r] ** 2).sum() / (S**2).sum(), rel=1e-3)
    assert found["r"] == "1"
    assert "relative gap at r" in found["caption"]
    rows = list(csv.DictReader(io.StringIO(found["csv"])))
    assert len(rows) == 48
    assert float(rows[11]["gap"]) == pytest.approx((S[0] - S[1]) / S[0], rel=1e-4)
    assert float(rows[11]["sigma"]) == pytest.approx(S[0], rel=1e-6)
    assert found["maps"] == 1
    assert found["bars"] == 1
    assert found["wide"]
    assert found["scale"] > 0.99, "words are as large as they are meant to be"
    assert found["colours"] > 10


@needs_browser
def test_a_large_model_is_drawn_within_a_second_and_two_sides_are_held_against_each_other(
    tmp_path: Path,
) -> None:
    page = tmp_path / "page.html"
    base, edited = spectra(80, 64, 128), spectra(80, 64, 128)
    head = edited[7].heads[5]
    changed = replace(head, singular_values=(*head.singular_values[1:], 0.0), frobenius=head.frobenius / 2)
    edited[7] = replace(edited[7], heads=(*edited[7].heads[:5], changed, *edited[7].heads[6:]))
    sides = [Side("base", base), Side("patched", edited)]
    page.write_text(spectra_page("a model", 4, sides[:1]))
    alone = drive(page, "found.ms = performance.now();")
    assert alone["errors"] == []
    assert alone["ms"] < 5000, "a second on a machine that does nothing else"
    page.write_text(spectra_page("a model", 4, sides))
    found = drive(page, DRIVE)
    assert found["errors"] == []
    assert found["first"] == "Layer 7, head 5", "where they differ"
    assert found["maps"] == 3
    assert found["bars"] == 2


def test_a_page_replaces_a_page_and_nothing_else(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    look = ("inspect", tiny.path, "--modes", 2, "--report")
    assert run(*look, tmp_path / "page.html").exit_code == 0
    assert run(*look, tmp_path / "page.html").exit_code == 0
    (tmp_path / "mine.html").write_text("my notes")
    assert run(*look, tmp_path / "mine.html").exit_code == 2
    assert (tmp_path / "mine.html").read_text() == "my notes"
    assert run(*look, tiny.path / "page.html").exit_code == 2
    assert not (tiny.path / "page.html").exists()


def test_a_page_by_energy_begins_at_the_modes_that_the_table_says(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("inspect", TOY, "--layers", 3, "--heads", 0, "--energy", 0.3, "--report", page).exit_code == 0
    assert embedded(page.read_text())["modes"] == 2
