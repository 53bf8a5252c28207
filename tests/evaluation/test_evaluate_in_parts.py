"""An evaluation by several machines: the bytes of a single run's, whatever they do and in whatever order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from failing import interrupt
from jsonschema import Draft202012Validator
from test_evaluate import ASKED, SCHEMA, TOY, given, inputs
from typer.testing import Result

import qkpatch
from qkpatch.errors import UsageError
from qkpatch.evaluation import bench
from qkpatch.evaluation.records import of_parts
from qkpatch.evaluation.subject import Subject

SHORT = replace(ASKED, sample=10, questions=1, max_new_tokens=4)  # three batches, and the text
EDIT: dict[str, Any] = {"layers": "3-5", "alpha": 0.5}


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.fixture(scope="module")
def whole(album: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one machine writes."""
    out = tmp_path_factory.mktemp("whole") / "result"
    qkpatch.evaluate(TOY, inputs(album, batch_size=4), SHORT, out=out, **EDIT)
    return files(out)


def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each batch of captions from here on, how many pictures."""
    captions, sizes = Subject.captions, list[int]()

    def counted(self: Subject, pictures: Any, protocol: Any) -> Any:
        sizes.append(len(pictures))
        return captions(self, pictures, protocol)

    monkeypatch.setattr(Subject, "captions", counted)
    return sizes


def test_parts_in_any_order_give_the_result_of_one_run(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "result"
    with monkeypatch.context() as patched:
        interrupt(patched, Subject, "captions", 1)
        with pytest.raises(KeyboardInterrupt):
            qkpatch.evaluate(TOY, inputs(album, batch_size=4), SHORT, out=out, part=(1, 2), **EDIT)
    for cut in of_parts(out):
        cut.write_bytes(cut.read_bytes()[:-7])  # which a kill does
    sizes = asked(monkeypatch)
    for number, expected in ((2, [4, 4]), (1, [4, 2, 4, 2]), (1, []), (2, [])):
        share = qkpatch.evaluate(TOY, inputs(album, batch_size=4), SHORT, out=out, part=(number, 2), **EDIT)
        assert (list(share.sides), sizes) == ([], expected)
        sizes.clear()
    interrupt(monkeypatch, Subject, "load", 0)  # no model is needed any more
    qkpatch.evaluate(TOY, inputs(album, batch_size=4), SHORT, out=out, **EDIT)
    assert files(out) == whole


@pytest.mark.long
def test_what_no_part_has_is_asked_in_the_end(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    out, sizes = tmp_path / "result", asked(monkeypatch)
    qkpatch.evaluate(TOY, inputs(album, batch_size=4), SHORT, out=out, part=(3, 3), **EDIT)
    (torn,) = (p for p in of_parts(out) if b"caption" in p.read_bytes() and b"alpha" in p.read_bytes())
    torn.write_bytes(torn.read_bytes()[:-7])  # one picture of the batch, which is asked again as a whole
    assert sizes == [2, 2]
    qkpatch.evaluate(TOY, inputs(album, batch_size=4), SHORT, out=out, **EDIT)
    assert sizes == [2, 2, 4, 4, 4, 4, 2]
    assert files(out) == whole


@pytest.mark.parametrize(
    ("change", "said", "also_of_whole"),
    [({"protocol": replace(SHORT, max_new_tokens=3)}, "protocol", True), ({"alpha": 0.4}, "models and edits", True),
     ({"batch_size": 3}, "batch size", True), ({"files_of": "others"}, "files of models", True),
     ({"machine": {"cpu": "another"}}, "cpu", False)],
    ids=["protocol", "edit", "batches", "files", "machine"],
)  # fmt: skip
def test_parts_of_another_run_are_refused(
    change: dict[str, Any], said: str, also_of_whole: bool,
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, how = tmp_path / "result", {**EDIT, **change}
    qkpatch.evaluate(
        TOY, inputs(album, batch_size=4), SHORT, out=out, part=(5, 5), **EDIT
    )  # which has nothing to do
    before, batch_size, protocol = files(out), how.pop("batch_size", 4), how.pop("protocol", SHORT)
    for name in {"files_of", "machine"} & how.keys():
        value = how.pop(name)
        monkeypatch.setattr(bench, name, lambda *_, value=value: value)
    for part in ((1, 2), None)[: 1 + also_of_whole]:
        with pytest.raises(UsageError, match=f"a run of other settings: {said}"):
            qkpatch.evaluate(TOY, inputs(album, batch_size=batch_size), protocol, out=out, part=part, **how)
    assert files(out) == before
    if not also_of_whole:  # nor does it add to what was said there
        with pytest.raises(UsageError, match=f"a run of other settings: {said}"):
            qkpatch.evaluate(TOY, inputs(album, batch_size=4), SHORT, out=out, **EDIT)


def test_the_command_says_what_is_left_to_do(run: Callable[..., Result], album: Path, tmp_path: Path) -> None:
    said = ("evaluate", TOY, *given(album, "--sample", 8, "--questions", 0))
    for wrong in (
        ("--part", "1/2"),
        ("--part", "", "-o", tmp_path / "out"),
        ("--part", "3/2", "-o", tmp_path / "out"),
    ):
        assert run(*said, *wrong).exit_code == 2
    assert list(tmp_path.iterdir()) == []
    done = run(*said, "--part", "1/2", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "Part 1/2 of" in done.stdout
    assert "the same command without --part" in done.stdout
    printed = run(*said, "--part", "2/2", "-o", tmp_path / "out", "--json").stdout
    Draft202012Validator(SCHEMA).validate(json.loads(printed))
    assert "chair_s" in run(*said, "-o", tmp_path / "out").stdout
