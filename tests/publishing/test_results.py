"""Results of lmms-eval for both models in the card: on the same questions, or not at all."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cards import BASE_CARD, base_model, edited_copy, lmms
from conftest import Tiny
from typer.testing import Result

from qkpatch.planning.manifest import Manifest
from qkpatch.publishing.card import is_card_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def out(base: Tiny, tmp_path: Path, run: Callable[..., Result]) -> Path:
    return edited_copy(base, tmp_path, run)


def test_results_are_shown_side_by_side_with_the_paired_difference(
    out: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    before = lmms(tmp_path / "b", [1.0, 0.0, 1.0, 0.0], [True, True, False, False])
    after = lmms(tmp_path / "p", [1.0, 1.0, 1.0, 0.0], [False, True, False, False])
    result = run("card", out, "--results", after, "--base-results", before)
    assert result.exit_code == 0, result.stderr
    assert "Nothing was measured" not in result.stdout
    rows = {line.split(" | ")[1]: line for line in result.stdout.splitlines() if line.startswith("| pope |")}
    half = 1.96 * 0.5 / math.sqrt(4)  # of 0, 1, 0, 0: a standard deviation of one half
    assert rows["pope_accuracy"] == (
        f"| pope | pope_accuracy | 4 | 0.5000 | 0.7500 | +0.2500 | +0.2500 ± {half:.4f} | 1 of 4 |"
    )
    assert "pope_yes_ratio" not in result.stdout
    coco = next(line for line in result.stdout.splitlines() if "coco_cap_chair_s" in line)
    assert coco == (
        "| coco_cap_chair | coco_cap_chair_s | - | 50.0000 | 25.0000 | -25.0000 "
        f"| -25.0000 ± {100 * half:.4f} | 1 of 4 |"
    )
    assert "llava_hf, pretrained=b" in result.stdout
    assert ", both models with the same call. Base: " in result.stdout


def test_without_samples_there_is_no_interval(out: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    before, after = lmms(tmp_path / "b", [1.0, 0.0], [True]), lmms(tmp_path / "p", [1.0, 1.0], [True])
    for path in tmp_path.glob("?/*.jsonl"):
        path.unlink()
    result = run("card", out, "--results", after, "--base-results", before)
    assert "| pope | pope_accuracy | 2 | 0.5000 | 1.0000 | +0.5000 | - | - |" in result.stdout
    assert "small differences may be chance" in result.stdout


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"n-samples": {"pope": {"effective": 9}}}, "n-samples"),
        ({"versions": {}}, "versions"),
        ({"configs": {"pope": {"generation_kwargs": {"max_new_tokens": 16}}}}, "generation of pope"),
        ({"results": {"pope": {"pope_accuracy,none": 1.0}}}, "tasks"),
    ],
)
def test_runs_that_differ_in_more_than_the_model_are_not_compared(
    out: Path, tmp_path: Path, run: Callable[..., Result], more: dict[str, object], said: str
) -> None:
    before, after = lmms(tmp_path / "b", [1.0], [True]), lmms(tmp_path / "p", [1.0], [True], **more)
    result = run("card", out, "--results", after, "--base-results", before)
    assert result.exit_code == 2
    assert f"they differ in {said}" in result.stderr


def of_pope(**figures: Any) -> dict[str, object]:
    return {"results": {"pope": figures, "coco_cap_chair": {}}}


BIG = 10**400


@pytest.mark.parametrize(
    ("left", "right", "cells"),
    [
        (0.5, math.nan, "0.5000 | - | -"),
        (math.nan, 0.5, "- | 0.5000 | -"),
        (0.5, math.inf, "0.5000 | - | -"),
        (BIG, 0.5, "- | 0.5000 | -"),
        (0.5, -BIG, "0.5000 | - | -"),
        (0.5, None, "0.5000 | - | -"),
        ("N/A", 0.5, "- | 0.5000 | -"),
    ],
)
def test_a_figure_that_one_run_lacks_is_a_dash_on_either_side(
    out: Path, tmp_path: Path, run: Callable[..., Result], left: Any, right: Any, cells: str
) -> None:
    alike = {"f1,none": 0.25}
    before = lmms(tmp_path / "b", [1.0], [True], **of_pope(**{"acc,none": left, **alike}))
    after = lmms(tmp_path / "p", [1.0], [True], **of_pope(**{"acc,none": right, **alike}))
    result = run("card", out, "--results", after, "--base-results", before)
    if result.exit_code and {BIG, -BIG} & {left, right}:
        assert (result.exit_code, "digits" in result.stderr) == (3, True), result.stderr
        return
    assert result.exit_code == 0, result.stderr
    assert f"| pope | acc | 1 | {cells} | - | - |\n" in result.stdout
    assert "| pope | f1 | 1 | 0.2500 | 0.2500 | +0.0000 | - | - |" in result.stdout
    lone = lmms(tmp_path / "l", [1.0], [True], **of_pope(acc=math.nan))
    nothing = run("card", out, "--results", lone, "--base-results", before)
    assert nothing.exit_code == 2
    assert "no figure in common" in nothing.stderr


def test_one_run_is_no_comparison(out: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    path = lmms(tmp_path / "b", [1.0, math.nan], [True])
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    (tmp_path / "link").symlink_to(path)
    for other in (path, copy, tmp_path / "link"):
        result = run("card", out, "--results", other, "--base-results", path)
        assert result.exit_code == 2
        assert "they are the same run" in result.stderr
        assert result.stdout == ""


def test_what_else_differs_is_told(out: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    config = {"model": "llava_hf", "model_args": "pretrained=/models/x"}
    before = lmms(tmp_path / "b", [1.0], [True], config={**config, "limit": 8}, transformers_version="4.57")
    after = lmms(tmp_path / "p", [0.0], [True], config={**config, "limit": None}, transformers_version="5.0")
    result = run("card", out, "--results", after, "--base-results", before)
    assert result.exit_code == 0, result.stderr
    said = "**Not the model alone:** the runs differ in config.limit, transformers_version; both name the same model."
    assert said in result.stdout
    assert "same call" not in result.stdout


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [
        ("pretrained=a,load_in_4bit=True", "pretrained=b", "the runs differ in load_in_4bit of model_args."),
        ({"pretrained": "a", "x": True}, '{"pretrained": "b", "x": false}', "the runs differ in x of model_args."),
        ("pretrained=a,/home/me/x", "pretrained=b,y", "the runs differ in model_args."),
        ("pretrained=o,dtype=float16", "pretrained=o,dtype=float32", "dtype of model_args; both name the same model."),
        ("pretrained=./o/", "dtype=a, pretrained=o", "dtype of model_args; both name the same model."),
        ("pretrained=o,revision=x", "pretrained=o,revision=y", None),
        ({"pretrained": "a", "x": 1}, "x=1,pretrained=b", None),
        ("", "", None),
    ],
)  # fmt: skip
def test_arguments_that_differ_and_models_that_do_not(
    out: Path, tmp_path: Path, run: Callable[..., Result], left: object, right: object, said: str | None
) -> None:
    before = lmms(tmp_path / "b", [1.0], [True], config={"model": "m", "model_args": left})
    after = lmms(tmp_path / "p", [0.0], [True], config={"model": "m", "model_args": right})
    result = run("card", out, "--results", after, "--base-results", before)
    assert result.exit_code == 0, result.stderr
    assert ("both models with the same call." in result.stdout) == (said is None)
    assert ("Not the model alone" in result.stdout) == (said is not None)
    assert (said or "") in result.stdout
    assert "/me" not in result.stdout
    manifest = Manifest.loads((out / "qkpatch.json").read_bytes(), "")
    assert is_card_of(result.stdout, manifest, BASE_CARD)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("pretrained=/home/me/My models/x,dtype=float16", "pretrained=x,dtype=float16"),
        ("pretrained=~/x/,device_map=auto", "pretrained=x,device_map=auto"),
        ("pretrained=C:\\models\\x", "pretrained=x"),
        ("pretrained=file:///home/me/x", "pretrained=x"),
        ('{"pretrained": "/home/me/x", "n": 1}', '{"pretrained": "x", "n": 1}'),
        ({"pretrained": "/home/me/x", "n": 1}, "pretrained=x,n=1"),
        ("pretrained=org/name,revision=main", "pretrained=org/name,revision=main"),
        ("pretrained=org/name,base_url=https://host/v1", "pretrained=org/name,base_url=https://host/v1"),
    ],
)
def test_no_path_of_this_machine_is_in_a_card(
    out: Path, tmp_path: Path, run: Callable[..., Result], arguments: object, shown: str
) -> None:
    config = {"model": "llava_hf", "model_args": arguments}
    before = lmms(tmp_path / "b", [1.0], [True], config=config, model_name="/home/me/x")
    after = lmms(tmp_path / "p", [0.0], [True], model_name="/home/me/y")
    result = run("card", out, "--results", after, "--base-results", before)
    assert result.exit_code == 0, result.stderr
    assert f"Base: `llava_hf, {shown}, x`; patched:" in result.stdout
    assert "/me" not in result.stdout


@pytest.mark.parametrize("task", ["a/b", "../b", "/", "", "\0", "x" * 300, "a|b`\n# Measured: 100 %", ".."])
def test_a_task_may_be_called_what_no_file_is(
    out: Path, tmp_path: Path, run: Callable[..., Result], task: str
) -> None:
    more: dict[str, Any] = {"n-samples": {}, "versions": {}, "configs": {}}
    before = lmms(tmp_path / "b", [1.0], [True], results={task: {"pope_accuracy,none": 0.5}}, **more)
    after = lmms(tmp_path / "p", [0.0], [True], results={task: {"pope_accuracy,none": 0.75}}, **more)
    result = run("card", out, "--results", after, "--base-results", before)
    assert result.exit_code == 0, result.stderr
    (row,) = [line for line in result.stdout.splitlines() if "+0.2500" in line]
    assert row.endswith("| pope_accuracy | - | 0.5000 | 0.7500 | +0.2500 | - | - |")
    assert "\n# Measured" not in result.stdout


@pytest.mark.parametrize(
    ("sample", "code"),
    [
        (b"{", 3),
        (b"\xff", 3),
        (b"[" * 100_000, 3),
        (b"1", 3),
        (b'{"doc_id": 0}', 3),
        (b'{"doc_id": 0, "pope_accuracy": {"score": "high"}}', 3),
        (b'{"doc_id": 0, "pope_accuracy": {"score": null}}', 3),
        (b'{"doc_id": 0, "pope_accuracy": {"score": NaN}}', 0),
        (b'{"doc_id": 0, "pope_accuracy": {"score": ' + b"9" * 400 + b"}}", 0),
        (b'{"doc_id": 0, "pope_accuracy": {"score": ' + b"9" * 5000 + b"}}", 3),
    ],
)
def test_a_sample_that_is_none_is_told_or_gives_no_interval(
    out: Path, tmp_path: Path, run: Callable[..., Result], sample: bytes, code: int
) -> None:
    before, after = lmms(tmp_path / "b", [1.0, 0.0], [True]), lmms(tmp_path / "p", [1.0, 1.0], [True])
    (tmp_path / "p" / "20261127_samples_pope.jsonl").write_bytes(sample + b"\n")
    result = run("card", out, "--results", after, "--base-results", before)
    assert result.exit_code == code, result.stderr
    if code:
        assert "not a sample of pope" in result.stderr
    else:
        assert "| pope | pope_accuracy | 2 | 0.5000 | 1.0000 | +0.5000 | - | - |" in result.stdout


def test_captions_of_any_length_take_time_in_proportion(
    out: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Each of a hundred thousand things was once looked for among a hundred thousand: an hour."""
    before, after = (lmms(tmp_path / side, [1.0, 0.0], [True, False]) for side in "bp")
    things = [str(i) for i in range(100_000)]
    sample = {"doc_id": 0, "coco_cap_chair_s": {"answer": things, "pred": things[::-1]}}
    file = tmp_path / "p" / "20261127_samples_coco_cap_chair.jsonl"
    file.write_text(json.dumps(sample) + "\n" + file.read_text().splitlines()[1] + "\n")
    begun = time.process_time()
    result = run("card", out, "--results", after, "--base-results", before)
    assert result.exit_code == 0, result.stderr
    assert time.process_time() - begun < 10
    assert "-50.0000 ± 98.0000 | 1 of 2 |" in result.stdout


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no number of pictures": lambda d: d["pictures"].update(n=math.inf),
    "no number of looks": lambda d: d.update(tuned={"beaten": {}, "looked": math.inf}),
    "no figure": lambda d: d["comparisons"][0]["figures"]["chair_s"].update(base=math.nan),
    "a figure of 300 digits": lambda d: d["comparisons"][0]["figures"]["chair_s"].update(model=10**299),
    "no interval": lambda d: d["comparisons"][0]["figures"]["chair_s"]["difference"].update(low=-math.inf),
    "no edit": lambda d: d["sides"][1].update(edit="full"),
    "no side": lambda d: d["comparisons"][0].update(model=9),
    "no comparison": lambda d: d.update(comparisons=[]),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_an_evaluation_that_is_none_is_refused(
    out: Path, tmp_path: Path, run: Callable[..., Result], forgery: str
) -> None:
    figure = {"base": 0.5, "model": 0.25, "difference": {"low": -0.5, "high": 0.0}}
    document = {
        "comparisons": [{"base": 0, "model": 1, "figures": {"chair_s": figure}}], "pictures": {"n": 4},
        "warnings": [], "tuned": None, "sides": [{"model": "a"}, {"model": "b", "edit": {"alpha": 0.8}}],
    }  # fmt: skip
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(document))
    assert run("card", out, "--results", file).exit_code == 0
    FORGED[forgery](document)
    file.write_text(json.dumps(document))
    result = run("card", out, "--results", file)
    assert result.exit_code == 3
    assert "no comparison of qkpatch evaluate" in result.stderr


def test_a_result_without_its_base_and_a_file_of_another_kind_are_refused(
    out: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    path = lmms(tmp_path / "b", [1.0], [True])
    alone = run("card", out, "--results", path)
    assert alone.exit_code == 2
    assert "go together" in alone.stderr
    other = run("card", out, "--results", out / "config.json", "--base-results", path)
    assert other.exit_code == 3
    assert "not the results of a run of lmms-eval" in other.stderr
    assert run("card", tmp_path).exit_code == 3
