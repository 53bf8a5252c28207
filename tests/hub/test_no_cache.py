"""apply from the Hub: straight into OUT, by way of the cache, and where OUT goes when nobody says."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from fake_hub import TOKEN, FakeHub, Fault, Repo, command, hub_environment, run_qkpatch
from typer.testing import Result

SHARDS = [["layers.0."], ["layers.1."], ["layers.2."], [""]]


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return hub_environment(hub.endpoint, tmp_path / "home", HF_HUB_DOWNLOAD_TIMEOUT="2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Four shards; the largest tensor takes several pieces of a download."""
    big = {"model.big.weight": torch.arange(5 << 20, dtype=torch.int32).view(5, -1)}
    tiny = build_tiny(tmp_path_factory.mktemp("model") / "model", shards=SHARDS, extra=big)
    (tiny.path / "folder").mkdir()
    (tiny.path / "folder" / "notes.txt").write_text("notes\n")
    (tiny.path / "empty.txt").write_text("")
    return tiny


@pytest.fixture
def published(hub: FakeHub, model: Tiny) -> Repo:
    hub.repos["org/model"] = Repo(model.path)
    return hub.repos["org/model"]


@pytest.fixture(scope="module")
def from_disk(model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What apply makes of the directory itself."""
    from conftest import app
    from typer.testing import CliRunner

    out = tmp_path_factory.mktemp("disk") / "out"
    assert CliRunner().invoke(app, ["apply", str(model.path), "-o", str(out)]).exit_code == 0
    return contents(out)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def assert_same(out: Path, from_disk: dict[str, bytes]) -> dict[str, Any]:
    """All files equal, and the manifests but for where SOURCE was; ours."""
    found, wanted = contents(out), dict(from_disk)
    ours, theirs = (json.loads(files.pop("qkpatch.json")) for files in (found, wanted))
    assert found == wanted
    for file in (*ours["files"], *theirs["files"]):
        file.pop("source_sha256")
    assert {key for key in ours if ours[key] != theirs[key]} <= {"source", "run"}
    return dict(ours)


def size_of(model: Tiny) -> int:
    return sum(path.stat().st_size for path in model.path.glob("*.safetensors"))


def staged(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".qkpatch-" in path.name]


# -------- straight into OUT


def test_without_the_cache_out_is_the_same_and_there_is_one_copy(
    hub: FakeHub, published: Repo, model: Tiny, environment: dict[str, str], tmp_path: Path,
    from_disk: dict[str, bytes],
) -> None:  # fmt: skip
    result = run_qkpatch(environment, "apply", "org/model", "--no-cache", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    record = assert_same(tmp_path / "out", from_disk)
    assert record["source"]["commit"] == published.commit
    assert list((tmp_path / "home").rglob("*.safetensors")) == []
    assert staged(tmp_path) == []
    layer = 2 * (model.n_heads + model.n_kv_heads) * model.d_head * model.d_model
    header = 4 * (64 << 10)
    # All of it once; the edited layer's rows, which are edited and not copied, also for their digest, and its keys.
    assert size_of(model) <= hub.sent_of(".safetensors") <= size_of(model) + 2 * layer + header
    assert {(request.host, request.token) for request in hub.log} == {("hub", TOKEN), ("cdn", None)}
    shards = [request for request in hub.log if request.path.endswith(".safetensors")]
    assert all(re.fullmatch(r"bytes=\d+-\d+", request.range or "") for request in shards)
    assert TOKEN not in result.stdout + result.stderr
    # And the same by way of the cache, its manifest to the letter but for the run.
    assert run_qkpatch(environment, "apply", "org/model", "-o", tmp_path / "cached").returncode == 0
    one, other = (json.loads((tmp_path / name / "qkpatch.json").read_text()) for name in ("out", "cached"))
    assert one.pop("run") != other.pop("run")
    assert one == other


def test_new_shards_and_digests_of_files_without_the_cache(
    published: Repo, model: Tiny, environment: dict[str, str], tmp_path: Path, run: Callable[..., Result]
) -> None:
    flags = ("--max-shard-size", "8MB", "--digest", "files")
    arguments = ("apply", "org/model", "--no-cache", "-o", tmp_path / "out", *flags)
    assert run_qkpatch(environment, *arguments).returncode == 0
    assert run("apply", model.path, "-o", tmp_path / "disk", *flags).exit_code == 0
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "disk")
    for files in (ours, theirs):
        files.pop("qkpatch.json")
        files["SHA256SUMS"] = b"".join(
            line for line in files["SHA256SUMS"].splitlines(keepends=True) if b"qkpatch.json" not in line
        )
    assert ours == theirs


def test_broken_connections_change_nothing(
    hub: FakeHub, published: Repo, model: Tiny, environment: dict[str, str], tmp_path: Path,
    from_disk: dict[str, bytes],
) -> None:  # fmt: skip
    big = "00004-of-00004.safetensors"
    hub.faults += [
        Fault("cut", big, 3, host="cdn", skip=1),
        Fault("status 503", big, 1, host="cdn", skip=2),
        Fault("status 403", big, 1, host="cdn", skip=3),
        Fault("cut", "tokenizer.json", 1),
    ]
    (tmp_path / "here").mkdir()
    result = run_qkpatch(environment, "apply", "org/model", "--no-cache", cwd=tmp_path / "here")
    assert result.returncode == 0, result.stderr
    (out,) = (tmp_path / "here").iterdir()
    assert re.fullmatch("model-qkpatch-[0-9a-f]{8}", out.name)  # nobody named it
    assert_same(out, from_disk)
    assert all(fault.times == 0 for fault in hub.faults)
    assert hub.sent_of(big) <= (model.path / f"model-{big}").stat().st_size + (64 << 10)  # no byte came twice


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_had_come_before_a_kill_is_taken_over(
    number: signal.Signals, hub: FakeHub, published: Repo, model: Tiny, environment: dict[str, str], tmp_path: Path,
    from_disk: dict[str, bytes],
) -> None:  # fmt: skip
    last = "00003-of-00004.safetensors"
    hub.faults.append(Fault("status 503", last, 999, {"Retry-After": "50"}, host="cdn", skip=1))
    arguments = ("apply", "org/model", "--no-cache", "-o", tmp_path / "out", "--layers", "1")
    first = command(*arguments, *(() if number == signal.SIGKILL else ("--resume",)))
    process = subprocess.Popen(first, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        journal = ""
        while (
            "00004-of-00004" not in journal
            and "00001-of-00004" not in journal
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
            notes = [path / "journal" for path in staged(tmp_path)]
            journal = "".join(path.read_text() for path in notes if path.exists())
    finally:
        process.send_signal(number)
        said = process.communicate()[1]
    assert ("are kept. Go on with: qkpatch apply org/model" in said) == (number == signal.SIGTERM), said
    assert "00001-of-00004" in journal
    hub.faults.clear()
    hub.sent.clear()
    result = run_qkpatch(environment, *arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert hub.sent_of("00001-of-00004.safetensors") <= 64 << 10  # its header
    record = json.loads((tmp_path / "out" / "qkpatch.json").read_text())
    assert record["run"]["copied_by"]["resumed"] >= 1
    assert staged(tmp_path) == []
    assert {n: d for n, d in contents(tmp_path / "out").items() if n != "qkpatch.json"} == {
        n: d for n, d in from_disk.items() if n != "qkpatch.json"
    }


def test_what_had_come_before_the_hub_failed_is_kept_and_taken_over(
    hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path, from_disk: dict[str, bytes]
) -> None:
    hub.faults.append(
        Fault("status 429", "00003-of-00004.safetensors", 999, {"Retry-After": "900"}, host="cdn", skip=1)
    )
    arguments = ("apply", "org/model", "--no-cache", "-o", tmp_path / "out")
    failed = run_qkpatch(environment, *arguments)
    assert failed.returncode == 4, failed.stderr
    assert "--resume" in failed.stderr
    assert not (tmp_path / "out").exists()
    assert len(staged(tmp_path)) == 1
    hub.faults.clear()
    result = run_qkpatch(environment, *arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "out", from_disk)
    assert staged(tmp_path) == []


def test_a_file_that_comes_damaged_is_refused(
    hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.faults.append(Fault("damage", "00004-of-00004.safetensors", 1, host="cdn", skip=2))
    result = run_qkpatch(environment, "apply", "org/model", "--no-cache", "-o", tmp_path / "out")
    assert result.returncode == 4, result.stderr
    assert "digest is another" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("more", "said"), [((), "on this machine already"), (("--link",), "--no-cache")])
def test_no_cache_is_refused_where_it_means_nothing(
    tiny: Tiny, run: Callable[..., Result], tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    result = run("apply", "org/name" if more else tiny.path, "--no-cache", "-o", tmp_path / "out", *more)
    assert result.exit_code == 2
    assert said in result.stderr


# -------- by way of the cache


def test_a_wrong_request_does_not_wait_for_a_download(
    hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path
) -> None:
    result = run_qkpatch(environment, "apply", "org/model", "-o", tmp_path / "out", "--layers", "77")
    assert result.returncode == 2, result.stderr
    assert hub.sent_of(".safetensors") <= 4 * (64 << 10)


def test_an_interrupted_download_into_the_cache_goes_on_where_it_stopped(
    hub: FakeHub, published: Repo, model: Tiny, environment: dict[str, str], tmp_path: Path,
    from_disk: dict[str, bytes],
) -> None:  # fmt: skip
    big = model.path / "model-00004-of-00004.safetensors"
    hub.faults.append(Fault("cut", big.name, 1, host="cdn", skip=1))
    result = run_qkpatch(environment, "apply", "org/model", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "into the Hub cache" in result.stderr
    assert_same(tmp_path / "out", from_disk)
    assert hub.sent_of(big.name) <= big.stat().st_size + (64 << 10) + (1 << 20)


# -------- where OUT goes


def test_out_is_named_after_source_and_the_edit(
    model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("apply", model.path)
    assert result.exit_code == 0, result.stderr
    (out,) = (path for path in tmp_path.iterdir() if path.name.startswith("model"))
    assert re.fullmatch("model-qkpatch-[0-9a-f]{8}", out.name)
    assert f"OUT is not named, so it is {out.name} in the current directory" in result.stderr
    again = run(
        "apply", model.path, "--layers", "1", "--modes", "4"
    )  # the defaults, said aloud: the same edit
    assert again.exit_code == 0, again.stderr
    assert f"Already done, as its manifest records; nothing was written to {out.name}" in again.stdout
    other = run("apply", model.path, "--alpha", "0.25", "--quiet")
    assert other.exit_code == 0
    assert other.stderr == other.stdout == ""
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith("model")}
    assert len(names) == 2
    assert run("verify", out, "--source", model.path).exit_code == 0
