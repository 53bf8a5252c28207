"""The search: halves that do not meet, a log that goes on, one look that is counted, and a verdict that is plain."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from commands import last_said
from conftest import REPO
from failing import interrupt
from jsonschema import Draft202012Validator
from typer.testing import CliRunner, Result

import qkpatch
from qkpatch.cli import app
from qkpatch.evaluation import Inputs, Limits, Protocol
from qkpatch.evaluation.search import HEAD, candidates
from qkpatch.evaluation.subject import Subject
from qkpatch.planning.request import Request, parse_request
from qkpatch.spectral.rule import Channel

Run = Callable[..., Result]

TOY = REPO / "demo" / "toy-0"
FLAGS = ("--prompt", "<image> describe :", "--question", "<image> exists {object}", "--max-new-tokens", 16,
         "--questions", 1, "--batch-size", 20, "--trials", 3)  # fmt: skip
SCHEMA = json.loads((resources.files("qkpatch") / "evaluation" / "evaluation.schema.json").read_text())


def given(album: Path, out: Path, *more: object) -> tuple[object, ...]:
    return last_said(
        TOY,
        "--images",
        album / "pictures",
        "--objects",
        album / "objects.jsonl",
        *FLAGS,
        "-o",
        out,
        *more,
    )


def log(out: Path) -> dict[str, Any]:
    lines = (out.with_suffix(".tune") / "log.jsonl").read_text().splitlines()
    return dict(json.loads(line) for line in lines)


@pytest.fixture(scope="module")
def searched(album: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A whole search, and where its setting would be."""
    out = tmp_path_factory.mktemp("searched") / "edit.yaml"
    return CliRunner().invoke(app, [str(word) for word in ("tune", *given(album, out))]), out


def copied(searched: tuple[Result, Path], folder: Path) -> Path:
    """What a whole search leaves, for a test to go on from."""
    out = folder / "edit.yaml"
    shutil.copytree(searched[1].with_suffix(".tune"), out.with_suffix(".tune"))
    return out


def test_settings_are_drawn_with_a_seed_and_what_is_fixed_is_fixed() -> None:
    drawn = candidates(20, 9, Request(), 0, channels=False)
    assert (
        drawn
        == candidates(20, 9, Request(), 0, channels=False)
        != candidates(20, 9, Request(), 1, channels=False)
    )
    assert len(set(drawn)) == 20
    assert drawn[0] == Request(alpha=0.8)
    assert {r.channel for r in drawn[1:]} == {Channel.full}
    assert {r.channel for r in candidates(40, 9, Request(), 0, channels=True)[1:]} == set(Channel)
    fixed = candidates(20, 9, Request(layers=(3, 4), modes=2), 0, channels=False)
    assert {(r.layers, r.modes) for r in fixed} == {((3, 4), 2)}
    assert len(fixed) <= 7  # no more strengths than there are
    assert all(set(r.layers or ()) <= set(range(9)) for r in drawn)


@pytest.mark.long
def test_a_search_says_plainly_what_it_found_and_writes_only_what_beats_all(
    run: Run, searched: tuple[Result, Path], album: Path, tmp_path: Path
) -> None:
    result, out = searched[0], copied(searched, tmp_path)
    assert result.exit_code == 1, result.output  # twenty pictures cannot show what is there
    assert "NOT found better than" in result.output
    assert "edit nothing" in result.output
    assert not searched[1].exists()
    document = json.loads((tmp_path / "edit.tune" / "evaluation.json").read_text())
    Draft202012Validator(SCHEMA).validate(document)
    tuned = document["tuned"]
    assert set(tuned["beaten"]) == {"no edit", "stopping earlier", "random modes", "shrink"}
    assert not tuned["is_found"]
    assert tuned["looked"] == 1
    assert [side["edit"] and side["edit"].get("select") for side in document["sides"]] == [
        None,
        None,
        "random",
        "shrink",
    ]

    trials = [key for key in log(out) if key.startswith("trial ")]
    assert len(trials) == 3 + 2 + 1  # by halving
    held_out = {row["picture"] for row in document["sides"][0]["said"]}
    searched = set()
    for grown in (tmp_path / "edit.tune").glob("*.jsonl"):
        lines = dict(json.loads(line) for line in grown.read_text().splitlines())
        if grown.name != "log.jsonl" and not lines[":settings"]["asked"]:
            searched |= {name for name in lines if name.endswith(".png")}
    assert len(held_out) == len(searched) == 20
    assert not held_out & searched

    before = log(out)
    anyway = run("tune", *given(album, out, "--anyway"))
    assert anyway.exit_code == 0, anyway.output
    assert f"Wrote {out} (--anyway)" in anyway.output
    assert "edit nothing" not in anyway.output + out.read_text()
    # The setting is spelled out, whatever was left to the recipe.
    assert set(tuned["edit"]) == {"layers", "modes", "alpha", "channel"}
    assert all(f"\n{key}: {value}\n" in out.read_text() for key, value in tuned["edit"].items())
    heading = next(line for line in anyway.output.splitlines() if "against" in line)
    assert all(f"{key} {value}" in heading for key, value in tuned["edit"].items())
    assert log(out) == before  # nothing is measured again, and the same look is no second one
    assert out.read_text().startswith(HEAD)
    assert "# NOT found better than" in out.read_text()
    request = parse_request(out.read_bytes(), "edit.yaml")
    applied = run("apply", TOY, "--config", out, "-o", tmp_path / "edited")
    assert applied.exit_code == 0, applied.output
    assert {key: getattr(request, key) for key in ("alpha", "modes")} == {
        key: tuned["edit"].get(key) for key in ("alpha", "modes")
    }
    evidence = tmp_path / "edit.tune" / "evaluation.json"
    card = run("card", tmp_path / "edited", "--results", evidence, "--write")
    assert card.exit_code == 0, card.output
    text = (tmp_path / "edited" / "README.md").read_text()
    assert "with qkpatch evaluate, by whoever made it" in text
    assert "the held-out half was looked at 1 time(s) in all" in text
    assert "not found better than stopping earlier" in text
    assert "chair_s_at_equal_recall" in text
    assert str(tmp_path) not in text
    proof = run("verify", tmp_path / "edited", "--source", TOY)
    assert proof.exit_code == 0, proof.output
    assert "reports results, which are its author's" in proof.output
    for broken in ('{"comparisons": []}', '{"comparisons": [{"figures": 3}], "pictures": {"n": 3}}'):
        evidence.write_text(broken)
        refused = run("card", tmp_path / "edited", "--results", evidence)
        assert refused.exit_code == 3, refused.output
        assert "no comparison of qkpatch evaluate" in refused.output
    # Another setting is another look, and the log says so.
    other = run(
        "tune", *given(album, out, "--alpha", 1 - tuned["edit"]["alpha"] / 2, "--trials", 1, "--json")
    )
    assert json.loads(other.stdout)["tuned"]["looked"] == 2


