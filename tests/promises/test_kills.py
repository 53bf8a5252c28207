"""What kills, signals and other programs do to a running `apply`, at any moment.

OUT is whole or absent (or, with `--overwrite`, the old one), SOURCE stays, and no file is left.
"""

# Fixtures are imported, and asked for by the names of parameters.
# ruff: noqa: F401, F811

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import REPO, build_tiny
from faulty_runs import (
    HUP,
    INT,
    KILL,
    PHASES,
    PROVABLE,
    ROUNDS,
    TERM,
    WAYS,
    Contents,
    Driver,
    Pace,
    chance,
    clear,
    driver,
    earlier,
    ends_with_edited_rows,
    folder,
    names,
    pace,
    plain,
    source,
    state,
    undisturbed_of,
    whole,
)

# -------- kills


def test_killed_at_any_moment_out_is_whole_or_absent_and_any_next_run_gives_the_same(
    driver: Driver,
    source: Path,
    folder: Path,
    pace: Pace,
    plain: Contents,
    earlier: Contents,
    chance: random.Random,
) -> None:
    """Up to three kills in a row, then a run that is left alone; each with or without `--resume`."""
    out = folder / "out"
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
    assert killed > ROUNDS
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


@pytest.mark.long
def test_a_reader_of_an_output_that_is_overwritten_never_misses_it(
    driver: Driver, source: Path, folder: Path, chance: random.Random
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
        for _ in range(3 * ROUNDS):
            assert driver.apply(source, out, "--overwrite", "--alpha", chance.choice(("0", "0.5"))).code == 0
    finally:
        done.set()
        reader.join()
    assert missed == []
    assert looks > 100


# -------- signals


@pytest.mark.long
def test_signals_at_any_moment_clear_up_even_when_they_come_twice(
    driver: Driver, source: Path, folder: Path, pace: Pace, plain: Contents, chance: random.Random
) -> None:
    out = folder / "out"
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
    assert stopped > ROUNDS


@pytest.mark.long
def test_on_a_terminal_more_of_ctrl_c_does_not_cut_the_clearing_up_short(
    folder: Path, tmp_path: Path, chance: random.Random
) -> None:
    """There, a thread draws the progress: one that takes signals which the main thread blocks."""
    source = tmp_path / "source"
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


@pytest.mark.long
def test_a_signal_at_any_instruction_of_the_engine_clears_up(
    driver: Driver, folder: Path, tmp_path: Path, chance: random.Random
) -> None:
    """Also where contexts are entered and left, between one that is open and the one that will close it."""
    source, out = tmp_path / "source", folder / "out"
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
