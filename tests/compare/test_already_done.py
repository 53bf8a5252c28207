"""The same `apply` again: done already where OUT is just what it would write; else refused. `plan` says the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, build_tiny

import qkpatch

Run = Callable[..., Any]


@pytest.fixture
def out(tiny: Tiny, tmp_path: Path, run: Run) -> Path:
    assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
    return tmp_path / "out"


def state(root: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("way", [(), ("--digest", "files"), ("--link",), ("--max-shard-size", "4KB")])
def test_the_same_again_is_done_already_and_nothing_is_written(
    way: tuple[str, ...], tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "folder" / "out"
    assert run("apply", tiny.path, "-o", out, *way).exit_code == 0
    before = state(tmp_path)
    again = run("apply", tiny.path, "-o", out, *way)
    assert again.exit_code == 0, again.output
    assert "Already done, as its manifest records; nothing was written to" in again.stdout
    assert run("apply", tiny.path, "-o", out, "--quiet", *way).output == ""
    planned = run("apply", tiny.path, "-o", out, "--dry-run", *way)
    assert planned.exit_code == 0
    assert "nothing would be written" in planned.stdout
    assert state(tmp_path) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_json_and_the_api_say_so(tiny: Tiny, out: Path, run: Run) -> None:
    again = run("apply", tiny.path, "-o", out, "--json")
    document = json.loads(again.stdout)
    assert document["run"].pop("already_done") is True
    assert document == json.loads((out / "qkpatch.json").read_bytes())
    planned = run("plan", tiny.path, "-o", out, "--json")
    assert json.loads(planned.stdout)["run"] == {"already_done": True}
    plan = qkpatch.plan(tiny.path, out=out)
    assert plan.is_done
    assert qkpatch.apply(plan, out).run.already_done is True
    assert qkpatch.apply(plan, out, overwrite=True).run.already_done is None


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def changed_manifest(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


HARMS: dict[str, Callable[[Path], None]] = {
    "a byte of an edited tensor": lambda out: changed(out / "model.safetensors"),
    "a byte of a copied file": lambda out: (out / "tokenizer.json").write_text("[]") and None,
    "a file more": lambda out: (out / "mine").write_text("mine") and None,
    "a file less": lambda out: (out / "tokenizer.json").unlink(),
    "the manifest": lambda out: changed_manifest(out / "qkpatch.json"),
    "no manifest": lambda out: (out / "qkpatch.json").unlink(),
    "a link in place of a file": lambda out: (
        (out / "tokenizer.json").rename(out / "t") and (out / "tokenizer.json").symlink_to("t")
    ),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("command", ["apply", "plan"])
def test_what_is_not_intact_is_refused_as_it_is(
    command: str, harm: str, tiny: Tiny, out: Path, run: Run
) -> None:
    HARMS[harm](out)
    before = state(out)
    result = run(command, tiny.path, "-o", out)
    assert result.exit_code == 2, result.output
    assert "exists and is not empty" in result.stderr
    assert state(out) == before


@pytest.mark.parametrize(
    "other", [("--alpha", "0.5"), ("--layers", "0"), ("--digest", "files"), ("--max-shard-size", "4KB")]
)
@pytest.mark.parametrize("command", ["apply", "plan"])
def test_another_edit_is_not_done(
    command: str, other: tuple[str, str], tiny: Tiny, out: Path, run: Run
) -> None:
    flags = (*other, "--dry-run") if command == "plan" else other
    result = run("apply", tiny.path, "-o", out, *flags)
    assert result.exit_code == 2, result.output
    assert "--overwrite" in result.stderr


def test_an_output_without_digests_is_not_known_to_be_intact(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    assert run("apply", tiny.path, "-o", out, "--digest", "none").exit_code == 0
    assert run("apply", tiny.path, "-o", out, "--digest", "none").exit_code == 2


def test_another_source_is_not_done(tiny: Tiny, out: Path, run: Run, tmp_path: Path) -> None:
    other = build_tiny(tmp_path / "other", seed=1).path
    assert run("apply", other, "-o", out).exit_code == 2


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_plan_refuses_a_disk_that_is_too_small(
    overwrite: tuple[str, ...], tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = [run(c, tiny.path, "-o", tmp_path / "new" / "out", *overwrite) for c in ("plan", "apply")]
    assert [result.exit_code for result in said] == [4, 4]
    assert said[0].stderr == said[1].stderr
    assert "1,000 are free" in said[0].stderr


def test_a_plan_refuses_sums_that_would_meet_the_sources_own(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    (tiny.path / "SHA256SUMS").write_text("mine")
    flags = (tiny.path, "-o", tmp_path / "out", "--digest", "files")
    assert [run("apply", *flags, *more).exit_code for more in ((), ("--dry-run",))] == [2, 2]
