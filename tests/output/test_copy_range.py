"""What is carried over: every file, every byte, by whichever means the kernel offers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from safetensors.torch import load_file
from typer.testing import Result

from qkpatch.checkpoint import files
from qkpatch.checkpoint.files import LocalOpenFile, open_read, write_exact
from qkpatch.errors import FileSystemError
from qkpatch.output.passage import copy_range

IN_KERNEL = [pytest.param(name, marks=pytest.mark.linux) for name in ("copy_file_range", "sendfile")]
DECLINES = ["EXDEV", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EPERM", "nothing copied"]


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def data() -> bytes:
    return random.Random(0).randbytes(300_001)


def copy(tmp_path: Path, data: bytes, size: int | None = None) -> tuple[str, bytes, list[int]]:
    """Copy ``data`` from one file to another: by what means, what arrived, what progress was told."""
    (tmp_path / "source").write_bytes(data)
    told: list[int] = []
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "w+b") as target:
        size = len(data) if size is None else size
        opened = LocalOpenFile(source.fileno(), "source")
        means = copy_range(opened, target.fileno(), 0, size, told.append)
    return means, (tmp_path / "target").read_bytes(), told


def declining(reason: str) -> Callable[..., int]:
    def decline(*args: Any) -> int:
        if reason == "nothing copied":
            return 0
        raise OSError(getattr(errno, reason), reason)

    return decline


def giving_up_after(calls: int, function: Callable[..., int]) -> Callable[..., int]:
    """``function``, a few calls long."""
    left = calls

    def step(*args: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EXDEV, "cross-device")
        return function(*args)

    return step


# -------- copy_range


def test_copying_gives_the_same_bytes(tmp_path: Path, data: bytes) -> None:
    _, copied, told = copy(tmp_path, data)
    assert copied == data
    assert sum(told) == len(data)


def test_copying_nothing_is_possible(tmp_path: Path) -> None:
    assert copy(tmp_path, b"") == ("none", b"", [])


@pytest.mark.linux
@pytest.mark.parametrize("reason", DECLINES)
def test_sendfile_steps_in_where_copy_file_range_declines(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(os, "copy_file_range", declining(reason))
    means, copied, told = copy(tmp_path, data)
    assert (means, copied, sum(told)) == ("sendfile", data, len(data))


@pytest.mark.parametrize("reason", DECLINES)
def test_reading_and_writing_steps_in_where_both_decline(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(os, "copy_file_range", declining(reason), raising=False)
    monkeypatch.setattr(os, "sendfile", declining(reason))
    means, copied, told = copy(tmp_path, data)
    assert (means, copied, sum(told)) == ("read_write", data, len(data))


@pytest.mark.linux
def test_each_means_goes_on_where_the_one_before_gave_up(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qkpatch.output.passage.COPY_CHUNK", 1000)
    monkeypatch.setattr(os, "copy_file_range", giving_up_after(3, os.copy_file_range))
    monkeypatch.setattr(os, "sendfile", giving_up_after(5, os.sendfile))
    means, copied, told = copy(tmp_path, data)
    assert (means, copied) == ("read_write", data)
    assert sum(told) == len(data)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("means", [*IN_KERNEL, "pwrite"])
def test_a_real_error_is_not_taken_for_declining(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, means: str, code: int
) -> None:
    def fail(*args: Any) -> int:
        raise OSError(code, os.strerror(code))

    order = ["copy_file_range", "sendfile", "pwrite"]
    for earlier in order[: order.index(means)]:
        monkeypatch.setattr(os, earlier, declining("EXDEV"), raising=False)
    for later in order[order.index(means) + 1 :]:
        monkeypatch.setattr(os, later, None)  # must not be tried
    monkeypatch.setattr(os, means, fail)
    with pytest.raises(FileSystemError, match=os.strerror(code)):
        copy(tmp_path, data)


@pytest.mark.parametrize("declined", [[], ["copy_file_range"], ["copy_file_range", "sendfile"]])
def test_a_source_that_ends_early_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declined: list[str]
) -> None:
    for means in declined:
        monkeypatch.setattr(os, means, declining("EXDEV"), raising=False)
    with pytest.raises(FileSystemError, match="2 bytes early"):
        copy(tmp_path, b"abc", size=5)


# -------- exact reads and writes


def test_short_reads_are_completed(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(data)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:777]], at))
    with open_read(tmp_path / "file") as file:
        assert file.read(5000, 10) == data[10:5010]


def test_a_read_past_the_end_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with open_read(tmp_path / "file") as file, pytest.raises(FileSystemError, match="4 bytes early"):
        file.read(5, len(data) - 1)


def test_pieces_are_parts_of_one_buffer(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(files, "READ_CHUNK", 1000)
    with open_read(tmp_path / "file") as file:
        pieces = [(bytes(piece), id(piece.obj)) for piece in file.pieces(7, 2507)]
        assert [piece for piece, _ in pieces] == [data[7:1007], data[1007:2007], data[2007:2507]]
        assert len({buffer for _, buffer in pieces}) == 1
        assert list(file.pieces(7, 7)) == []
        assert file.sha256(7, 2507) == hashlib.sha256(data[7:2507]).hexdigest()


def test_short_writes_are_completed(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:777], at))
    with open(tmp_path / "file", "w+b") as file:
        write_exact(file.fileno(), data, 10, "file")
    assert (tmp_path / "file").read_bytes() == bytes(10) + data


def test_short_reads_and_writes_change_nothing_in_the_output(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
    preadv, pread, pwrite = os.preadv, os.pread, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:99]], at))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 99), at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:99], at))
    monkeypatch.setattr(os, "copy_file_range", declining("EXDEV"), raising=False)
    monkeypatch.setattr(os, "sendfile", declining("EXDEV"))
    assert run("apply", tiny.path, "-o", tmp_path / "short").exit_code == 0
    monkeypatch.undo()
    whole, short = contents(tmp_path / "out"), contents(tmp_path / "short")
    _, manifest = whole.pop("qkpatch.json"), json.loads(short.pop("qkpatch.json"))
    assert set(manifest["run"]["copied_by"]) == {"read_write"}
    assert whole == short


# -------- which files


def test_everything_in_source_is_carried_over(tiny: Tiny, tmp_path: Path, run: Callable[..., Result]) -> None:
    source = tiny.path
    names = [
        "modeling_x.py",
        "chat_template.jinja",
        ".hidden",
        "onnx/a/b.txt",
        "space in name",
        "ünïcode",
        "-o",
    ]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"content of {name}")
    (source / "empty" / "nested").mkdir(parents=True)
    (source / "empty.txt").touch()
    expected = contents(source)
    assert run("apply", source, "-o", tmp_path / "out").exit_code == 0
    found = contents(tmp_path / "out")
    assert found.pop("qkpatch.json")
    assert {name for name in expected if expected[name] != found.get(name)} == {"model.safetensors"}
    assert found.keys() == expected.keys()
    assert (tmp_path / "out" / "empty" / "nested").is_dir()
    assert run("verify", tmp_path / "out", "--source", source).exit_code == 0


def test_linked_files_and_folders_become_regular_ones(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    far = tmp_path / "far"
    (far / "folder").mkdir(parents=True)
    (far / "folder" / "file").write_text("x")
    (tiny.path / "model.safetensors").rename(far / "blob")
    (tiny.path / "model.safetensors").symlink_to(far / "blob")
    (tiny.path / "folder").symlink_to(far / "folder")
    before = contents(far)
    assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / "folder" / "file").read_text() == "x"
    assert contents(far) == before


def test_permissions_stay_and_the_owner_may_write(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    (tiny.path / "tool.sh").write_text("#!/bin/sh\n")
    (tiny.path / "tool.sh").chmod(0o555)
    (tiny.path / "config.json").chmod(0o400)
    assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "tool.sh").stat().st_mode & 0o700 == 0o700
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o600


def test_bookkeeping_of_git_and_the_hub_client_stays_behind(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    for name in (".git/HEAD", ".cache/huggingface/download/x.metadata", ".cache/other", "sub/.gitignore"):
        (tiny.path / name).parent.mkdir(parents=True, exist_ok=True)
        (tiny.path / name).write_text("x")
    assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
    found = contents(tmp_path / "out").keys()
    assert {name for name in found if "." in (name[0], name.split("/")[-1][0])} == {
        ".cache/other",
        "sub/.gitignore",
    }
    assert not (tmp_path / "out" / ".cache" / "huggingface").exists()


def test_an_earlier_manifest_is_replaced_and_its_edit_remembered(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run("apply", tiny.path, "-o", tmp_path / "once", "--alpha", "0.25").exit_code == 0
    assert run("apply", tmp_path / "once", "-o", tmp_path / "twice").exit_code == 0
    manifest = json.loads((tmp_path / "twice" / "qkpatch.json").read_bytes())
    assert manifest["source"]["previous_edit"]["alpha"] == 0.25
    assert "qkpatch.json" not in {file["name"] for file in manifest["files"]}
    assert run("verify", tmp_path / "twice", "--source", tmp_path / "once").exit_code == 0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("loop of folders", "leads back"),
        ("loop of links", "dangling"),
        ("dangling link", "dangling"),
        ("fifo", "not a regular file"),
        ("device", "not a regular file"),
        ("name that is not UTF-8", "name"),
    ],
)
def test_what_cannot_be_carried_over_is_an_error_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result], kind: str, said: str
) -> None:
    odd = tiny.path / "odd"
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "name that is not UTF-8":
        try:
            Path(os.fsdecode(os.fsencode(tiny.path) + b"/\xff")).touch()
        except OSError:
            pytest.skip("a file system whose names are all UTF-8")
    else:
        targets = {"loop of folders": ".", "loop of links": "odd", "device": "/dev/null"}
        odd.symlink_to(targets.get(kind, "nowhere"))
    result = run("apply", tiny.path, "-o", tmp_path / "out")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 4, result.output
    assert said in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


# -------- which bytes


def bf16(rows: int, columns: int, seed: int) -> bytes:
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return bytes(W.view(torch.int16).flatten().numpy().tobytes())


def handmade_shard(tiny: Tiny) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A shard as no library writes it, and where its tensors lie.

    Its keys are in no order, its header is followed by spaces that leave the data at an odd offset, it has
    two metadata keys in between, escapes, undefined fields, and a tensor of a dtype nobody knows.
    """
    tensors = {
        tiny.name(1, "k"): ("BF16", [16, 24], bf16(16, 24, 1)),
        "mystery": ("F3_XYZ", [5, 7], bytes(range(14))),
        tiny.name(1, "q"): ("BF16", [32, 24], bf16(32, 24, 2)),
        "sc\\u0061lar": ("I64", [], bytes(8)),
        "none": ("F32", [0, 3], b""),
    }
    places, entries, data = {}, [], b""
    for name, (dtype, shape, raw) in tensors.items():
        begin, end = len(data), len(data) + len(raw)
        places[name] = (begin, end)
        data += raw
        entries.append(
            f'"{name}" : {{ "shape":{shape}, "data_offsets":[{begin},{end}] ,"dtype":"{dtype}","x":null}}'
        )
    entries.insert(2, '"__metadata__":{"format":"pt","än":"\\u00f6\\n"}')
    header = ("{" + " ,\n".join(reversed(entries)) + "}").encode()
    header += b" " * (9 - len(header) % 8)  # the data begins one past a multiple of eight
    shift = 8 + len(header)
    places = {name: (shift + begin, shift + end) for name, (begin, end) in places.items()}
    return len(header).to_bytes(8, "little") + header + data, places


