"""Results of a sweep's variants, as lmms-eval and VLMEvalKit write them: paired, or told why not."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build_tiny
from typer.testing import Result

import qkpatch
from qkpatch.errors import QKPatchError
from qkpatch.evaluation import statistics
from qkpatch.evaluation.chair import CaptionScore, chair_columns
from qkpatch.evaluation.statistics import holm, mcnemar, paired
from qkpatch.sweeps import collect as collecting

Run = Callable[..., Result]

N = 40
RNG = np.random.default_rng(0)
THERE = [RNG.random() < 0.5 for _ in range(N)]  # of POPE's questions
GOOD = [t if RNG.random() < 0.8 else not t for t in THERE]
BETTER = [t if RNG.random() < 0.5 else said for t, said in zip(THERE, GOOD, strict=True)]
CAPTIONS = [["cat"] + ["dog"] * (RNG.random() < 0.5) for _ in range(N)]
CLEANER = [said[:1] if RNG.random() < 0.6 else said for said in CAPTIONS]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four variants: L1-m1, L1-m2, and a shrink of each."""
    folder = tmp_path_factory.mktemp("made")
    tiny = build_tiny(folder / "tiny")
    grid = {"modes": [1, 2], "layers": [1], "select": ["dominant", "shrink"]}
    qkpatch.sweep(tiny.path, grid, folder / "sweep", form="none")
    return folder / "sweep"


@pytest.fixture
def sweep(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "sweep"))


def lmms(
    sweep: Path, name: str, said: list[bool], captions: list[list[str]] = CAPTIONS, *, date: str = "20261101_120000",
    limit: int | None = None, prompt: str = "p", more: dict[str, Any] | None = None, samples: bool = True,
) -> Path:  # fmt: skip
    """A run as ``evaluate.sh`` has it: ``results/NAME/<model>/<date>_results.json``, and samples beside it."""
    model = f"checkpoints/tiny-{name}"
    folder = sweep / "results" / name / model.replace("/", "__")
    folder.mkdir(parents=True, exist_ok=True)
    right = [a == t for a, t in zip(said, THERE, strict=True)]
    hits = sum(a and t for a, t in zip(said, THERE, strict=True))
    made_up = [any(thing != "cat" for thing in caption) for caption in captions]
    document = {
        "results": {
            "pope": {
                "alias": "pope", "pope_accuracy,none": sum(right) / N, "pope_accuracy_stderr,none": "N/A",
                "pope_f1_score,none": 2 * hits / (sum(said) + sum(THERE)), "pope_yes_ratio,none": sum(THERE) / N,
            },
            "coco_cap_chair": {"alias": "coco_cap_chair", "coco_cap_chair_s,none": 100 * sum(made_up) / N},
        },
        "configs": {"pope": {"generation_kwargs": {"max_new_tokens": 128}}},
        "versions": {"pope": "Yaml", "coco_cap_chair": "Yaml"},
        "n-shot": {"pope": 0, "coco_cap_chair": 0},
        "n-samples": {"pope": {"original": N, "effective": N}},
        "config": {"model": "llava_hf", "model_args": f"pretrained={model},dtype=bfloat16", "limit": limit},
        "git_hash": "75571cf", "date": date, **(more or {}),
    }  # fmt: skip
    (folder / f"{date}_results.json").write_text(json.dumps(document))
    for task in ("pope", "coco_cap_chair") if samples else ():
        with (folder / f"{date}_samples_{task}.jsonl").open("w") as file:
            for i in range(N):
                hashes = {"doc_hash": f"d{i}", "prompt_hash": f"{prompt}{i}", "target_hash": f"t{i}"}
                line: dict[str, Any] = {"doc_id": i, "target": "x", "filtered_resps": ["..."], **hashes}
                if task == "pope":
                    yes, no = ("yes", "no")
                    one = {"question_id": i, "score": float(right[i]), "prediction": yes if said[i] else no,
                           "ground_truth": yes if THERE[i] else no}  # fmt: skip
                    figures = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
                    line |= {f"pope_{figure}": one for figure in figures}
                else:
                    one = {"answer": ["cat"], "pred": captions[i], "image_id": i}
                    line |= {f"coco_cap_{figure}": one for figure in ("chair_s", "chair_i", "recall")}
                file.write(json.dumps(line) + "\n")
    return folder


def table(work: Path, model: str, said: list[bool], suffix: str = "tsv") -> Path:
    """What VLMEvalKit scored: ``<work>/MODEL/T..._G.../MODEL_POPE_auxmatch.tsv``."""
    folder = work / model / "T20261101_Ge8e78f0"
    folder.mkdir(parents=True)
    with (folder / f"{model}_POPE_auxmatch.{suffix}").open("w", newline="") as file:
        written = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        written.writerow(
            ("index", "question", "answer", "category", "image_path", "prediction", "extracted", "score")
        )
        for i, (a, t) in enumerate(zip(said, THERE, strict=True)):
            word = {True: "Yes", False: "No"}
            written.writerow(
                (
                    i,
                    f"Is there\ta {i}?",
                    word[t],
                    "random",
                    f"{i // 4}.jpg",
                    f"{word[a]}\n...",
                    word[a],
                    a == t,
                )
            )
    return folder


