"""``--max-shard-size``: the same tensors in other files, with headers and an index of our own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qkpatch.checkpoint.files import open_read
from qkpatch.checkpoint.header import Header, read_header
from qkpatch.checkpoint.source import open_stored
from qkpatch.errors import UsageError
from qkpatch.output.layout import Extent, OutputFile
from qkpatch.planning.request import parse_size

Run = Callable[..., Any]
INDEX = "model.safetensors.index.json"
LAYERS_APART = [["layers.0."], ["layers.1."], [""]]
QUERIES_APART = [["k_proj"], ["q_proj"], [""]]


def headers(path: Path) -> dict[str, Header]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with open_read(file) as opened:
            found[file.name] = read_header(opened, file.name)
    return found


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].equal(b[n]) for n in a
    )


def apply(run: Run, source: Path, out: Path, *flags: object) -> Path:
    result = run("apply", source, "-o", out, *flags)
    assert result.exit_code == 0, result.output
    return out


def verified(run: Run, out: Path, source: Path) -> Any:
    return run("verify", out, "--source", source)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("512MiB", 512 << 20), ("200KB", 200_000),
        ("1tib", 1 << 40), (" 7MB ", 7 * 10**6), ("123456789", 123456789),
    ],
)  # fmt: skip
def test_sizes_are_read_as_the_field_writes_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "5G", "1.5GB", "five", "٥GB", "1e9", "9" * 30, "GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="max-shard-size"):
        parse_size(text)


@pytest.mark.parametrize("shards", [None, LAYERS_APART, QUERIES_APART])
@pytest.mark.parametrize("size", [1, 1000, 2500, 10**6])
def test_the_tensors_are_those_of_a_plain_run(
    tmp_path: Path, run: Run, shards: list[list[str]] | None, size: int
) -> None:
    source = build_tiny(tmp_path / "source", shards=shards).path
    plain = apply(run, source, tmp_path / "plain")
    out = apply(run, source, tmp_path / "out", "--max-shard-size", size)
    assert same(tensors(out), tensors(plain))
    assert not same(tensors(out), tensors(source))
    for header in headers(out).values():
        sizes = [ref.nbytes for ref in header.tensors.values()]
        assert sum(sizes) <= size or len(sizes) == 1
    result = verified(run, out, source)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("shards", [None, LAYERS_APART])
def test_tensors_keep_their_order_and_metadata(
    tmp_path: Path, run: Run, shards: list[list[str]] | None
) -> None:
    source = build_tiny(tmp_path / "source", shards=shards).path
    out = apply(run, source, tmp_path / "out", "--max-shard-size", 2000)

    def order(path: Path) -> list[str]:
        refs = (sorted(h.tensors.values(), key=lambda ref: ref.begin) for h in headers(path).values())
        return [ref.name for of_one in refs for ref in of_one]

    assert order(out) == order(source)
    assert {tuple((h.metadata or {}).items()) for h in headers(out).values()} == {(("format", "pt"),)}
    assert all(h.data_start % 8 == 0 for h in headers(out).values())


def test_the_index_says_where_all_is_and_keeps_what_else_it_said(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source", shards=LAYERS_APART).path
    before = json.loads((source / INDEX).read_text())
    before["metadata"]["total_parameters"] = 7
    before["other"] = {"a": 1}
    (source / INDEX).write_text(json.dumps(before))
    out = apply(run, source, tmp_path / "out", "--max-shard-size", "2KB")
    after = json.loads((out / INDEX).read_text())
    found = headers(out)
    assert len(found) > 3
    assert after["weight_map"] == {n: shard for shard, h in found.items() for n in h.tensors}
    assert after["metadata"] == {
        "total_parameters": 7,
        "total_size": sum(ref.nbytes for h in found.values() for ref in h.tensors.values()),
    }
    assert after["other"] == {"a": 1}
    count = len(found)
    assert list(found) == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def test_shards_are_joined_to_one_file_without_an_index(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source", shards=QUERIES_APART).path
    out = apply(run, source, tmp_path / "out", "--max-shard-size", "1GB")
    assert contents(out).keys() == {"model.safetensors", "config.json", "tokenizer.json", "qkpatch.json"}
    assert same(tensors(out), tensors(apply(run, source, tmp_path / "plain")))
    assert verified(run, out, source).exit_code == 0


def test_how_source_is_sharded_makes_no_difference(tmp_path: Path, run: Run) -> None:
    """One more step, and the files of the next are the same."""
    source = build_tiny(tmp_path / "source").path
    pieces = apply(run, source, tmp_path / "pieces", "--max-shard-size", 700, "--alpha", 1)
    whole = apply(run, source, tmp_path / "whole", "--max-shard-size", 10**9, "--alpha", 1)
    for at in (pieces, whole):
        (at / "qkpatch.json").unlink()
    files = [
        contents(apply(run, at, tmp_path / f"from-{at.name}", "--max-shard-size", 2500))
        for at in (pieces, whole)
    ]
    for of_one in files:
        del of_one["qkpatch.json"]
    assert files[0] == files[1]
    assert len(files[0]) > 4


def test_every_tensor_is_aligned_whatever_lies_beside_it(tmp_path: Path, run: Run) -> None:
    extra = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "wide": torch.arange(5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "half": torch.arange(3, dtype=torch.float16),
    }
    source = build_tiny(tmp_path / "source", extra=extra).path
    size = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "BOOL": 1}
    for limit in (50, 3000, 10**6):
        out = apply(run, source, tmp_path / f"out-{limit}", "--max-shard-size", limit)
        refs = [ref for header in headers(out).values() for ref in header.tensors.values()]
        assert all(ref.begin % size[ref.dtype] == 0 for ref in refs if ref.nbytes)
        assert {n: t for n, t in tensors(out).items() if n in extra}.keys() == extra.keys()
        assert same({n: t for n, t in tensors(out).items() if n in extra}, extra)
        assert verified(run, out, source).exit_code == 0


def test_a_dtype_nobody_knows_is_carried_over(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    with open(tiny.path / "model.safetensors", "rb") as file:
        raw = file.read()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin = len(raw) - 8 - length
    header["mystery"] = {"dtype": "F3_XYZ", "shape": [5, 7], "data_offsets": [begin, begin + 14]}
    text = json.dumps(header).encode()
    data = raw[8 + length :] + bytes(range(14))
    (tiny.path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    out = apply(run, tiny.path, tmp_path / "out", "--max-shard-size", 2000)
    last = sorted(headers(out).items())[-1]
    ref = last[1].tensors["mystery"]
    assert (out / last[0]).read_bytes()[ref.begin : ref.end] == bytes(range(14))
    assert (ref.dtype, ref.shape) == ("F3_XYZ", (5, 7))
    assert verified(run, out, tiny.path).exit_code == 0


def test_the_record_names_files_and_bytes_of_out(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source", shards=QUERIES_APART).path
    out = apply(run, source, tmp_path / "out", "--max-shard-size", 2500)
    record = json.loads((out / "qkpatch.json").read_text())
    assert record["output"] == {"max_shard_size": 2500, "digest": "edited"}
    found = headers(out)
    for edit in record["edits"]:
        ref = found[edit["shard"]].tensors[edit["tensor"]]
        assert edit["byte_range"] == [ref.begin, ref.end]
        assert edit["key_tensor"] in found[edit["key_shard"]].tensors
    actions = {file["name"]: file["action"] for file in record["files"]}
    assert set(actions.values()) == {"copied", "patched", "resharded"}
    assert actions[INDEX] == "resharded"
    assert {edit["shard"] for edit in record["edits"]} == {n for n, a in actions.items() if a == "patched"}
    plan = json.loads(run("plan", source, "--max-shard-size", 2500, "--json").stdout)
    assert plan["files"] == [{**file, "sha256": None} for file in record["files"]]
    assert plan["costs"]["output_bytes"] == sum(file["size"] for file in record["files"])


def test_sizes_may_be_given_in_a_file(tmp_path: Path, tiny: Tiny, run: Run) -> None:
    (tmp_path / "edit.yaml").write_text("max_shard_size: 2KB\nmodes: 2\n")
    out = apply(run, tiny.path, tmp_path / "out", "--config", tmp_path / "edit.yaml")
    flags = apply(run, tiny.path, tmp_path / "flags", "--max-shard-size", "2KB", "--modes", 2)
    assert headers(out) == headers(flags)
    assert len(headers(out)) > 1


def test_digests_are_those_of_the_new_files(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source", shards=LAYERS_APART).path
    out = apply(run, source, tmp_path / "out", "--max-shard-size", 2500, "--digest", "files")
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=False
    )
    assert check.returncode == 0
    assert len((out / "SHA256SUMS").read_text().splitlines()) == len(contents(out)) - 1
    assert verified(run, out, source).exit_code == 0


def test_only_what_is_copied_whole_is_linked(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    out = apply(run, tiny.path, tmp_path / "out", "--max-shard-size", 2500, "--link")
    assert {p.name for p in out.iterdir() if p.stat().st_nlink > 1} == {"config.json", "tokenizer.json"}


@pytest.mark.parametrize("what", ["tensor", "row", "header", "index", "length", "size"])
def test_verify_sees_what_is_not_as_it_should_be(tiny: Tiny, tmp_path: Path, run: Run, what: str) -> None:
    out = apply(run, tiny.path, tmp_path / "out", "--max-shard-size", 2500, "--layers", 1)
    shard, header = next((n, h) for n, h in headers(out).items() if tiny.name(1, "q") in h.tensors)
    path = out / shard
    raw = bytearray(path.read_bytes())
    other = next(ref for n, h in headers(out).items() for ref in h.tensors.values() if n != shard)
    if what == "tensor":
        path, raw = out / other.shard, bytearray((out / other.shard).read_bytes())
        raw[other.begin + 1] ^= 1
    elif what == "row":
        raw[header.tensors[tiny.name(1, "q")].begin] ^= 1
    elif what == "header":
        raw[header.data_start - 1 : header.data_start] = b"\t" if raw[header.data_start - 1] == 32 else b" "
    elif what == "length":
        raw += b"\0"
    elif what == "index":
        path, raw = out / INDEX, bytearray((out / INDEX).read_bytes().replace(b'": ', b'" :', 1))
    else:
        path, record = out / "qkpatch.json", json.loads((out / "qkpatch.json").read_text())
        record["output"]["max_shard_size"] = 4000
        raw = bytearray(json.dumps(record).encode())
    path.write_bytes(raw)
    result = verified(run, out, tiny.path)
    assert result.exit_code == 1, result.output
    expected = {
        "tensor": other.name,
        "row": "sha256_after",
        "header": "not as qkpatch writes it",
        "index": "not as qkpatch writes it",
        "length": "should have",
    }
    assert expected.get(what, "mismatch") in result.stdout


def test_metadata_that_disagree_cannot_be_joined(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source", shards=LAYERS_APART).path
    first = sorted(source.glob("*.safetensors"))[0]
    save_file(load_file(first), first, {"format": "np", "more": "x"})
    result = run("apply", source, "-o", tmp_path / "out", "--max-shard-size", "1GB")
    assert result.exit_code == 3
    assert "'format'" in result.stderr
    assert not (tmp_path / "out").exists()
    out = apply(run, source, tmp_path / "out", "--max-shard-size", 1)
    with safe_open(out / "model-00001-of-00010.safetensors", "pt") as file:
        assert file.metadata() == {"format": "np", "more": "x"}
    assert verified(run, out, source).exit_code == 0


def test_a_name_that_is_taken_is_refused(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source", shards=LAYERS_APART).path
    (source / "model-00001-of-00010.safetensors").write_bytes(b"something else")
    result = run("apply", source, "-o", tmp_path / "out", "--max-shard-size", 1)
    assert result.exit_code == 3
    assert "model-00001-of-00010.safetensors" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_none_is_refused_before_anything_is_read(tmp_path: Path, run: Run) -> None:
    result = run("apply", tmp_path / "nowhere", "-o", tmp_path / "out", "--max-shard-size", "5 apples")
    assert result.exit_code == 2
    assert "5 apples" in result.stderr


def test_a_single_file_becomes_shards_with_an_index(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    file = tiny.path / "model.safetensors"
    out = apply(run, file, tmp_path / "out", "--max-shard-size", 2500)
    assert INDEX in contents(out)
    assert same(tensors(out), tensors(apply(run, file, tmp_path / "plain")))
    assert verified(run, out, file).exit_code == 0


def test_what_is_written_can_be_edited_again(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    once = apply(run, tiny.path, tmp_path / "once", "--max-shard-size", 2500)
    open_stored(once)  # our own strict reader, and the index check
    twice = apply(run, once, tmp_path / "twice")
    assert verified(run, twice, once).exit_code == 0


@pytest.mark.long
@pytest.mark.fixtures
def test_transformers_loads_the_new_shards(smollm2: Path, tmp_path: Path, run: Run) -> None:
    from transformers import AutoModelForCausalLM

    flags = ("--layers", "10-11", "--max-shard-size")
    many = apply(run, smollm2, tmp_path / "many", *flags, "30MB")
    one = apply(run, smollm2, tmp_path / "one", *flags, "2GB")
    assert len(headers(many)) > 5
    assert len(headers(one)) == 1
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict() for path in (many, one)]
    assert same(*models)
    assert verified(run, many, smollm2).exit_code == 0


def test_extents_around_ranges_are_what_is_left() -> None:
    class File:
        name = "a"
        size = 100

    a, b = File(), File()
    file = OutputFile("x", 0o644, b"own!", (Extent(a, 10, 30, 4), Extent(b, 0, 10, 24)))  # type: ignore[arg-type]
    assert file.size == 34

    def left(*ranges: tuple[int, int]) -> list[tuple[int, int, int]]:
        return [(e.begin, e.end, e.at) for e in file.around(ranges)]

    assert left() == [(10, 30, 4), (0, 10, 24)]
    assert left((4, 24)) == [(0, 10, 24)]
    assert left((4, 34)) == []
    assert left((6, 8), (8, 9), (20, 26)) == [(10, 12, 4), (15, 26, 9), (2, 10, 26)]
    assert left((33, 34)) == [(10, 30, 4), (0, 9, 24)]
