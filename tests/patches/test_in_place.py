"""SOURCE edited in place: killed or interrupted anywhere, it is finished or restored byte for byte; what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, build_tiny
from failing import fill_disk, path_of
from faulty_runs import commit, disk
from test_crash import Driver, driver  # noqa: F401 - a fixture

import qkpatch
from qkpatch.checkpoint.names import UNDO
from qkpatch.common import system
from qkpatch.errors import FileSystemError, UsageError

Run = Callable[..., Any]
State = dict[str, tuple[int, int, bytes]]
EDIT = ("--layers", "0-2", "--heads", "0,3", "--modes", "2")


def state(root: Path) -> State:
    """Mode, time and bytes of every file."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def contents(root: Path) -> dict[str, Any]:
    """Bytes of every file but the undo files; of the manifest, what does not depend on the moment."""
    found: dict[str, Any] = {name: raw for name, (_, _, raw) in state(root).items() if "undo" not in name}
    if "qkpatch.json" in found:
        manifest = json.loads(found["qkpatch.json"])
        found["qkpatch.json"] = {**manifest, "run": None, "source": {**manifest["source"], "name": None}}
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two shards."""
    shards = [["layers.0", "layers.1"], [""]]
    return build_tiny(tmp_path / "source", n_layers=3, shards=shards).path


def fresh(source: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    return place


# -------- what it does


@pytest.mark.parametrize("digest", ["edited", "none"])
def test_the_rows_are_those_of_a_copy_and_the_way_back_is_byte_for_byte(
    digest: str, source: Path, tmp_path: Path, run: Run
) -> None:
    before = state(source)
    assert run("apply", source, "-o", tmp_path / "out", "--digest", digest, *EDIT).exit_code == 0
    result = run("apply", source, "--in-place", "--digest", digest, *EDIT)
    assert result.exit_code == 0, result.output
    assert f"Undo it with: qkpatch revert {source}" in result.stdout
    assert contents(source) == contents(tmp_path / "out")
    assert set(state(source)) - set(state(tmp_path / "out")) == {"qkpatch.undo"}
    restored = run("revert", source, "-o", tmp_path / "restored")
    assert restored.exit_code == 0, restored.output
    assert state(tmp_path / "restored") == before
    proof = run("verify", source, "--source", tmp_path / "restored")
    assert proof.exit_code == 0, proof.output
    assert "qkpatch.undo leads back" in proof.stdout
    assert run("revert", source).exit_code == 0
    assert state(source) == before


def test_the_same_again_is_done_already_and_another_edit_is_refused(source: Path, run: Run) -> None:
    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    before = state(source)
    again = run("apply", source, "--in-place", *EDIT)
    assert again.exit_code == 0, again.output
    assert "Already done" in again.stdout
    other = run("apply", source, "--in-place", "--modes", "1")
    assert other.exit_code == 2
    assert "qkpatch revert" in other.stderr
    assert state(source) == before


def test_a_preview_tells_what_would_be_done_and_does_nothing(source: Path, run: Run) -> None:
    before = state(source)
    shown = run("plan", source, *EDIT, "--in-place")
    assert shown.exit_code == 0, shown.output
    assert f"What leads back, by `qkpatch revert`: {source / UNDO}" in shown.stdout
    planned, dry = (
        json.loads(run(*command, source, *EDIT, "--in-place", "--json", *more).stdout)
        for command, more in ((("plan",), ()), (("apply",), ("--dry-run",)))
    )
    assert {**planned["costs"], "free_disk_bytes": 0} == {**dry["costs"], "free_disk_bytes": 0}
    assert "output_bytes" not in planned["costs"]
    assert state(source) == before
    assert run("apply", source, *EDIT, "--in-place").exit_code == 0
    # But for how the manifest names the device.
    assert abs((source / UNDO).stat().st_size - planned["costs"]["undo_bytes"]) < 64
    after = state(source)
    assert "SOURCE is that already" in run("plan", source, *EDIT, "--in-place").stdout
    refused(run, source, "plan", source, "--layers", 1, "--in-place", says="leads back from that alone")
    assert state(source) == after


def test_a_preview_refuses_what_would_be_refused(source: Path, run: Run) -> None:
    os.link(source / "model-00001-of-00002.safetensors", source.parent / "another name")
    refused(run, source, "plan", source, *EDIT, "--in-place", says="other names (hard links)")
    refused(run, source, "plan", source, *EDIT, "--in-place", "-o", source.parent / "x", says="--in-place")


def test_an_earlier_output_gets_its_manifest_and_sums_back(source: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    assert run("apply", source, "-o", out, "--digest", "files", *EDIT).exit_code == 0
    (out / "qkpatch.json").chmod(0o600)
    before = state(out)
    assert run("apply", out, "--in-place", "--alpha", "0.5").exit_code == 0
    assert not (out / "SHA256SUMS").exists()
    assert json.loads((out / "qkpatch.json").read_text())["source"]["previous_edit"]["modes"] == 2
    assert run("revert", out, "-o", tmp_path / "restored").exit_code == 0
    assert run("verify", out, "--source", tmp_path / "restored").exit_code == 0
    assert run("revert", out).exit_code == 0
    assert state(out) == before == state(tmp_path / "restored")


def test_the_undo_file_is_never_weights_and_never_published(source: Path, tmp_path: Path, run: Run) -> None:
    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    assert not [
        name for name in state(source) if name.endswith((".safetensors", ".bin", ".pt")) and "undo" in name
    ]
    plan = qkpatch.plan(source)
    assert not [name for name in plan.output.files if "undo" in name]
    assert not [file.name for file in qkpatch.apply(plan, tmp_path / "out").files if "undo" in file.name]
    assert not [name for name in state(tmp_path / "out") if "undo" in name]
    assert run("diff", source, source).exit_code == 0


# -------- kills


def recovered(driver: Driver, place: Path, how: str, original: State, edited: dict[str, Any]) -> None:  # noqa: F811
    """After a kill: the next run, or the way back, leads to one side."""
    if how == "apply":
        end = driver("apply", place, "--in-place", *EDIT, "--quiet")
        assert end.code == 0, end.text
        assert contents(place) == edited
        kept = {"qkpatch.undo.qkpatch.json", "qkpatch.undo.SHA256SUMS"}
        assert {name for name in state(place) if "undo" in name} - kept == {"qkpatch.undo"}
    had_undo = any(name in ("qkpatch.undo", "qkpatch.undo.unfinished") for name in state(place))
    end = driver("revert", place, "--quiet")
    assert end.code == (0 if had_undo else 2), end.text
    assert state(place) == original


def moments(end_at: Callable[[int], int], how_many: int | None) -> list[int]:
    """File operations of a command, all or some of them; ``end_at``: how it ends where it is met at one."""
    low, high = 1, 2048  # the first at which it ends well is one too many
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if end_at(middle) == 0 else (middle + 1, high)
    every = range(1, low)
    # The last ones are those on the disk's side of the undo file.
    return (
        list(every) if how_many is None else sorted({*random.Random(0).sample(every, how_many), *every[-12:]})
    )


MANY = [pytest.param(14, id="some"), pytest.param(None, id="all", marks=pytest.mark.stress)]


@pytest.mark.long
@pytest.mark.parametrize("how_many", MANY)
def test_killed_before_any_file_operation_it_is_finished_or_restored(
    how_many: int | None,
    driver: Driver,  # noqa: F811
    source: Path,
    tmp_path: Path,
) -> None:
    original, command = state(source), ("--in-place", *EDIT, "--quiet")
    whole = fresh(source, tmp_path / "whole")
    assert driver("apply", whole, *command).code == 0
    edited, unfinished, done = contents(whole), 0, 0
    every = moments(lambda n: driver("apply", fresh(source, tmp_path / "try"), *command, at=n).code, how_many)
    for n in every:
        place = fresh(source, tmp_path / "place")
        death = driver("apply", place, *command, at=n)
        assert death.code == -signal.SIGKILL, death.text
        names = {name for name in state(place) if "undo" in name}
        unfinished += "qkpatch.undo.unfinished" in names
        done += "qkpatch.undo" in names
        if not names & {"qkpatch.undo.unfinished", "qkpatch.undo"}:
            assert contents(place) == contents(source)
        recovered(driver, place, "apply" if n % 2 else "revert", original, edited)
    print(f"kills survived: {len(every)}, of these with rows of both sides {unfinished}")
    assert unfinished > 5
    assert done > 0


@pytest.mark.long
@pytest.mark.parametrize("how_many", MANY)
def test_killed_before_any_file_operation_the_way_back_can_be_taken_again(
    how_many: int | None,
    driver: Driver,  # noqa: F811
    source: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    first = tmp_path / "first"
    assert run("apply", source, "-o", first, "--digest", "files", "--alpha", "0.5").exit_code == 0
    original = state(first)
    whole = fresh(first, tmp_path / "whole")
    assert driver("apply", whole, "--in-place", *EDIT, "--quiet").code == 0
    edited = contents(whole)
    every = moments(
        lambda n: driver("revert", fresh(whole, tmp_path / "try"), "--quiet", at=n).code, how_many
    )
    for n in every:
        place = fresh(whole, tmp_path / "place")
        death = driver("revert", place, "--quiet", at=n)
        assert death.code == -signal.SIGKILL, death.text
        if any(name in ("qkpatch.undo", "qkpatch.undo.unfinished") for name in state(place)):
            recovered(driver, place, "apply" if n % 2 else "revert", original, edited)
        assert state(place) == original
    print(f"kills of the way back survived: {len(every)}")


@pytest.mark.long
@pytest.mark.parametrize("how_many", MANY)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_before_any_file_operation_it_is_one_side_or_the_other(
    how_many: int | None,
    driver: Driver,  # noqa: F811
    source: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    command = ("--in-place", *EDIT, "--quiet")
    whole = fresh(source, tmp_path / "whole")
    assert driver("apply", whole, *command).code == 0
    original, edited, restored = state(source), contents(whole), 0
    every = moments(lambda n: driver("apply", fresh(source, tmp_path / "try"), *command, at=n).code, how_many)
    for n in every:
        place = fresh(source, tmp_path / "place")
        end = driver("apply", place, *command, at=n, send=number)
        assert end.code in (0, 128 + number), end.text
        if (place / "qkpatch.undo").exists():
            assert contents(place) == edited
        else:
            restored += 1
            assert end.code != 0
            assert state(place) == original
    assert restored > 5


def test_what_follows_waits_until_what_it_needs_is_on_the_disk(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undo file, its name, rows, manifest, its name: each is synced before the next begins."""
    plan, log = qkpatch.plan(source, heads=[0], layers=range(3), modes=1), []
    names: dict[int, str] = {}
    owners = dict.fromkeys(("open", "pwrite", "rename", "unlink"), os) | {"sync": system}
    originals = {name: getattr(owner, name) for name, owner in owners.items()}

    def told(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = originals[name](*args, **kwargs)
            if name == "open":
                names[result] = Path(path_of(result)).name
            elif name in ("rename", "unlink"):
                log.append((name, *map(str, args)))
            else:
                log.append((name, names.get(args[0], Path(path_of(args[0])).name)))
            return result

        return call

    for name, owner in owners.items():
        monkeypatch.setattr(owner, name, told(name))
    qkpatch.apply_in_place(plan)
    monkeypatch.undo()
    folder, shards = ("sync", "source"), sorted(path.name for path in source.glob("*.safetensors"))
    renamed = log.index(("rename", "qkpatch.undo.part", "qkpatch.undo.unfinished"))
    rows = [i for i, (what, name, *_) in enumerate(log) if what == "pwrite" and name in shards]
    manifest = log.index(("rename", "qkpatch.undo.part", "qkpatch.json"))
    done = log.index(("rename", "qkpatch.undo.unfinished", "qkpatch.undo"))
    assert ("sync", "qkpatch.undo.part") in log[:renamed]
    assert folder in log[renamed : min(rows)]
    assert {("sync", shard) for shard in shards} <= set(log[max(rows) : manifest])
    assert ("sync", "qkpatch.undo.part") in log[max(rows) : manifest]
    assert folder in log[manifest:done]
    assert folder in log[done:]


# -------- faults


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_disk_that_refuses_rows_leaves_source_as_it_was(
    after: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(source)
    fill_disk(monkeypatch, after + 1, ".safetensors")
    with pytest.raises(FileSystemError, match="No space left"):
        qkpatch.apply_in_place(qkpatch.plan(source))
    monkeypatch.undo()
    assert state(source) == before


@pytest.mark.parametrize("at", range(1, 40, 6))
def test_a_full_disk_leaves_nothing(at: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, left = state(source), fill_disk(monkeypatch, at)
    try:
        qkpatch.apply_in_place(qkpatch.plan(source))
    except FileSystemError:
        monkeypatch.undo()
        assert state(source) == before
    else:
        assert left() > 0


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_on_a_real_disk_that_is_full_source_stays_as_it_was(kind: str, tmp_path: Path, run: Run) -> None:
    """Where blocks are copied on writing, rows that are overwritten take new ones, and so does the way back."""
    source = build_tiny(tmp_path / "big", n_heads=16, n_kv_heads=4, d_head=16, d_model=256).path
    with disk(128 if kind == "btrfs" else 8, kind) as place:
        there, refusals = fresh(source, place / "there"), 0
        before = state(there)
        for spare in (0, 300_000, 700_000, 1_000_000, 4_000_000):
            with suppress(OSError), (place / "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(os.urandom(1 << 16))
            os.truncate(place / "ballast", max(0, (place / "ballast").stat().st_size - spare))
            commit(place)
            result = run("apply", there, "--in-place", "--layers", "0-2")
            (place / "ballast").unlink()
            commit(place)
            if result.exit_code:
                assert result.exit_code == 4, result.output
                refusals += 1
            if result.exit_code == 0 or (there / "qkpatch.undo.unfinished").exists():
                assert result.exit_code == 0 or kind == "btrfs"
                assert run("revert", there).exit_code == 0
            assert state(there) == before
        assert 0 < refusals


def test_a_source_cut_short_is_refused_by_all_that_read_it(
    driver: Driver,  # noqa: F811
    source: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    (source / "qkpatch.undo").rename(source / "qkpatch.undo.unfinished")
    shard = sorted(source.glob("*.safetensors"))[0]
    for arguments in (
        ("apply", source, "-o", tmp_path / "out"),
        ("plan", source),
        ("inspect", source),
        ("inspect", shard),
        ("diff", source, source),
        ("verify", source, "--source", source),
        ("recipes", "check", source),
    ):
        result = run(*arguments)
        assert result.exit_code == 3, (arguments, result.output)
        assert "cut short" in result.stderr
        assert "qkpatch revert" in result.stderr


# -------- what is refused


def refused(run: Run, source: Path, *arguments: object, says: str = "", code: int = 2) -> None:
    before = state(source)
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert says in result.stderr, result.stderr
    assert "try " in result.stderr
    assert state(source) == before


def test_files_that_others_share_or_nobody_may_write_are_refused(
    source: Path, tmp_path: Path, run: Run
) -> None:
    shard = sorted(source.glob("*.safetensors"))[0]
    apply = ("apply", source, "--in-place", *EDIT)
    os.link(shard, tmp_path / "other")
    refused(run, source, *apply, says="hard links")
    (tmp_path / "other").unlink()
    shard.chmod(0o444)
    refused(run, source, *apply, says="read-only")
    shard.chmod(0o644)
    shard.rename(source / "renamed")
    shard.symlink_to("renamed")
    refused(run, source, *apply, says="a link")
    (source / "renamed").rename(tmp_path / "outside")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside")
    refused(run, source, *apply, says="leads out of it by a link")
    shard.unlink()
    (tmp_path / "outside").rename(shard)
    (tmp_path / "notes").write_text("notes")
    (source / "notes").symlink_to(tmp_path / "notes")
    refused(run, source, *apply, says="leads out of it by a link")
    (source / "notes").unlink()
    assert run(*apply).exit_code == 0
    os.link(shard, tmp_path / "other")
    refused(run, source, "revert", source, says="hard links")


@pytest.mark.parametrize(
    "flags",
    [
        ("-o", "out"),
        ("--max-shard-size", "1KB"),
        ("--exclude", "*.txt"),
        ("--link",),
        ("--link-cache",),
        ("--resume",),
        ("--overwrite",),
        ("--overwrite", "--force"),
        ("--digest", "files"),
        ("--push", "me/name"),
        ("--no-cache",),
        ("--patch-only",),
    ],
)
def test_flags_of_a_copy_are_refused(flags: tuple[str, ...], source: Path, run: Run) -> None:
    refused(run, source, "apply", source, "--in-place", *flags)


def test_other_places_are_refused(source: Path, tiny: Tiny, run: Run) -> None:
    refused(run, source, "apply", tiny.path / "model.safetensors", "--in-place", says="one file")
    (source / "model.safetensors.index.json").unlink()
    refused(run, source, "apply", source, "--in-place", says="index")
    refused(run, source, "revert", source, says="there is no qkpatch.undo")
    refused(run, source, "revert", source / "nothing", code=4)


def test_a_snapshot_in_the_hub_cache_is_refused(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    place.parent.mkdir(parents=True)
    shutil.copytree(source, place)
    result = run("apply", place, "--in-place")
    assert result.exit_code == 2, result.output
    assert "Hub cache" in result.stderr
    assert state(place) == state(source)


def test_two_runs_at_once_are_refused(source: Path, run: Run) -> None:
    fd = os.open(source, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for command in (("apply", source, "--in-place"), ("revert", source)):
        refused(run, source, *command, says="another qkpatch")
    os.close(fd)
    assert run("apply", source, "--in-place").exit_code == 0


def test_rows_that_somebody_changed_since_are_not_taken_back(source: Path, tmp_path: Path, run: Run) -> None:
    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    edit = json.loads((source / "qkpatch.json").read_text())["edits"][0]
    with (source / edit["shard"]).open("r+b") as file:
        file.seek(edit["byte_range"][0])
        file.write(b"\1\2")
    refused(run, source, "revert", source, says="somebody has changed")
    refused(run, source, "revert", source, "-o", tmp_path / "out", says="somebody has changed")
    refused(run, source, "apply", source, "--in-place", *EDIT, says="somebody has changed")
    assert not (tmp_path / "out").exists()


def test_what_else_changed_since_is_told_and_kept(source: Path, tmp_path: Path, run: Run) -> None:
    """Done already is what was computed from what is there now; and no former time is set over a later change."""
    before = state(source)
    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    key = next(
        ref
        for name, ref in qkpatch.plan(source).model.checkpoint.tensors.items()
        if "layers.1" in name and "k_proj" in name
    )
    shard = source / key.shard
    with shard.open("r+b") as file:
        file.seek(key.begin)
        file.write(b"\1\2")
    changed, time = shard.read_bytes(), shard.stat().st_mtime_ns
    refused(
        run,
        source,
        "apply",
        source,
        "--in-place",
        *EDIT,
        says="what its edit in place was computed from has changed",
    )
    copy = run("revert", source, "-o", tmp_path / "copy")
    assert copy.exit_code == 0, copy.output
    result = run("revert", source)
    assert result.exit_code == 0, result.output
    for said in (copy, result):
        assert f"but for what changed since, by the time of {key.shard}" in said.output, said.output
    assert shard.stat().st_mtime_ns >= time
    wanted = bytearray(before[key.shard][2])
    wanted[key.begin : key.begin + 2] = changed[key.begin : key.begin + 2]
    assert shard.read_bytes() == wanted
    assert (tmp_path / "copy" / key.shard).read_bytes() == wanted
    assert {name for name, (_, _, raw) in state(source).items() if raw != before[name][2]} == {key.shard}


def test_a_config_changed_since_is_told(source: Path, run: Run) -> None:
    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    with (source / "config.json").open("a") as file:
        file.write(" ")
    refused(run, source, "apply", source, "--in-place", *EDIT, says="config.json")
    result = run("revert", source)
    assert result.exit_code == 0, result.output
    assert "but for what changed since, by the time of config.json" in result.output


@pytest.mark.long
def test_a_way_back_cut_short_keeps_the_time_of_a_later_change(
    driver: Driver,  # noqa: F811
    source: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    before = state(source)
    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    shard = sorted(source.glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 10**18))
    former = {name: of[1] for name, of in before.items() if name.endswith(".safetensors")}
    command = ("revert", tmp_path / "try", "--quiet")
    for n in moments(lambda n: driver(*command, at=fresh(source, tmp_path / "try") and n).code, 3)[::4]:
        place = fresh(source, tmp_path / "place")
        assert driver("revert", place, "--quiet", at=n).code == -signal.SIGKILL
        if any("undo" in name for name in state(place)):
            assert driver("revert", place, "--quiet").code == 0
        after = state(place)
        assert {name: of[2] for name, of in after.items()} == {name: of[2] for name, of in before.items()}
        assert not [name for name in former if after[name][1] == former[name]]


def test_a_plan_made_before_is_done_already_or_told_what_is_missing(source: Path) -> None:
    plan = qkpatch.plan(source, layers=1, modes=2)
    qkpatch.apply_in_place(plan)
    assert qkpatch.apply_in_place(plan).run.already_done
    (source / "qkpatch.json").unlink()
    for again in (plan, qkpatch.plan(source, layers=1, modes=2)):
        with pytest.raises(FileSystemError, match="No such file") as caught:
            qkpatch.apply_in_place(again)
        assert str(caught.value.where).endswith("qkpatch.json")
    qkpatch.revert(source)


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "patch"])
def test_what_is_called_as_an_undo_file_and_is_none_is_told(
    kind: str, source: Path, tmp_path: Path, run: Run
) -> None:
    undo = source / "qkpatch.undo"
    make = {
        "folder": undo.mkdir,
        "link": lambda: undo.symlink_to("config.json"),
        "pipe": lambda: os.mkfifo(undo),
    }
    made = make.get(
        kind, lambda: qkpatch.make_patch(qkpatch.plan(source), tmp_path / "edit.qkpatch").rename(undo)
    )
    made()
    for command in (("apply", source, "--in-place", *EDIT), ("revert", source)):
        refused(run, source, *command, says="no undo file of an edit in place")


def test_a_restored_copy_is_refused_where_something_is(source: Path, tmp_path: Path, run: Run) -> None:
    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    (tmp_path / "there").mkdir()
    refused(run, source, "revert", source, "-o", tmp_path / "there", says="exists already")
    refused(run, source, "revert", source, "-o", source / "inside", says="lies in SOURCE")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_undo_file_is_refused(damage: str, source: Path, run: Run) -> None:
    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    undo = source / "qkpatch.undo"
    raw = bytearray(undo.read_bytes())
    raw[-5] ^= 1
    undo.write_bytes({"cut": raw[:-100], "flipped": raw, "empty": b"", "other": b"{}" * 100}[damage])
    refused(run, source, "revert", source, says="damaged", code=3)
    result = run("apply", source, "--in-place", *EDIT)
    assert (result.exit_code, "the way back is lost" in result.stderr) == (3, True), result.output
    assert "--patch-only" not in result.stderr


@pytest.mark.parametrize("forgery", ["a row less", "a row more", "late", "early", "outside", "nowhere"])
def test_a_forged_undo_file_is_refused(forgery: str, source: Path, run: Run) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    assert run("apply", source, "--in-place", *EDIT).exit_code == 0
    undo, shard = source / "qkpatch.undo", sorted(source.glob("*.safetensors"))[0].name
    with safe_open(undo, framework="pt") as file:
        said = dict(file.metadata())
    tensors, record = load_file(undo), json.loads(said["record"])
    if forgery == "a row less":
        tensors.pop(next(iter(tensors)))
    elif forgery == "a row more":
        record["digests"].pop(next(iter(tensors)))
    else:
        times = {"late": {shard: [10**30, 0]}, "early": {shard: [0, -(10**30)]}, "outside": {"../a": [0, 0]}}
        record["former"] |= times.get(forgery, {"a\0b": [0, 0]})
    save_file(tensors, undo, {**said, "record": json.dumps(record)})
    refused(run, source, "revert", source, says="the way back is lost", code=3)


def test_an_edit_that_fails_leaves_source_as_it_was(tmp_path: Path, run: Run) -> None:
    import torch

    source = build_tiny(
        tmp_path / "nan", extra={"model.layers.1.self_attn.q_proj.weight": torch.full((32, 24), torch.nan)}
    )
    refused(run, source.path, "apply", source.path, "--in-place", "--layers", "0-2", says="NaN", code=3)


def test_the_api_refuses_what_the_command_does(source: Path) -> None:
    with pytest.raises(UsageError, match="max-shard-size"):
        qkpatch.apply_in_place(qkpatch.plan(source, max_shard_size="1KB"))
    with pytest.raises(UsageError, match="exclude"):
        qkpatch.apply_in_place(qkpatch.plan(source, exclude="*.txt"))
    with pytest.raises(UsageError, match="copy"):
        qkpatch.apply_in_place(qkpatch.plan(source), digest="files")  # type: ignore[arg-type]
