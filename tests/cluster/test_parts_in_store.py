"""One OUT in a store by several machines: what a single one would have written there, or a clear refusal."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny_folder
from s3_server import upload

import qkpatch
from qkpatch.checkpoint.names import CLAIM
from qkpatch.errors import CheckpointError, QKPatchError, StoreError, UsageError
from qkpatch.stores import store
from qkpatch.stores.store import Store, open_store
from qkpatch.stores.url import StoreUrl
from qkpatch.uploads import claim

EDIT: dict[str, Any] = {"layers": "0-1", "modes": 2}
SHARDS = [["layers.0.", "embed"], ["layers.1."], ["layers.2."]]
QUERIES_APART = [["k_proj"], ["q_proj"], [""]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = build_tiny_folder(tmp_path / "tiny", shards=SHARDS)
    (path / "empty.txt").write_bytes(b"")
    return path


@pytest.fixture(params=["memory", "s3", "gs", "az"])
def anywhere(request: pytest.FixtureRequest, reached: Callable[[str], str], tmp_path: Path) -> str:
    return f"{reached(request.param)}/{tmp_path.name}"


def at(url: str) -> Store:
    parsed = StoreUrl.parse(url)
    assert parsed is not None
    return open_store(parsed)


def objects_of(url: str) -> dict[str, bytes | None]:
    return {name: at(url).read(name) for name in at(url).listing()}


def without_run(files: dict[str, bytes | None]) -> dict[str, Any]:
    said: dict[str, Any] = {**files, "qkpatch.json": json.loads(files["qkpatch.json"] or b"")}
    del said["qkpatch.json"]["run"]
    said.pop("SHA256SUMS", None)  # has the digest of the manifest, and so of the run's time
    return said


def write(source: Path | str, out: str, count: int, *numbers: int, **how: Any) -> None:
    edit = {**EDIT, **how.pop("edit", {})}
    for number in numbers or range(1, count + 1):
        qkpatch.apply(qkpatch.plan(source, **edit), out, part=(number, count), threads=1, **how)


@pytest.mark.parametrize(
    ("edit", "how", "count"),
    [
        ({}, {}, 1),
        ({}, {"digest": "files"}, 2),
        ({"max_shard_size": 2000}, {}, 4),
        ({}, {"digest": "none"}, 12),
    ],
    ids=["1 part", "files", "resharded", "more parts than files"],
)
def test_what_parts_write_is_what_a_single_run_does(
    edit: dict[str, Any], how: dict[str, Any], count: int, folder: Path, anywhere: str
) -> None:
    qkpatch.apply(qkpatch.plan(folder, **EDIT, **edit), f"{anywhere}/one", **how)
    out = f"{anywhere}/out"
    write(folder, out, count, edit=edit, **how)
    assert not objects_of(out)
    made = qkpatch.finish(out)
    assert without_run(objects_of(out)) == without_run(objects_of(f"{anywhere}/one"))
    assert objects_of(out)["qkpatch.json"] == made.dumps().encode()
    assert {name.partition("/")[0] for name in objects_of(anywhere)} == {"one", "out"}
    assert qkpatch.verify(out, folder).ok
    before = at(out).listing()
    assert qkpatch.finish(out).run.already_done
    assert at(out).listing() == before
    if how.get("digest") != "none":
        plan = qkpatch.plan(folder, **EDIT, **edit)
        assert qkpatch.apply(plan, out, part=(1, count), **how).run.already_done


@pytest.mark.parametrize("shards", [SHARDS, QUERIES_APART], ids=["by layer", "queries apart"])
def test_source_may_be_in_a_store_too(shards: list[list[str]], anywhere: str, tmp_path: Path) -> None:
    folder = build_tiny_folder(tmp_path / "tiny", shards=shards)
    source = upload(folder, anywhere.partition("://")[2].partition("/")[0], f"{tmp_path.name}/in",
                    anywhere.partition(":")[0])  # fmt: skip
    qkpatch.apply(qkpatch.plan(source, **EDIT), f"{anywhere}/one")
    for out in (f"{anywhere}/out", str(tmp_path / "out")):
        write(source, out, 2)
        qkpatch.finish(out)
        assert qkpatch.verify(out, folder).ok
        found = without_run(objects_of(out) if "://" in out else {
            path.relative_to(out).as_posix(): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()
        })  # fmt: skip
        assert found == without_run(objects_of(f"{anywhere}/one"))


def test_what_is_missing_foreign_or_damaged_is_refused_and_made_anew(folder: Path, anywhere: str) -> None:
    out, parts = f"{anywhere}/out", f"{anywhere}/.out.qkpatch-parts"
    with pytest.raises(UsageError, match="no part of an OUT was written there"):
        qkpatch.finish(out)
    write(folder, out, 3, 1, 3)
    with pytest.raises(UsageError, match="of its 3 parts these are not done: 2"):
        qkpatch.finish(out)
    for other in ({"edit": {"modes": 1}}, {"digest": "files"}):
        with pytest.raises(UsageError, match="the parts that are there are of another"):
            write(folder, out, 3, 2, **other)
    write(folder, out, 3, 2)
    name = next(name for name in at(parts).listing() if name.endswith(".safetensors"))
    raw = at(parts).read(name) or b""
    at(parts).put(name, raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"part {name[0]}/3 is not as it was left") as told:
        qkpatch.finish(out)
    assert told.value.fix == f"run it again: --part {name[0]}/3"
    assert not objects_of(out)
    write(folder, out, 3, int(name[0]))
    at(parts).put("2/more.txt", b"more")
    with pytest.raises(CheckpointError, match=r"more\.txt came from elsewhere"):
        qkpatch.finish(out)
    write(folder, out, 3, 2)
    at(out).put("mine.txt", b"mine")
    with pytest.raises(UsageError, match="qkpatch did not write this"):
        qkpatch.finish(out)
    at(out).remove(["mine.txt"])
    qkpatch.finish(out)
    assert qkpatch.verify(out, folder).ok


def test_what_no_part_can_be_of_is_refused_before_anything_is_written(folder: Path, anywhere: str) -> None:
    plan, bucket = qkpatch.plan(folder, **EDIT), anywhere.rpartition("/")[0]
    for out, how, said in (
        (bucket, {}, "beside a bucket there is none"),
        (f"{anywhere}/out", {"overwrite": True}, "not there yet"),
        (f"{anywhere}/out", {"link": True}, "a store has no links"),
        ("https://host/out", {}, "half written"),
    ):
        with pytest.raises(UsageError, match=said):
            qkpatch.apply(plan, out, part=(1, 2), **how)
    assert not objects_of(anywhere)


class Killed(BaseException):
    """As a signal that nobody hears: nothing is cleared up."""


@pytest.mark.parametrize(
    "anywhere",
    ["memory", *(pytest.param(name, marks=pytest.mark.long) for name in ("s3", "gs", "az"))],
    indirect=True,
)
@pytest.mark.parametrize("step", range(4))
def test_any_part_and_finish_may_die_at_any_call(
    step: int, folder: Path, anywhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_NOTED", 1)
    out, calls, last = f"{anywhere}/out", 0, 0
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    changing = {name: getattr(Store, name) for name in ("put", "remove", "assemble")}

    def dies(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **how: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= last:  # dead for good
                raise Killed
            return changing[name](*arguments, **how)

        return call

    for call_of_death in range(1 + step, 400, 4):
        last = call_of_death
        for name in changing:
            monkeypatch.setattr(Store, name, dies(name))
        calls = 0
        try:
            write(folder, out, 2)
            qkpatch.finish(out)
            is_killed = False
        except Killed:
            is_killed = True
        for name, call in changing.items():
            monkeypatch.setattr(Store, name, call)
        found = objects_of(out)
        if "qkpatch.json" in found:
            assert qkpatch.verify(out, folder).ok
        elif found:
            assert CLAIM in found
            assert "config.json" not in found or names <= {*found}
        for number in (2, 1):  # those that are done say so
            write(folder, out, 2, number)
        qkpatch.finish(out)
        assert qkpatch.verify(out, folder).ok
        assert {name.partition("/")[0] for name in objects_of(anywhere)} == {"out"}
        at(out).remove(objects_of(out))
        if not is_killed:
            break
    else:
        raise AssertionError("it never came to an end")


def test_two_that_finish_at_once_leave_one_whole_out(folder: Path, anywhere: str) -> None:
    out, ends = f"{anywhere}/out", list[Exception | None]()
    write(folder, out, 2)

    def finish() -> None:
        try:
            qkpatch.finish(out)
            ends.append(None)
        except QKPatchError as error:
            ends.append(error)

    threads = [threading.Thread(target=finish) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(error, StoreError | UsageError | CheckpointError) for error in ends if error)
    qkpatch.finish(out)
    assert qkpatch.verify(out, folder).ok


def test_the_command_line_takes_urls(
    folder: Path, tmp_path: Path, run: Callable[..., Any], reached: Callable[[str], str]
) -> None:
    out = f"{reached('s3')}/{tmp_path.name}/out"
    for part in ("1/2", "2/2"):
        done = run("apply", folder, "--layers", "0-1", "-o", out, "--part", part)
        assert done.exit_code == 0, done.output
        assert f"qkpatch finish {out}" in done.output
    done = run("finish", out)
    assert done.exit_code == 0, done.output
    assert f"Wrote {out}" in done.output
    assert run("verify", out, "--source", folder).exit_code == 0
