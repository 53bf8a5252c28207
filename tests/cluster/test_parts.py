"""One OUT by several machines: what a single one would have written, or a clear refusal; nothing half published."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from fake_hub import FakeHub, Repo, hub_environment, run_qkpatch
from safetensors.torch import load_file, save_file
from typer.testing import Result

import qkpatch
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.cluster.place import place_of
from qkpatch.cluster.share import check_part, share_of
from qkpatch.common.part import Part, parse_part
from qkpatch.errors import CheckpointError, FileSystemError, QKPatchError, UsageError
from qkpatch.output import staging
from qkpatch.output.options import Writing
from qkpatch.patching.edit_heads import Editor
from qkpatch.planning.plan import EditPlan

LAYERS_APART = [[f"layers.{n}."] for n in range(4)] + [[""]]
QUERIES_APART = [["k_proj"], ["q_proj"], [""]]
EDIT: dict[str, Any] = {"layers": "0-2", "modes": 2}
Run = Callable[..., Result]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five shards, three of which an edit writes to; a file and a folder beside them, and an empty folder."""
    path = build_tiny(tmp_path / "source", n_layers=4, shards=LAYERS_APART).path
    (path / "sub" / "empty").mkdir(parents=True)
    (path / "sub").chmod(0o750)
    (path / "sub" / "notes.txt").write_text("notes")
    (path / "run.sh").write_text("true")
    (path / "run.sh").chmod(0o755)
    return path


def whole(out: Path) -> dict[str, Any]:
    """All of an output, with modes; of its manifest, and what the manifest's digest is in, all but the run block."""
    found: dict[str, Any] = {
        p.relative_to(out).as_posix(): (p.lstat().st_mode, p.read_bytes() if p.is_file() else None)
        for p in out.rglob("*")
    }
    found["qkpatch.json"] = {**json.loads(found["qkpatch.json"][1]), "run": None}
    if "SHA256SUMS" in found:
        found["SHA256SUMS"] = [
            line for line in found["SHA256SUMS"][1].splitlines() if b"qkpatch.json" not in line
        ]
    return {**found, ".": out.stat().st_mode}


