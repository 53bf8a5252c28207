"""`diff` finds every difference between two checkpoints, none that is not there, and measures them right."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from conftest import REPO, Tiny, build_tiny
from safetensors.torch import load_file, save_file
from two_sides import Diff, Entry, differing, flipped, write
from typer.testing import Result

from qkpatch.checkpoint.pairs import CHUNK
from qkpatch.common.dtypes import DTYPE_BITS, FLOATS
from qkpatch.compare import diff as diff_module
from qkpatch.compare import values
from qkpatch.compare.diff_types import natural


@pytest.fixture
def diff(run: Callable[..., Result]) -> Diff:
    return differing(run)


# -------- equal

EQUAL_PARTS = ("changed", "retyped", "only_in_a", "only_in_b")


def is_nothing(document: dict[str, Any]) -> bool:
    return (
        document["equal"]
        and not any(document["tensors"][part] for part in EQUAL_PARTS)
        and not document["metadata"]
    )


def test_a_checkpoint_equals_itself_and_its_copy(tiny: Tiny, tmp_path: Path, diff: Diff, run) -> None:
    shutil.copytree(tiny.path, tmp_path / "copy")
    for other in (tiny.path, tmp_path / "copy"):
        document = diff(tiny.path, other)
        assert is_nothing(document)
        assert document["tensors"]["equal"] == 10
        assert document["files"] == {"equal": 2, "changed": [], "only_in_a": [], "only_in_b": []}
        assert document["layout"] == {"equal": True, "shards_a": 1, "shards_b": 1, "rewritten": []}
    sizes = {path.name: path.stat().st_size for path in tiny.path.iterdir()}
    raw = (tiny.path / "model.safetensors").read_bytes()
    assert document["compared_bytes"] == sum(sizes.values()) - 8 - struct.unpack("<Q", raw[:8])[0]
    assert run("diff", tiny.path, tiny.path, "--quiet").output == ""


def test_equal_checkpoints_need_no_torch(tiny: Tiny) -> None:
    code = (
        "import sys\nfrom qkpatch.cli import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, "diff", tiny.path, tiny.path], check=True, capture_output=True
    )


@pytest.mark.parametrize("division", [[["layers.1."], [""]], [["k_proj"], ["q_proj", "v_proj"], [""]]])
def test_another_division_into_shards_is_equal(tmp_path: Path, diff: Diff, division) -> None:
    one = build_tiny(tmp_path / "one")
    other = build_tiny(tmp_path / "other", shards=division)
    for a, b in ((one, other), (other, one)):
        document = diff(a.path, b.path)
        assert is_nothing(document)
        assert document["tensors"]["equal"] == 10
        assert not document["layout"]["equal"]
        assert {u["name"] for u in document["uncompared"]} == {"model.safetensors.index.json"}


def test_another_division_with_one_change_shows_that_alone(tmp_path: Path, diff: Diff) -> None:
    one = build_tiny(tmp_path / "one")
    other = build_tiny(tmp_path / "other", shards=[["k_proj"], ["layers.1."], [""]])
    file = other.path / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors[one.name(1, "q")][3, 5] += 1
    save_file(tensors, file, {"format": "pt"})
    found = diff(one.path, other.path)["tensors"]
    assert [d["name"] for d in found["changed"]] == [one.name(1, "q")]
    assert found["changed"][0]["differing_elements"] == 1
    assert found["equal"] == 9


def test_another_order_in_the_file_is_equal(tmp_path: Path, diff: Diff) -> None:
    tensors = {f"layers.{i}": ("F32", [5], os.urandom(20)) for i in range(12)}
    a = write(tmp_path / "a.safetensors", tensors)
    b = write(tmp_path / "b.safetensors", dict(reversed(tensors.items())))
    document = diff(a, b)
    assert is_nothing(document)
    assert document["files"] is None
    assert not document["layout"]["equal"]


def test_a_header_in_other_words_is_equal_and_told(tmp_path: Path, diff: Diff) -> None:
    a = write(tmp_path / "a" / "m.safetensors", {"x": ("U8", [2], b"ab"), "y": ("U8", [1], b"c")})
    text = (
        b'{"y":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},'
        b'"x":{"shape":[2],"dtype":"U8","data_offsets":[0,2]}}'
    )
    length = struct.unpack("<Q", a.read_bytes()[:8])[0]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "m.safetensors").write_bytes(struct.pack("<Q", length) + text.ljust(length) + b"abc")
    document = diff(a.parent, tmp_path / "b")
    assert document["equal"]
    assert document["layout"] == {"equal": True, "shards_a": 1, "shards_b": 1, "rewritten": ["m.safetensors"]}


def test_no_config_and_no_recipe_are_needed(tmp_path: Path, diff: Diff) -> None:
    for side in "ab":
        write(tmp_path / side / "model.safetensors", {"anything": ("I32", [1], b"1234")})
    assert diff(tmp_path / "a", tmp_path / "b")["equal"]


@pytest.mark.parametrize("dtype", [*DTYPE_BITS, "F2_FUTURE"])
@pytest.mark.parametrize("shape", [[], [0], [3, 0, 2], [8]])
def test_equal_tensors_of_any_dtype_and_shape_are_equal(
    tmp_path: Path, diff: Diff, dtype: str, shape: list[int]
) -> None:
    bits = DTYPE_BITS.get(dtype, 2) * int(np.prod(shape))
    if bits % 8:
        pytest.skip("no whole number of bytes")
    data = b"\xff" * (bits // 8)  # NaN in all float formats: equal bits are equal
    a = write(tmp_path / "a.safetensors", {"x": (dtype, shape, data)})
    b = write(tmp_path / "b.safetensors", {"before": ("U8", [1], b"."), "x": (dtype, shape, data)})
    document = diff(a, b)
    assert document["tensors"]["equal"] == 1
    assert [ref["name"] for ref in document["tensors"]["only_in_b"]] == ["before"]


# -------- which tensors


def test_one_flipped_byte_is_one_changed_element(tiny: Tiny, tmp_path: Path, diff: Diff) -> None:
    shutil.copytree(tiny.path, tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(flipped(data, len(data) - 10))
    document = diff(tiny.path, tmp_path / "b")
    (found,) = document["tensors"]["changed"]
    assert (found["differing_elements"], found["differing_bytes"], found["values"]["max_ulps"]) == (1, 1, 1)
    assert document["tensors"]["equal"] == 9


def test_every_byte_of_every_tensor_is_compared(tmp_path: Path, diff: Diff) -> None:
    tensors: dict[str, Entry] = {
        "a": ("U8", [3], b"abc"),
        "b": ("BF16", [2], b"1234"),
        "c": ("F4", [4], b"xy"),
    }
    a = write(tmp_path / "a.safetensors", tensors)
    raw = a.read_bytes()
    b = tmp_path / "b.safetensors"
    owners = "aaabbbbcc"
    for place, owner in enumerate(owners, len(raw) - len(owners)):
        b.write_bytes(flipped(raw, place))
        assert [d["name"] for d in diff(a, b)["tensors"]["changed"]] == [owner]


def test_the_last_byte_of_a_tensor_of_several_chunks_is_compared(tmp_path: Path, diff: Diff) -> None:
    data = bytes(2 * CHUNK + 6)
    a = write(tmp_path / "a.safetensors", {"x": ("BF16", [CHUNK + 3], data)})
    for place in (0, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, len(data) - 2):
        b = write(tmp_path / "b.safetensors", {"x": ("BF16", [CHUNK + 3], flipped(data, place))})
        (found,) = diff(a, b)["tensors"]["changed"]
        assert (found["differing_elements"], found["differing_bytes"]) == (1, 1)


def test_missing_tensors_are_named_on_their_side(tmp_path: Path, diff: Diff) -> None:
    x: Entry = ("F32", [1], b"....")
    a = write(tmp_path / "a.safetensors", {f"l.{i}": x for i in (10, 9, 2, 1)})
    b = write(tmp_path / "b.safetensors", {f"l.{i}": x for i in (1, 11, 100)})
    found = diff(a, b)["tensors"]
    assert found["equal"] == 1
    assert [ref["name"] for ref in found["only_in_a"]] == ["l.2", "l.9", "l.10"]
    assert [ref["name"] for ref in found["only_in_b"]] == ["l.11", "l.100"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("F32", [4], bytes(16)), ("F32", [2, 2], bytes(16))),
        (("F32", [4], bytes(16)), ("I32", [4], bytes(16))),
        (("U8", [4], bytes(4)), ("I8", [4], bytes(4))),
        (("F32", [2, 2], bytes(16)), ("F64", [4], bytes(32))),
        (("F2_FUTURE", [4], bytes(16)), ("F2_FUTURE", [4], bytes(12))),
        (("F32", [0], b""), ("F64", [0], b"")),
    ],
)
def test_another_shape_or_kind_is_told_and_not_compared(
    a: Entry, b: Entry, tmp_path: Path, diff: Diff
) -> None:
    document = diff(write(tmp_path / "a.safetensors", {"x": a}), write(tmp_path / "b.safetensors", {"x": b}))
    (found,) = document["tensors"]["retyped"]
    assert not found["compared"]
    assert (found["a"]["dtype"], found["a"]["shape"]) == (a[0], a[1])
    assert (found["b"]["dtype"], found["b"]["shape"]) == (b[0], b[1])
    assert found["values"] is None


# -------- against `apply` and its manifest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_edit_shows_as_its_manifest_says(dtype: torch.dtype, tmp_path: Path, run, diff: Diff) -> None:
    tiny = build_tiny(tmp_path / "tiny", n_layers=12, dtype=dtype, shards=[["layers.1"], [""]])
    out = tmp_path / "out"
    assert run("apply", tiny.path, "-o", out, "--layers", "1,2,10", "--heads", "1-2").exit_code == 0
    document = diff(tiny.path, out)
    edits = {edit["tensor"]: edit for edit in json.loads((out / "qkpatch.json").read_text())["edits"]}
    changed = document["tensors"]["changed"]
    assert [d["name"] for d in changed] == [tiny.name(layer, "q") for layer in (1, 2, 10)]
    assert edits.keys() == {d["name"] for d in changed}
    assert document["tensors"]["equal"] == 37 - 3
    assert document["layout"]["equal"]
    assert document["files"]["equal"] == 2
    weights = {k: v for file in tiny.path.glob("*.safetensors") for k, v in load_file(file).items()}
    for found in changed:
        W = weights[found["name"]].double().numpy().reshape(tiny.n_heads, tiny.d_head, -1)
        square = sum(
            (head["relative_change"] * np.linalg.norm(W[head["head"]])) ** 2
            for head in edits[found["name"]]["heads"]
        )
        assert found["values"]["frobenius"] == pytest.approx(square**0.5, rel=1e-7)
        assert found["values"]["frobenius_a"] == pytest.approx(np.linalg.norm(W), rel=1e-12)
        assert 0 < found["differing_elements"] <= 2 * tiny.d_head * tiny.d_model
    assert [u["name"] for u in document["uncompared"]] == ["qkpatch.json", "model.safetensors.index.json"]
    assert document["uncompared"][0]["in_b"]
    assert not document["uncompared"][0]["in_a"]


# -------- files and metadata


def test_files_beside_the_weights(tiny: Tiny, tmp_path: Path, diff: Diff) -> None:
    b = tmp_path / "b"
    shutil.copytree(tiny.path, b)
    for root, names in ((tiny.path, ("same/x", "gone.txt", "longer")), (b, ("same/x", "new.txt", "longer"))):
        for name in names:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"content")
    (b / "longer").write_bytes(b"content and more")
    (b / "tokenizer.json").write_text("[]")
    (b / "pytorch_model.bin").write_bytes(b"twin")
    (b / ".git").mkdir()
    document = diff(tiny.path, b)
    assert not document["equal"]
    assert document["files"] == {
        "equal": 2,
        "changed": [
            {"name": "longer", "size_a": 7, "size_b": 16, "first": 7},
            {"name": "tokenizer.json", "size_a": 2, "size_b": 2, "first": 0},
        ],
        "only_in_a": ["gone.txt"],
        "only_in_b": ["new.txt", "pytorch_model.bin"],
    }
    assert document["uncompared"] == [{"name": ".git", "in_a": False, "in_b": True, "why": "bookkeeping"}]


def test_a_large_file_differs_late(tiny: Tiny, tmp_path: Path, diff: Diff) -> None:
    (tiny.path / "blob").write_bytes(bytes(2 * CHUNK + 9))
    shutil.copytree(tiny.path, tmp_path / "b")
    (tmp_path / "b" / "blob").write_bytes(flipped(bytes(2 * CHUNK + 9), 2 * CHUNK + 3))
    (found,) = diff(tiny.path, tmp_path / "b")["files"]["changed"]
    assert found["first"] == 2 * CHUNK + 3


def test_metadata_differs_by_key(tmp_path: Path, diff: Diff) -> None:
    x: dict[str, Entry] = {"x": ("U8", [1], b".")}
    a = write(tmp_path / "a.safetensors", x, {"format": "pt", "note": "old", "same": "1"})
    b = write(tmp_path / "b.safetensors", x, {"note": "new", "same": "1"})
    document = diff(a, b)
    assert not document["equal"]
    assert document["metadata"] == [
        {"key": "format", "a": ["pt"], "b": [None]},
        {"key": "note", "a": ["old"], "b": ["new"]},
    ]


def test_no_metadata_and_empty_metadata_are_equal(tmp_path: Path, diff: Diff) -> None:
    x: dict[str, Entry] = {"x": ("U8", [1], b".")}
    assert diff(write(tmp_path / "a.safetensors", x), write(tmp_path / "b.safetensors", x, {}))["equal"]


def test_the_name_of_a_single_file_does_not_matter(tmp_path: Path, diff: Diff) -> None:
    x: dict[str, Entry] = {"x": ("U8", [1], b".")}
    document = diff(write(tmp_path / "one.safetensors", x), write(tmp_path / "other.safetensors", x))
    assert document["layout"] == {"equal": True, "shards_a": 1, "shards_b": 1, "rewritten": []}


def test_a_single_file_is_compared_with_a_directory_by_tensors(
    tiny: Tiny, tmp_path: Path, diff: Diff
) -> None:
    alone = shutil.copy(tiny.path / "model.safetensors", tmp_path / "alone.safetensors")
    document = diff(tiny.path, Path(alone))
    assert document["equal"]
    assert document["files"] is None
    assert (document["a"]["kind"], document["b"]["kind"]) == ("directory", "file")


# -------- the command


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda p: p / "nowhere", 2),
        (lambda p: (p / "empty").mkdir() or p / "empty", 3),
        (lambda p: (p / "x.bin").write_bytes(b"") * 0 or p / "x.bin", 3),
        (lambda p: (p / "x.safetensors").write_bytes(b"12345678") * 0 or p / "x.safetensors", 3),
    ],
)
def test_what_cannot_be_compared_is_an_error_and_no_difference(
    make, code: int, tiny: Tiny, tmp_path: Path, run
) -> None:
    other = make(tmp_path)
    for arguments in ((tiny.path, other), (other, tiny.path)):
        result = run("diff", *arguments, "--json")
        assert result.exit_code == code
        assert json.loads(result.stdout)["error"]["exit_code"] == code


def test_bytes_that_no_tensor_owns_are_refused(tmp_path: Path, run) -> None:
    a = write(tmp_path / "a.safetensors", {"x": ("U8", [1], b".")})
    b = tmp_path / "b.safetensors"
    b.write_bytes(a.read_bytes() + b"hidden")
    assert run("diff", a, b).exit_code == 3


def test_a_file_that_cannot_be_read_is_an_io_error(tiny: Tiny, tmp_path: Path, run, monkeypatch) -> None:
    shutil.copytree(tiny.path, tmp_path / "b")
    before = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return before(fd, buffers, offset) if offset < 2000 else 0

    monkeypatch.setattr(os, "preadv", short)
    result = run("diff", tiny.path, tmp_path / "b")
    assert result.exit_code == 4
    assert "ends" in result.stderr


def test_quiet_says_nothing_and_differs_by_exit_code(tmp_path: Path, run) -> None:
    a = write(tmp_path / "a.safetensors", {"x": ("U8", [1], b"a")})
    b = write(tmp_path / "b.safetensors", {"x": ("U8", [1], b"b")})
    result = run("diff", a, b, "-q")
    assert (result.exit_code, result.output) == (1, "")


def test_the_help_tells_the_exit_codes(run) -> None:
    text = " ".join(run("diff", "--help").stdout.split())
    assert "0 all tensors" in text
    assert "1 something differs" in text
    assert "Compare two checkpoints" in text


def test_long_lists_are_cut_with_a_count_and_changes_come_first(tmp_path: Path, run, diff: Diff) -> None:
    tensors: dict[str, Entry] = {f"layers.{i}.w": ("F32", [2], bytes(8)) for i in range(60)}
    a = write(tmp_path / "a.safetensors", {**tensors, "gone": ("F32", [0], b"")})
    b = write(tmp_path / "b.safetensors", {n: (d, s, bytes([1] * 8)) for n, (d, s, _) in tensors.items()})
    text = run("diff", a, b).stdout
    assert "and 40 more; --json lists all" in text
    assert text.index("layers.2.w") < text.index("layers.10.w") < text.index("Only in A")
    assert "layers.20.w" not in text
    names = [d["name"] for d in json.loads(run("diff", a, b, "--json").stdout)["tensors"]["changed"]]
    assert names == [f"layers.{i}.w" for i in range(60)]


@pytest.mark.parametrize("length", [10, 60, 300])
def test_the_table_fits_a_terminal_of_80_columns(length: int, tmp_path: Path) -> None:
    from qkpatch.checkpoint.source import open_stored
    from qkpatch.cli.diff_text import text

    name = "model." + "n" * length
    big = np.random.default_rng(0).standard_normal((300, 500)).astype(np.float32)
    a = write(
        tmp_path / "a.safetensors", {name: ("F32", big.shape, big.tobytes()), "z\x1b[31m": ("U8", [1], b"a")}
    )
    b = write(
        tmp_path / "b.safetensors",
        {name: ("F32", big.shape, (-big).tobytes()), "z\x1b[31m": ("U8", [1], b"b")},
    )
    result = diff_module.difference(open_stored(a), open_stored(b), lambda _: None)
    lines = text(result, "a", "b", 80).splitlines()
    assert all(len(line) <= 80 for line in lines if name not in line)
    assert "\x1b" not in "".join(lines)
    assert any("‖Δ‖/‖A‖" in line for line in lines)
    assert any("moved by ULPs" in line for line in lines)


def test_a_reader_who_leaves_early_hides_no_difference(tmp_path: Path) -> None:
    tensors: dict[str, Entry] = {f"layers.{i}.w": ("F32", [2], bytes(8)) for i in range(3000)}
    a = write(tmp_path / "a.safetensors", tensors)
    b = write(tmp_path / "b.safetensors", {n: (d, s, bytes([1] * 8)) for n, (d, s, _) in tensors.items()})
    # Unbuffered, Python itself loses what is left of a write that was cut short, without an error.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = f"{warm.shell('diff', a, b, '--json')} | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 1
    assert done.stderr == ""


# VmHWM of a fresh process that runs the command line.
MEASURE = """
import re, sys
from qkpatch.cli import app
try:
    app(sys.argv[2:])