def test_an_unusual_shard_survives_byte_for_byte_but_for_the_edited_rows(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    before, places = handmade_shard(tiny)
    (tiny.path / "model.safetensors").write_bytes(before)
    result = run("apply", tiny.path, "-o", tmp_path / "out", "--layers", "1", "--heads", "1,3")
    assert result.exit_code == 0, result.output
    after = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert len(after) == len(before)
    begin, _ = places[tiny.name(1, "q")]
    assert begin % 2 == 1
    head = 8 * 24 * 2
    different = {i for i in range(len(before)) if before[i] != after[i]}
    rows = [range(begin + head * h, begin + head * (h + 1)) for h in (1, 3)]
    assert different <= {i for r in rows for i in r}
    assert all(different & set(r) for r in rows)


def test_verify_accepts_an_unusual_shard(tiny: Tiny, tmp_path: Path, run: Callable[..., Result]) -> None:
    (tiny.path / "model.safetensors").write_bytes(handmade_shard(tiny)[0])
    assert run("apply", tiny.path, "-o", tmp_path / "out", "--layers", "1").exit_code == 0
    result = run("verify", tmp_path / "out", "--source", tiny.path)
    assert result.exit_code == 0, result.output


QUERIES_APART = [["q_proj"], ["k_proj"], [""]]
LAYERS_APART = [["layers.0."], ["layers.1."], [""]]
ALL_IN_ONE = [[""]]


@pytest.mark.parametrize("shards", [QUERIES_APART, LAYERS_APART, ALL_IN_ONE])
def test_the_division_into_shards_does_not_change_the_edit(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result], shards: list[list[str]]
) -> None:
    divided = build_tiny(tmp_path / "divided", shards=shards)
    assert run("apply", tiny.path, "-o", tmp_path / "whole").exit_code == 0
    assert run("apply", divided.path, "-o", tmp_path / "out").exit_code == 0
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (divided.path / index).read_bytes()
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_untouched_shards_are_identical_files(tmp_path: Path, run: Callable[..., Result]) -> None:
    divided = build_tiny(tmp_path / "divided", shards=QUERIES_APART)
    assert run("apply", divided.path, "-o", tmp_path / "out").exit_code == 0
    before, after = contents(divided.path), contents(tmp_path / "out")
    assert [name for name in before if before[name] != after[name]] == ["model-00001-of-00003.safetensors"]


def test_a_single_file_as_source_gives_that_file_and_a_manifest(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run("apply", tiny.path, "-o", tmp_path / "whole").exit_code == 0
    file = tiny.path / "model.safetensors"
    result = run("apply", file, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "nothing beside it" in result.stderr
    assert contents(tmp_path / "out").keys() == {"model.safetensors", "qkpatch.json"}
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert run("verify", tmp_path / "out", "--source", file).exit_code == 0


def test_alpha_one_gives_a_byte_identical_copy(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run("apply", tiny.path, "-o", tmp_path / "out", "--alpha", "1").exit_code == 0
    found = contents(tmp_path / "out")
    del found["qkpatch.json"]
    assert found == contents(tiny.path)
    assert run("verify", tmp_path / "out", "--source", tiny.path).exit_code == 0


def test_a_copy_takes_more_than_one_step_when_it_is_large(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qkpatch.output.passage.COPY_CHUNK", 1000)
    monkeypatch.setattr(files, "READ_CHUNK", 700)
    assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
    monkeypatch.undo()
    assert run("verify", tmp_path / "out", "--source", tiny.path).exit_code == 0
