"""The page of a sweep, in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import drive, needs_browser

from qkpatch.reports.sweep_page import Mark, sweep_page

KINDS = ("dominant", "random", "bottom", "subspace", "shrink")
DRIVE = """
found.dots = document.querySelectorAll(".dot").length;
found.filled = document.querySelectorAll(".dot.dominant").length;
found.first = $("name").textContent;
document.querySelectorAll(".dot")[3].dispatchEvent(new MouseEvent("click", {bubbles: true}));
found.clicked = $("name").textContent;
found.bars = document.querySelectorAll("#layers .bar").length;
const heads = [...document.querySelectorAll("th button")];
heads.find(b => b.textContent === "energy removed").click();
found.least = document.querySelector("tbody tr").cells[0].textContent;
heads.find(b => b.textContent === "energy removed").click();
found.most = document.querySelector("tbody tr").cells[0].textContent;
const row = document.querySelector("tbody tr");
row.focus();
row.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
found.focus = document.activeElement === row;
found.entered = $("name").textContent;
found.wide = document.documentElement.scrollWidth <= innerWidth;
found.scale = Math.min(...[...document.querySelectorAll("svg")].map(s => s.clientWidth / s.viewBox.baseVal.width));
"""


def marks(n: int) -> list[Mark]:
    return [
        Mark(f"v{i}", "an edit", KINDS[i % 5], "full", 0.01 * i, 0.002 * i, None, [(3, 0.1), (4, 0.2)])
        for i in range(n)
    ]


def test_a_name_ends_nothing() -> None:
    assert "</script><b>" not in sweep_page("</script><b>", marks(1))


@needs_browser
@pytest.mark.parametrize(("n", "width"), [(5, 400), (200, 1200)])
def test_marks_and_rows_do_what_they_should(n: int, width: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(sweep_page("toy", marks(n)))
    found = drive(page, DRIVE, width)
    assert found["errors"] == []
    assert (found["dots"], found["filled"]) == (n, n // 5)
    assert (found["first"], found["clicked"], found["bars"]) == ("v0", "v3", 2)
    assert (found["least"], found["most"], found["entered"]) == ("v0", f"v{n - 1}", f"v{n - 1}")
    assert found["focus"]
    assert found["wide"]
    assert found["scale"] > 0.99, "words are as large as they are meant to be"