except SystemExit as stop:
    assert (stop.code or 0) == int(sys.argv[1])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def hole(path: Path, dtype: str, n_bytes: int, flips: Sequence[int] = ()) -> Path:
    """A file with one tensor of zeros that take no disk, but for single bytes of it."""
    elements = n_bytes * 8 // DTYPE_BITS[dtype]
    text = json.dumps({"x": {"dtype": dtype, "shape": [elements], "data_offsets": [0, n_bytes]}}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + n_bytes)
        for place in flips:
            file.seek(8 + len(text) + place)
            file.write(b"\x01")
    return path


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is a Linux figure")
@pytest.mark.parametrize(
    ("kind", "dtype", "large"), [("equal", "F32", 1 << 28), ("changed", "BF16", 1 << 27)]
)
def test_memory_does_not_follow_the_size_of_a_tensor(
    kind: str, dtype: str, large: int, tmp_path: Path
) -> None:
    peaks = []
    for size in (4 << 20, large):
        flips = [size // 2, size - 1] if kind == "changed" else []
        a = hole(tmp_path / f"a{size}.safetensors", dtype, size)
        b = hole(tmp_path / f"b{size}.safetensors", dtype, size, flips)
        code = str(len(flips) and 1)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, code, "diff", a, b, "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stderr.split()[-1]))
        assert len(json.loads(done.stdout)["tensors"]["changed"]) == len(flips) // 2
    assert peaks[1] - peaks[0] < 16 << 10


# -------- parts


def test_the_formats_that_have_values_are_those_that_can_be_decoded() -> None:
    assert FLOATS.keys() < DTYPE_BITS.keys()
    for dtype, form in FLOATS.items():
        one = torch.ones(1).to(getattr(torch, form.torch))
        next_up = (one.view(values._INTEGERS[DTYPE_BITS[dtype]]) + 1).view(one.dtype)
        assert float(next_up.double()) == 1 + 2.0**-form.fraction


def test_names_are_in_natural_order_whatever_they_are() -> None:
    names = ["", "1", "01", "a", "a1", "a01", "a2", "a10", "a1b2", "a1b10", "9" * 5000, "é²", "٣"]
    ordered = sorted(names, key=natural)
    assert ordered.index("a2") < ordered.index("a10")
    assert ordered.index("a1b2") < ordered.index("a1b10")
    names.reverse()
    assert sorted(names, key=natural) == ordered


def test_the_figures_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, CHUNK)).astype(np.float32)
    a = write(tmp_path / "a.safetensors", {"x": ("F32", [CHUNK], x[0].tobytes())})
    b = write(tmp_path / "b.safetensors", {"x": ("F32", [CHUNK], x[1].tobytes())})
    outputs = set()
    for threads in (3, 1):  # and one is what is left
        torch.set_num_threads(threads)
        outputs.add(run("diff", a, b, "--json").stdout)
    assert len(outputs) == 1
    assert '"differing"' in outputs.pop()


