"""Files made to harm: headers of every odd kind, paths that lead away, bombs of memory and time. Never a traceback."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_header
import torch
from conftest import REPO, Tiny, build_tiny
from test_header import (
    COPIES,
    F16,
    F32,
    U64,
    Case,
    entry,
    framed,
    ids,
    library_accepts,
    many,
    needs_recent,
    no,
    ok,
    one,
    read,
)
from typer.testing import Result

from qkpatch.checkpoint.header import DTYPE_BITS, MAX_HEADER_SIZE
from qkpatch.checkpoint.tree import MAX_JSON_BYTES
from qkpatch.common.json_text import canonical_json
from qkpatch.common.number_ranges import parse_ranges
from qkpatch.common.strict_yaml import MAX_BYTES, load_yaml
from qkpatch.errors import CheckpointError, HeaderError, RecipeError, UsageError
from qkpatch.planning.manifest import Manifest
from qkpatch.planning.request import parse_request
from qkpatch.recipes.reading import parse_recipe

Run = Callable[..., Result]

# Found here, and still open in the package. The mark goes with the repair.
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is a Linux figure")


def calm(result: Result, *codes: int) -> str:
    """The output, of a command that ended by itself with one of these exit codes."""
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert result.exit_code in codes, result.output
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", result.output)
    return result.output


# -------- headers, with the library's verdict beside ours


def named(name: str, data: bytes = b"xy") -> bytes:
    """A file with one tensor, whose name is written as JSON writes it."""
    return framed(f"{{{json.dumps(name)}:{entry()}}}", data)


def padded(spaces: int) -> bytes:
    return framed('{"a":' + entry(F32, "[1]", "[0,4]") + "}" + " " * spaces, b"wxyz")


def empties(*shapes: str) -> bytes:
    return many(*((str(i), shape, "[0,0]") for i, shape in enumerate(shapes)), data=b"")


CASES = [
    # --- padding and alignment
    *(ok(f"{n} spaces of padding are allowed", padded(n)) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 4096)),
    ok("padding may be of tabs alone", framed("{}" + "\t" * 9)),
    ok("padding inside the object is white space", framed("{" + " " * 64 + "}")),
    no("a NUL within the padding is refused", framed("{}  \0 "), "not valid JSON"),
    no("a vertical tab as padding is refused", framed("{}\v"), "not valid JSON"),
    no("a line separator as padding is refused", framed("{}\u2028"), "not valid JSON"),
    no("an em space as padding is refused", framed("{}\u2003"), "not valid JSON"),
    ok(
        "eight-byte numbers may lie at an odd byte",
        framed(
            f'{{"a":{entry(shape="[1]", offsets="[0,1]")},"b":{entry(chr(34) + "F64" + chr(34), "[1]", "[1,9]")}}}',
            bytes(9),
        ),
    ),
    no(
        "bytes between two tensors for alignment are refused",
        framed(f'{{"a":{entry(shape="[1]", offsets="[0,1]")},"b":{entry(F32, "[1]", "[4,8]")}}}', bytes(8)),
        "begins at byte",
    ),
    no(
        "a byte of alignment before the first is refused",
        one(entry(F16, "[1]", "[2,4]"), bytes(4)),
        "begins at byte",
    ),
    # --- empty tensors
    ok("one empty tensor and no data", empties("[0]")),
    ok("empty tensors of many shapes", empties("[0]", "[0,0]", "[2,0,3]", "[1,1,0]", f"[0,{U64}]")),
    ok("a thousand empty tensors in one place", empties(*["[0]"] * 1000)),
    ok(
        "an empty tensor of every dtype",
        framed(
            "{"
            + ",".join(f'"{d}":{entry(f"{chr(34)}{d}{chr(34)}", "[0]", "[0,0]")}' for d in DTYPE_BITS)
            + "}"
        ),
    ),
    ok(
        "empty tensors before, between and after",
        many(
            ("p", "[0]", "[0,0]"),
            ("a", "[1]", "[0,1]"),
            ("q", "[0]", "[1,1]"),
            ("b", "[1]", "[1,2]"),
            ("r", "[0]", "[2,2]"),
            data=b"xy",
        ),
    ),
    no(
        "an empty tensor behind the end of the data is refused",
        many(("a", "[1]", "[0,1]"), ("b", "[0]", "[2,2]"), data=b"x"),
        "begins at byte",
    ),
    no("a scalar without bytes is refused", one(entry(shape="[]", offsets="[0,0]"), b""), "takes 1 bytes"),
    no("an empty shape of one byte too many is refused", one(entry(shape="[]")), "takes 1 bytes"),
    no(
        "an empty tensor that holds a byte is refused",
        one(entry(shape="[0]", offsets="[0,1]"), b"x"),
        "takes 0 bytes",
    ),
    # --- names
    *(
        ok(f"a name with {what} is only a name", named(name))
        for what, name in (
            ("an escape sequence", "\x1b[2J\x1b]0;title\x07"),
            ("a C1 control", "\x9b31m"),
            ("an override of direction", "\u202egnp.weight"),
            ("isolates", "\u2066a\u2069"),
            ("a zero-width joiner", "a\u200db"),
            ("a byte order mark", "\ufeffa"),
            ("a non-character", "\uffff\U0010ffff"),
            ("a private character", "\ue000"),
            ("combining marks", "e" + "\u0301" * 500),
            ("60,000 letters", "n" * 60_000),
            ("a path", "../../etc/passwd"),
            ("a slash", "/"),
            ("markup", "[bold red]x[/]"),
            ("a format", "{layer}%s%n"),
            ("blanks", "  \t "),
            ("line ends", "a\r\nb"),
        )
    ),
    ok(
        "names that differ in normalisation alone are two names",
        framed(
            '{"\u00e9":'
            + entry(shape="[1]", offsets="[0,1]")
            + ',"e\u0301":'
            + entry(shape="[1]", offsets="[1,2]")
            + "}",
            b"xy",
        ),
    ),
    ok(
        "names that differ in case alone are two names",
        many(("a", "[1]", "[0,1]"), ("A", "[1]", "[1,2]"), data=b"xy"),
    ),
    ok(
        "names that differ in a trailing NUL are two names",
        framed(
            '{"a":'
            + entry(shape="[1]", offsets="[0,1]")
            + ',"a\\u0000":'
            + entry(shape="[1]", offsets="[1,2]")
            + "}",
            b"xy",
        ),
    ),
    *(
        ok(f"a tensor may be called {name!r}", named(name))
        for name in ("__metadata__ ", "__Metadata__", "__metadata", "__proto__", "dtype")
    ),
    no("a tensor cannot be called __metadata__", named("__metadata__"), "the value of shape"),
    # --- dtypes that look like others
    ok("a dtype in Cyrillic is an unknown one", one(entry(dtype='"ВF16"', shape="[9]")), differs=COPIES),
    ok("a dtype with a blank is an unknown one", one(entry(dtype='"U8 "')), differs=COPIES),
    ok("an empty dtype is an unknown one", one(entry(dtype='""')), differs=COPIES),
    ok("a dtype with an escape in it is what it spells", one(entry(dtype=r'"\u00558"'))),
    # --- numbers
    no("an offset of 2^63 is far past the end", one(entry(offsets=f"[0,{2**63}]")), "its data_offsets hold"),
    no("an offset with a plus is refused", one(entry(offsets="[+0,2]")), "not valid JSON"),
    no("an offset in full-width digits is refused", one(entry(offsets="[０,２]")), "not valid JSON"),
    no("an offset in hexadecimal is refused", one(entry(offsets="[0x0,2]")), "not valid JSON"),
    no("an offset with separators is refused", one(entry(offsets="[0,2_0]")), "not valid JSON"),
    no("an offset of minus zero is refused", one(entry(offsets="[-0,2]")), "data_offsets is"),
    no(
        "offsets whose difference alone is right are refused",
        one(entry(offsets=f"[{U64 - 2},{U64}]")),
        "begins at byte",
    ),
    no("a shape of a thousand twos is refused", one(entry(shape="[" + "2," * 999 + "2]")), "2^64"),
    ok("a shape of a thousand ones is a shape", one(entry(shape="[" + "1," * 999 + "2]"))),
    no("a size just past 2^64 bits is refused", one(entry(shape=f"[{2**61}]")), "2^64"),
]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "m"


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_our_verdict(case: Case, scratch: Path) -> None:
    if case.ours:
        read(scratch, case.file)
        return
    with pytest.raises(HeaderError) as caught:
        read(scratch, case.file)
    assert case.says in str(caught.value)
    assert str(caught.value).isprintable()


@needs_recent
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_library_agrees(case: Case, scratch: Path) -> None:
    scratch.write_bytes(case.file)
    assert library_accepts(scratch) == (case.ours != bool(case.differs))


# -------- size: time and memory

MEASURE = """
import re, sys
from pathlib import Path
from qkpatch.checkpoint.files import open_read
from qkpatch.checkpoint.header import read_header
from qkpatch.errors import HeaderError
from qkpatch.cli import app
before = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
try:
    if sys.argv[1] == "header":
        with open_read(Path(sys.argv[2])) as opened:
            read_header(opened, "m")
    else:
        app(sys.argv[1:])
