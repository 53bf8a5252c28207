"""Bytes on their way past the page cache: whatever the offsets, holes and faults, the same bytes arrive."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny

from qkpatch.checkpoint.files import LocalOpenFile
from qkpatch.common import system
from qkpatch.errors import FileSystemError
from qkpatch.output.passage import ALIGN, Lane, Passage

PIECE = 2 * ALIGN
DATA = random.Random(0).randbytes(11 * ALIGN + 777)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkpatch.output.passage.PIECE", PIECE)
    monkeypatch.setattr("qkpatch.output.passage.LEAST_DIRECT", ALIGN)


class Files:
    """A source with data, and a target of zeros, as a copier makes it."""

    def __init__(self, folder: Path, data: bytes = DATA, size: int | None = None) -> None:
        self.source, self.target = folder / "source", folder / "target"
        self.source.write_bytes(data)
        self.size = len(data) + 5 * ALIGN if size is None else size
        self.told: list[int] = []

    def copy(self, begin: int, end: int, at: int, digest: Any = None, **hooks: Any) -> str:
        with open(self.source, "rb") as a, open(self.target, "w+b") as b, Lane() as lane:
            b.truncate(self.size)
            hooks.get("before", lambda fd: None)(b.fileno())
            with Passage(lane, LocalOpenFile(a.fileno(), str(self.source)), b.fileno()) as passage:
                progress = hooks.get("progress", self.told.append)
                return passage.copy(begin, end, at, progress, digest)

    def expected(self, begin: int, end: int, at: int) -> bytes:
        data = self.source.read_bytes()[begin:end]
        return bytes(at) + data + bytes(self.size - at - len(data))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def can_be_direct(folder: Path) -> bool:
    if not (system.IS_LINUX and os.major(folder.stat().st_dev)):
        return False
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def places() -> Iterator[tuple[int, int, int]]:
    yield from [
        (0, len(DATA), 0),
        (0, len(DATA), ALIGN),
        (0, len(DATA), 3),
        (5, len(DATA) - 1, 0),
        (ALIGN, 9 * ALIGN, 3 * ALIGN),
        (ALIGN - 1, 9 * ALIGN + 1, 1),
        (7, 7, 7),
        (3, 9, ALIGN - 2),
    ]
    dice = random.Random(1)
    for _ in range(20):
        begin, end = sorted(dice.randrange(len(DATA)) for _ in range(2))
        yield begin, end, dice.choice([begin, dice.randrange(5 * ALIGN)])


@pytest.mark.parametrize("takes_digest", [False, True])
@pytest.mark.parametrize(("begin", "end", "at"), list(places()))
def test_the_bytes_arrive_where_they_belong_and_nowhere_else(
    files: Files, begin: int, end: int, at: int, takes_digest: bool
) -> None:
    digest = hashlib.sha256() if takes_digest else None
    files.copy(begin, end, at, digest)
    assert files.target.read_bytes() == files.expected(begin, end, at)
    assert sum(files.told) == end - begin
    if digest is not None:
        assert digest.digest() == hashlib.sha256(DATA[begin:end]).digest()


def test_disks_are_written_past_the_page_cache(files: Files, tmp_path: Path) -> None:
    if not can_be_direct(tmp_path):
        pytest.skip("no file system on a disk, or one without O_DIRECT")
    assert files.copy(0, len(DATA), 0) == "direct"


@pytest.mark.linux
def test_what_is_on_no_disk_is_copied_in_the_kernel(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "major", lambda device: 0)
    assert files.copy(0, len(DATA), 3) in ("copy_file_range", "sendfile")
    assert files.target.read_bytes() == files.expected(0, len(DATA), 3)


class Raw:
    """``os.pwrite`` and ``os.preadv`` that treat descriptors with O_DIRECT in a way of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, treat: Callable[..., int]) -> None:
        import fcntl

        plain = getattr(os, name)
        self.calls = 0

        def call(fd: int, data: Any, at: int, *rest: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                self.calls += 1
                return treat(plain, fd, data, at)
            return int(plain(fd, data, at, *rest))

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("name", ["pwrite", "preadv"])
def test_where_it_is_declined_the_page_cache_is_used(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, code: int
) -> None:
    if not can_be_direct(tmp_path):
        pytest.skip("no file system on a disk, or one without O_DIRECT")

    def decline(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(system, "is_cached", lambda *_: False)
    raw = Raw(monkeypatch, name, decline)
    files.copy(0, len(DATA), 0)
    assert raw.calls
    assert files.target.read_bytes() == files.expected(0, len(DATA), 0)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_an_error(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    if not can_be_direct(tmp_path):
        pytest.skip("no file system on a disk, or one without O_DIRECT")

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    Raw(monkeypatch, "pwrite", fail)
    with pytest.raises(FileSystemError, match=os.strerror(code)):
        files.copy(0, len(DATA), 0)


@pytest.mark.parametrize("name", ["pwrite", "preadv"])
def test_what_is_done_in_part_is_completed(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    if not can_be_direct(tmp_path):
        pytest.skip("no file system on a disk, or one without O_DIRECT")

    def part(plain: Callable[..., int], fd: int, data: Any, at: int) -> int:
        return plain(fd, data[:4096] if name == "pwrite" else [data[0][:4096]], at)

    monkeypatch.setattr(system, "is_cached", lambda *_: False)
    raw = Raw(monkeypatch, name, part)
    files.copy(0, len(DATA), 0)
    assert raw.calls
    assert files.target.read_bytes() == files.expected(0, len(DATA), 0)


@pytest.mark.parametrize("takes_digest", [False, True])
def test_a_source_that_ends_early_is_an_error(files: Files, takes_digest: bool) -> None:
    with pytest.raises(FileSystemError, match="early"):
        files.copy(0, len(DATA) + 2, 0, hashlib.sha256() if takes_digest else None)


@pytest.mark.linux
def test_holes_stay_holes(tmp_path: Path) -> None:
    files = Files(tmp_path, size=64 * ALIGN)
    with open(files.source, "r+b") as file:
        file.truncate(64 * ALIGN)
        file.seek(40 * ALIGN + 5)
        file.write(DATA[:1000])
    if files.source.stat().st_blocks * 512 >= 64 * ALIGN:
        pytest.skip("a file system without holes")
    files.copy(0, 64 * ALIGN, 0)
    assert files.target.read_bytes() == files.source.read_bytes()
    assert files.target.stat().st_blocks * 512 < 20 * ALIGN
    assert sum(files.told) == 64 * ALIGN


def test_stopping_leaves_nobody_writing(files: Files) -> None:
    class StopError(Exception):
        pass

    def stop(n_bytes: int) -> None:
        raise StopError

    before = set(threading.enumerate())
    with pytest.raises(StopError):
        files.copy(0, len(DATA), 0, progress=stop)
    assert not set(threading.enumerate()) - before


def test_rows_that_others_write_meanwhile_stay(tmp_path: Path) -> None:
    """Copied around, block by block or not, while they are written again and again through the page cache."""
    data = random.Random(2).randbytes(64 * ALIGN)
    ranges = [(3 * ALIGN + 100, 5 * ALIGN - 7), (20 * ALIGN, 21 * ALIGN), (40 * ALIGN + 1, 40 * ALIGN + 4097)]
    (tmp_path / "source").write_bytes(data)
    for _ in range(5):
        done = threading.Event()
        with open(tmp_path / "source", "rb") as a, open(tmp_path / "target", "w+b") as b, Lane() as lane:
            b.truncate(len(data))

            def write(fd: int = b.fileno(), done: threading.Event = done) -> None:
                while not done.is_set():
                    for begin, end in ranges:
                        os.pwrite(fd, b"\xee" * (end - begin), begin)

            writer = threading.Thread(target=write)
            writer.start()
            with Passage(lane, LocalOpenFile(a.fileno(), "source"), b.fileno()) as passage:
                position = 0
                for begin, end in [*ranges, (len(data), len(data))]:
                    passage.copy(position, begin, position, lambda n: None)
                    position = end
            done.set()
            writer.join()
            os.fsync(b.fileno())
        expected = bytearray(data)
        for begin, end in ranges:
            expected[begin:end] = b"\xee" * (end - begin)
        assert (tmp_path / "target").read_bytes() == expected


@pytest.mark.parametrize("flags", [(), ("--digest", "files"), ("--max-shard-size", "700KB")])
def test_a_whole_edit_by_this_way_is_the_same(tmp_path: Path, run: Any, flags: tuple[str, ...]) -> None:
    extra = {f"ballast.{i}": torch.arange(150_000 + i, dtype=torch.int64) for i in range(3)}
    shards = [["layers.0."], ["ballast.0"], [""]]
    source = build_tiny(tmp_path / "source", d_model=512, shards=shards, extra=extra).path
    out, plain = tmp_path / "out", tmp_path / "plain"
    assert run("apply", source, "-o", out, *flags).exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkpatch.output.passage.LEAST_DIRECT", 1 << 40)
        assert run("apply", source, "-o", plain, *flags).exit_code == 0
    if can_be_direct(tmp_path):
        assert json.loads((out / "qkpatch.json").read_text())["run"]["copied_by"].get("direct")
    for file in plain.iterdir():
        if file.name not in ("qkpatch.json", "SHA256SUMS"):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert run("verify", out, "--source", source).exit_code == 0
    if "files" in flags:
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)
