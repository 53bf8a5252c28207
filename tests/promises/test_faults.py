"""What disks do to a running `apply`: they are full, have bad sectors, or cannot do what others can.

Errors say what was wrong, nothing hangs, and no file is left.
"""

# Fixtures are imported, and asked for by the names of parameters.
# ruff: noqa: F401, F811

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from faulty_runs import (
    KILL,
    ROUNDS,
    SEED,
    TERM,
    WAYS,
    Contents,
    Driver,
    End,
    chance,
    clear,
    commit,
    disk,
    driver,
    earlier,
    faults,
    faulty,
    folder,
    names,
    plain,
    source,
    state,
    whole,
)

# -------- full disks


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


@pytest.mark.long
def test_a_disk_that_is_full_at_any_byte_is_told_and_nothing_is_left(
    driver: Driver, source: Path, plain: Contents, chance: random.Random
) -> None:
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


@pytest.mark.long
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


@pytest.mark.long
def test_a_limit_of_file_sizes_is_told_and_nothing_is_left(
    driver: Driver, source: Path, folder: Path, plain: Contents, chance: random.Random
) -> None:
    limits = [1, 100, (1 << 20) - 1]
    limits += [chance.randrange(1, 1 << 20) for _ in range(2 * ROUNDS)]
    for limit in limits:
        end = driver.apply(source, folder / "out", *chance.choice(WAYS[:2]), file_size=limit)
        assert assert_refused_or_right(end, folder, [], plain, os.strerror(errno.EFBIG))
        assert f"{folder / 'out'}" in end.text or "journal" in end.text
        assert str(source) not in end.text
        assert "journal" in end.text or "FAT32" in end.text
    assert driver.apply(source, folder / "out", file_size=1 << 20).code == 0


@pytest.mark.long
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


def test_interrupted_calls_and_short_counts_change_nothing(
    faulty: Driver, source: Path, folder: Path, plain: Contents, chance: random.Random
) -> None:
    out = folder / "out"
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
    faulty: Driver, source: Path, folder: Path, plain: Contents, chance: random.Random
) -> None:
    out = folder / "out"
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


@pytest.mark.long
@pytest.mark.parametrize("side", ["SOURCE", "OUT"])
def test_errors_of_the_disk_at_any_call_are_told_as_themselves(
    side: str,
    faulty: Driver,
    source: Path,
    folder: Path,
    plain: Contents,
    earlier: Contents,
    chance: random.Random,
) -> None:
    out = folder / "out"
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


@pytest.mark.long
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
