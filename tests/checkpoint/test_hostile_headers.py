"""Headers made to harm: of every odd kind, with the library's verdict beside ours, and of every size."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import test_header
from conftest import Tiny
from hostile import Run, grown_mib, linux
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

from qkpatch.checkpoint.header import MAX_HEADER_SIZE
from qkpatch.common.dtypes import DTYPE_BITS
from qkpatch.errors import HeaderError

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

    @pytest.mark.long
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


def test_the_two_tables_of_headers_have_no_case_twice() -> None:
    both = [*test_header.CASES, *CASES]
    assert len({case.what for case in both}) == len(both)
    assert len({case.file for case in both}) == len(both)