except HeaderError:
    pass
except SystemExit as stop:
    print(stop.code, end=" ", file=sys.stderr)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) - before, file=sys.stderr)
"""


def grown_mib(*arguments: object) -> float:
    """By how much a fresh process grows while it reads a header, or runs a command."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stderr.split()[-1]) / 1024


@linux
class TestSize:
    def test_a_header_at_the_limit_takes_three_times_its_size_and_little_time(self, scratch: Path) -> None:
        scratch.write_bytes(framed(b"{}" + b" " * (MAX_HEADER_SIZE - 2)))
        start = time.perf_counter()
        assert grown_mib("header", scratch) < 3.5 * MAX_HEADER_SIZE / 2**20
        assert time.perf_counter() - start < 20

    def test_a_header_one_byte_above_the_limit_is_not_read(self, scratch: Path) -> None:
        scratch.write_bytes((MAX_HEADER_SIZE + 1).to_bytes(8, "little"))
        os.truncate(scratch, 8 + MAX_HEADER_SIZE + 1)
        assert grown_mib("header", scratch) < 4

    def test_a_name_that_fills_the_header(self, scratch: Path) -> None:
        scratch.write_bytes(framed(f'{{"{"n" * 30_000_000}":{entry(shape="[3]")}}}', b"xy"))
        with scratch.open("rb") as file, pytest.raises(HeaderError) as caught:
            read(scratch, file.read())
        assert len(str(caught.value)) < 600

    def test_lists_in_an_undefined_field_take_no_more_than_thirty_times_their_text(
        self, scratch: Path
    ) -> None:
        size = 6_000_000
        scratch.write_bytes(
            one(entry(shape="[0]", offsets="[0,0]", more=',"x":[' + "[]," * (size // 3) + "0]"), b"")
        )
        assert grown_mib("header", scratch) < 30 * size / 2**20

    def test_a_hundred_thousand_tensors_are_planned(self, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        for i in range(100_000):
            at = len(data) + 2 * i
            header[f"model.layers.{i % 3}.mlp.experts.{i}.up_proj.weight"] = {
                "dtype": "BF16", "shape": [1], "data_offsets": [at, at + 2],
            }  # fmt: skip
        path.write_bytes(framed(json.dumps(header), data + bytes(200_000)))
        start = time.perf_counter()
        assert grown_mib("plan", tiny.path) < 200
        assert time.perf_counter() - start < 20
        costs = json.loads(run("plan", tiny.path, "--json").stdout)["costs"]
        assert costs["expected_peak_memory_bytes"] > 100_000 * 500


# -------- config.json

COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def reconfigure(tiny: Tiny, **changes: object) -> None:
    path = tiny.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestConfig:
    @pytest.mark.parametrize(
        "value", [10**9, 10**30, 2**20, 2**20 + 1, 2**31, 0, -1, 1.5, 1e999, "32", [32], {}, True]
    )
    @pytest.mark.parametrize("key", COUNTS)
    def test_absurd_counts_are_refused(self, key: str, value: object, tiny: Tiny, run: Run) -> None:
        reconfigure(tiny, **{key: value})
        calm(run("plan", tiny.path), 3)

    @linux
    @pytest.mark.parametrize("value", [10**9, 2**20])
    @pytest.mark.parametrize("key", COUNTS)
    def test_memory_does_not_follow_the_counts(self, key: str, value: int, tiny: Tiny) -> None:
        reconfigure(tiny, **{key: value})
        assert grown_mib("plan", tiny.path) < 64

    def test_a_number_of_digits_beyond_python_is_no_number(self, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        path.write_text(path.read_text()[:-1] + f', "num_hidden_layers": {"9" * 5000}}}')
        calm(run("plan", tiny.path), 3)

    @pytest.mark.parametrize("depth", [100, 900, 100_000])
    def test_nesting_anywhere(self, depth: int, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        text = path.read_text()[:-1]
        for key in ("extra", "text_config", "layer_types", "per_layer_config", "num_hidden_layers"):
            path.write_text(f'{text}, "{key}": {"[" * depth}{"]" * depth}}}')
            calm(run("plan", tiny.path), 0, 3)

    def test_a_config_above_the_limit_is_not_read(self, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        os.truncate(path, MAX_JSON_BYTES + 1)
        start = time.perf_counter()
        assert "more than any real file" in calm(run("plan", tiny.path), 3)
        assert time.perf_counter() - start < 5

    @pytest.mark.parametrize(
        "text", ["NaN", "1e999", "-Infinity", "[]", "{}", "null", '"x"', "true", "9" * 400]
    )
    @pytest.mark.parametrize(
        "key", ["query_pre_attn_scalar", "attn_logit_softcapping", "rope_theta", "torch_dtype"]
    )
    def test_numbers_that_are_only_recorded(self, key: str, text: str, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        path.write_text(f'{path.read_text()[:-1]}, "{key}": {text}}}')
        calm(run("plan", tiny.path, "--json"), 0, 3)

    @pytest.mark.parametrize(
        "value",
        ["NaN", "Infinity", "1e999", '{"a": NaN}', r'"\ud800"', "[" * 450 + "]" * 450, "[" * 900 + "]" * 900],
    )
    def test_model_types_that_cannot_be_recorded(self, value: str, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        path.write_text(path.read_text().replace('"llama"', value, 1))
        out = tiny.path.parent / "out"
        calm(run("plan", tiny.path, "--recipe", "llama", "--json"), 3)
        calm(run("apply", tiny.path, "--recipe", "llama", "--modes", 2, "-o", out), 3)
        assert not out.exists()

    def test_a_config_of_17_mib_is_no_config(self, tiny: Tiny, run: Run) -> None:
        """Parsed, it could take 25 times as much."""
        path = tiny.path / "config.json"
        path.write_text(path.read_text() + " " * (17 << 20))
        assert "more than any real file" in calm(run("plan", tiny.path), 3)

    @pytest.mark.parametrize("layer", ["9" * 5000, "-1", "٣", "²", "1.0", "", " 1", "0x1"])
    def test_layer_numbers_that_are_none(self, layer: str, tiny: Tiny, run: Run) -> None:
        reconfigure(tiny, per_layer_config={layer: {"head_dim": 4}})
        calm(run("plan", tiny.path), 0, 3)


# -------- index, paths, links


@pytest.fixture
def sharded(tmp_path: Path) -> Tiny:
    return build_tiny(tmp_path / "sharded", shards=[("q_proj",), ("",)])


def point(tiny: Tiny, shard: object) -> None:
    """Make the index say that one query is in ``shard``."""
    path = tiny.path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tiny.name(0, "q")] = shard
    path.write_text(json.dumps(index))


class TestPaths:
    @pytest.mark.parametrize(
        "shard",
        [
            "..", "../", "../model.safetensors", "sub/../../model.safetensors", "/", "//", "//host/share",
            "/proc/self/environ", "..\\m", "C:\\m",
            "\\\\host\\m", "m\0.safetensors", "../" * 500 + "etc/passwd", "\x00", "a\\b",
            "x" * 5000,
        ],
    )  # fmt: skip
    def test_an_index_that_leads_out_is_refused_as_such(self, shard: str, sharded: Tiny, run: Run) -> None:
        point(sharded, shard)
        output = calm(run("apply", sharded.path, "-o", sharded.path.parent / "out"), 3)
        assert "not a plain path inside the checkpoint" in " ".join(output.split())
        assert not (sharded.path.parent / "out").exists()

    @pytest.mark.parametrize(
        "shard",
        [
            "~/m.safetensors", "%2e%2e/m.safetensors", "．．/m.safetensors", "…", "file:m", "http:m", "$HOME",
            "`id`", "-rf",
            "m.safetensors ", "MODEL-00001-OF-00002.SAFETENSORS", "\u202e",
            "model.safetensors.index.json\n",
        ],
    )  # fmt: skip
    def test_an_index_with_other_odd_names_finds_no_such_file(
        self, shard: str, sharded: Tiny, run: Run
    ) -> None:
        point(sharded, shard)
        assert "not there" in calm(run("plan", sharded.path), 3)

    @pytest.mark.parametrize("shard", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
    def test_an_index_that_names_files_of_another_kind(self, shard: str, sharded: Tiny, run: Run) -> None:
        point(sharded, shard)
        calm(run("plan", sharded.path), 3)

    @pytest.mark.parametrize(
        "weight_map", [None, [], "x", 7, {}, {"a": None}, {"a": ["m"]}, {"a": {"m": 1}}, {"a": True}]
    )
    def test_a_weight_map_that_is_none(self, weight_map: object, sharded: Tiny, run: Run) -> None:
        (sharded.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        calm(run("plan", sharded.path), 3)

    def test_an_index_above_the_limit_is_not_read(self, sharded: Tiny, run: Run) -> None:
        os.truncate(sharded.path / "model.safetensors.index.json", MAX_JSON_BYTES + 1)
        assert "more than any real file" in calm(run("plan", sharded.path), 3)

    def test_a_link_that_leaves_the_directory_is_followed_and_its_content_copied(
        self, sharded: Tiny, run: Run
    ) -> None:
        """The Hub cache consists of such links, and people keep shards on another disk."""
        shard = sharded.path / "model-00001-of-00002.safetensors"
        blobs = sharded.path.parent / "blobs"
        blobs.mkdir()
        shard.rename(blobs / "0123")
        shard.symlink_to("../blobs/0123")
        before = (blobs / "0123").read_bytes()
        out = sharded.path.parent / "out"
        calm(run("apply", sharded.path, "-o", out, "--modes", 2), 0)
        assert (out / shard.name).is_file()
        assert not (out / shard.name).is_symlink()
        assert (blobs / "0123").read_bytes() == before
        calm(run("verify", out, "--source", sharded.path), 0)

    def test_a_shard_that_links_to_no_safetensors_file_is_refused_without_a_word_of_its_content(
        self, sharded: Tiny, run: Run
    ) -> None:
        secret = sharded.path.parent / "secret"
        secret.write_text("hunter2 " * 100)
        shard = sharded.path / "model-00001-of-00002.safetensors"
        shard.unlink()
        shard.symlink_to(secret)
        assert "hunter2" not in calm(run("apply", sharded.path, "-o", sharded.path.parent / "out"), 3)
        assert not (sharded.path.parent / "out").exists()


# -------- YAML


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (BOMB, "aliases"),
            ("a: &a {x: *a}", "aliases"),
            ("&a [*a]", "aliases"),
            ("<<: {modes: 1}", "tagged as"),
            ("alpha: !!bool x", "leave the tag out"),
            ('alpha: !!float ""', "leave the tag out"),
            ("!!map [a]", "leave the tag out"),
            ("!!set {a, b}", "leave the tag out"),
            ("!!omap [a: b]", "leave the tag out"),
            ("alpha: !!binary aGk=", "leave the tag out"),
            ("alpha: !!python/name:os.system", "leave the tag out"),
            ("!!python/object/apply:os.system ['true']", "leave the tag out"),
            ("alpha: ! x", "leave the tag out"),
            ("%TAG ! tag:yaml.org,2002:\n---\nalpha: !float x", "leave the tag out"),
            ('recipe: "\\Uffffffff"', "not valid YAML"),
            ('recipe: "\\U00110000"', "not valid YAML"),
            ('recipe: "\\ud800.yaml"', "holds the character"),
            ('recipe: "a\\0.yaml"', "holds the character"),
            ('"\\udfff": 1', "holds the character"),
            ("alpha: 0:00.5", "not a plain decimal number"),
            ("alpha: 0_0.5", "not a plain decimal number"),
            ("modes: 1_000", "not a plain decimal number"),
            ("modes: 0b1", "not a plain decimal number"),
            ("modes: +1", "not a plain decimal number"),
            (f"modes: {'9' * 5000}", "not valid YAML"),
            ("[" * 100_000, "nested too deeply"),
            ("{a: " * 100_000, "nested too deeply"),
            ("- " * 100_000, "nested too deeply"),
            ("? " * 100_000, "nested too deeply"),
            ("a: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
            ("a" * (MAX_BYTES + 1), "bytes of YAML"),
            ("%YAML 9.9\n---\na: 1", "incompatible"),
            ("a\0b: 1", "not valid YAML"),
            ("a: \x1b[31m", "not valid YAML"),
        ],
        ids=lambda text: text[:30],
    )  # fmt: skip
    def test_what_is_refused_in_settings_and_recipes(self, text: str, message: str) -> None:
        for parse in (parse_request, parse_recipe):
            with pytest.raises(RecipeError, match=re.escape(message)):
                parse(text.encode(), "x.yaml")

    @pytest.mark.parametrize("alpha", ["9" * 400, "-" + "9" * 400, "9" * 4000])
    def test_an_alpha_beyond_all_floats(self, alpha: str) -> None:
        with pytest.raises(RecipeError, match="not valid YAML"):
            parse_request(f"alpha: {alpha}".encode(), "edit.yaml")

    def test_ranges_named_over_and_over_do_not_fill_the_memory(self) -> None:
        """A megabyte of YAML has room for a hundred thousand such ranges, each of which takes 40 MB."""
        tracemalloc.start()
        try:
            with pytest.raises(UsageError, match="named twice"):
                parse_ranges("0-999999," * 5 + "0", "--layers")
            assert tracemalloc.get_traced_memory()[1] < 150 << 20
        finally:
            tracemalloc.stop()

    def test_the_largest_alpha_that_is_a_float_is_still_only_out_of_range(self, tiny: Tiny, run: Run) -> None:
        (tiny.path / "edit.yaml").write_text(f"alpha: {10**299}\n")
        assert "is not between 0 and 1" in calm(
            run("plan", tiny.path, "--config", tiny.path / "edit.yaml"), 2
        )

    @pytest.mark.parametrize(
        "text",
        ["a: [" + "x," * 150_000 + "x]", "a:\n" + "\n" * 400_000, '"' + "\\n" * 200_000 + '": 1',
        "{" + "[,{" * 100_000],
        ids=["a long list", "blank lines", "escapes", "broken brackets"],
    )  # fmt: skip
    def test_no_text_takes_long(self, text: str) -> None:
        start = time.perf_counter()
        with contextlib.suppress(RecipeError):
            load_yaml(text.encode(), "x.yaml")
        assert time.perf_counter() - start < 20


# -------- manifests


@pytest.fixture
def out(tiny: Tiny, run: Run, tmp_path: Path) -> Path:
    calm(run("apply", tiny.path, "--layers", "0-1", "--modes", 2, "-o", tmp_path / "out"), 0)
    return tmp_path / "out"


def set_at(document: Any, path: str, value: object) -> None:
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parents:
        document = document[part]
    document[last] = value


ABSURD = [
    0,
    -1,
    2**63,
    10**400,
    1.5,
    -0.0,
    True,
    None,
    "",
    "x",
    "\0",
    "\x1b[31m\u202e",
    "../../x",
    [],
    {},
    [[]],
    [None],
    ["x"],
]
FIELDS = [
    "recipe.name", "edit.attention", "edit.layers", "edit.heads", "edit.skipped_layers", "edit.modes",
    "edit.alpha",
    "edit.channel", "edit.select", "edit.seed", "edit.fold_norm", "edit.from_recipe", "model.num_attention_heads",
    "model.head_dim", "model.rows", "model.logits", "edits", "edits.0", "edits.0.tensor", "edits.0.shard",
    "edits.0.dtype",
    "edits.0.shape", "edits.0.byte_range", "edits.0.sha256_before", "edits.0.sha256_after", "edits.0.scale_tensor",
    "edits.0.key_tensor", "edits.0.heads", "edits.0.heads.0", "edits.0.heads.0.head", "edits.0.heads.0.kv_head",
    "edits.0.heads.0.gains", "files", "files.0", "files.0.name", "files.0.size", "files.0.action", "warnings",
    "run", "tool",
    "recipe", "edit", "model", "source", "compute", "schema",
]  # fmt: skip


class TestManifest:
    @pytest.mark.parametrize("field", FIELDS)
    def test_verify_ends_by_itself_whatever_a_field_holds(
        self, field: str, out: Path, tiny: Tiny, run: Run
    ) -> None:
        good = (out / "qkpatch.json").read_text()
        for value in ABSURD:
            document = json.loads(good)
            set_at(document, field, value)
            (out / "qkpatch.json").write_text(json.dumps(document))
            calm(run("verify", out, "--source", tiny.path), 0, 1, 2, 3, 4)

    @pytest.mark.parametrize(
        ("field", "text"),
        [
            pytest.param("edits.0.byte_range", "[1e999, 0]"),
            pytest.param("edits.0.byte_range", "[0, -1e999]"),
            ("edit.alpha", "1e999"),
            ("edit.modes", "1e999"),
            ("edit.layers", "[1e999]"),
            pytest.param("run", '{"x": ' + "[" * 400 + "]" * 400 + "}"),
            pytest.param("run", '{"x": ' + '{"y": ' * 400 + "1" + "}" * 400 + "}"),
            pytest.param("model.logits", "[" * 900 + "]" * 900),
            ("run", "[" * 100_000),
            ("edit.seed", "9" * 5000),
            ("recipe.name", r'"\ud800"'),
            ("run", '{"a": 1, "a": 2}'),
        ],
    )
    def test_spellings_that_only_text_can_have(
        self, field: str, text: str, out: Path, tiny: Tiny, run: Run
    ) -> None:
        document = json.loads((out / "qkpatch.json").read_text())
        set_at(document, field, "HERE")
        (out / "qkpatch.json").write_text(json.dumps(document).replace('"HERE"', text))
        assert (
            "malformed manifest" in (output := calm(run("verify", out, "--source", tiny.path), 3))
            or "JSON" in output
        )

    @pytest.mark.parametrize(
        ("field", "value", "fault"),
        [
            ("edit.modes", "4", "$.edit.modes: expected int, got str"),
            ("edit.modes", True, "$.edit.modes: expected int, got bool"),
            ("edit.alpha", "0.5", "$.edit.alpha: expected float, got str"),
            ("edit.layers", [1, None], "$.edit.layers[1]: expected int, got NoneType"),
            ("edit.channel", "half", "$.edit.channel: 'half' is not one of full, symmetric, antisymmetric"),
            ("source.commit", 1, "$.source.commit: expected str, got int"),
            ("model.logits", {"scale": []}, "$.model.logits.scale: expected int, got list"),
            ("output", {}, "$.output.max_shard_size: missing"),
            ("edits.0.byte_range", [1], "$.edits[0].byte_range: expected 2 items, got 1"),
            ("edits.0.heads.0.gains", ["x"], "$.edits[0].heads[0].gains[0]: expected float, got str"),
            ("files.0.mine", 1, "$.files[0].mine: unknown key"),
        ],
    )
    def test_a_fault_says_where_it_is(self, field: str, value: Any, fault: str, out: Path) -> None:
        document = json.loads((out / "qkpatch.json").read_text())
        set_at(document, field, value)
        with pytest.raises(CheckpointError) as error:
            Manifest.loads(json.dumps(document).encode(), "m")
        assert error.value.what == f"malformed manifest: {fault}"

    def test_keys_that_other_versions_add_to_a_block_are_kept(self, out: Path, tiny: Tiny, run: Run) -> None:
        document = json.loads((out / "qkpatch.json").read_text())
        for block in ("tool", "compute", "source", "recipe", "edit", "model", "output", "run"):
            document[block] |= {"further": 1, "mine": {"a": [None, 0.5]}}
        (out / "qkpatch.json").write_text(text := canonical_json(document))
        assert Manifest.loads(text.encode(), "m").dumps() == text
        calm(run("verify", out, "--source", tiny.path), 0)

    def test_what_the_first_version_did_not_say_has_a_default(self) -> None:
        raw = (REPO / "tests" / "planning" / "goldens" / "defaults.json").read_bytes()
        manifest = Manifest.loads(raw, "m")
        assert (manifest.source.checked, manifest.source.previous_edit) == (None, None)
        assert not any(file.outside for file in manifest.files)
        assert Manifest.loads(manifest.dumps().encode(), "again") == manifest

    def test_edited_scales_that_source_does_not_store(self, out: Path, tiny: Tiny, run: Run) -> None:
        document = json.loads((out / "qkpatch.json").read_text())
        document["edits"][0] |= {"scale_tensor": "nope", "scale_shard": "model.safetensors"}
        (out / "qkpatch.json").write_text(json.dumps(document))
        calm(run("verify", out, "--source", tiny.path), 1)

    def test_a_request_out_of_a_manifest_can_be_checked(self, out: Path) -> None:
        manifest = Manifest.loads((out / "qkpatch.json").read_bytes(), "m")
        manifest.request()


# -------- names reach the terminal as text


HOSTILE = "model.\x1b[31m\x9b\u202e[bold]\x07.weight"


def test_hostile_tensor_names_in_every_report(tmp_path: Path, run: Run) -> None:
    tiny = build_tiny(tmp_path / "names", extra={HOSTILE: torch.zeros(3)})
    calm(run("plan", tiny.path), 0)
    calm(run("inspect", tiny.path, "--layers", 1), 0)
    out = tmp_path / "out"
    calm(run("apply", tiny.path, "--modes", 2, "-o", out), 0)
    raw = bytearray((out / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin = json.loads(raw[8 : 8 + length])[HOSTILE]["data_offsets"][0]
    raw[8 + length + begin] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    assert "differs outside the planned rows" in " ".join(
        calm(run("verify", out, "--source", tiny.path), 1).split()
    )


# -------- nothing that a file says is ever executed


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((REPO / "qkpatch").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "runpy",
    "transformers",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_ATTRIBUTES = {
    "torch": {"load", "jit", "hub"}, "numpy": {"load"}, "np": {"load"}, "yaml": {"load_all", "unsafe_load",
    "full_load", "Loader"},
    "os": {"system", "popen"},
}  # fmt: skip
# What imports by name, and who hands it a name of its own callers'.
BY_NAME = {"importlib.import_module": {"subject.py"}, "library": set[str]()}


def test_the_package_runs_nothing_out_of_a_file() -> None:
    for path, tree in trees():
        for node in ast.walk(tree):
            place = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES, place
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES, place
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in FORBIDDEN_CALLS, place
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.attr not in FORBIDDEN_ATTRIBUTES.get(node.value.id, set()), place
            if isinstance(node, ast.keyword):
                # What evaluates a model runs its code where the user asks for that.
                is_asked = path.parent.name == "evaluation" and not isinstance(node.value, ast.Constant)
                allowed = {"trust_remote_code"} if is_asked else set[str]()
                assert node.arg not in {"trust_remote_code", "allow_pickle", "shell"} - allowed, place


def test_what_is_imported_by_name_is_named_in_the_code() -> None:
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                said = [node.func, *node.args]
                for part, name in zip(map(ast.unparse, said), said[1:], strict=False):
                    if path.name not in BY_NAME.get(part, {path.name}):
                        assert isinstance(name, ast.Constant), f"{path.name}:{node.lineno}"


def test_the_package_does_not_even_name_what_would() -> None:
    for path in sorted((REPO / "qkpatch").rglob("*.py")):
        remote = "" if path.parent.name == "evaluation" else "|trust_remote_code"
        found = re.search(
            r"torch\.load|pickle\.|(?<![.])\beval\(|\bexec\(|unsafe_load" + remote, path.read_text()
        )
        assert found is None, f"{path.name}: {found}"
    loads = [p.name for p in (REPO / "qkpatch").rglob("*.py") if "yaml.load(" in p.read_text()]
    assert loads == ["strict_yaml.py"]


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_and_code_beside_the_weights_are_carried_over_and_never_run(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    (tiny.path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "pickled")))
    (tiny.path / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'imported')!r})\n")
    reconfigure(tiny, auto_map={"AutoModel": "modeling_evil.Model"}, trust_remote_code=True)
    out = tmp_path / "out"
    calm(run("apply", tiny.path, "--modes", 2, "-o", out), 0)
    calm(run("inspect", tiny.path, "--layers", 1), 0)
    calm(run("verify", out, "--source", tiny.path), 0)
    assert (out / "pytorch_model.bin").read_bytes() == (tiny.path / "pytorch_model.bin").read_bytes()
    assert not (tmp_path / "pickled").exists()
    assert not (tmp_path / "imported").exists()
    (tiny.path / "model.safetensors").unlink()
    calm(run("plan", tiny.path), 3)
    assert not (tmp_path / "pickled").exists()


def test_the_two_tables_of_headers_have_no_case_twice() -> None:
    both = [*test_header.CASES, *CASES]
    assert len({case.what for case in both}) == len(both)
    assert len({case.file for case in both}) == len(both)