def test_variants_are_paired_with_the_base_by_the_statistics_of_evaluate(sweep: Path) -> None:
    lmms(sweep, "base", GOOD)
    lmms(sweep, "L1-m1", BETTER, CLEANER)
    lmms(sweep, "L1-m2", GOOD, CAPTIONS[::-1])
    found = qkpatch.collect(sweep)
    assert [(one.variant, one.task, one.n) for one in found.found] == [
        ("L1-m1", "coco_cap_chair", N), ("L1-m1", "pope", N), ("L1-m2", "coco_cap_chair", N), ("L1-m2", "pope", N),
    ]  # fmt: skip
    assert found.warnings == ("not evaluated: L1-m1-shrink, L1-m2-shrink",)
    coco, pope, other, same = found.found
    assert list(coco.figures) == ["chair_s", "chair_i", "recall", "length"]
    # F1 and accuracy as reported; POPE's yes_ratio is of the right answers, and its recall is no mean: left out.
    assert set(pope.figures) == {"f1", "said_yes", "pope_accuracy"}
    order = sorted(range(N), key=str)

    def columns(captions: list[list[str]]) -> Any:
        scores = [CaptionScore.of(captions[i], {"cat"}) for i in order]
        return np.stack(list(chair_columns(scores).values()))

    # Pictures in the order of their names, as a resampling depends on it.
    theirs, ours = columns(CAPTIONS), columns(CLEANER)
    expected = paired(ours, theirs)
    assert [figure.difference for figure in coco.figures.values()] == expected
    made_up = [[any(thing != "cat" for thing in c) for c in side] for side in (CAPTIONS, CLEANER)]
    assert coco.mcnemar["chair_s"] == mcnemar(*made_up)
    right = [[a == t for a, t in zip(side, THERE, strict=True)] for side in (GOOD, BETTER)]
    assert pope.mcnemar["pope_accuracy"] == mcnemar(*right)
    assert math.isclose(pope.figures["pope_accuracy"].model, sum(right[1]) / N)
    assert same.figures["pope_accuracy"].difference.estimate == 0
    p = [one.figures["chair_s"].difference.p for one in (coco, other)]
    assert [one.holm["chair_s"] for one in (coco, other)] == holm(p)


def test_all_variants_of_a_task_share_one_resampling_and_the_base_is_scored_once(
    sweep: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, said in (
        ("base", GOOD),
        ("L1-m1", BETTER),
        ("L1-m2", BETTER[::-1]),
        ("L1-m1-shrink", GOOD[::-1]),
    ):
        lmms(sweep, name, said)
    counted = dict.fromkeys(("resampled", "columns"), 0)

    def counting(module: Any, name: str, key: str) -> None:
        call = getattr(module, name)

        def count(*arguments: Any, **named: Any) -> Any:
            counted[key] += 1
            return call(*arguments, **named)

        monkeypatch.setattr(module, name, count)

    counting(statistics, "resampled", "resampled"), counting(collecting, "_columns", "columns")
    result = run("collect", sweep)
    assert result.exit_code == 0, result.output
    assert counted == {"resampled": 2, "columns": 8}  # by task; by run
    assert "detectable" in result.output
    found = {(one.variant, one.task): one for one in qkpatch.collect(sweep).found}
    figure = found["L1-m1", "pope"].figures["pope_accuracy"]
    assert f"{figure.smallest_detectable:.4f}" in result.output


def test_a_control_can_be_what_all_are_held_against_and_tables_say_so(sweep: Path, run: Run) -> None:
    lmms(sweep, "L1-m1-shrink", GOOD)
    lmms(sweep, "L1-m1", BETTER, CLEANER)
    result = run("collect", sweep, "--against", "L1-m1-shrink")
    assert result.exit_code == 0, result.output
    assert "coco_cap_chair: chair_s, less that of L1-m1-shrink" in result.output
    assert "not evaluated: base" in " ".join(result.output.split())
    document = json.loads(run("collect", sweep, "--against", "L1-m1-shrink", "--json").stdout)
    assert {one["variant"] for one in document["found"]} == {"L1-m1"}
    assert run("collect", sweep, "--quiet", "--against", "L1-m1-shrink").stdout == ""
    assert run("collect", sweep, "--quiet", "--against", "L1-m1-shrink", "--strict").exit_code == 6


def test_answers_of_vlmevalkit_are_paired_by_picture(sweep: Path, tmp_path: Path, run: Run) -> None:
    work = tmp_path / "outputs"
    table(work, "llava-base", GOOD), table(work, "llava-L1-m1", BETTER)
    found = qkpatch.collect(sweep, work)
    (one,) = found.found
    assert (one.variant, one.task, one.tool, one.n) == ("L1-m1", "POPE", "VLMEvalKit", N // 4)
    assert set(one.figures) == {"f1", "said_yes", "accuracy"}
    right = [[a == t for a, t in zip(side, THERE, strict=True)] for side in (GOOD, BETTER)]
    assert one.mcnemar["accuracy"] == mcnemar(*right)
    # Folders of other names, by hand; and the format that it writes unless it is told otherwise.
    named = qkpatch.collect(sweep, f"base={work / 'llava-base'}", f"L1-m2={work / 'llava-L1-m1'}")
    assert named.found[0].figures == one.figures
    assert named.found[0].variant == "L1-m2"
    table(work, "llava-L1-m2", GOOD, "xlsx")
    refused = run("collect", sweep, work)
    assert refused.exit_code == 3
    assert "PRED_FORMAT=tsv" in refused.output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": "q"}, "not compared, as it differs from base in prompts"),
        ({"more": {"versions": {"pope": "2", "coco_cap_chair": "2"}}}, "as it differs from base in versions"),
        ({"more": {"configs": {"pope": {"generation_kwargs": {"max_new_tokens": 16}},
                               "coco_cap_chair": {"generation_kwargs": {"max_new_tokens": 16}}}}},
         "not compared, as it differs from base in generation of pope"),
        ({"limit": 8}, "it differs from base in config.limit too"),
        ({"samples": False}, "no answers lie beside the results"),
    ],
)  # fmt: skip
def test_runs_that_are_not_comparable_are_told_and_left_out(
    sweep: Path, change: dict[str, Any], says: str
) -> None:
    lmms(sweep, "base", GOOD), lmms(sweep, "L1-m1", BETTER)
    lmms(sweep, "L1-m2", BETTER, **change)
    found = qkpatch.collect(sweep)
    assert any(says in warning and warning.startswith("L1-m2, ") for warning in found.warnings), (
        found.warnings
    )
    assert {one.variant for one in found.found} == ({"L1-m1", "L1-m2"} if "too" in says else {"L1-m1"})