def write(plan: EditPlan, out: Path, count: int, only: Iterable[int] | None = None, **how: Any) -> None:
    for number in only or range(1, count + 1):
        qkpatch.apply(plan, out, part=(number, count), threads=1, **how)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def replace_fused(path: Path) -> None:
    """A phi3 in two shards of the tiny llama's numbers: fused projections."""
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    tensors = {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in path.glob("model*"):
        file.unlink()
    for layer in range(4):
        stem = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{stem}{which}_proj.weight") for which in "qkv"]
        tensors[f"{stem}qkv_proj.weight"] = torch.cat(parts)
    weight_map = {name: f"model-{1 + ('.1.' in name)}.safetensors" for name in tensors}
    for file_name in set(weight_map.values()):
        chosen = {name: t for name, t in tensors.items() if weight_map[name] == file_name}
        save_file(chosen, path / file_name, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# -------- the same as a single machine


@pytest.mark.parametrize(
    ("edit", "how", "count"),
    [
        ({}, {}, 1),
        ({}, {}, 3),
        ({}, {"digest": "files"}, 2),
        ({}, {"digest": "none", "link": True}, 2),
        ({"max_shard_size": 3000}, {}, 4),
        ({"edits": [{"layers": "0", "energy": 0.4}, {"layers": "1-3", "select": "random"}]}, {}, 12),
        ({"alpha": 1.0}, {}, 2),
    ],
    ids=["1 part", "3 parts", "files", "links", "resharded", "energy, more parts than files", "no-op"],
)
def test_bytes_and_manifest_are_those_of_a_single_run(
    source: Path, tmp_path: Path, edit: dict[str, Any], how: dict[str, Any], count: int
) -> None:
    plan = qkpatch.plan(source, **(edit if "edits" in edit else EDIT | edit))
    single = qkpatch.apply(plan, tmp_path / "one", threads=1, **how)
    out = tmp_path / "out"
    write(qkpatch.plan(source, plan.request), out, count, **how)
    assert not out.exists()
    joined = qkpatch.finish(out)
    assert whole(out) == whole(tmp_path / "one")
    assert joined == single
    assert sum(joined.run.copied_by.values()) == len(single.files)  # type: ignore[union-attr]
    assert hidden(tmp_path) == []
    assert qkpatch.verify(out, source).ok


@pytest.mark.parametrize(
    "layout",
    ["fused", "queries apart from keys", pytest.param("scales apart from codes", marks=pytest.mark.stress)],
)
def test_a_part_reads_of_source_what_its_edits_need(tmp_path: Path, layout: str) -> None:
    source = build_tiny(tmp_path / "source", n_layers=4, shards=QUERIES_APART).path
    edit = EDIT
    if layout == "fused":
        replace_fused(source)
    elif layout == "scales apart from codes":
        from test_fp8 import build

        source, edit = tmp_path / "fp8", {"layers": "1", "modes": 2}
        build(source, apart=True)
    plan = qkpatch.plan(source, **edit)
    qkpatch.apply(plan, tmp_path / "one", threads=1)
    write(plan, tmp_path / "out", 2)
    qkpatch.finish(tmp_path / "out")
    assert whole(tmp_path / "out") == whole(tmp_path / "one")


def test_rows_of_a_patch_file_are_written_in_parts_too(source: Path, tmp_path: Path) -> None:
    patch = qkpatch.make_patch(qkpatch.plan(source, **EDIT), tmp_path / "rows.qkpatch", threads=1)
    plan = qkpatch.plan(source, patch=patch)
    qkpatch.apply(plan, tmp_path / "one")
    write(plan, tmp_path / "out", 2)
    qkpatch.finish(tmp_path / "out")
    assert whole(tmp_path / "out") == whole(tmp_path / "one")


@pytest.mark.long
def test_each_machine_may_have_a_hub_cache_of_its_own(source: Path, tmp_path: Path, hub: FakeHub) -> None:
    hub.repos["org/name"] = Repo(source)

    def run(machine: str, *arguments: object) -> None:
        environment = hub_environment(hub.endpoint, tmp_path / machine)
        done = run_qkpatch(environment, "apply", "org/name", "--layers", "0-2", "--quiet", *arguments)
        assert done.returncode == 0, done.stderr

    run("a", "-o", tmp_path / "one")
    for machine, part in (("b", "1/2"), ("c", "2/2")):
        run(machine, "-o", tmp_path / "out", "--part", part)
    qkpatch.finish(tmp_path / "out")
    assert whole(tmp_path / "out") == whole(tmp_path / "one")
    assert whole(tmp_path / "out")["qkpatch.json"]["source"]["checked"]
    with pytest.raises(UsageError, match="so SOURCE must be in a store, or on a disk") as told:
        check_part((1, 2), Writing(), straight="hub")
    assert (told.value.where, told.value.fix) == ("--no-cache", "leave it out")


# -------- shares


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_shares_are_apart_and_together_all_and_even(source: Path, count: int) -> None:
    plan = qkpatch.plan(source, **EDIT)
    shares = [share_of(plan, Part(number, count)) for number in range(1, count + 1)]
    assert sorted(name for share in shares for name in share.output.files) == [*plan.output.files]
    assert sorted(e.layer for share in shares for e in share.edits) == [e.layer for e in plan.edits]
    for share in shares:
        assert share.edits_by_file.keys() <= share.output.files.keys()
    n_edits, sizes = [len(share.edits) for share in shares], [share.output_bytes for share in shares]
    assert max(n_edits) - min(n_edits) <= 1
    largest = max(file.size for file in plan.output.files.values())
    assert max(sizes) - min(sizes) <= largest


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        ("3/8", {}, (3, 8)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "4"}, (1, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, (4, 4)),
        ("auto/4", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        ("auto", {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}, (2, 2)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "7"}, (8, 8)),
        ("auto", {"JOB_COMPLETION_INDEX": "7"}, "of how many"),
        ("auto/7", {"JOB_COMPLETION_INDEX": "7"}, "no part 8 of 7"),
        # One task of eight, submitted again by itself.
        ("auto/8", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "1"},
         "SLURM_ARRAY_TASK_COUNT is 1"),
        ("auto", {}, "no variable of a scheduler"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_COUNT is ''"),
        ("auto", {"JOB_COMPLETION_INDEX": "0", "SKYPILOT_NODE_RANK": "0"}, "and"),
        ("0/0", {}, "no part 0 of 0"),
        ("3/2", {}, "no part 3 of 2"),
        ("0/2", {}, "no part 0 of 2"),
        ("1/99999", {}, "no part 1 of 99999"),
        ("3", {}, "is no part"),
        ("-1/2", {}, "is no part"),
        ("٣/٨", {}, "is no part"),
    ],
)  # fmt: skip
def test_which_part_is_said_outright_or_by_the_scheduler(
    text: str, environment: dict[str, str], part: tuple[int, int] | str
) -> None:
    if isinstance(part, tuple):
        assert parse_part(text, environment) == part
        return
    with pytest.raises(UsageError, match=part):
        parse_part(text, environment)