# -------- two spellings of one model

V4 = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def spelled(
    path: Path, *, older: bool, change: Callable[[dict[str, Entry]], object] = lambda _: None
) -> Path:
    """A LLaVA as transformers 4 saves it, or as 5 does: towers whose layers have the same names."""
    parts = {
        "model.language_model.": (
            "embed_tokens",
            "norm",
            *(f"layers.{i}.{p}" for i in range(3) for p in "qkvm"),
        ),
        "model.vision_tower.": ("embeddings", *(f"encoder.layers.{i}.{p}" for i in range(3) for p in "qkvf")),
        "model.multi_modal_projector.": ("linear_1", "linear_2"),
        "": ("lm_head",),
    }
    names = [f"{prefix}{part}.weight" for prefix, some in parts.items() for part in some]
    tensors: dict[str, Entry] = {name: ("BF16", [4], bytes([i] * 8)) for i, name in enumerate(names)}
    change(tensors)
    if older:
        olds = {new: old for old, new in V4.items()}
        tensors = {
            next(old + name[len(new) :] for new, old in olds.items() if name.startswith(new)): entry
            for name, entry in tensors.items()
        }
    return write(path, tensors)


def test_two_spellings_of_one_model_are_compared_under_one(
    diff: Diff, tmp_path: Path, run: Callable[..., Result]
) -> None:
    """It was once: 32 only in A, 32 only in B."""
    a = spelled(tmp_path / "a.safetensors", older=True)
    b = spelled(
        tmp_path / "b.safetensors",
        older=False,
        change=lambda t: t.update({"model.language_model.layers.1.q.weight": ("BF16", [4], bytes(8))}),
    )
    for one, other, names in ((a, b, V4), (b, a, {new: old for old, new in V4.items()})):
        found = diff(one, other)["tensors"]
        assert {r["a"]: r["b"] for r in found["renamed"]} == names
        assert sum(r["tensors"] for r in found["renamed"]) == found["equal"] + 1 == 30
        assert (found["only_in_a"], found["only_in_b"]) == ([], [])
        assert [d["name"].rpartition("layers.")[2] for d in found["changed"]] == ["1.q.weight"]
    text = run("diff", a, b).stdout
    assert "language_model.model. is model.language_model. in B: 14 tensor(s)" in text
    assert (
        run("diff", a, spelled(tmp_path / "c.safetensors", older=False)).exit_code == 1
    )  # names are read, too


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["model.a.weight"], ["model.b.weight"]),
        (["x.a.weight"], ["y.b.weight"]),
        (["layers.0.a.q.weight", "layers.1.a.q.weight"], ["layers.0.b.q.weight", "layers.1.b.q.weight"]),
        (["a." * 90_000 + "weight"], ["b." + "a." * 90_000 + "weight"]),
        (["t.0.weight", *(f"p.{i}.x.weight" for i in range(9))], ["r.t.0.weight"]),
    ],
    ids=["one module", "two modules", "within layers", "many dots", "hardly any"],
)
def test_other_names_are_no_spelling(diff: Diff, tmp_path: Path, ours: list[str], theirs: list[str]) -> None:
    a, b = (
        write(tmp_path / f"{i}.safetensors", {name: ("U8", [1], b"x") for name in names})
        for i, names in enumerate((ours, theirs))
    )
    found = diff(a, b)["tensors"]
    if ours[0] != "t.0.weight":
        assert found["renamed"] == []
    assert len(found["only_in_a"]) >= len(ours) - 1


@pytest.mark.stress
def test_a_prefix_alone_and_tensors_that_one_side_lacks(diff: Diff, tmp_path: Path) -> None:
    names = ["embed_tokens.weight", *(f"layers.{i}.{p}.weight" for i in range(9) for p in "qkv")]
    a = write(
        tmp_path / "a.safetensors", {n: ("U8", [1], b"x") for n in [*names, "layers.0.rotary.inv_freq"]}
    )
    b = write(tmp_path / "b.safetensors", {f"model.{n}": ("U8", [1], b"x") for n in names})
    found = diff(a, b)["tensors"]
    assert {r["a"]: r["b"] for r in found["renamed"]} == {
        "embed_tokens.": "model.embed_tokens.", "layers.": "model.layers.",
    }  # fmt: skip
    assert [t["name"] for t in found["only_in_a"]] == ["layers.0.rotary.inv_freq"]
    assert found["only_in_b"] == []
