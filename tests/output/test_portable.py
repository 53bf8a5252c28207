"""Without what only Linux has, the same bytes come out, and the same promises are kept as far as they can be."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import portable
import pytest
from conftest import build_tiny_folder
from typer.testing import Result

import qkpatch
from qkpatch.common import system
from qkpatch.output import staging

pytestmark = pytest.mark.linux  # it lays the two beside each other
Run = Callable[..., Result]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build_tiny_folder(tmp_path / "source")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "qkpatch.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_bytes_are_the_same_and_each_is_proven_by_the_other(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    assert run("apply", source, "-o", plain).exit_code == 0
    with monkeypatch.context() as without:
        portable.take_away(without.setattr)
        assert run("apply", source, "-o", other).exit_code == 0
        assert run("verify", plain, "--source", source).exit_code == 0
        # By a name that is free, for a moment, since names cannot be exchanged: which is told.
        told = run("apply", source, "-o", other, "--alpha", "0.5", "--overwrite").stderr
        assert staging.NO_EXCHANGE in " ".join(told.split())
        assert run("apply", source, "-o", other, "--overwrite").exit_code == 0
    assert run("verify", other, "--source", source).exit_code == 0
    assert contents(plain) == contents(other)
    assert set(json.loads((other / "qkpatch.json").read_bytes())["run"]["copied_by"]) == {"read_write"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_edit_in_place_leads_back_and_to_a_copy(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(source)
    portable.take_away(monkeypatch.setattr)
    assert run("apply", source, "--in-place").exit_code == 0
    assert run("revert", source, "-o", tmp_path / "copy").exit_code == 0
    assert run("revert", source).exit_code == 0
    assert contents(source) == contents(tmp_path / "copy") == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_the_umask_is_seen_at_a_new_directory(
    mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, former = os.open(tmp_path, os.O_RDONLY), os.umask(mask)
    try:
        told = system.umask(fd)
        portable.take_away(monkeypatch.setattr)
        assert (told, system.umask(fd)) == (mask, mask)
        assert os.umask(mask) == mask
    finally:
        os.umask(former)
        os.close(fd)
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_of_the_machine_has_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    portable.take_away(monkeypatch.setattr)
    assert system.processors() == os.cpu_count()
    assert system.ending_signals() == (signal.SIGINT, signal.SIGTERM)
    assert system.boot_id() == ""
    with open(tmp_path / "file", "rb") as file:
        buffer, fd, before = bytearray(4), file.fileno(), system.open_files()
        assert system.read_into(fd, memoryview(buffer), 7) == 3
        assert bytes(buffer) == b"789\0"
        assert system.path_of(fd, tmp_path / "file") == str(tmp_path / "file")
        assert system.open_direct(fd, os.O_RDONLY) is None
        assert not system.is_cached(fd, 0)
        assert not system.is_append_only(fd)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
            system.data_at(fd, 0)
    assert system.open_files() == before - 1


def test_macos_is_asked_for_what_it_has_instead(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    mac = portable.Mac(monkeypatch.setattr)
    assert run("apply", source, "-o", out).exit_code == 0
    assert ("renameatx_np", 4) in mac.asked
    assert 51 in mac.asked  # F_FULLFSYNC
    assert (
        run("apply", source, "-o", out, "--alpha", "0.5", "--overwrite").stderr.count("cannot exchange") == 0
    )
    assert mac.asked.count(("renameatx_np", 2)) == 1
    assert (system.boot_id(), system.processor()) == ("5E55", "Apple M9")
    assert run("verify", out, "--source", source).exit_code == 0
    assert 50 in mac.asked  # F_GETPATH
    made = qkpatch.make_patch(qkpatch.plan(source), tmp_path / "edit.qkpatch")
    assert [path.name for path in tmp_path.glob("edit*")] == [made.name]

    def flagged(fd: int) -> Any:
        return SimpleNamespace(st_flags=4)  # UF_APPEND

    monkeypatch.setattr(system, "os", SimpleNamespace(fstat=flagged))
    assert system.is_append_only(0)
