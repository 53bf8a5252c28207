"""The model card, results beside it, and the one commit that publishes an edited checkpoint."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from cards import BASE_CARD, PATCHED, UNTOUCHED, base_model, edited_copy, lmms, parts, verified
from conftest import REPO, Tiny
from fake_hub import TOKEN, FakeHub, Repo, hub_environment, run_qkpatch
from typer.testing import Result

import qkpatch
from qkpatch.planning.manifest import Manifest
from qkpatch.publishing.card import CHECKED, FOLLOWS, is_card_of, model_card, told


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def published(hub: FakeHub, base: Tiny) -> Repo:
    hub.repos["org/base"] = Repo(base.path)
    return hub.repos["org/base"]


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return hub_environment(hub.endpoint, tmp_path / "home")


@pytest.fixture
def out(base: Tiny, tmp_path: Path, run: Callable[..., Result]) -> Path:
    return edited_copy(base, tmp_path, run)


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


def test_a_shrink_is_told_by_what_it_is_as_much_as(
    base: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    plan = qkpatch.plan(base.path, layers=1, select="shrink")
    edit = qkpatch.apply(plan, tmp_path / "out").edit
    assert told(edit) == "layers 1, shrunk as much as 4 dominant mode(s), alpha 0.8, full channel"
    card = run("card", tmp_path / "out").stdout
    assert "| selection | shrink, as much as 4 dominant mode(s) per head |" in card


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
    assert "not looked at, since systems leave such things anywhere: .gitattributes" in proved.stdout
    assert "README.md says that it was checked, which its author says" in proved.stdout
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


@pytest.mark.long
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


# -------- the card in OUT


def test_no_text_of_a_manifest_or_a_title_is_markup_in_a_card(
    base: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    out, lie = tmp_path / "out", "x`\n\n# Certified\r\r| a | b |\n<script>\x1b[31m"
    assert run("apply", base.path, "-o", out, "--quiet").exit_code == 0
    document = json.loads((out / "qkpatch.json").read_text())
    document["recipe"]["name"] = lie
    document["edits"][0] |= {"tensor": lie, "dtype": lie}
    manifest = Manifest.loads(json.dumps(document).encode(), "")
    card = model_card(manifest, f"a {lie}", None, None)
    assert not any(c in card for c in "\r\x1b")
    assert "<script>" not in card.partition("```")[0]
    (heading,) = (line for line in card.splitlines() if line.startswith("# "))
    assert heading.startswith("# a x'")
    assert is_card_of(card, manifest, None)
    assert not is_card_of(card.replace("# a x", "# a <b>x"), manifest, None)
    assert not is_card_of(card.replace("# a x", "# a\rx"), manifest, None)


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ("Made by the first of these; the second checks it", CHECKED, "says that it was checked"),
        (f"\n{FOLLOWS}\n\n# Base\n", "", "lacks SOURCE's card"),
    ],
)
def test_what_a_card_claims_or_leaves_out_is_named(
    base: Tiny, tmp_path: Path, run: Callable[..., Result], old: str, new: str, note: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(base.path, source)
    (source / "README.md").write_text("# Base\n")
    assert run("apply", source, "-o", out, "--quiet").exit_code == 0
    assert run("card", out, "--write").exit_code == 0
    card = (out / "README.md").read_text()
    assert old in card
    (out / "README.md").write_text(card.replace(old, new))
    result = run("verify", out, "--source", source)
    assert result.exit_code == 0, result.stdout
    assert note in result.stdout


@pytest.mark.parametrize("readme", [BASE_CARD, "\ufeff# Base\n", "", None])
@pytest.mark.parametrize("digest", ["edited", "files", "none"])
def test_a_card_that_is_written_into_out_is_a_card_that_verify_knows(
    base: Tiny, tmp_path: Path, run: Callable[..., Result], readme: str | None, digest: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(base.path, source)
    (source / "README.md").unlink()
    if readme is not None:
        (source / "README.md").write_text(readme, encoding="utf-8")
    assert run("apply", source, "-o", out, "--digest", digest, "--quiet").exit_code == 0
    printed = run("card", out).stdout
    others = {p.name: p.read_bytes() for p in out.iterdir() if p.name != "README.md"}
    written = run("card", out, "--write")
    assert (written.exit_code, written.stdout) == (0, ""), written.stderr
    card = (out / "README.md").read_text()
    assert card == printed
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != "README.md"} == others
    verified(run, out, source)
    # Once more, with results and without.
    assert run("card", out).stdout == card
    before, after = lmms(tmp_path / "b", [1.0, 0.0], [True]), lmms(tmp_path / "p", [1.0, 1.0], [True])
    results = ("--results", after, "--base-results", before)
    assert run("card", out, "--write", *results, "--quiet").exit_code == 0
    measured = (out / "README.md").read_text()
    assert "Measured for this model" in measured
    assert "Nothing was measured" not in measured
    verified(run, out, source)
    manifest = Manifest.loads((out / "qkpatch.json").read_bytes(), "")
    for text in (card, measured):
        assert is_card_of(text, manifest, readme)
        assert not is_card_of(text.replace("| factor α | 0.8 |", "| factor α | 0.1 |"), manifest, readme)
        assert not is_card_of(text + "x", manifest, readme)
        assert not is_card_of(text.replace("qkpatch apply", "curl"), manifest, readme)
    assert run("card", out).stdout == card
    assert run("card", out, "--write").exit_code == 0
    assert (out / "README.md").read_text() == card
    assert ("digests before and after" in card) == (digest != "none")


def test_an_output_with_its_card_is_still_an_output(
    base: Tiny, out: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    again = ("apply", base.path, "-o", out)
    assert run("card", out, "--write").exit_code == 0
    done = run(*again)
    assert done.exit_code == 0, done.stderr
    assert "# Base" in (out / "README.md").read_text().partition("qkpatch")[2]  # nothing was written
    before, after = lmms(tmp_path / "b", [1.0, 0.0], [True]), lmms(tmp_path / "p", [1.0, 1.0], [True])
    assert run("card", out, "--write", "--results", after, "--base-results", before).exit_code == 0
    for flags in ((), ("--overwrite",)):  # results are somebody's work
        refused = run(*again, *flags)
        assert refused.exit_code == 2
        assert "README.md" in refused.stderr
    assert run("card", out, "--write").exit_code == 0
    assert run(*again, "--overwrite").exit_code == 0
    assert (out / "README.md").read_text() == BASE_CARD


def test_the_card_of_an_edit_of_an_edit_replaces_the_one_before(
    base: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    sources = [base.path]
    before, after = lmms(tmp_path / "b", [1.0, 0.0], [True]), lmms(tmp_path / "p", [1.0, 1.0], [True])
    for alpha in ("0.5", "0.6", "0.7"):
        out = tmp_path / alpha
        assert run("apply", sources[-1], "-o", out, "--alpha", alpha, "--quiet").exit_code == 0
        assert run("card", out, "--write", "--results", after, "--base-results", before).exit_code == 0
        verified(run, out, sources[-1])
        sources.append(out)
    card = run("card", sources[-1]).stdout
    assert "Nothing was measured for this model" in card
    assert "Measured for this model" not in card
    assert card.count("## What is claimed") == card.count("It is *good*.") == 1
    assert "| factor α | 0.7 |" in card
    assert "That was edited by qkpatch before: layers 1, 4 dominant mode(s), alpha 0.6, full channel." in card
    data, _ = parts(card)
    assert (data["license"], data["tags"]) == ("other", ["vision", "chat", "qkpatch"])


@pytest.mark.long
@pytest.mark.parametrize("redirection", [">", ">>", "| tee"])
@pytest.mark.parametrize("name", ["out/README.md", "soft", "hard"])
def test_a_card_is_not_printed_into_itself(out: Path, tmp_path: Path, redirection: str, name: str) -> None:
    (tmp_path / "soft").symlink_to(out / "README.md")
    (tmp_path / "hard").hardlink_to(out / "README.md")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}

    def bash(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    # A pipe is not seen through, but the card that it has emptied is missed.
    emptied = f": > {name}; " if "tee" in redirection else ""
    done = bash(f"set -o pipefail; {emptied}{warm.shell('card', 'out')} {redirection} {name}")
    assert done.returncode == (4 if emptied else 2), done.stderr
    assert "qkpatch card out --write" in done.stderr.replace("OUT", "out")
    assert (out / "README.md").read_text() == (BASE_CARD if redirection == ">>" else "")
    # The cure.
    (out / "README.md").write_text(BASE_CARD)
    cured = bash(warm.shell("card", "out", "--write"))
    assert cured.returncode == 0, cured.stderr
    assert "license: other\n" in (out / "README.md").read_text()


def test_a_card_that_cannot_be_written_leaves_the_one_there(
    out: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    names = sorted(out.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        result = run("card", out, "--write")
    assert result.exit_code == 4
    assert "No space left on device" in result.stderr
    assert (out / "README.md").read_text() == BASE_CARD
    assert sorted(out.iterdir()) == names
    (out / "README.md").rename(out.parent / "elsewhere")
    (out / "README.md").symlink_to(out.parent / "elsewhere")
    linked = run("card", out, "--write")
    assert linked.exit_code == 4
    assert "README.md is a link" in linked.stderr
    assert (out.parent / "elsewhere").read_text() == BASE_CARD
    both = run("card", out, "--write", "--push", "me/new")
    assert both.exit_code == 2


def test_uploads_that_fail_are_told_as_what_failed(
    hub: FakeHub, base: Tiny, out: Path, environment: dict[str, str]
) -> None:
    """Several at a time, in threads of the library's."""
    hub.broken_uploads = True
    result = run_qkpatch(environment, "card", out, "--push", "me/new", "--source", base.path)
    assert result.returncode == 4, result.stderr
    assert "Traceback" not in result.stderr
    assert "the Hub answered: Bad request: no" in result.stderr
    assert hub.commits == []
