"""How OUT is written: digests of files, hard links, and what a killed run had done. What is in it stays the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, build_tiny

Run = Callable[..., Any]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def source(tmp_path: Path) -> Tiny:
    """Two shards of weights, with side files in a folder and odd names."""
    tiny = build_tiny(tmp_path / "source", n_layers=4)
    (tiny.path / "sub").mkdir()
    (tiny.path / "sub" / "tokenizer.json").write_text("{}")
    (tiny.path / "a\\b\nc").write_text("odd")
    return tiny


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A checkpoint whose edit takes long enough to be met in the middle of it."""
    path = tmp_path_factory.mktemp("slow") / "source"
    tiny = build_tiny(path, n_layers=4, n_heads=32, n_kv_heads=8, d_head=32, d_model=256)
    (path / "side.bin").write_bytes(bytes(1 << 20))
    return tiny


def contents(path: Path) -> dict[str, bytes]:
    files = (p for p in sorted(path.rglob("*")) if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "qkpatch.json").read_text())


def same_but_for_the_record(a: Path, b: Path) -> bool:
    left, right = contents(a), contents(b)
    for held in (left, right):
        held.pop("qkpatch.json")
        held.pop("SHA256SUMS", None)
    return left == right


class TestDigests:
    def test_sha256sum_accepts_every_file_of_out(self, source: Tiny, run: Run, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert run("apply", source.path, "-o", out, "--digest", "files").exit_code == 0
        check = subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, capture_output=True, text=True
        )
        assert check.returncode == 0, check.stderr
        assert len(check.stdout.splitlines()) == len(contents(out)) - 1
        assert run("verify", out, "--source", source.path).exit_code == 0

    @pytest.mark.parametrize("which", ["copied file", "edited file", "sums", "record"])
    def test_verify_looks_at_them(self, which: str, source: Tiny, run: Run, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert run("apply", source.path, "-o", out, "--digest", "files", "--layers", 1).exit_code == 0
        document = record(out)
        if which == "sums":
            (out / "SHA256SUMS").write_text((out / "SHA256SUMS").read_text().upper())
        elif which == "record":
            (out / "SHA256SUMS").unlink()
        else:
            action = "copied" if which == "copied file" else "patched"
            file = next(f for f in document["files"] if f["action"] == action)
            file["sha256"] = "0" * 64
            (out / "qkpatch.json").write_text(json.dumps(document))
        result = run("verify", out, "--source", source.path)
        assert result.exit_code == 1
        assert "SHA256SUMS" in result.stdout or "sha256" in result.stdout

    def test_none_leaves_nulls_that_verify_accepts(self, source: Tiny, run: Run, tmp_path: Path) -> None:
        plain, out = tmp_path / "plain", tmp_path / "out"
        assert run("apply", source.path, "-o", plain).exit_code == 0
        assert run("apply", source.path, "-o", out, "--digest", "none").exit_code == 0
        assert same_but_for_the_record(plain, out)
        assert {edit["sha256_before"] for edit in record(out)["edits"]} == {None}
        assert run("verify", out, "--source", source.path).exit_code == 0

    def test_sums_of_an_earlier_edit_are_not_carried_over(
        self, source: Tiny, run: Run, tmp_path: Path
    ) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        assert run("apply", source.path, "-o", first, "--digest", "files").exit_code == 0
        assert run("apply", first, "-o", second).exit_code == 0
        assert "SHA256SUMS" not in contents(second)
        assert run("apply", source.path, "-o", first, "--overwrite").exit_code == 0
        assert "SHA256SUMS" not in contents(first)

    def test_sums_that_are_the_sources_own_are_not_replaced(
        self, source: Tiny, run: Run, tmp_path: Path
    ) -> None:
        (source.path / "SHA256SUMS").write_text("mine")
        result = run("apply", source.path, "-o", tmp_path / "out", "--digest", "files")
        assert result.exit_code == 2
        assert "SHA256SUMS of its own" in result.stderr
        assert run("apply", source.path, "-o", tmp_path / "out").exit_code == 0
        assert (tmp_path / "out" / "SHA256SUMS").read_text() == "mine"
        assert run("verify", tmp_path / "out", "--source", source.path).exit_code == 0

    def test_files_of_the_hub_cache_have_their_digest_for_a_name(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import hashlib

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        tiny = build_tiny(tmp_path / "tiny")
        repository = tmp_path / "models--org--name"
        snapshot = repository / "snapshots" / ("0123456789" * 4)
        (repository / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (tiny.path / "big.bin").write_bytes(b"weights")
        for file in tiny.path.iterdir():
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)
        out = tmp_path / "out"
        assert run("apply", snapshot, "-o", out, "--digest", "files").exit_code == 0
        check = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=False)
        assert check.returncode == 0
        shards = {file["name"]: file for file in record(out)["files"]}
        before = hashlib.sha256((tiny.path / "model.safetensors").read_bytes()).hexdigest()
        assert shards["model.safetensors"]["source_sha256"] == before
        assert shards["model.safetensors"]["sha256"] != before
        assert shards["big.bin"]["source_sha256"] == shards["big.bin"]["sha256"]
        assert run("verify", out, "--source", snapshot).exit_code == 0
        assert run("verify", out, "--source", tiny.path).exit_code == 0


class TestLinks:
    def test_what_is_not_edited_is_linked_and_what_is_edited_is_not(
        self, source: Tiny, run: Run, tmp_path: Path
    ) -> None:
        plain, out = tmp_path / "plain", tmp_path / "out"
        before = contents(source.path)
        assert run("apply", source.path, "-o", plain, "--layers", 1).exit_code == 0
        assert run("apply", source.path, "-o", out, "--layers", 1, "--link").exit_code == 0
        assert same_but_for_the_record(plain, out)
        assert contents(source.path) == before
        for name in before:
            is_edited = name.endswith(".safetensors")
            assert (source.path / name).samefile(out / name) != is_edited, name
        assert record(out)["run"]["copied_by"]["hardlink"] == len(before) - 1
        assert run("verify", out, "--source", source.path).exit_code == 0

    def test_links_of_the_source_are_followed(self, source: Tiny, run: Run, tmp_path: Path) -> None:
        linked = tmp_path / "linked"
        linked.mkdir()
        for file in source.path.iterdir():
            (linked / file.name).symlink_to(file)
        out = tmp_path / "out"
        assert run("apply", linked, "-o", out, "--layers", 1, "--link").exit_code == 0
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert (out / "config.json").samefile(source.path / "config.json")

    def test_the_hub_cache_is_linked_to_only_when_that_is_said(self, run: Run, tmp_path: Path) -> None:
        tiny = build_tiny(tmp_path / "tiny")
        repository = tmp_path / "models--org--name"
        snapshot = repository / "snapshots" / "0123456789abcdef"
        (repository / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, file in enumerate(tiny.path.iterdir()):
            shutil.copy(file, repository / "blobs" / str(number))
            (snapshot / file.name).symlink_to(repository / "blobs" / str(number))
        assert run("apply", snapshot, "-o", tmp_path / "a", "--link").exit_code == 0
        assert "hardlink" not in record(tmp_path / "a")["run"]["copied_by"]
        assert run("apply", snapshot, "-o", tmp_path / "b", "--link-cache").exit_code == 0
        assert record(tmp_path / "b")["run"]["copied_by"]["hardlink"] >= 1

    def test_another_file_system_is_copied_to(self, source: Tiny, run: Run, tmp_path: Path) -> None:
        other = Path("/dev/shm")
        if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("no second file system")
        out = other / f"qkpatch-test-{os.getpid()}"
        try:
            assert run("apply", source.path, "-o", out, "--link").exit_code == 0
            assert "hardlink" not in record(out)["run"]["copied_by"]
        finally:
            shutil.rmtree(out, ignore_errors=True)


class TestResume:
    """A run that was killed, and the next one with ``--resume``."""

    def kill(self, source: Path, out: Path, after: str) -> Path:
        """Kill a run once its journal mentions ``after``; the staging directory that it leaves."""
        command = [sys.executable, "-m", "qkpatch", "apply", source, "-o", out, "--quiet"]
        process = subprocess.Popen([str(part) for part in command], env=ENVIRONMENT)
        try:
            while process.poll() is None:
                for journal in out.parent.glob(f".{out.name}.qkpatch-*/journal"):
                    if after in journal.read_text():
                        process.send_signal(signal.SIGKILL)
                time.sleep(0.001)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
        assert not out.exists()
        (staging,) = out.parent.glob(f".{out.name}.qkpatch-*")
        return staging

    @pytest.mark.parametrize("after", ["side.bin", "filled"])
    def test_what_was_done_is_taken_over_and_the_result_is_the_same(
        self, after: str, slow: Tiny, run: Run, tmp_path: Path
    ) -> None:
        plain, out = tmp_path / "plain", tmp_path / "out"
        assert run("apply", slow.path, "-o", plain).exit_code == 0
        staging = self.kill(slow.path, out, after)
        done = "side.bin" if after == "side.bin" else "model.safetensors"
        inode = (staging / "files" / done).stat().st_ino
        assert run("apply", slow.path, "-o", out, "--resume").exit_code == 0
        assert same_but_for_the_record(plain, out)
        assert (out / done).stat().st_ino == inode
        assert record(out)["run"]["copied_by"]["resumed"] >= 1
        assert run("verify", out, "--source", slow.path).exit_code == 0
        assert list(tmp_path.glob(".out*")) == []

    @pytest.mark.parametrize("change", ["another edit", "another source", "no --resume", "touched copy"])
    def test_nothing_is_taken_over_that_might_be_another(
        self, change: str, slow: Tiny, run: Run, tmp_path: Path
    ) -> None:
        source, out = tmp_path / "source", tmp_path / "out"
        shutil.copytree(slow.path, source)
        staging = self.kill(source, out, "side.bin")
        options = ["--resume"]
        if change == "another edit":
            options += ["--modes", "2"]
        elif change == "another source":
            (source / "side.bin").write_bytes(bytes(range(256)) * 4096)
        elif change == "no --resume":
            options = []
        else:
            with open(staging / "files" / "side.bin", "r+b") as file:
                file.write(b"!")
        assert run("apply", source, "-o", out, *options).exit_code == 0
        assert (out / "side.bin").read_bytes() == (source / "side.bin").read_bytes()
        assert run("verify", out, "--source", source).exit_code == 0
        assert list(tmp_path.glob(".out*")) == []

    def test_a_journal_that_was_cut_short_is_believed_as_far_as_it_goes(
        self, slow: Tiny, run: Run, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        staging = self.kill(slow.path, out, "filled")
        journal = staging / "journal"
        journal.write_bytes(journal.read_bytes()[:-7])
        assert run("apply", slow.path, "-o", out, "--resume").exit_code == 0
        assert run("verify", out, "--source", slow.path).exit_code == 0