def test_other_pictures_and_the_same_run_twice_are_left_out_and_the_newest_counts(sweep: Path) -> None:
    lmms(sweep, "base", GOOD), lmms(sweep, "L1-m1", GOOD)
    lmms(sweep, "L1-m1", BETTER, date="20261102_120000")
    other = lmms(sweep, "L1-m2", BETTER)
    for file in other.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"d3"', '"another"'))
    shutil.copytree(sweep / "results" / "base", sweep / "results" / "L1-m2-shrink")
    found = qkpatch.collect(sweep)
    assert {one.variant for one in found.found} == {"L1-m1"}
    told = "\n".join(found.warnings)
    assert "L1-m2, pope: not compared, as it differs from base in questions or pictures" in told
    assert "L1-m1, pope: 2 runs, of which 20261102_120000_results.json counts" in told
    assert "L1-m2-shrink, pope: the same run as base's, left out" in told
    assert found.found[1].figures["pope_accuracy"].difference.estimate != 0


def test_what_cannot_be_collected_is_a_sentence_with_a_cure(sweep: Path, tmp_path: Path, run: Run) -> None:
    def refused(code: int, says: str, cure: str, *words: object) -> None:
        result = run("collect", *words)
        text = " ".join(result.output.split())
        assert result.exit_code == code, result.output
        assert says in text
        assert cure in text

    refused(3, "no record of a sweep", "choose another", tmp_path) if (
        tmp_path / "sweep.json"
    ).exists() else None
    assert run("collect", tmp_path).exit_code != 0
    nothing = run("collect", sweep)  # results/ is not there
    assert nothing.exit_code == 2
    assert "evaluate.sh" in nothing.stderr
    (sweep / "results").mkdir()
    refused(2, "no results are in it", "--output_path", sweep)
    lmms(sweep, "L1-m1", BETTER)
    refused(2, "there is no run of base, so nothing can be compared", "bash evaluate.sh base", sweep)
    refused(2, "no variant of this sweep", "did you mean L1-m1-shrink?", sweep, "--against", "L1-m1-shrnk")
    refused(2, "'L9' is no variant of this sweep", "L1-m1", sweep, f"L9={sweep / 'results'}")
    folder = lmms(sweep, "base", GOOD, prompt="q")
    refused(2, "no two runs can be compared", "the same call", sweep)
    moved = folder.rename(tmp_path / "elsewhere")
    text = (moved / "20261101_120000_results.json").read_text().replace("tiny-base", "tiny")
    (moved / "20261101_120000_results.json").write_text(text)
    refused(2, "of no variant by their names", "NAME=FOLDER", sweep, moved)
    (moved / "20261101_120000_samples_pope.jsonl").write_text('{"doc_id": 1, "pope_accuracy": 3, "answer"')
    refused(3, "not a sample of pope", "--log_samples", sweep, f"base={moved}")
    (moved / "20261101_120000_results.json").write_text("{}")
    refused(3, "not the results of a run of lmms-eval", "*_results.json", sweep, f"base={moved}")
    with pytest.raises(QKPatchError):
        qkpatch.collect(sweep, moved)