@pytest.mark.long
def test_limits_are_kept(album: Path, tmp_path: Path) -> None:
    inputs = Inputs(album / "pictures", album / "objects.jsonl", batch_size=20, text=album / "text.txt")
    asked = Protocol("<image> describe :", max_new_tokens=16, questions=0)
    limits = Limits(trials=4, max_kl=1e-9, max_perplexity=1.0, keep_recall=0.0)
    result = qkpatch.tune(TOY, inputs, tmp_path / "edit.yaml", asked, limits=limits, layers="0-8", modes=8)
    assert result.tuned is not None
    assert any(limit.startswith("kl_prompts") for limit in result.tuned["broken"])
    assert not result.tuned["is_found"]
    assert not (tmp_path / "edit.yaml").exists()


@pytest.mark.long
def test_settings_that_the_model_has_not_are_not_tried(monkeypatch: Any, album: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("qkpatch.evaluation.search.MODES", (1, 999))
    inputs = Inputs(album / "pictures", album / "objects.jsonl", batch_size=20)
    asked = Protocol("<image> describe :", max_new_tokens=8, questions=0, sample=8)
    result = qkpatch.tune(TOY, inputs, tmp_path / "edit.yaml", asked, limits=Limits(trials=8), channel="full")
    assert result.tuned is not None
    assert 1 <= result.tuned["trials"] < 8
    assert not [key for key in log(tmp_path / "edit.yaml") if "999" in key]


@pytest.mark.long
def test_a_search_that_was_stopped_goes_on(
    run: Run, searched: tuple[Result, Path], album: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole, out = searched[1], tmp_path / "edit.yaml"
    for n_batches in (2, 4):
        with monkeypatch.context() as patched:
            interrupt(patched, Subject, "captions", n_batches)
            stopped = run("tune", *given(album, out))
        assert stopped.exit_code == 130, stopped.output
        assert f"what was said so far is kept in {out.with_suffix('.tune')}. Go on with" in stopped.output
    assert run("tune", *given(album, out)).exit_code == 1
    a, b = (
        {k: {**v, "seconds": 0} if isinstance(v, dict) else v for k, v in log(o).items()}
        for o in (whole, out)
    )
    assert a == b


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--max-perplexity", 1.02), 2, "no text to measure it on"),
        (("--sample", 6), 2, "too few"),
        (("--trials", 0), 2, "no number from 1 on"),
        (("--layers", "99"), 2, "99"),
        (("--keep-recall", -1), 2, "no number from"),
        (("--max-shard-size", "1GB"), 2, "no such option"),
        (("--seed", 3), 2, "nothing is drawn"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(
    flags: tuple[object, ...], code: int, says: str, run: Run, album: Path, tmp_path: Path
) -> None:
    result = run("tune", *given(album, tmp_path / "edit.yaml", *flags))
    assert result.exit_code == code, result.output
    assert says in result.output
    assert not list(tmp_path.glob("edit*"))


def test_other_files_are_not_written_over(run: Run, album: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("layers: 3\n")
    os.mkfifo(tmp_path / "pipe.yaml")  # which would be waited for
    for out in (tmp_path / "mine.yaml", tmp_path / "edit.txt", tmp_path / "pipe.yaml", tmp_path):
        result = run("tune", *given(album, out))
        assert result.exit_code == 2, result.output
    assert (tmp_path / "mine.yaml").read_text() == "layers: 3\n"


@pytest.mark.long
def test_a_log_of_other_pictures_or_another_model_is_refused(
    run: Run, searched: tuple[Result, Path], album: Path, tmp_path: Path
) -> None:
    out = copied(searched, tmp_path)
    other = run("tune", REPO / "demo" / "toy-1", *given(album, out)[1:])
    assert other.exit_code == 2, other.output
    assert "other settings: model" in other.output
    fewer = run("tune", *given(album, out, "--sample", 30))
    assert fewer.exit_code == 2, fewer.output
    assert "pictures" in fewer.output
