"""What processes, disks and people do to a running `apply`: kills, signals, full disks, bad sectors, races.

Whatever happens, OUT is whole or absent (or, with `--overwrite`, the old one), SOURCE stays, errors say what was
wrong, nothing hangs, and no file or thread is left. Moments and faults are drawn by chance, from a fixed seed:
`make stress` draws more of them, ROUNDS times as many (50), from another seed with SEED. Full disks and other file
systems are loop devices, for which one must be root.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, build_tiny
from safetensors.torch import load_file, save_file

ROUNDS = int(os.environ.get("QKPATCH_ROUNDS", "1"))
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
        return self("apply", source, "-o", out, *EDIT, *flags, **harm)


def request(*arguments: object, **harm: Any) -> dict[str, Any]:
    return {"arguments": [str(argument) for argument in arguments], **harm}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    shim = tmp_path_factory.mktemp("shim") / "faulty_io.so"
    has_shim = shutil.which("gcc") is not None
    if has_shim:
        code = REPO / "tests" / "kit" / "faulty_io.c"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, code, "-ldl"], check=True)
        environment["LD_PRELOAD"] = str(shim)
    command = [sys.executable, str(REPO / "tests" / "kit" / "fault_driver.py")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Driver(process, has_shim=has_shim)
        assert process.stdin is not None
        process.stdin.close()


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


# -------- kills


def test_killed_at_any_moment_out_is_whole_or_absent_and_any_next_run_gives_the_same(
    driver: Driver, source: Path, folder: Path, pace: Pace, plain: Contents, earlier: Contents
) -> None:
    """Up to three kills in a row, then a run that is left alone; each with or without `--resume`."""
    chance, out = random.Random(SEED), folder / "out"
    before, killed, resumed = state(source), 0, 0
    for _ in range(7 * ROUNDS):
        clear(folder)
        ways = WAYS
        way = chance.choice(ways)
        overwrite: tuple[str, ...] = ()
        if chance.random() < 0.4:
            ways = PROVABLE
            assert driver.apply(source, out, "--alpha", "0", *chance.choice(ways)).code == 0
            overwrite = ("--overwrite",)
            way = chance.choice(ways)
        for _ in range(chance.choice((1, 1, 2, 3))):
            slow = chance.choice(PHASES)
            moment = pace.moment(chance, slow)
            resume = chance.choice(((), ("--resume",)))
            end = driver.apply(source, out, *way, *overwrite, *resume, slow=slow, signals=[(moment, KILL)])
            assert end.code in (0, -KILL, 2), end
            assert end.code != 2 or "exists and is not empty" in end.text, (
                end
            )  # without the digests of this way
            killed += end.code == -KILL
            assert len(names(folder)) <= 2
            if out.exists():
                assert whole(out) in ([plain, earlier] if overwrite else [plain])
            elif overwrite:
                raise AssertionError("the old output is gone")
            way = chance.choice((way, chance.choice(ways)))
        resume = chance.choice(((), ("--resume",)))
        done = out.exists() and not overwrite
        end = driver.apply(source, out, *way, *overwrite, *resume)
        # Done already, but for the digests that this way wants, or that way did not leave.
        assert end.code in ((0, 2) if done else (0,)), end.text
        if not done:
            run = json.loads((out / "qkpatch.json").read_bytes())["run"]
            resumed += bool(run["copied_by"].get("resumed"))
            assert names(folder) == ["out"]
            assert ("files" in way) == (out / "SHA256SUMS").exists()
        assert whole(out) == plain
        if not done:
            assert driver("verify", out, "--source", source).code == 0
    assert state(source) == before
    assert killed > 3 * ROUNDS
    assert resumed > 0 or ROUNDS < 5


def killed_at(
    driver: Driver, source: Path, out: Path, *flags: str, slow: dict[str, float], after: float
) -> None:
    end = driver.apply(source, out, *flags, slow=slow, signals=[(after, KILL)])
    assert end.code == -KILL, end
    assert not out.exists()


@pytest.mark.parametrize("second", [("--digest", "files"), ("--digest", "edited")], ids=["files", "edited"])
@pytest.mark.parametrize("reached", ["SHA256SUMS", "qkpatch.json"])
def test_a_manifest_or_sums_of_the_killed_run_are_not_taken_for_those_of_the_next(
    reached: str, second: tuple[str, str], driver: Driver, source: Path, folder: Path, plain: Contents
) -> None:
    out = folder / "out"
    staging = killed_with_everything_copied(driver, source, out)
    (staging / "files" / "SHA256SUMS").write_text("stale")
    if reached == "qkpatch.json":
        (staging / "files" / "qkpatch.json").write_text("{}")
    end = driver.apply(source, out, "--resume", *second)
    assert end.code == 0, end.text
    assert (out / "SHA256SUMS").exists() == ("files" in second)
    assert whole(out) == plain
    assert driver("verify", out, "--source", source).code == 0


def killed_with_everything_copied(driver: Driver, source: Path, out: Path) -> Path:
    """The staging directory of a run that was killed while it wrote its edits."""
    for wait in (1, 4, 16):  # a busy machine may take longer
        killed_at(driver, source, out, slow={"rows": 60}, after=wait)
        (staging,) = out.parent.glob(".out.qkpatch-*")
        noted = (staging / "journal").read_text()
        if all(json.dumps(name) in noted for name in state(source)):
            return staging
        shutil.rmtree(staging)
    raise AssertionError("nothing was noted")


def test_a_note_is_not_believed_of_another_file_with_the_same_inode_number(
    driver: Driver, folder: Path, tmp_path: Path
) -> None:
    """The shard is noted as filled, then somebody cuts it short.

    The second run makes it anew, where file systems like ext4 give it the same inode, and is killed with the rows
    written and the rest not. The third run must not take the first one's word for it.
    """
    source, out = tmp_path / "source", folder / "out"
    ends_with_edited_rows(source)
    flags = ("--layers", "1")
    expected = undisturbed_of(driver, source, *flags)
    for attempt in (1, 4, 16):
        killed_at(driver, source, out, *flags, slow={"rows": 60}, after=attempt)
        if any("filled" in path.read_text() for path in folder.glob(".out.*/journal")):
            break
        clear(folder)
    (staged,) = folder.glob(".out.*/files/*.safetensors")
    os.truncate(staged, 1000)
    killed_at(driver, source, out, *flags, "--resume", slow={"copying": 60}, after=attempt)
    end = driver("apply", source, "-o", out, *flags, "--quiet", "--resume")
    assert end.code == 0, end.text
    assert whole(out) == expected


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


# -------- links and what is there already


def test_an_output_of_links_can_be_overwritten_whatever_other_links_come_and_go(
    driver: Driver, source: Path, folder: Path, plain: Contents
) -> None:
    out, other = folder / "out", folder / "other"
    for _ in range(3):
        end = driver.apply(source, out, "--link", "--overwrite")
        assert end.code == 0, end.text
    assert driver.apply(source, other, "--link").code == 0
    assert driver.apply(source, out, "--overwrite").code == 0
    shutil.rmtree(out)
    assert driver.apply(source, other, "--overwrite").code == 0
    assert whole(other) == plain


def test_a_link_that_someone_wrote_through_is_no_longer_qkpatchs(
    driver: Driver, folder: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", folder / "out"
    build_tiny(source)
    assert driver("apply", source, "-o", out, "--quiet").code == 0
    (out / "tokenizer.json").write_bytes(b"[]")  # as long as before
    end = driver("apply", source, "-o", out, "--quiet", "--overwrite")
    assert end.code == 2
    assert "not as qkpatch left it" in end.text


def test_a_reader_of_an_output_that_is_overwritten_never_misses_it(
    driver: Driver, source: Path, folder: Path
) -> None:
    out = folder / "out"
    assert driver.apply(source, out).code == 0
    missed: list[OSError] = []
    looks = 0
    done = threading.Event()

    def look() -> None:
        nonlocal looks
        while not done.is_set():
            try:
                with open(out / "config.json", "rb") as file:
                    assert file.read()
            except OSError as error:
                missed.append(error)
            looks += 1

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(3 * ROUNDS):
            assert driver.apply(source, out, "--overwrite", "--alpha", str(number % 2 / 2)).code == 0
    finally:
        done.set()
        reader.join()
    assert missed == []
    assert looks > 100


# -------- signals


def test_signals_at_any_moment_clear_up_even_when_they_come_twice(
    driver: Driver, source: Path, folder: Path, pace: Pace, plain: Contents
) -> None:
    chance, out = random.Random(SEED), folder / "out"
    stopped = 0
    for _ in range(8 * ROUNDS):
        clear(folder)
        resume: tuple[str, ...] = ()
        if chance.random() < 0.3:
            moment = pace.moment(chance, {"pwrite": 0.002})
            driver.apply(source, out, slow={"pwrite": 0.002}, signals=[(moment, KILL)])
            if out.exists():
                clear(folder)
            resume = ("--resume",)
        orphans = names(folder)
        slow = chance.choice(PHASES)
        sent = [(pace.moment(chance, slow), chance.choice((INT, TERM, HUP)))]
        for _ in range(chance.choice((0, 1, 1, 2))):
            sent.append((chance.choice((0, 0.0005, 0.02)) * chance.random(), chance.choice((INT, TERM))))
        way = chance.choice(WAYS)
        end = driver.apply(source, out, *way, *resume, slow=slow, signals=sent)
        stopped += end.code != 0
        # A late signal finds the command done, and the process about to end as it wants to.
        is_late = end.text == "" and end.code in {130, *(-number for _, number in sent)}
        assert is_late or end.code in {0, *(128 + number for _, number in sent)}, (sent, end)
        is_kept = bool(resume) and " file(s) are kept. Go on with: qkpatch apply --resume" in end.text
        if end.code and not is_late and not is_kept:
            assert end.text in (
                "Interrupted; nothing half done is left behind.\n",
                "Terminated; nothing half done is left behind.\n",
            ), end.text
        # What a killed run left stays where the signal came before it was looked for.
        left = [name for name in names(folder) if end.code == 0 or name not in orphans]
        if is_kept:
            assert len(names(folder)) == 1, names(folder)
            end = driver.apply(source, out, *way, *resume)
            assert end.code == 0, end.text
            assert "resumed" in json.loads((out / "qkpatch.json").read_bytes())["run"]["copied_by"]
            left = names(folder)
        assert left in ([], ["out"]), (sent, end)
        if out.exists():
            assert whole(out) == plain
        else:
            assert end.code != 0
    assert stopped > 2 * ROUNDS


def test_on_a_terminal_more_of_ctrl_c_does_not_cut_the_clearing_up_short(
    folder: Path, tmp_path: Path
) -> None:
    """There, a thread draws the progress: one that takes signals which the main thread blocks."""
    source, chance = tmp_path / "source", random.Random(SEED)
    build_tiny(source, n_layers=4, n_heads=16, n_kv_heads=4, d_head=16, d_model=128)
    for number in range(300):
        (source / f"file-{number}").write_bytes(bytes(2000))
    command = [sys.executable, "-m", "qkpatch", "apply", str(source), "-o", str(folder / "out")]
    command += ["--layers", "0-3"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    for _ in range(3 * ROUNDS):
        clear(folder)
        ours, theirs = os.openpty()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs) as process:
            os.close(theirs)
            deadline = time.monotonic() + 120
            while not names(folder) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.15)
            for _ in range(3):
                process.send_signal(INT)
                time.sleep(chance.random() * 0.004)
            said = b""
            with suppress(OSError):  # which is how a terminal ends
                while part := os.read(ours, 4096):
                    said += part
            os.close(ours)
            process.communicate(timeout=120)
        assert process.returncode in (0, 130, -INT)  # the last for a signal that meets the interpreter's end
        assert names(folder) in ([], ["out"]), said
        assert process.returncode == 0 or b"Interrupted; nothing half done is left behind." in said


def test_a_signal_at_any_instruction_of_the_engine_clears_up(
    driver: Driver, folder: Path, tmp_path: Path
) -> None:
    """Also where contexts are entered and left, between one that is open and the one that will close it."""
    source, out, chance = tmp_path / "source", folder / "out", random.Random(SEED)
    build_tiny(source, n_layers=2, n_heads=2)
    flags = ("--layers", "0-1", "--threads", "2", "--quiet")
    new, old = (undisturbed_at(driver, source, *flags, *more) for more in ((), ("--alpha", "0")))
    count = driver("apply", source, "-o", out, *flags, trace=True).opcodes
    assert count > 1000
    for number in range(12 * ROUNDS):
        clear(folder)
        overwrite: tuple[str, ...] = ()
        if number % 2:
            assert driver("apply", source, "-o", out, *flags, "--alpha", "0").code == 0
            overwrite = ("--overwrite",)
        # Every fourth, in what is only done to enter and to leave.
        at = chance.randrange(1, count)
        at = chance.choice((at, at, at, count - at // 10))
        which = chance.choice((INT, TERM))
        end = driver(
            "apply", source, "-o", out, *flags, *overwrite, trace=True, trip_at=at, trip_signal=int(which)
        )
        assert end.code in (0, 128 + which), (at, end)
        assert names(folder) in ([], ["out"]), (at, end)
        if out.exists():
            assert whole(out) in ([new, old] if overwrite else [new]), (at, end)


def undisturbed_at(driver: Driver, source: Path, *flags: str) -> Contents:
    out = source.with_name("expected")
    assert driver("apply", source, "-o", out, *flags).code == 0
    found = whole(out)
    shutil.rmtree(out)
    return found


# -------- full disks


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


def leave_free(place: Path, wanted: int) -> None:
    """Fill a file system up to ``wanted`` bytes, as far as its blocks allow."""
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    commit(place)
    status = os.statvfs(place)
    with (place / "ballast").open("wb") as file:
        size = status.f_bavail * status.f_frsize - wanted
        if size > 0:
            os.posix_fallocate(file.fileno(), 0, size)
    for number in range(8):  # the map of the ballast's blocks takes some too
        status = os.statvfs(place)
        short = wanted - status.f_bavail * status.f_frsize
        if short >= 0 or number == 7:
            break
        with (place / f"ballast{number}").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, -short)
    commit(place)


def commit(place: Path) -> None:
    """Blocks of what was removed come back with this."""
    fd = os.open(place, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def assert_refused_or_right(end: End, place: Path, left: list[str], expected: Contents, *said: str) -> bool:
    """Whether it was refused: then for a reason that was told, and without a trace."""
    if end.code == 0:
        assert whole(place / "out") == expected
        assert names(place) == sorted([*left, "out"])
        return False
    assert end.code == 4, end
    assert any(text in end.text for text in said), end.text
    assert names(place) == left
    return True


FULL = os.strerror(errno.ENOSPC)


def test_a_disk_that_is_full_at_any_byte_is_told_and_nothing_is_left(
    driver: Driver, source: Path, plain: Contents
) -> None:
    chance = random.Random(SEED)
    needed = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    refused = 0
    # Room for everything but the journal, the digests or the manifest is what lies around what is needed.
    sizes = [chance.randrange(needed) for _ in range(2 * ROUNDS)]
    sizes += [needed + chance.randrange(-8 << 10, 48 << 10) for _ in range(6 * ROUNDS)]
    with disk(8, "ext4", "-q", "-b", "1024", "-m", "0") as place:
        for number, size in enumerate(sizes):
            leave_free(place, size)
            left = names(place)
            way = chance.choice(((), ("--digest", "files")))
            end = driver.apply(source, place / "out", *way, skip_space_check=number % 3 > 0)
            refused += assert_refused_or_right(end, place, left, plain, FULL, "OUT needs")
        leave_free(place, 2 << 20)
        assert driver.apply(source, place / "out").code == 0
    assert refused > 2 * ROUNDS


def test_a_disk_without_inodes_is_told_and_nothing_is_left(
    driver: Driver, source: Path, plain: Contents
) -> None:
    needed = len(state(source)) + 5  # the staging directory, its files, a folder, the journal, the manifest
    with disk(8, "ext4", "-q", "-m", "0", "-N", "64") as place:
        for free in (0, 1, 5, *range(needed - 3, needed + 2)):
            leave_free(place, 4 << 20)
            for number in range(os.statvfs(place).f_ffree - free):
                (place / f"ballast-{number}").touch()
            left = names(place)
            end = driver.apply(source, place / "out", "--digest", chance_of(free))
            is_refused = assert_refused_or_right(end, place, left, plain, FULL)
            assert is_refused == (free < needed + (free % 2)), free


def chance_of(number: int) -> str:
    return "files" if number % 2 else "edited"


def test_a_limit_of_file_sizes_is_told_and_nothing_is_left(
    driver: Driver, source: Path, folder: Path, plain: Contents
) -> None:
    chance = random.Random(SEED)
    limits = [1, 100, (1 << 20) - 1]
    limits += [chance.randrange(1, 1 << 20) for _ in range(2 * ROUNDS)]
    for limit in limits:
        end = driver.apply(source, folder / "out", *chance.choice(WAYS[:2]), file_size=limit)
        assert assert_refused_or_right(end, folder, [], plain, os.strerror(errno.EFBIG))
        assert f"{folder / 'out'}" in end.text or "journal" in end.text
        assert str(source) not in end.text
        assert "journal" in end.text or "FAT32" in end.text
    assert driver.apply(source, folder / "out", file_size=1 << 20).code == 0


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range,sendfile,pwrite", "mkdir", "fsync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_runs_dry_is_told_with_the_file_of_out(
    error: int, call: str, faulty: Driver, source: Path, folder: Path
) -> None:
    environment = faults(random.Random(SEED), str(folder), call, error=error, per_mille=1000)
    end = faulty.apply(source, folder / "out", environment=environment)
    assert end.code == 4, end
    where = end.text.partition("where")[2].splitlines()[0]
    assert where.strip().startswith(str(folder)), end.text
    assert "-o" in end.text.partition("try")[2]
    assert names(folder) == []


# -------- bad sectors, interrupted calls, short counts


CALLS = ["pread", "preadv", "pwrite", "write", "copy_file_range", "fsync", "rename", "mkdir"]


def faults(chance: random.Random, root: str, calls: str, **numbers: int) -> dict[str, str]:
    settings = {f"FAULT_{name.upper()}": str(number) for name, number in numbers.items()}
    return {"FAULTS": calls, "FAULT_ROOT": root, "FAULT_SEED": str(chance.randrange(1 << 30)), **settings}


def test_interrupted_calls_and_short_counts_change_nothing(
    faulty: Driver, source: Path, folder: Path, plain: Contents
) -> None:
    chance, out = random.Random(SEED), folder / "out"
    for _ in range(2 * ROUNDS):
        clear(folder)
        calls = "pread,preadv,pwrite,copy_file_range,sendfile,fsync"
        root = str(Path(os.path.commonpath([source, folder])))
        numbers = {"error": errno.EINTR, "per_mille": chance.randrange(400), "short": chance.randrange(900)}
        end = faulty.apply(
            source, out, *chance.choice(WAYS), environment=faults(chance, root, calls, **numbers)
        )
        assert end.code == 0, end.text
        assert whole(out) == plain


def test_a_journal_that_is_written_in_part_only_harms_no_later_run(
    faulty: Driver, source: Path, folder: Path, plain: Contents
) -> None:
    chance, out = random.Random(SEED), folder / "out"
    for _ in range(ROUNDS):
        clear(folder)
        for _ in range(2):
            environment = faults(chance, "/journal", "write", per_mille=0, short=500)
            faulty.apply(
                source, out, "--resume", environment=environment, slow={"pwrite": 0.01}, signals=[(0.2, KILL)]
            )
            if out.exists():
                clear(folder)
        end = faulty.apply(source, out, "--resume")
        assert end.code == 0, end.text
        assert whole(out) == plain


@pytest.mark.parametrize("side", ["SOURCE", "OUT"])
def test_errors_of_the_disk_at_any_call_are_told_as_themselves(
    side: str, faulty: Driver, source: Path, folder: Path, plain: Contents, earlier: Contents
) -> None:
    chance, out = random.Random(SEED), folder / "out"
    before, told = state(source), 0
    for number in range(6 * ROUNDS):
        clear(folder)
        overwrite: tuple[str, ...] = ()
        if chance.random() < 0.3:
            assert faulty.apply(source, out, "--alpha", "0").code == 0
            overwrite = ("--overwrite",)
        root = str(source if side == "SOURCE" else folder)
        calls = ("all", *CALLS)[number % (len(CALLS) + 1)] if side == "OUT" else "all"
        numbers = {
            "error": errno.EIO,
            "per_mille": chance.choice((5, 50, 500)),
            "short": chance.choice((0, 300)),
        }
        way = chance.choice(WAYS)
        end = faulty.apply(source, out, *way, *overwrite, environment=faults(chance, root, calls, **numbers))
        told += end.code != 0
        assert end.code in (0, 4), end
        assert (os.strerror(errno.EIO) in end.text) == (end.code == 4), end.text
        assert names(folder) in ([], ["out"]), end
        if out.exists():  # the last error can be in syncing the folder, with OUT whole in it
            assert whole(out) in ([plain, earlier] if overwrite and end.code else [plain])
        else:
            assert end.code != 0
            assert not overwrite
    assert state(source) == before
    assert told > 0 or ROUNDS < 5


# -------- what a file system cannot do


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("flock", errno.ENOSYS, "has no locks"),
        ("flock", errno.ENOLCK, "has no locks"),
        ("fsync of directories", errno.EINVAL, "cannot sync"),
        ("fsync", errno.EINVAL, "cannot sync"),
        ("renameat2", errno.EINVAL, "cannot exchange names"),
        ("renameat2", errno.ENOSYS, "cannot exchange names"),
        ("statvfs", 0, ""),
        ("copy_file_range,sendfile", errno.EOPNOTSUPP, ""),
    ],
)
def test_what_a_file_system_cannot_do_is_done_without_and_said_where_it_weakens_a_promise(
    call: str, error: int, said: str, faulty: Driver, source: Path, folder: Path, plain: Contents
) -> None:
    environment = faults(random.Random(SEED), str(folder), call, error=error, per_mille=1000)
    flags = ("-o", folder / "out", "--layers", "0-3")
    for more in ((), ("--overwrite",)):
        end = faulty("apply", source, *flags, *more, environment=environment)
        assert end.code == 0, end.text
        assert end.text.count("Warning:") == bool(said and ("exchange" not in said or more)), end.text
    assert said in end.text
    assert whole(folder / "out") == plain
    assert names(folder) == ["out"]
    assert "weaker" not in json.loads((folder / "out" / "qkpatch.json").read_bytes())["run"]
    end = faulty("plan", source, "-o", folder / "other", environment=environment)
    assert end.code == 0, end.text


def test_free_space_that_nobody_knows_is_not_zero(faulty: Driver, source: Path, folder: Path) -> None:
    environment = faults(random.Random(SEED), str(folder), "statvfs", error=0, per_mille=1000)
    end = faulty("plan", source, "-o", folder / "out", environment=environment)
    assert end.code == 0, end.text
    assert "free disk unknown" in end.text
    end = faulty("plan", source, "-o", folder / "out", "--json", environment=environment)
    assert "free_disk_bytes" not in json.loads(end.text)["costs"]


def test_where_there_are_no_locks_nothing_is_kept_that_nobody_could_take_over(
    faulty: Driver, source: Path, folder: Path
) -> None:
    environment = faults(random.Random(SEED), str(folder), "flock", error=errno.ENOSYS, per_mille=1000)
    slow = {"rows": 2.0}
    end = faulty.apply(
        source, folder / "out", "--resume", environment=environment, slow=slow, signals=[(1, TERM)]
    )
    assert end.code == 128 + TERM
    assert "nothing half done is left behind" in end.text
    assert names(folder) == []


# -------- several at once


def test_of_runs_for_one_out_one_wins_and_the_others_say_so(
    driver: Driver, source: Path, folder: Path, pace: Pace, plain: Contents
) -> None:
    chance, out = random.Random(SEED), folder / "out"
    for _ in range(3 * ROUNDS):
        clear(folder)
        if chance.random() < 0.5:
            driver.apply(source, out, slow={"pwrite": 0.002}, signals=[(pace.moment(chance, {}), KILL)])
            if out.exists():
                clear(folder)
        flags = chance.choice(((), ("--resume",)))
        runs = [
            request("apply", source, "-o", out, *EDIT, *flags, slow=chance.choice(PHASES))
            for _ in range(chance.choice((2, 2, 3)))
        ]
        ends = driver.together(*runs)
        # Whoever begins when it is there finds it done already.
        assert {end.code for end in ends} in ({0}, {0, 2}), ends
        for end in ends:
            assert end.code == 0 or "came into being" in end.text, end
        assert names(folder) == ["out"]
        assert whole(out) == plain


def test_of_runs_that_overwrite_each_leaves_a_whole_output(
    driver: Driver, source: Path, folder: Path, plain: Contents, earlier: Contents
) -> None:
    chance, out = random.Random(SEED), folder / "out"
    for _ in range(2 * ROUNDS):
        clear(folder)
        assert driver.apply(source, out, "--alpha", "0").code == 0
        runs = [
            request("apply", source, "-o", out, *EDIT, "--overwrite", *more, slow=chance.choice(PHASES))
            for more in ((), ("--alpha", "0"), ("--resume", "--link"))
        ]
        ends = driver.together(*runs)
        assert any(end.code == 0 for end in ends), ends
        for end in ends:
            # Hard links that one run makes and another's overwriting drops look like a change of SOURCE.
            assert end.code in (0, 2) or "the source changed" in end.text, end
            assert end.code == 0 or "Error:" in end.text
        assert names(folder) == ["out"]
        assert whole(out) in (plain, earlier)


@pytest.mark.parametrize("change", ["replaced", "truncated", "grown", "touched", "written to", "removed"])
def test_a_source_that_changes_at_any_moment_is_an_error_or_was_read_before(
    change: str, driver: Driver, source: Path, folder: Path, tmp_path: Path, plain: Contents, pace: Pace
) -> None:
    chance, out, victim = random.Random(f"{SEED}{change}"), folder / "out", tmp_path / "source"
    refused = 0
    for _ in range(2 * ROUNDS):
        clear(folder)
        shutil.rmtree(victim, ignore_errors=True)
        shutil.copytree(source, victim)
        name = chance.choice(("side.dat", *[p.name for p in source.glob("*.safetensors")]))
        slow = chance.choice([{"copy_file_range": 0.02}, {"pwrite": 0.004}, {"preadv": 0.002}])
        meddle = (pace.moment(chance, slow), change, str(victim / name))
        end = driver.apply(victim, out, slow=slow, meddle=meddle)
        said = ("changed", "early", os.strerror(errno.ENOENT))
        found = folder / "out" / "qkpatch.json"
        if end.code == 0:
            manifest = json.loads(found.read_bytes())
            expected = {**plain, "qkpatch.json": {**plain["qkpatch.json"], "source": manifest["source"]}}
            assert whole(out) == expected, meddle
        else:
            refused += 1
            assert end.code == 4, end
            assert any(text in end.text for text in said), end.text
            assert names(folder) == []
    assert refused > 0 or ROUNDS < 5


# -------- threads


@pytest.mark.parametrize("threads", [1, 5])
def test_a_failure_in_one_thread_is_told_as_itself(
    threads: int, faulty: Driver, source: Path, folder: Path, tmp_path: Path
) -> None:
    chance, broken = random.Random(SEED), tmp_path / "source"
    shutil.copytree(source, broken)
    shard = broken / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(name for name in sorted(tensors) if "layers.3" in name and "q_proj" in name)
    tensors[name][-1, -1] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    flags = ("--layers", "0-3", "--threads", str(threads), "--quiet")
    for _ in range(ROUNDS):
        end = faulty("apply", broken, "-o", folder / "out", *flags, slow=chance.choice(PHASES))
        assert (end.code, names(folder)) == (3, []), end
        assert "query head 7 of layer 3 holds NaN" in end.text
        assert name in end.text
        for root, calls, said in (
            ("side.dat", "copy_file_range,pwrite", "cannot copy"),
            ("side.dat", "fsync", "cannot sync"),
            ("model-00001-of-00002.safetensors", "pwrite", "cannot (copy|write)"),
            ("/journal", "write", "cannot write"),
        ):
            environment = faults(chance, root, calls, error=errno.EIO, per_mille=1000)
            slow = chance.choice(PHASES)
            end = faulty("apply", source, "-o", folder / "out", *flags, environment=environment, slow=slow)
            assert (end.code, names(folder)) == (4, []), end
            assert re.search(f"{said}: {os.strerror(errno.EIO)}", end.text)
            assert root in end.text


def test_threads_that_cannot_be_started_are_an_error_and_nothing_waits_for_them(
    driver: Driver, source: Path, folder: Path
) -> None:
    end = driver("apply", source, "-o", folder / "out", "--threads", 200, "--quiet", address_space=400 << 20)
    assert end.code in (2, 4), end
    assert "thread" in end.text
    assert names(folder) == []


def test_many_small_files_do_not_take_as_many_descriptors(
    driver: Driver, folder: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", folder / "out"
    build_tiny(source)
    for number in range(400):
        (source / f"file-{number}").write_bytes(b"content")
    end = driver("apply", source, "-o", out, "--quiet", open_files=128, slow={"fsync": 0.002})
    assert end.code == 0, end.text
    assert driver("verify", out, "--source", source).code == 0


# -------- the same bytes


def test_the_bytes_do_not_depend_on_threads_nor_on_the_file_system(
    driver: Driver, source: Path, folder: Path
) -> None:
    for number, edit in enumerate((("--layers", "0-3"), ("--select", "random", "--channel", "symmetric"))):
        found = []
        for threads in (1, 2, 5, 5):
            out = folder / f"{number}-{threads}-{len(found)}"
            flags = ("--threads", str(threads), "--quiet", *edit)
            assert driver("apply", source, "-o", out, *flags).code == 0
            found.append(whole(out))
        assert found[1:] == found[:-1]


@pytest.mark.parametrize(("kind", "mebibytes"), [("xfs", 320), ("btrfs", 128), ("tmpfs", 0)])
def test_another_file_system_gets_the_same_bytes(
    kind: str, mebibytes: int, driver: Driver, source: Path, plain: Contents, request: pytest.FixtureRequest
) -> None:
    with tmpfs() if kind == "tmpfs" else disk(mebibytes, kind) as place:
        assert driver.apply(source, place / "far").code == 0
        assert whole(place / "far") == plain
        if kind == "tmpfs":
            return
        near = place / "source"
        shutil.copytree(source, near)
        for way in WAYS:
            end = driver.apply(near, place / "near", *way, "--overwrite")
            assert end.code == 0, end.text
            found = whole(place / "near")
            means = json.loads((place / "near" / "qkpatch.json").read_bytes())["run"]["copied_by"]
            assert "reflink" in means
            assert {**found, "qkpatch.json": None} == {**plain, "qkpatch.json": None}
        for after in (0.01, 0.03, 0.1)[: 2 * ROUNDS - 1]:
            shutil.rmtree(place / "near", ignore_errors=True)
            driver.apply(near, place / "near", slow={"fsync": 0.01}, signals=[(after, KILL)])
            assert driver.apply(near, place / "near", "--resume", "--overwrite").code == 0
            assert driver("verify", place / "near", "--source", near).code == 0
        assert names(place) == ["far", "near", "source"]


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


# -------- odd files, all the way


def test_a_hundred_thousand_tensors_are_applied_and_verified(
    driver: Driver, folder: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", folder / "out"
    ends_with_edited_rows(source)
    raw = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    parts = [(n, e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()]
    empty = [(f"none.{n}", "F32", [0, n], b"") for n in range(50_000)]
    bytes_ = [(f"one.{n}", "U8", [1], b"\1") for n in range(50_001)]  # odd: what follows is not aligned
    write_shard(source / "model.safetensors", [*empty, *bytes_, *parts])
    assert driver("apply", source, "-o", out, "--quiet", "--layers", "0-1").code == 0
    assert driver("verify", out, "--source", source).code == 0


def test_rows_at_the_very_end_and_the_very_beginning_are_written(
    driver: Driver, folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    source = tmp_path / "source"
    ends_with_edited_rows(source)
    raw = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    parts = [(n, e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()]
    for number, order in enumerate((parts, parts[::-1], [p for p in parts if "ballast" not in p[0]])):
        write_shard(source / "model.safetensors", order)
        out = folder / str(number)
        assert driver("apply", source, "-o", out, "--quiet", "--layers", "0-1").code == 0
        assert driver("verify", out, "--source", source).code == 0
        assert (out / "model.safetensors").stat().st_size == (source / "model.safetensors").stat().st_size
