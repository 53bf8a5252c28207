"""Several runs, threads and file systems at once: one wins or all find the same, and the bytes are always the same."""

# Fixtures are imported, and asked for by the names of parameters.
# ruff: noqa: F401, F811

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny
from faulty_runs import (
    EDIT,
    KILL,
    PHASES,
    ROUNDS,
    WAYS,
    Contents,
    Driver,
    Pace,
    chance,
    clear,
    disk,
    driver,
    earlier,
    ends_with_edited_rows,
    faults,
    faulty,
    folder,
    names,
    pace,
    plain,
    request,
    source,
    tmpfs,
    whole,
    write_shard,
)
from safetensors.torch import load_file, save_file

# -------- several at once


@pytest.mark.long
def test_of_runs_for_one_out_one_wins_and_the_others_say_so(
    driver: Driver, source: Path, folder: Path, pace: Pace, plain: Contents, chance: random.Random
) -> None:
    out = folder / "out"
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


@pytest.mark.long
def test_of_runs_that_overwrite_each_leaves_a_whole_output(
    driver: Driver, source: Path, folder: Path, plain: Contents, earlier: Contents, chance: random.Random
) -> None:
    out = folder / "out"
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
    change: str,
    driver: Driver,
    source: Path,
    folder: Path,
    tmp_path: Path,
    plain: Contents,
    pace: Pace,
    chance: random.Random,
) -> None:
    out, victim = folder / "out", tmp_path / "source"
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
    threads: int, faulty: Driver, source: Path, folder: Path, tmp_path: Path, chance: random.Random
) -> None:
    broken = tmp_path / "source"
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


@pytest.mark.long
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


@pytest.mark.long
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


# -------- odd files, all the way


@pytest.mark.long
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
