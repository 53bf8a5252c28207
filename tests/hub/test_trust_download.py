"""What is downloaded is what the Hub lists, whichever way it comes, or there is no OUT."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, build_tiny
from fake_hub import FakeHub, Repo, hub_environment, run_qkpatch
from typer.testing import Result

SHARDS = [["layers.0."], ["layers.1."], ["layers.2."], [""]]
LAYER = ("--layers", "1")  # in the second shard
EDITED = "model-00002-of-00004.safetensors"


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return hub_environment(hub.endpoint, tmp_path / "home", HF_HUB_DOWNLOAD_TIMEOUT="2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_tiny(tmp_path_factory.mktemp("model") / "model", shards=SHARDS)


@pytest.fixture
def published(hub: FakeHub, model: Tiny) -> Repo:
    hub.repos["org/model"] = Repo(model.path)
    return hub.repos["org/model"]


def record(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "qkpatch.json").read_text()))


def lie_about(hub: FakeHub, repo: Repo, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the Hub delivers other bytes of a file, as many as before; the last one differs."""
    data = repo.files[name].read_bytes()
    other = repo.path.parent / f"other-{name}"
    other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setitem(hub.substitutes, name, other)


# -------- straight into OUT


@pytest.mark.parametrize(
    "name",
    [
        EDITED,
        pytest.param("model-00001-of-00004.safetensors", marks=pytest.mark.stress),
        "tokenizer.json",
        pytest.param("config.json", marks=pytest.mark.stress),
        pytest.param("model.safetensors.index.json", marks=pytest.mark.stress),
    ],
)
@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--digest", "files"), marks=pytest.mark.stress),
        pytest.param(("--max-shard-size", "10kB"), marks=pytest.mark.stress),
        pytest.param(("--digest", "none"), marks=pytest.mark.stress),
    ],
)
def test_a_file_with_one_other_byte_is_refused(
    name: str,
    flags: tuple[str, ...],
    hub: FakeHub,
    published: Repo,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lie_about(hub, published, name, monkeypatch)
    out = tmp_path / "out"
    result = run_qkpatch(environment, "apply", "org/model", "--no-cache", *LAYER, *flags, "-o", out)
    assert result.returncode in (3, 4), result.stderr
    assert "what came is not what the Hub lists" in result.stderr or "JSON" in result.stderr
    assert not out.exists()


def test_what_came_wrong_in_a_new_shard_comes_anew_with_resume(
    hub: FakeHub,
    published: Repo,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    arguments = ("apply", "org/model", "--no-cache", *LAYER, "--max-shard-size", "10kB", "-o", out)
    with monkeypatch.context() as lying:
        lie_about(hub, published, EDITED, lying)
        assert run_qkpatch(environment, *arguments).returncode == 4
    assert run_qkpatch(environment, *arguments, "--resume").returncode == 0
    assert run_qkpatch(environment, "verify", out, "--source", published.path).returncode == 0


def test_the_edit_is_computed_from_what_was_checked(
    hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Rows and keys are not fetched for the edit beside the file: nothing but the headers comes twice."""
    out = tmp_path / "out"
    assert run_qkpatch(environment, "apply", "org/model", "--no-cache", *LAYER, "-o", out).returncode == 0
    assert record(out)["source"]["checked"] is True
    sizes = {path.name: path.stat().st_size for path in published.path.glob("*.safetensors")}
    for name, size in sizes.items():
        assert hub.sent_of(name) <= size + min(size, 64 << 10)
    assert run("verify", out, "--source", published.path).exit_code == 0


# Ends as where the Hub fails, when rows of the edited file were written already.
BROKEN_OFF = """
import sys, time
from pathlib import Path
from qkpatch.errors import HubError
from qkpatch.model.locate import Access
from qkpatch.patching.apply import apply_plan
from qkpatch.planning.plan import make_plan
from qkpatch.planning.request import Request
from qkpatch.output.options import Digest, Writing

class Observer:
    n = 0
    def begins(self, *what): pass
    def copied(self, n_bytes): pass
    def edited(self, n_heads):
        self.n += 1
        if self.n == 2:
            raise HubError("broken off")

out = Path(sys.argv[1])
plan = make_plan("org/model", Request.of(layers="1"), Access.no_cache)
try:
    apply_plan(plan, out, observer=Observer(), writing=Writing(Digest.files))
except HubError:
    sys.exit(4)
"""


@pytest.mark.long
@pytest.mark.parametrize("at", [None, -1, pytest.param(0.5, marks=pytest.mark.stress)])
def test_what_a_run_before_left_is_hashed_before_it_is_taken_over(
    at: float | None, hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    script = [sys.executable, "-c", BROKEN_OFF, out]
    assert subprocess.run(script, env=environment, check=False, timeout=120).returncode == 4
    (staging,) = tmp_path.glob(".out.qkpatch-*")
    notes = (staging / "journal").read_text()
    for path in (staging / "files").glob("*.safetensors"):
        assert path.name in notes
        if at is not None:
            flip(path, int(path.stat().st_size * at) if at > 0 else path.stat().st_size - 1)
    hub.sent.clear()
    arguments = ("apply", "org/model", "--no-cache", *LAYER, "--digest", "files", "-o", out)
    result = run_qkpatch(environment, *arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert run("verify", out, "--source", published.path).exit_code == 0
    for file in record(out)["files"]:
        assert file["sha256"] == hashlib.sha256((out / file["name"]).read_bytes()).hexdigest()
    if at is None:
        assert record(out)["run"]["copied_by"] == {"resumed": len(record(out)["files"])}


@pytest.mark.long
def test_a_new_shard_that_somebody_changed_in_staging_is_not_the_hubs_fault(
    hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path, run: Callable[..., Result]
) -> None:
    out, flags = tmp_path / "out", ("--no-cache", *LAYER, "--max-shard-size", "4KB")
    script = BROKEN_OFF.replace('layers="1"', 'layers="1", max_shard_size=4000')
    script = script.replace("Digest.files", "Digest.edited, resume=True")
    broken = subprocess.run([sys.executable, "-c", script, out], env=environment, check=False, timeout=120)
    assert broken.returncode == 4
    (staging,) = tmp_path.glob(".out.qkpatch-*")
    for path in (staging / "files").glob("*.safetensors"):
        flip(path, path.stat().st_size - 1)
    again = run_qkpatch(environment, "apply", "org/model", *flags, "-o", out, "--resume")
    assert again.returncode == 4
    assert "what an earlier run had left in staging" in again.stderr
    again = run_qkpatch(environment, "apply", "org/model", *flags, "-o", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert run("verify", out, "--source", published.path).exit_code == 0


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


# -------- by way of the cache


@pytest.mark.parametrize("name", [EDITED, pytest.param("tokenizer.json", marks=pytest.mark.stress)])
def test_what_comes_wrong_into_the_cache_is_refused_and_not_kept(
    name: str, hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as lying:
        lie_about(hub, published, name, lying)
        result = run_qkpatch(environment, "apply", "org/model", *LAYER, "-o", out)
        assert result.returncode == 4, result.stderr
        assert "what came is not what the Hub lists" in result.stderr
        assert not out.exists()
    result = run_qkpatch(environment, "apply", "org/model", *LAYER, "-o", out)
    assert result.returncode == 0, result.stderr
    assert record(out)["source"]["checked"] is False  # the other files were in the cache by then
    assert run_qkpatch(environment, "verify", out, "--source", published.path).returncode == 0


@pytest.mark.parametrize("name", [EDITED, pytest.param("tokenizer.json", marks=pytest.mark.stress)])
def test_a_blob_that_was_in_the_cache_is_hashed_where_digests_are_wanted(
    name: str, hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path
) -> None:
    assert run_qkpatch(environment, "apply", "org/model", *LAYER, "-o", tmp_path / "first").returncode == 0
    flags = ("apply", "org/model", *LAYER, "--digest", "files", "-o")
    assert run_qkpatch(environment, *flags, tmp_path / "checked").returncode == 0
    assert record(tmp_path / "checked")["source"]["checked"] is True
    (link,) = (tmp_path / "home").rglob(f"snapshots/*/{name}")
    blob = link.resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    # Without digests it is believed, and the manifest says so.
    assert run_qkpatch(environment, "apply", "org/model", *LAYER, "-o", tmp_path / "second").returncode == 0
    assert record(tmp_path / "second")["source"]["checked"] is False
    result = run_qkpatch(environment, *flags, tmp_path / "third")
    assert result.returncode == 4, result.stderr
    assert "not what its name there says" in result.stderr
    assert str(blob) in result.stderr
    assert not (tmp_path / "third").exists()


def test_a_snapshot_whose_links_lead_to_other_blobs_is_refused(
    hub: FakeHub, published: Repo, environment: dict[str, str], tmp_path: Path
) -> None:
    """The blobs are sound, and one of them stands for another file."""
    arguments = ("apply", "org/model", *LAYER, "--digest", "files", "-o")
    assert run_qkpatch(environment, *arguments, tmp_path / "first").returncode == 0
    first, other = ("model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors")
    (link,) = (tmp_path / "home").rglob(f"snapshots/*/{first}")
    link.unlink()
    link.symlink_to((link.parent / other).readlink())
    for source in ("org/model", link.parent):
        result = run_qkpatch(environment, "apply", source, *LAYER, "-o", tmp_path / "second")
        assert result.returncode in (3, 4), result.stderr
        assert not (tmp_path / "second").exists()
    assert "another file there than the Hub lists" in result.stderr