# -------- what is refused


def rewrite(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = source / "model-00005-of-00005.safetensors"
    data, times = bytearray(shard.read_bytes()), shard.stat()
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def other_stack(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Editor, "stack", {"torch": "1", "blas": "other", "cpu": "other"})


def test_cards_of_two_kinds_are_two_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = [Editor(torch.device("cpu")).stack]
    for card in ("H200", "L4"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, card=card: card)
        stacks.append(Editor(torch.device("cuda")).stack)
    assert [stack.get("card") for stack in stacks] == [None, "H200", "L4"]
    assert stacks[0] == {key: value for key, value in stacks[1].items() if key != "card"}


def other_version(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = Editor(torch.device("cpu")).tool
    monkeypatch.setattr(Editor, "tool", replace(tool, version="9"))


@pytest.mark.parametrize(
    ("edit", "how", "count", "change", "said"),
    [
        ({"alpha": 0.5}, {}, 2, None, "another edit"),
        ({}, {}, 3, None, "another number of parts"),
        ({}, {"digest": "files"}, 2, None, "--digest"),
        ({"max_shard_size": 3000}, {}, 2, None, "--max-shard-size"),
        ({}, {}, 2, rewrite, "other files of SOURCE"),
        ({}, {}, 2, other_stack, "another CPU"),
        ({}, {}, 2, other_version, "another version"),
    ],
    ids=["alpha", "count", "digest", "shards", "source", "stack", "version"],
)
def test_parts_of_different_plans_in_one_place_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    edit: dict[str, Any], how: dict[str, Any], count: int, change: Any, said: str,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    write(qkpatch.plan(source, **EDIT), out, 2, [1])
    before = {p: p.stat().st_mtime_ns for p in place_of(out).rglob("*")}
    if change is not None:
        change(source, monkeypatch)
    with pytest.raises(UsageError, match=said):
        qkpatch.apply(qkpatch.plan(source, **EDIT | edit), out, part=(2, count), threads=1, **how)
    assert {p: p.stat().st_mtime_ns for p in place_of(out).rglob("*")} == before


@pytest.mark.parametrize(
    ("how", "said"),
    [({"part": (3, 2)}, "no part 3 of 2"), ({"part": (0, 0)}, "no part"), ({"part": (1.0, 2)}, "is no part"),
     ({"part": (1, 2), "overwrite": True}, "--overwrite")],
)  # fmt: skip
def test_a_part_that_cannot_be_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, how: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        qkpatch.apply(qkpatch.plan(source, **EDIT), tmp_path / "out", **how)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "flags",
    [("--part", "1/2", "--push", "me/x"), ("--part", "1/2", "--dry-run"), ("--part", "1/2", "--in-place"),
     ("--part", "1/2", "--patch-only"), ("--part", "1/2", "--overwrite"), ("--ray", "local"),
     ("--ray", "local", "--part", "1/2")],
    ids=" ".join,
)  # fmt: skip
def test_flags_that_do_not_go_with_parts_are_refused(
    source: Path, tmp_path: Path, run: Run, flags: tuple[str, ...]
) -> None:
    out = () if "--in-place" in flags else ("-o", tmp_path / "out")
    assert run("apply", source, *out, *flags).exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_missing_is_named_and_what_is_done_is_told(source: Path, tmp_path: Path, run: Run) -> None:
    out, edit = tmp_path / "out", ("--layers", "0-2", "--threads", 1)
    for nothing in (out, source):
        told = " ".join(run("finish", nothing).stderr.split())
        assert "no part of an OUT was written there" in told
        assert "what ends a sweep, or an evaluation, is its own command" in told
    for number in (1, 3, 3):
        assert run("apply", source, "-o", out, *edit, "--part", f"{number}/4").exit_code == 0
    result = run("finish", out)
    assert result.exit_code == 2
    assert "of its 4 parts these are not done: 2,4" in result.stderr
    assert not out.exists()
    for number in (2, 4):
        result = run("apply", source, "-o", out, *edit, "--part", f"{number}/4")
        assert f"Wrote part {number}/4" in result.stdout
        assert f"qkpatch finish {out}" in result.stdout
    assert "Already done: part 4/4" in run("apply", source, "-o", out, *edit, "--part", "4/4").stdout
    assert f"Wrote {out}" in run("finish", out).stdout
    done = whole(out)
    assert f"Already done: {out}" in run("finish", out).stdout
    assert "Already done" in run("apply", source, "-o", out, *edit, "--part", "2/4").stdout
    assert run("apply", source, "-o", out, *edit, "--part", "2/4", "--alpha", 0).exit_code == 2
    assert whole(out) == done
    assert hidden(tmp_path) == []


# -------- what was tampered with


def flip(part: Path) -> None:
    """A bit of an edited tensor, under its former times."""
    shard = next(iter(sorted(part.glob("*.safetensors"))))
    data, times = bytearray(shard.read_bytes()), shard.stat()
    data[-1 - len(data) // 2] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def add(part: Path) -> None:
    (part / "more.bin").write_bytes(b"more")


def drop(part: Path) -> None:
    next(part.glob("*.safetensors")).unlink()


def link_file(part: Path) -> None:
    shard = next(part.glob("*.safetensors"))
    shard.rename(part.parent.parent / "elsewhere")
    shard.symlink_to(part.parent.parent / "elsewhere")


def link_part(part: Path) -> None:
    part.rename(part.parent.parent / "elsewhere")
    part.symlink_to(part.parent.parent / "elsewhere")


def forget(part: Path) -> None:
    (part / "qkpatch.json").unlink()


def spoil(part: Path) -> None:
    (part / "qkpatch.json").write_text("{}")


@pytest.mark.parametrize("harm", [flip, add, drop, link_file, link_part, forget, spoil])
def test_a_part_that_was_tampered_with_is_refused_and_made_anew(
    source: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    plan, out = qkpatch.plan(source, layers="0-2", modes=2), tmp_path / "out"
    qkpatch.apply(plan, tmp_path / "one", threads=1)
    write(plan, out, 2)
    harm(place_of(out) / "2")
    with pytest.raises(QKPatchError) as caught:
        qkpatch.finish(out)
    assert "2" in f"{caught.value.what} {caught.value.where}"
    assert not out.exists()
    assert qkpatch.apply(plan, out, part=(1, 2), threads=1).run.already_done
    assert not qkpatch.apply(plan, out, part=(2, 2), threads=1).run.already_done
    qkpatch.finish(out)
    assert whole(out) == whole(tmp_path / "one")


def test_a_part_that_says_what_no_run_says_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(qkpatch.plan(source, **EDIT), out, 2)
    record = place_of(out) / "2" / "qkpatch.json"
    honest = record.read_text()
    for block, key, value in (
        ("", "warnings", ["all is well"]), ("run", "started", None), ("run", "started", "2099-01-01T00:00:00+00:00"),
        ("run", "finished", None), ("run", "finished", "x"), ("run", "copied_by", None), ("tool", "more", 1),
        ("run", "copied_by", {"none": 99}), ("", "more", 1),
    ):  # fmt: skip
        document = json.loads(honest)
        (document[block] if block else document)[key] = value
        record.write_text(json.dumps(document))
        with pytest.raises(CheckpointError):
            qkpatch.finish(out)
        assert not out.exists()
    record.write_text(honest)
    qkpatch.finish(out)
    assert qkpatch.verify(out, source).ok


@pytest.mark.parametrize("count", [None, "abc", [1], 0, -1, 1.5, 10**9])
def test_how_many_parts_there_are_is_a_number_or_refused(source: Path, tmp_path: Path, count: Any) -> None:
    out = tmp_path / "out"
    write(qkpatch.plan(source, **EDIT), out, 2)
    agreed = place_of(out) / "plan.json"
    document = json.loads(agreed.read_text())
    document["run"]["parts"] = count
    agreed.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="how many parts"):
        qkpatch.finish(out)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["open to others", "another user's", "a link"])
def test_a_shared_directory_that_is_not_ours_alone_is_refused(
    source: Path, tmp_path: Path, kind: str
) -> None:
    plan, out = qkpatch.plan(source, **EDIT), tmp_path / "out"
    write(plan, out, 2, [1])
    place = place_of(out)
    if kind == "open to others":
        place.chmod(0o770)
    elif kind == "a link":
        place.rename(tmp_path / "elsewhere")
        place.symlink_to("elsewhere")
    elif os.geteuid() == 0:
        os.chown(place, 12345, -1)
    else:
        pytest.skip("only root gives files away")
    before = sorted(tmp_path.rglob("*"))
    for call in (lambda: qkpatch.apply(plan, out, part=(2, 2), threads=1), lambda: qkpatch.finish(out)):
        with pytest.raises((FileSystemError, UsageError)):
            call()
    assert sorted(tmp_path.rglob("*")) == before


def test_an_out_that_came_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    plan, out = qkpatch.plan(source, **EDIT), tmp_path / "out"
    write(plan, out, 2)
    qkpatch.apply(qkpatch.plan(source, **EDIT, alpha=0.5), out, threads=1)
    other = whole(out)
    with pytest.raises(UsageError, match="of another plan"):
        qkpatch.finish(out)
    assert whole(out) == other
    shutil.rmtree(out)
    qkpatch.apply(plan, out, threads=1)  # the same, by one machine
    assert qkpatch.finish(out).run.already_done
    assert hidden(tmp_path) == []


# -------- several at once, and what file systems lack


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    ends: list[Any] = [None] * len(calls)

    def call(i: int) -> None:
        try:
            ends[i] = calls[i]()
        except QKPatchError as error:
            ends[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


@pytest.mark.parametrize("has_locks", [True, False])
def test_runs_of_one_part_and_of_finish_at_once_end_as_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    if not has_locks:  # and each run is on a machine of its own
        numbers = iter(f"{n:08x}" for n in range(99))
        monkeypatch.setattr(staging, "_machine", lambda: next(numbers))

        def flock(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    plan, out = qkpatch.plan(source, **EDIT), tmp_path / "out"
    qkpatch.apply(plan, tmp_path / "one", threads=1)
    parts = [(1, 2), (1, 2), (2, 2), (2, 2)]
    ends = at_once(*(lambda part=part: qkpatch.apply(plan, out, part=part, threads=1) for part in parts))
    assert [e for e in ends if isinstance(e, Exception)] == []
    assert sum(not end.run.already_done for end in ends) == 2
    ends = at_once(*(lambda: qkpatch.finish(out) for _ in range(3)))
    assert sum(not isinstance(end, Exception) and not end.run.already_done for end in ends) == 1, ends
    assert whole(out) == whole(tmp_path / "one")
    qkpatch.finish(out)
    assert hidden(tmp_path) == []


def test_where_there_are_no_links_finish_copies(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    plan, out = qkpatch.plan(source, **EDIT), tmp_path / "out"
    qkpatch.apply(plan, tmp_path / "one", threads=1)
    monkeypatch.setattr(Rooted, "link", link)
    write(plan, out, 2)
    qkpatch.finish(out)
    assert whole(out) == whole(tmp_path / "one")


def test_what_a_machine_left_is_gone_on_with_by_itself_alone_and_goes_in_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = qkpatch.plan(source, **EDIT), tmp_path / "out"
    place = place_of(out)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    for machine in ("aaaaaaaa", "bbbbbbbb"):
        with monkeypatch.context() as patched:
            patched.setattr(staging, "_machine", lambda machine=machine: machine)
            patched.setattr(Editor, "edited", dies)
            with pytest.raises(KeyboardInterrupt):
                qkpatch.apply(plan, out, part=(1, 2), threads=1, resume=True)
    left = sorted(path.name[: len(".1.qkpatch-aaaaaaaa")] for path in place.glob(".1.*"))
    if left:  # what was copied before the edit began
        assert set(left) <= {".1.qkpatch-aaaaaaaa", ".1.qkpatch-bbbbbbbb"}
    monkeypatch.setattr(staging, "_machine", lambda: "bbbbbbbb")
    done = qkpatch.apply(plan, out, part=(1, 2), threads=1, resume=True)
    assert not list(place.glob(".1.qkpatch-bbbbbbbb-*"))
    if ".1.qkpatch-bbbbbbbb" in left:
        assert (done.run.copied_by or {}).get("resumed")
    if ".1.qkpatch-aaaaaaaa" in left:
        assert list(place.glob(".1.qkpatch-aaaaaaaa-*"))
    write(plan, out, 2, [2])
    qkpatch.finish(out)
    assert hidden(tmp_path) == []


def test_clocks_that_differ_are_no_matter(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part from tomorrow, and one from a clock that stands at 1980."""
    plan, out = qkpatch.plan(source, **EDIT), tmp_path / "out"
    from qkpatch.patching import apply

    for number, now in ((1, "2999-01-01T00:00:00+00:00"), (2, "1980-01-01T00:00:00+00:00")):
        monkeypatch.setattr(apply, "now", lambda now=now: now)
        write(plan, out, 2, [number])
    assert qkpatch.finish(out).run.started == "1980-01-01T00:00:00+00:00"


def test_tiny_is_one_part_of_work_for_many(tiny: Tiny, tmp_path: Path) -> None:
    """One file is written by one machine, and the others have nothing to do but small files."""
    plan = qkpatch.plan(tiny.path, layers="0")
    write(plan, tmp_path / "out", 3)
    qkpatch.finish(tmp_path / "out")
    assert qkpatch.verify(tmp_path / "out", tiny.path).ok
    with pytest.raises(CheckpointError):
        qkpatch.verify(tiny.path, tiny.path)
