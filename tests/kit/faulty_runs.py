"""Runs of `apply` that are harmed: the driver that forks them, their checkpoint, the moments, what is left of them.

Moments and faults are drawn by chance, from a fixed seed: `make stress` draws more of them, ROUNDS times as many (50),
from other seeds with SEED; five rounds are a test. Full disks and other file systems are loop devices, for which one
must be root.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import last_said
from conftest import REPO, build_tiny

_ROUNDS = int(os.environ.get("QKPATCH_ROUNDS", "1"))
ROUNDS = min(_ROUNDS, 5)  # of a test
SEED = int(os.environ.get("QKPATCH_SEED", "1"))
EDIT = ("--layers", "0-3", "--threads", "3", "--quiet")
KILL, INT, TERM, HUP = signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP

Contents = dict[str, Any]


@dataclass(frozen=True)
class End:
    """How a run ended; a negative code is the signal that killed it."""

    code: int
    text: str
    seconds: float
    open_files: list[str]
    threads: list[str]
    opcodes: int


class Driver:
    """The driver process, as a function. No run may leave files open or threads behind."""

    def __init__(self, process: subprocess.Popen[str], *, has_shim: bool) -> None:
        self._process, self.has_shim = process, has_shim

    def together(self, *runs: dict[str, Any]) -> list[End]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(runs) + "\n")
        self._process.stdin.flush()
        ends = [End(**end) for end in json.loads(self._process.stdout.readline())]
        for end in ends:
            assert "Traceback" not in end.text, end.text
            # A signal can come between a file's opening and the block that closes it; the process ends then.
            assert end.open_files == [] or end.code > 128, end
            assert end.threads == [], end
        return ends

    def __call__(self, *arguments: object, **harm: Any) -> End:
        return self.together(request(*arguments, **harm))[0]

    def apply(self, source: Path, out: Path, *flags: str, **harm: Any) -> End:
        return self("apply", source, "-o", out, *last_said(*EDIT, *flags), **harm)


def request(*arguments: object, **harm: Any) -> dict[str, Any]:
    return {"arguments": [str(argument) for argument in arguments], **harm}


@cache
def started() -> Driver:
    """The driver, for as long as this process lives."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    folder = tempfile.TemporaryDirectory()  # which goes when this process does
    atexit.register(folder.cleanup)
    shim, has_shim = Path(folder.name) / "faulty_io.so", shutil.which("gcc") is not None
    if has_shim:
        code = REPO / "tests" / "kit" / "faulty_io.c"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, code, "-ldl"], check=True)
        environment["LD_PRELOAD"] = str(shim)
    command = [sys.executable, str(REPO / "tests" / "kit" / "fault_driver.py")]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # type: ignore[union-attr]
    return Driver(process, has_shim=has_shim)


