"""The model card, results beside it, and the one commit that publishes an edited checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Tiny, build_tiny
from fake_hub import TOKEN, FakeHub, Repo, hub_environment, run_qkpatch
from typer.testing import Result

from qkpatch.publishing import front_matter

SHARDS = [["layers.0."], ["layers.1."], [""]]
PATCHED, UNTOUCHED = "model-00002-of-00003.safetensors", "model-00001-of-00003.safetensors"
BASE_CARD = """---
# kept
license: other
license_name: tongue-twister  # kept too
language:
- en
tags: [vision, 'chat']
base_model: org/older
model-index:
- name: base
  results:
  - task: {type: x}
pipeline_tag: image-text-to-text
---

# Base

It is *good*. --- or so.
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = build_tiny(tmp_path_factory.mktemp("base") / "base", shards=SHARDS)
    (tiny.path / "README.md").write_text(BASE_CARD)
    return tiny


@pytest.fixture
def published(hub: FakeHub, base: Tiny) -> Repo:
    hub.repos["org/base"] = Repo(base.path)
    return hub.repos["org/base"]


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return hub_environment(hub.endpoint, tmp_path / "home")


@pytest.fixture
def out(base: Tiny, tmp_path: Path, run: Callable[..., Result]) -> Path:
    """An edited copy of the directory."""
    assert run("apply", base.path, "-o", tmp_path / "out", "--quiet").exit_code == 0
    return tmp_path / "out"


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter, as YAML reads it, and the text."""
    _, block, text = card.split("---\n", 2)
    return yaml.safe_load(block), text


# -------- front matter


def test_front_matter_is_kept_but_for_what_is_set_and_dropped() -> None:
    block, text = front_matter.split(BASE_CARD)
    assert text == "\n# Base\n\nIt is *good*. --- or so.\n"
    changed = front_matter.changed(
        block, {"base_model": "org/base", "tags": ["a", "no", "1.5"]}, ["model-index"]
    )
    read = yaml.safe_load(changed)
    assert read == {
        "license": "other",
        "license_name": "tongue-twister",
        "language": ["en"],
        "pipeline_tag": "image-text-to-text",
        "base_model": "org/base",
        "tags": ["a", "no", "1.5"],
    }
    assert "license_name: tongue-twister  # kept too\n" in changed
    assert changed.startswith("# kept\n")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("tags: [vision, 'chat']", ["vision", "chat"]),
        ("tags: [vision,\n  chat]\nx: 1", ["vision", "chat"]),
        ("tags:\n- vision # yes\n- \"chat\"\nx: 1", ["vision", "chat"]),
        ("tags:\n  - vision\n", ["vision"]),
        ("tags: vision", ["vision"]),
        ("tags:\n", []),
        ("x: 1", []),
        ("", []),
    ],
)  # fmt: skip
def test_lists_are_read_in_each_of_their_forms(block: str, expected: list[str]) -> None:
    assert front_matter.listed(block, "tags") == expected


@pytest.mark.parametrize("card", ["# no front matter\n", "", "--- no\n---\n", "---\nunclosed: 1\n"])
def test_a_card_without_front_matter_is_all_text(card: str) -> None:
    assert front_matter.split(card) == ("", card)


def test_front_matter_with_other_line_ends_and_nothing_in_it() -> None:
    assert front_matter.split("---\r\na: 1\r\n---\r\ntext") == ("a: 1", "text")
    assert front_matter.split("---\n---\ntext") == ("", "text")


# -------- the card


def test_the_card_tells_the_edit_and_claims_nothing(out: Path, run: Callable[..., Result]) -> None:
    before = {path: path.read_bytes() for path in out.iterdir()}
    result = run("card", out)
    assert result.exit_code == 0, result.stderr
    data, text = parts(result.stdout)
    assert data["license"] == "other"
    assert data["license_name"] == "tongue-twister"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["tags"] == ["vision", "chat", "qkpatch"]
    assert "model-index" not in data
    assert data["base_model"] == "org/older"  # SOURCE is a directory: nobody knows another
    assert "Nothing was measured for this model" in text
    assert "finding, not a measurement of this model" in text
    assert "qkpatch apply base --recipe llama" in text
    assert "| factor α | 0.8 |" in text
    assert "model.layers.1.self_attn.q_proj.weight" in text
    assert text.endswith("\n# Base\n\nIt is *good*. --- or so.\n")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_the_command_in_the_card_makes_the_same_edit(
    base: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    flags = ("--layers", "0,2", "--alpha", "0.25", "--select", "random", "--seed", "3", "--heads", "1-2")
    assert run("apply", base.path, "-o", tmp_path / "one", *flags).exit_code == 0
    text = run("card", tmp_path / "one").stdout
    line = next(line for line in text.splitlines() if line.startswith("qkpatch apply"))
    _, command, _, *given = line.split()
    given[given.index("OUT")] = str(tmp_path / "two")
    assert run(command, base.path, *given).exit_code == 0
    for name in ("one", "two"):
        (tmp_path / name / "qkpatch.json").unlink()
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }


# -------- results


def lmms(folder: Path, accuracy: list[float], chair: list[bool], **more: object) -> Path:
    """Results and samples as lmms-eval writes them."""
    folder.mkdir()
    n = len(accuracy)
    document = {
        "results": {
            "pope": {
                "alias": "pope",
                "pope_accuracy,none": sum(accuracy) / n,
                "pope_accuracy_stderr,none": 0.01,
                "pope_yes_ratio,none": 0.5,
            },
            "coco_cap_chair": {"coco_cap_chair_s,none": 100 * sum(chair) / len(chair), "alias": "coco"},
        },
        "versions": {"pope": "Yaml", "coco_cap_chair": "Yaml"},
        "n-samples": {"pope": {"original": n, "effective": n}},
        "configs": {"pope": {"generation_kwargs": {"max_new_tokens": 128}}},
        "config": {"model": "llava_hf", "model_args": f"pretrained={folder.name}"},
        **more,
    }
    path = folder / "20261127_results.json"
    path.write_text(json.dumps(document))
    pope = [{"doc_id": i, "pope_accuracy": {"score": a, "prediction": "yes"}} for i, a in enumerate(accuracy)]
    things = [{"answer": ["cat"], "pred": ["cat", "dog"] if c else ["cat"]} for c in chair]
    coco = [{"doc_id": i, "coco_cap_chair_s": thing} for i, thing in enumerate(things)]
    for task, samples in (("pope", pope), ("coco_cap_chair", coco)):
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"20261127_samples_{task}.jsonl").write_text(text)
    return path


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
    assert run("card", tmp_path).exit_code == 4


# -------- one commit


def push(environment: dict[str, str], out: Path, *more: str) -> Any:
    return run_qkpatch(environment, "apply", "org/base", "-o", out, "--push", "me/new", *more)


def test_apply_and_push_copy_what_is_untouched_and_send_the_rest_in_one_commit(
    hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path, run: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    result = push(environment, out, "--private")
    assert result.returncode == 0, result.stderr
    (commit,) = hub.commits
    assert (commit.repo, commit.is_pull_request) == ("me/new", False)
    assert commit.summary.startswith(
        "QK product steering of org/base: layers 1, 4 dominant mode(s), alpha 0.8"
    )
    assert f"Published: {hub.endpoint}/me/new/commit/" in result.stderr
    # The patched shard is sent; the others are copied from the base, at its commit.
    patched = hashlib.sha256((out / PATCHED).read_bytes()).hexdigest()
    assert commit.large == {
        UNTOUCHED: published.sha256(UNTOUCHED),
        PATCHED: patched,
        "model-00003-of-00003.safetensors": published.sha256("model-00003-of-00003.safetensors"),
    }
    assert set(hub.uploads) == {patched}
    (copied,) = hub.duplicated
    assert copied["from"] == "org/base"
    assert copied["target"] == {"type": "model", "name": "me/new"}
    assert {file["filename"] for file in copied["files"]} == commit.large.keys() - {PATCHED}
    asked = [
        request.path for request in hub.log if "/paths-info/" in request.path and "org/base" in request.path
    ]
    assert {path.rpartition("/")[2] for path in asked} == {published.commit}
    # Everything else is sent whole, as it lies in OUT, but for the card.
    sent = dict(commit.files)
    card = sent.pop("README.md").decode()
    assert sent == {
        p.name: p.read_bytes() for p in out.iterdir() if p.suffix != ".safetensors" and p.name != "README.md"
    }
    data, text = parts(card)
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "finetune")
    assert data["license"] == "other"
    assert f"at commit `{published.commit}`" in text
    assert (out / "README.md").read_text() == BASE_CARD
    assert hub.created["me/new"].get("private", hub.created["me/new"].get("visibility")) in (True, "private")
    assert {request.token for request in hub.log if request.host == "hub"} == {TOKEN}
    assert {request.token for request in hub.log if request.host == "cdn"} == {None}
    assert TOKEN not in result.stdout + result.stderr + card
    # What is on the Hub then is proved like what lies in OUT; what people made of the card, and what came, is named.
    (out / "README.md").write_text(card)
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    proved = run("verify", out, "--source", published.path)
    assert proved.exit_code == 0
    assert "not looked into: .gitattributes" in proved.stdout
    assert "README.md" not in proved.stdout
    for edited in (card.replace("*good*", "*better*"), card.replace("| 0.8 |", "| 0.9 |")):
        (out / "README.md").write_text(edited)
        changed = run("verify", out, "--source", published.path)
        assert changed.exit_code == 0
        assert "README.md is not the card that qkpatch writes of this edit" in changed.stdout


def test_a_dry_run_shows_the_commit_and_makes_none(
    hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path
) -> None:
    result = push(environment, tmp_path / "out", "--dry-run", "--create-pr")
    assert result.returncode == 0, result.stderr
    assert "Pull request to me/new: QK product steering of org/base" in result.stdout
    lines = {line.split()[-1]: line for line in result.stdout.splitlines() if line.strip()}
    assert f"copy from org/base@{published.commit[:12]}" in lines[UNTOUCHED]
    assert lines[PATCHED].split()[0] == lines["README.md"].split()[0] == "upload"
    assert not (tmp_path / "out").exists()
    assert hub.commits == []
    assert hub.created == {}
    assert {request.method for request in hub.log} <= {"GET", "HEAD"}
    assert hub.sent_of(".safetensors") <= 3 * (64 << 10)


def test_a_directory_is_sent_whole_with_results_in_its_card_as_a_pull_request(
    hub: FakeHub, base: Tiny, out: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.repos["me/new"] = Repo(_folder(tmp_path / "there", {"README.md": "# there\n"}))
    before, after = lmms(tmp_path / "b", [1.0, 0.0], [True]), lmms(tmp_path / "p", [1.0, 1.0], [True])
    flags = ("--push", "me/new", "--create-pr", "--results", after, "--base-results", before)
    result = run_qkpatch(environment, "card", out, *flags, "--source", base.path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{hub.endpoint}/me/new/discussions/1"
    (commit,) = hub.commits
    assert commit.is_pull_request
    assert len(commit.large) == len(hub.uploads) == 3
    assert b"pope_accuracy" in commit.files["README.md"]
    assert hub.duplicated == []


def _folder(path: Path, files: dict[str, str]) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_what_cannot_be_published_is_refused_before_anything_is_done(
    hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.repos["me/new"] = Repo(_folder(tmp_path / "there", {"model-00001-of-00009.safetensors": "x"}))
    other = push(environment, tmp_path / "out")
    assert other.returncode == 2
    assert "holds other weights, model-00001-of-00009.safetensors" in other.stderr
    own = run_qkpatch(environment, "apply", "org/base", "-o", tmp_path / "out", "--push", "org/base")
    assert own.returncode == 2
    assert "base model's own repository" in own.stderr
    hub.repos["me/new"] = Repo(_folder(tmp_path / "empty", {"README.md": "x"}))
    public = push(environment, tmp_path / "out", "--private")
    assert public.returncode == 2
    assert "is there already, and public" in public.stderr
    del hub.repos["me/new"]
    without = {**environment, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
    del without["HF_TOKEN"]
    nobody = push(without, tmp_path / "out")
    assert nobody.returncode == 4
    assert "publishing needs a token" in nobody.stderr
    assert not (tmp_path / "out").exists()
    assert hub.commits == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--push", "nonsense"), "no name of a repository"),
        (("--push", "a/b@main"), "no name of a repository"),
        (("--private",), "go with --push"),
    ],
)
def test_flags_of_publishing_that_make_no_sense_are_refused(
    base: Tiny, tmp_path: Path, run: Callable[..., Result], flags: tuple[str, ...], said: str
) -> None:
    result = run("apply", base.path, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_was_cut_is_not_published(
    hub: FakeHub, base: Tiny, out: Path, environment: dict[str, str]
) -> None:
    shutil.copy(out / "config.json", out / PATCHED)
    result = run_qkpatch(environment, "card", out, "--push", "me/new", "--source", base.path)
    assert result.returncode == 1
    assert PATCHED in result.stderr
    assert hub.commits == []
