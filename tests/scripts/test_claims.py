"""The claims on one model: every control on the same pictures, in figures that agree with those of `evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import REPO
from typer.testing import CliRunner, Result

sys.path.insert(0, str(REPO))

from qkpatch.common.observer import UNSEEN
from qkpatch.evaluation.measure import Task
from qkpatch.evaluation.records import Inputs, Protocol
from qkpatch.evaluation.subject import Subject
from qkpatch.planning.request import Request
from scripts import claims

TOY = REPO / "demo" / "toy-0"
ASKED = Protocol("<image> describe :", "<image> exists {object}", 1, max_new_tokens=16, sample=12)


@pytest.mark.long
def test_each_control_is_asked_and_differences_are_those_of_evaluate(
    album: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    inputs = Inputs(album / "pictures", album / "objects.jsonl", batch_size=12)
    edit = Request.of(layers="0-8", modes=2, alpha=0.2)
    result, found = claims.measured(str(TOY), inputs, ASKED, edit, 2, tmp_path, UNSEEN)
    said = [(side.edit or {}).get("select") or (side.edit or {}).get("channel") for side in result.sides]
    assert said == [None, None, "shrink", "symmetric", "antisymmetric", "random", "random"]
    assert [(side.edit or {}).get("seed") for side in result.sides[-2:]] == [0, 1]
    by_question = {claim.question: claim.found.estimate for claim in found}
    figures = [side["figures"]["chair_s"] for side in result.to_json()["sides"]]
    assert by_question["lower than without an edit?"] == pytest.approx(figures[1] - figures[0])
    assert by_question["lower than with a shrink of that size?"] == pytest.approx(figures[1] - figures[2])
    drawn = (figures[5] + figures[6]) / 2
    assert by_question["lower than with random modes?"] == pytest.approx(figures[1] - drawn)
    assert by_question["symmetric lower than antisymmetric?"] == pytest.approx(figures[3] - figures[4])
    compared = result.comparisons[0].figures["chair_s"]
    assert compared.difference.estimate == pytest.approx(figures[1] - figures[0])
    text = claims.page(result, found)
    assert all(claim.question in text for claim in found)
    # Four times the pictures for half the difference.
    n, first = len(result.task.pictures.present), found[0].found
    base = result.comparisons[0].figures["chair_s"].base
    assert base > 0
    needed = n * (first.smallest_detectable / (0.04 * base)) ** 2
    assert f"takes about {int(needed) + 1:,} pictures" in " ".join(text.split())
    monkeypatch.setattr(Subject, "captions", None)  # nothing is left to be said
    assert claims.measured(str(TOY), inputs, ASKED, edit, 2, tmp_path, UNSEEN)[1] == found
    assert len(Task.of(inputs, ASKED).pictures.present) == n


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--layers", "3", "--modes", 1),
        ("--layers", "3", "--modes", 1, "--alpha", 0.5, "--select", "random"),
    ],
)
def test_a_setting_that_is_not_written_down_is_refused(
    flags: tuple[object, ...], album: Path, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(claims.run)
    invoke: Callable[..., Result] = CliRunner().invoke
    words = [
        TOY,
        "--images",
        album / "pictures",
        "--objects",
        album / "objects.jsonl",
        "-o",
        tmp_path / "out",
        *flags,
    ]
    result = invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    assert "written down beforehand" in result.output
    assert not (tmp_path / "out").exists()