@pytest.fixture(params=range(-(-_ROUNDS // ROUNDS)))
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Each test's own."""
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="module")
def driver() -> Driver:
    return started()


@pytest.fixture
def faulty(driver: Driver) -> Driver:
    if not driver.has_shim:
        pytest.skip("gcc is not there")
    return driver


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, a larger file that is only copied, a folder, an empty file."""
    path = tmp_path_factory.mktemp("checkpoint") / "source"
    build_tiny(
        path,
        n_layers=4,
        n_heads=8,
        n_kv_heads=2,
        d_head=16,
        d_model=64,
        shards=[["layers.0", "layers.1"], [""]],
    )
    (path / "sub").mkdir()
    (path / "sub" / "text").write_text("text")
    (path / "empty").touch()
    (path / "side.dat").write_bytes(random.Random(0).randbytes(1 << 20))
    return path


@pytest.fixture(scope="module")
def plain(driver: Driver, source: Path) -> Contents:
    """What becomes of SOURCE when nothing interferes."""
    return undisturbed(driver, source)


@pytest.fixture(scope="module")
def earlier(driver: Driver, source: Path) -> Contents:
    """What is there before `--overwrite`."""
    return undisturbed(driver, source, "--alpha", "0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def undisturbed(driver: Driver, source: Path, *flags: str) -> Contents:
    out = source.with_name("undisturbed")
    end = driver.apply(source, out, *flags)
    assert end.code == 0, end.text
    found = whole(out)
    shutil.rmtree(out)
    return found


def whole(out: Path) -> Contents:
    """Digests of all files of a finished output; of its manifest, what does not depend on how it was written.

    SHA256SUMS is checked and left out.
    """
    files: Contents = {}
    for path in sorted(out.rglob("*")):
        if path.is_file():
            files[path.relative_to(out).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    if "SHA256SUMS" in files:
        lines = (out / "SHA256SUMS").read_text().splitlines()
        del files["SHA256SUMS"]
        assert sorted(lines) == sorted(f"{digest}  {name}" for name, digest in files.items())
    manifest = json.loads((out / "qkpatch.json").read_bytes())
    for file in manifest["files"]:
        assert file.pop("sha256") in (None, files[file["name"]])
    del manifest["output"]["digest"]
    for edit in manifest["edits"]:
        del edit["sha256_before"], edit["sha256_after"]
    files["qkpatch.json"] = {**manifest, "run": None}
    return files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


def state(root: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        path.relative_to(root).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*")
        if path.is_file()
    }


# Where a run spends its time is also a matter of chance, so that short phases are met as well.
PHASES: list[dict[str, float]] = [
    {},
    {"fsync": 0.01},
    {"pwrite": 0.002},
    {"copying": 0.01},
    {"rows": 0.002},
    {"preadv": 0.001},
    {"unlink": 0.01},
    {"open": 0.003},
    {"link": 0.01, "rmdir": 0.02},
]
WAYS = [(), ("--digest", "files"), ("--link",), ("--digest", "files", "--link"), ("--digest", "none")]


PROVABLE = WAYS[:-1]  # so that what was written may be overwritten


class Pace:
    """How long a run takes in which phase of it is slow; measured once each."""

    def __init__(self, driver: Driver, source: Path) -> None:
        self._driver, self._source = driver, source
        self._seconds: dict[str, float] = {}

    def moment(self, chance: random.Random, slow: dict[str, float]) -> float:
        key = json.dumps(slow)
        if key not in self._seconds:
            out = self._source.with_name("paced")
            self._seconds[key] = self._driver.apply(self._source, out, "--digest", "files", slow=slow).seconds
            shutil.rmtree(out)
        return chance.uniform(0, self._seconds[key])


@pytest.fixture(scope="module")
def pace(driver: Driver, source: Path) -> Pace:
    return Pace(driver, source)


def undisturbed_of(driver: Driver, source: Path, *flags: str) -> Contents:
    out = source.with_name("expected")
    assert driver("apply", source, "-o", out, "--quiet", *flags).code == 0
    return whole(out)


def ends_with_edited_rows(path: Path) -> None:
    """A checkpoint in one file, with a megabyte of something else first and the queries of layer 1 last."""
    tiny = build_tiny(path, n_layers=2)
    generator = torch.Generator().manual_seed(0)
    order = [tiny.name(layer, which) for layer in (0, 1) for which in ("k", "q")]
    tensors = [("ballast", "U8", [1 << 20], random.Random(0).randbytes(1 << 20))]
    for name in order:
        W = (torch.randn(16 if "k_proj" in name else 32, 24, generator=generator) * 0.2).bfloat16()
        raw = struct.pack(f"<{W.numel()}h", *W.view(torch.int16).flatten().tolist())
        tensors.append((name, "BF16", list(W.shape), raw))
    write_shard(path / "model.safetensors", tensors)


def write_shard(path: Path, tensors: Sequence[tuple[str, str, list[int], bytes]]) -> None:
    """A safetensors file with its tensors in this order, which no library keeps."""
    header: dict[str, Any] = {}
    position = 0
    for name, dtype, shape, raw in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(raw)]}
        position += len(raw)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for *_, raw in tensors:
            file.write(raw)


@contextmanager
def disk(mebibytes: int, kind: str, *options: str) -> Iterator[Path]:
    """A file system of its own, on a loop device."""
    make = shutil.which(f"mkfs.{kind}")
    if os.geteuid() != 0 or make is None:
        pytest.skip(f"{kind} on a loop device takes root and mkfs.{kind}")
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    folder = base / f"qkpatch-disk-{os.getpid()}-{kind}"
    folder.mkdir()
    image, place = folder / "image", folder / "disk"
    try:
        place.mkdir()
        with image.open("wb") as file:
            file.truncate(mebibytes << 20)
        subprocess.run([make, *options, image], check=True, capture_output=True)
        mounted = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"mount: {mounted.stderr.strip()}")
        try:
            shutil.rmtree(place / "lost+found", ignore_errors=True)
            yield place
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        shutil.rmtree(folder)


def commit(place: Path) -> None:
    """Blocks of what was removed come back with this."""
    fd = os.open(place, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def tmpfs() -> Iterator[Path]:
    place = Path(f"/dev/shm/qkpatch-test-{os.getpid()}")
    if not place.parent.is_dir():
        pytest.skip("no tmpfs")
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place)


def faults(chance: random.Random, root: str, calls: str, **numbers: int) -> dict[str, str]:
    settings = {f"FAULT_{name.upper()}": str(number) for name, number in numbers.items()}
    return {"FAULTS": calls, "FAULT_ROOT": root, "FAULT_SEED": str(chance.randrange(1 << 30)), **settings}
