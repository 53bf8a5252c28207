"""Our header parser against the real one: crafted files, random files, damaged files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.numpy

from qkpatch.checkpoint import header
from qkpatch.checkpoint.files import LocalOpenFile, open_read
from qkpatch.checkpoint.header import MAX_HEADER_SIZE, Header, parse_header, read_header
from qkpatch.common.dtypes import DTYPE_BITS
from qkpatch.errors import FileSystemError, HeaderError

SHARD = "model-00001-of-00002.safetensors"

# Older versions know fewer dtypes and refuse some white space; their verdicts are not ours to match.
RECENT = tuple(int(part) for part in re.findall(r"\d+", safetensors.__version__)[:2]) >= (0, 8)
needs_recent = pytest.mark.skipif(not RECENT, reason="compares with safetensors 0.8 or later")

U64 = 2**64 - 1


# -------- building files


def framed(text: str | bytes, data: bytes = b"") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str = '"U8"', shape: str = "[2]", offsets: str = "[0,2]", more: str = "") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(entry_text: str, data: bytes = b"xy") -> bytes:
    """A file with the single tensor ``a``."""
    return framed(f'{{"a":{entry_text}}}', data)


def empty_tensor(more: str) -> bytes:
    """A file with one empty tensor that has fields the format does not define."""
    return one(entry(shape="[0]", offsets="[0,0]", more=f',"x":{more}'), b"")


def many(*tensors: tuple[str, str, str], data: bytes) -> bytes:
    """U8 tensors as (name, shape, offsets)."""
    return framed("{" + ",".join(f'"{n}":{entry(shape=s, offsets=o)}' for n, s, o in tensors) + "}", data)


A = f'"a":{entry()}'
F4, F16, F32, BF16 = '"F4"', '"F16"', '"F32"', '"BF16"'


# -------- the case table


@dataclass(frozen=True)
class Case:
    what: str
    file: bytes
    ours: bool
    says: str = ""  # what our message must contain
    differs: str = ""  # why safetensors sees it the other way


def ok(what: str, file: bytes, differs: str = "") -> Case:
    return Case(what, file, ours=True, differs=differs)


def no(what: str, file: bytes, says: str = "", differs: str = "") -> Case:
    return Case(what, file, ours=False, says=says, differs=differs)


MUST = "the format says that the header MUST begin with '{'"
IGNORES = "it ignores undefined fields"
COPIES = "qkpatch copies bytes whose dtype it does not know"

CASES = [
    # --- the frame
    no("a file of no bytes is refused", b"", "truncated"),
    no("a file shorter than its length field is refused", b"\x02" + bytes(6), "truncated"),
    no("a header of no bytes is refused", bytes(8), "begin with '{'"),
    no("a length past the end of the file is refused", (9).to_bytes(8, "little") + b"{}", "truncated"),
    no("a length one byte past the end is refused", (3).to_bytes(8, "little") + b"{}", "truncated"),
    no("the largest length is refused", b"\xff" * 8 + b"{}", "no safetensors file"),
    no(
        "a length just above the limit is refused",
        (MAX_HEADER_SIZE + 1).to_bytes(8, "little") + b"{}",
        "no safetensors file",
    ),
    no(
        "a length at the limit is still held against the file size",
        MAX_HEADER_SIZE.to_bytes(8, "little") + b"{}",
        "truncated",
    ),
    no("a big-endian length is refused", (2).to_bytes(8, "big") + b"{}", "no safetensors file"),
    no(
        "a Git LFS pointer is refused by name",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "Git LFS pointer",
    ),
    no("an HTML page is refused", b"<!DOCTYPE html><html></html>", "no safetensors file"),
    no("a zip file is refused", b"PK\x03\x04\x00\x00\x08\x08" + bytes(60), "no safetensors file"),
    ok("a header that is an empty object is a file without tensors", framed("{}")),
    no("data without tensors is refused", framed("{}", b"x"), "no tensor owns the last 1 bytes"),
    # --- text
    ok("trailing spaces are padding", framed("{" + A + "}   ", b"xy")),
    ok("trailing newline, tab and return are padding", framed("{" + A + "}\n\t\r ", b"xy")),
    no("a trailing form feed is refused", framed("{" + A + "}\f", b"xy"), "not valid JSON"),
    no("a trailing NUL is refused", framed("{" + A + "}\0", b"xy"), "not valid JSON"),
    no("a trailing no-break space is refused", framed("{" + A + "}\u00a0", b"xy"), "not valid JSON"),
    no("a second object behind the first is refused", framed("{" + A + "}{}", b"xy"), "not valid JSON"),
    no("a leading space is refused", framed(" {" + A + "}", b"xy"), "begin with '{'", differs=MUST),
    no("a leading newline is refused", framed("\n{" + A + "}", b"xy"), "begin with '{'", differs=MUST),
    no("a byte order mark is refused", framed("\ufeff{" + A + "}", b"xy"), "begin with '{'"),
    no("UTF-16 is refused", framed("{}".encode("utf-16-le")), "not valid JSON"),
    no("an array as header is refused", framed("[]"), "begin with '{'"),
    no("null as header is refused", framed("null"), "begin with '{'"),
    ok("white space between tokens is allowed", framed('{ "a" :\n\t' + entry() + "\r}", b"xy")),
    no("a trailing comma is refused", framed("{" + A + ",}", b"xy"), "not valid JSON"),
    no("an unfinished object is refused", framed("{" + A, b"xy"), "not valid JSON"),
    no("single quotes are refused", framed("{'a':" + entry() + "}", b"xy"), "not valid JSON"),
    no("a comment is refused", framed("{/**/" + A + "}", b"xy"), "not valid JSON"),
    no("a stray byte is not UTF-8", framed(b'{"\xff":' + entry().encode() + b"}", b"xy"), "utf-8"),
    no("an overlong encoding is not UTF-8", framed(b'{"\xc0\x80":null}'), "utf-8"),
    no("an encoded surrogate is not UTF-8", framed(b'{"\xed\xa0\x80":null}'), "utf-8"),
    no("a header that ends inside a character is refused", framed(b'{"a":null}\xe2\x82'), "utf-8"),
    # --- names
    ok("a name outside ASCII is fine", framed('{"größe.重み":' + entry() + "}", b"xy")),
    ok("an empty name is fine", framed('{"":' + entry() + "}", b"xy")),
    ok("an escaped name is fine", framed(r'{"\u0061\n\/\\ud800\"":' + entry() + "}", b"xy")),
    ok("an escaped NUL in a name is fine", framed(r'{"\u0000":' + entry() + "}", b"xy")),
    no("a raw control character in a name is refused", framed('{"\x01":' + entry() + "}", b"xy")),
    no("a raw newline in a name is refused", framed('{"\n":' + entry() + "}", b"xy")),
    ok("DEL in a name is fine", framed('{"\x7f":' + entry() + "}", b"xy")),
    no("an escape that is none is refused", framed(r'{"\x41":' + entry() + "}", b"xy")),
    no("an escape with a sign in it is refused", framed(r'{"\u+123":' + entry() + "}", b"xy")),
    no("an escape with an underscore in it is refused", framed(r'{"\u1_23":' + entry() + "}", b"xy")),
    ok("a pair of surrogates is one character", framed(r'{"\ud83D\uDE00":' + entry() + "}", b"xy")),
    no("a high surrogate alone is refused", framed(r'{"\ud83d":' + entry() + "}", b"xy"), "surrogate"),
    no("a low surrogate alone is refused", framed(r'{"\uDE00":' + entry() + "}", b"xy"), "surrogate"),
    no(
        "a pair the wrong way round is refused",
        framed(r'{"\ude00\ud83d":' + entry() + "}", b"xy"),
        "surrogate",
    ),
    no(
        "a high surrogate before an escaped backslash is alone",
        framed(r'{"\ud83d\\ude00":' + entry() + "}", b"xy"),
        "surrogate",
    ),
    no(
        "a high surrogate before another pair is alone",
        framed(r'{"\ud83d\ud83d\ude00":' + entry() + "}", b"xy"),
        "surrogate",
    ),
    # --- keys that appear twice
    no(
        "two tensors of one name are refused",
        framed("{" + A + "," + A + "}", b"xy"),
        "appears twice [m: a]",
        differs="it takes the last; a reader that takes the first would find other bytes",
    ),
    no(
        "two tensors of one name are refused even where the first is impossible",
        framed(f'{{"a":{entry(offsets="[9,3]")},{A}}}', b"xy"),
        "appears twice [m: a]",
        differs="it takes the last and never looks at the first",
    ),
    no(
        "two tensors of one name are refused however the name is spelled",
        framed(rf'{{{A},"\u0061":{entry()}}}', b"xy"),
        "appears twice [m: a]",
        differs="it takes the last",
    ),
    no(
        "a field twice in an entry is refused", one(entry(more=',"dtype":"U8"')), "dtype appears twice [m: a]"
    ),
    no(
        "a key twice in __metadata__ is refused",
        framed('{"__metadata__":{"k":"1","k":"2"}}'),
        "k appears twice [m: __metadata__]",
        differs="it takes the last",
    ),
    no(
        "two __metadata__ are refused",
        framed('{"__metadata__":{},"__metadata__":{}}'),
        "__metadata__ appears twice",
    ),
    no(
        "an undefined field twice is refused",
        one(entry(more=',"x":1,"x":2')),
        "x appears twice [m: a]",
        differs=IGNORES,
    ),
    no(
        "a key twice inside an undefined field is refused",
        one(entry(more=',"x":[{"y":1,"y":2}]')),
        "y appears twice [m: a]",
        differs=IGNORES,
    ),
    # --- __metadata__
    ok("__metadata__ alone is a file without tensors", framed('{"__metadata__":{"format":"pt"}}')),
    ok("__metadata__ may be empty", framed('{"__metadata__":{}}')),
    ok("__metadata__ may be null", framed('{"__metadata__":null}')),
    ok("__metadata__ may come last", framed("{" + A + ',"__metadata__":{"k":"v"}}', b"xy")),
    ok("__metadata__ may be spelled with escapes", framed(r'{"\u005f_metadata__":{"k":"v"}}')),
    no("a number in __metadata__ is refused", framed('{"__metadata__":{"k":1}}'), "the value of k"),
    no("a null in __metadata__ is refused", framed('{"__metadata__":{"k":null}}'), "the value of k"),
    no("an object in __metadata__ is refused", framed('{"__metadata__":{"k":{}}}'), "the value of k"),
    no("__metadata__ as string is refused", framed('{"__metadata__":"x"}'), "[m: __metadata__]"),
    no("__metadata__ as array is refused", framed('{"__metadata__":[]}'), "[m: __metadata__]"),
    no("half a surrogate in __metadata__ is refused", framed(r'{"__metadata__":{"k":"\ud800"}}'), "surrog"),
    # --- entries
    no("null as entry is refused", one("null", b""), "not a JSON object [m: a]"),
    no("a number as entry is refused", one("1", b""), "not a JSON object [m: a]"),
    no("an entry without fields is refused", one("{}", b""), "[m: a]"),
    no("an entry without dtype is refused", one('{"shape":[2],"data_offsets":[0,2]}'), "dtype is missing"),
    no("an entry without shape is refused", one('{"dtype":"U8","data_offsets":[0,2]}'), "shape is missing"),
    no("an entry without offsets is refused", one('{"dtype":"U8","shape":[2]}'), "data_offsets is missing"),
    no(
        "an entry as array is refused",
        one('["U8",[2],[0,2]]'),
        "not a JSON object",
        differs="its JSON layer reads a struct from an array by accident",
    ),
    no("an entry as longer array is refused", one('["U8",[2],[0,2],0]'), "not a JSON object"),
    ok("the fields may come in any order", one('{"data_offsets":[0,2],"shape":[2],"dtype":"U8"}')),
    ok("an undefined field is ignored", one(entry(more=',"x":[1.5,-1,1e9,true,null,"s",{"y":{}}]'))),
    ok("a field in other case is an undefined one", one(entry(more=',"Shape":[7]'))),
    no("an undefined NaN is refused", empty_tensor("NaN"), "NaN is no finite number"),
    no("an undefined Infinity is refused", empty_tensor("-Infinity"), "no finite number"),
    no("an undefined number past all doubles is refused", empty_tensor("1e999"), "no finite number"),
    no("an undefined integer of 5000 digits is refused", empty_tensor("9" * 5000), "no finite number"),
    ok("an undefined integer of 300 digits is ignored", empty_tensor("9" * 300)),
    ok("an undefined fraction of 5000 digits is ignored", empty_tensor("0." + "9" * 5000)),
    no("the largest double is refused", empty_tensor("1.7976931348623158e308"), "no finite number"),
    no(
        "an undefined number near the largest double is refused",
        empty_tensor("-1.5e308"),
        "no finite number",
        differs="where it stops depends on how the number is written; 1e308 is the round bound below",
    ),
    no("half a surrogate in an undefined field is refused", empty_tensor(r'["\udfff"]'), "surrogate"),
    ok("127 levels of arrays are read", empty_tensor("[" * 125 + "]" * 125)),
    no("128 levels of arrays are refused", empty_tensor("[" * 126 + "]" * 126), "too deeply [m: a]"),
    ok("127 levels of objects are read", empty_tensor('{"y":' * 125 + "1" + "}" * 125)),
    no("128 levels of objects are refused", empty_tensor('{"y":' * 126 + "1" + "}" * 126), "too deeply"),
    no("a hundred thousand levels are refused", empty_tensor("[" * 100_000 + "]" * 100_000)),
    no("a hundred thousand open levels are refused", framed('{"a":' * 100_000)),
    # --- dtype
    no("a dtype that is a number is refused", one(entry(dtype="4")), "dtype is missing or not a string"),
    no("a dtype that is null is refused", one(entry(dtype="null")), "dtype is missing or not a string"),
    no(
        "a dtype as object is refused",
        one(entry(dtype='{"U8":null}')),
        "dtype is missing or not a string",
        differs="its JSON layer reads an enum from an object by accident",
    ),
    ok("an unknown dtype passes", one(entry(dtype='"NF4"', shape="[3]")), differs=COPIES),
    ok("a known dtype in lower case is an unknown one", one(entry(dtype='"u8"')), differs=COPIES),
    no("an unknown dtype may not leave a hole", one(entry(dtype='"NF4"', offsets="[1,2]")), "byte"),
    no("an unknown dtype may not pass the end", one(entry(dtype='"NF4"', offsets="[0,3]")), "truncated"),
    no("an unknown dtype needs a sane shape", one(entry(dtype='"NF4"', shape="[-1]")), "shape"),
    # --- shape
    ok("a scalar has an empty shape", one(entry(dtype='"I16"', shape="[]"))),
    no("a shape too small for its range is refused", one(entry(shape="[1]")), "U8 [1] takes 1 bytes"),
    no(
        "a shape too large for its range is refused",
        one(entry(shape="[3]")),
        "its data_offsets hold 2 [m: a]",
    ),
    no("a negative length is refused", one(entry(shape="[-2]")), "shape is"),
    no("two negative lengths are refused", one(entry(shape="[-1,-2]")), "shape is"),
    no("a float length is refused", one(entry(shape="[2.0]")), "shape is"),
    no("a length with exponent is refused", one(entry(shape="[2e0]")), "shape is"),
    no("a length of minus zero is refused", one(entry(shape="[-0]", offsets="[0,0]"), b""), "shape is"),
    no("a boolean length is refused", one(entry(shape="[true]", offsets="[0,1]"), b"x"), "shape is"),
    no("a length in quotes is refused", one(entry(shape='["2"]')), "shape is"),
    no("a length with leading zero is refused", one(entry(shape="[02]")), "not valid JSON"),
    no("a null length is refused", one(entry(shape="[null]")), "shape is"),
    no("a shape of null is refused", one(entry(shape="null")), "shape is"),
    no("a shape as number is refused", one(entry(shape="2")), "shape is"),
    no("a nested shape is refused", one(entry(shape="[[2]]")), "shape is"),
    no("a length of 2^64 is refused", one(entry(shape=f"[{U64 + 1},0]", offsets="[0,0]"), b""), "shape is"),
    no("a length of 5000 digits is refused", one(entry(shape=f"[{'9' * 5000}]")), "no finite number"),
    ok("a zero saves the lengths after it", one(entry(shape=f"[0,{U64},2]", offsets="[0,0]"), b"")),
    ok("a zero saves one huge length before it", one(entry(shape=f"[{U64},0]", offsets="[0,0]"), b"")),
    no("a product past 2^64 is refused", one(entry(shape=f"[{U64},2,0]", offsets="[0,0]"), b""), "2^64"),
    no(
        "a product that wraps around to the right size is refused",
        one(entry(shape="[4294967296,4294967296]", offsets="[0,0]"), b""),
        "2^64",
    ),
    no(
        "a size in bits that wraps around is refused",
        one(entry(dtype=F32, shape="[576460752303423488]", offsets="[0,0]"), b""),
        "2^64",
    ),
    no(
        "nearly 2^64 bytes in eight tensors are refused",
        many(
            *((str(i), f"[{2**61 - 1}]", f"[{i * (2**61 - 1)},{(i + 1) * (2**61 - 1)}]") for i in range(8)),
            data=b"",
        ),
        "truncated",
    ),
    ok("four F4 fill two bytes", one(entry(dtype=F4, shape="[4]"))),
    no("three F4 end inside a byte", one(entry(dtype=F4, shape="[3]")), "takes 1.5 bytes"),
    ok("four F6 fill three bytes", one(entry(dtype='"F6_E3M2"', shape="[4]", offsets="[0,3]"), b"xyz")),
    no("two F6 end inside a byte", one(entry(dtype='"F6_E2M3"', shape="[2]")), "takes 1.5 bytes"),
    # --- data_offsets
    no("one offset is refused", one(entry(offsets="[0]")), "data_offsets is"),
    no("three offsets are refused", one(entry(offsets="[0,2,2]")), "data_offsets is"),
    no("no offsets are refused", one(entry(offsets="[]")), "data_offsets is"),
    no("offsets of null are refused", one(entry(offsets="null")), "data_offsets is"),
    no("offsets as object are refused", one(entry(offsets='{"0":0,"1":2}')), "data_offsets is"),
    no("a float offset is refused", one(entry(offsets="[0,2.0]")), "data_offsets is"),
    no("a boolean offset is refused", one(entry(offsets="[false,2]")), "data_offsets is"),
    no("a negative offset is refused", one(entry(offsets="[-2,0]")), "data_offsets is"),
    no("an offset of 2^64 is refused", one(entry(offsets=f"[0,{U64 + 1}]")), "data_offsets is"),
    no("offsets the wrong way round are refused", one(entry(offsets="[2,0]")), "end before they begin"),
    no("the largest offsets are refused", one(entry(shape="[0]", offsets=f"[{U64},{U64}]"), b""), "begins"),
    no("a hole at the start is refused", one(entry(shape="[1]", offsets="[1,2]")), "[m: a]"),
    no("bytes after the last tensor are refused", one(entry(), b"xyz"), "no tensor owns the last 1"),
    no("a missing last byte is refused", one(entry(), b"x"), "truncated: its header declares"),
    no("missing data are refused", one(entry(), b""), "truncated: its header declares"),
    no(
        "a hole between tensors is refused",
        many(("a", "[1]", "[0,1]"), ("b", "[1]", "[2,3]"), data=b"xyz"),
        "[m: b]",
    ),
    no(
        "overlapping tensors are refused",
        many(("a", "[2]", "[0,2]"), ("b", "[2]", "[1,3]"), data=b"xyz"),
        "[m: b]",
    ),
    no(
        "two tensors on the same bytes are refused",
        many(("a", "[2]", "[0,2]"), ("b", "[2]", "[0,2]"), data=b"xy"),
        "[m: b]",
    ),
    no(
        "a tensor inside another is refused",
        many(("a", "[3]", "[0,3]"), ("b", "[1]", "[1,2]"), data=b"xyz"),
        "[m: b]",
    ),
    no(
        "an empty tensor inside another is refused",
        many(("a", "[2]", "[0,2]"), ("b", "[0]", "[1,1]"), data=b"xy"),
        "[m: b]",
    ),
    ok(
        "empty tensors may share a place on a boundary",
        many(
            ("a", "[2]", "[0,2]"),
            ("b", "[0]", "[0,0]"),
            ("c", "[0]", "[2,2]"),
            ("d", "[0]", "[2,2]"),
            data=b"xy",
        ),
    ),
    ok(
        "names need not be in the order of the offsets",
        many(("b", "[1]", "[2,3]"), ("a", "[2]", "[0,2]"), data=b"xyz"),
    ),
    ok(
        "a tensor need not be aligned",
        framed(f'{{"a":{entry(shape="[1]", offsets="[0,1]")},"b":{entry(F32, "[1]", "[1,5]")}}}', b"01234"),
    ),
]


def ids(case: Case) -> str:
    return case.what


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "m"


def read(path: Path, content: bytes, shard: str = "m") -> Header:
    path.write_bytes(content)
    with open_read(path) as file:
        return read_header(file, shard)


def library_accepts(path: Path) -> bool:
    """The verdict of safetensors, which must be the same from memory and from a file."""
    try:
        safetensors.deserialize(path.read_bytes())
        in_memory = True
    except safetensors.SafetensorError:
        in_memory = False
    try:
        with safetensors.safe_open(path, "numpy"):
            on_disk = True
    except safetensors.SafetensorError:
        on_disk = False
    assert in_memory == on_disk
    return on_disk


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_our_verdict(case: Case, scratch: Path) -> None:
    if case.ours:
        parsed = read(scratch, case.file)
        assert sum(ref.nbytes for ref in parsed.tensors.values()) == parsed.file_size - parsed.data_start
    else:
        with pytest.raises(HeaderError) as caught:
            read(scratch, case.file)
        assert case.says in str(caught.value)
        assert caught.value.fix


@needs_recent
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_library_agrees(case: Case, scratch: Path) -> None:
    scratch.write_bytes(case.file)
    assert library_accepts(scratch) == (case.ours != bool(case.differs))


def test_the_table_is_large_and_its_sentences_are_unique() -> None:
    assert len(CASES) >= 50
    assert len({case.what for case in CASES}) == len(CASES)


# -------- dtypes


@needs_recent
def test_we_know_the_dtypes_that_safetensors_knows() -> None:
    with pytest.raises(safetensors.SafetensorError, match="unknown variant") as caught:
        safetensors.deserialize(one(entry(dtype='"?"')))
    assert set(re.findall(r"`(\w+)`", str(caught.value).split("expected one of")[1])) == set(DTYPE_BITS)


@needs_recent
@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_our_widths_are_those_of_safetensors(dtype: str, scratch: Path) -> None:
    size = DTYPE_BITS[dtype]  # bytes, for 8 elements
    content = one(entry(dtype=f'"{dtype}"', shape="[2,4]", offsets=f"[0,{size}]"), bytes(size))
    assert read(scratch, content).tensors["a"].nbytes == size
    assert library_accepts(scratch)


# -------- what we return


def test_the_fields_of_a_header(scratch: Path) -> None:
    text = (
        '{"z":' + entry(BF16, "[1,2]", "[3,7]") + ',"__metadata__":{"format":"pt"},"a":'
        + entry(shape="[3]", offsets="[0,3]") + "}  "
    )  # fmt: skip
    content = framed(text, b"abcWXYZ")
    parsed = read(scratch, content, SHARD)
    start = 8 + len(text)
    assert parsed == Header(
        shard=SHARD,
        data_start=start,
        file_size=len(content),
        tensors={
            "z": header.TensorRef("z", SHARD, "BF16", (1, 2), start + 3, start + 7),
            "a": header.TensorRef("a", SHARD, "U8", (3,), start, start + 3),
        },
        metadata={"format": "pt"},
    )
    assert list(parsed.tensors) == ["z", "a"]
    assert content[parsed.tensors["z"].begin : parsed.tensors["z"].end] == b"WXYZ"
    assert parsed.tensors["z"].nbytes == 4
    assert parse_header(text.encode(), shard=SHARD, file_size=len(content)) == parsed


def test_equal_shapes_and_neighbouring_offsets_are_one_object() -> None:
    """Of 200,000 tensors, that is 35 MB."""
    places = {"a": "[0,1000]", "b": "[1000,2000]"}
    raw = ",".join(f'"{name}":{entry(shape="[1000]", offsets=at)}' for name, at in places.items())
    a, b = parse_header(f"{{{raw}}}".encode(), shard=SHARD, file_size=2010 + len(raw)).tensors.values()
    assert a.shape is b.shape
    assert a.end is b.begin


def test_a_header_cannot_be_changed(scratch: Path) -> None:
    parsed = read(scratch, framed('{"__metadata__":{},' + A + "}", b"xy"))
    mutable: Any = parsed
    with pytest.raises(TypeError):
        mutable.tensors["b"] = parsed.tensors["a"]
    with pytest.raises(TypeError):
        mutable.metadata["k"] = "v"
    with pytest.raises(AttributeError):
        mutable.tensors["a"].begin = 0


@pytest.mark.parametrize(("text", "expected"), [("null", None), ("{}", {}), ('{"k":""}', {"k": ""})])
def test_metadata_keeps_the_difference_between_none_and_empty(
    text: str, expected: dict[str, str] | None, scratch: Path
) -> None:
    assert read(scratch, framed(f'{{"__metadata__":{text}}}')).metadata == expected
    assert read(scratch, framed("{}")).metadata is None


def test_a_remote_header_is_held_against_its_file_size() -> None:
    raw = ("{" + A + "}").encode()
    size = 8 + len(raw) + 2
    assert list(parse_header(raw, shard=SHARD, file_size=size).tensors) == ["a"]
    for wrong in (0, 8, len(raw), size - 1, size + 1):
        with pytest.raises(HeaderError):
            parse_header(raw, shard=SHARD, file_size=wrong)
    with pytest.raises(HeaderError, match="no safetensors file"):
        parse_header(b"{}" + b" " * MAX_HEADER_SIZE, shard=SHARD, file_size=2 * MAX_HEADER_SIZE)


# -------- messages


def test_a_fault_names_shard_and_tensor(scratch: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(HeaderError) as caught:
        read(scratch, framed(f'{{"{name}":{entry(shape="[3]")}}}', b"xy"), SHARD)
    assert caught.value.where == f"{SHARD}: {name}"
    assert caught.value.what == "U8 [3] takes 3 bytes, its data_offsets hold 2"


def test_a_truncated_file_says_both_sizes_and_what_to_do(scratch: Path) -> None:
    content = one(entry(shape="[100]", offsets="[0,100]"), bytes(100))
    with pytest.raises(HeaderError) as caught:
        read(scratch, content[:-40], SHARD)
    sizes = f"its header declares {len(content)} bytes, the file has {len(content) - 40}"
    assert caught.value.what == f"the file is truncated: {sizes}"
    assert caught.value.where == SHARD
    assert caught.value.fix == "download the file again"


def test_names_from_the_file_cannot_write_to_the_terminal(scratch: Path) -> None:
    for name in (r"\u001b[2J\u0007", "\x7f" * 9, r"a\nb", "n" * 100_000):
        with pytest.raises(HeaderError) as caught:
            read(scratch, framed(f'{{"{name}":{entry(shape="[3]")}}}', b"xy"))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600


# -------- reading files


def test_the_file_position_stays(scratch: Path) -> None:
    scratch.write_bytes(one(entry()))
    with scratch.open("rb", buffering=0) as file:
        file.seek(5)
        read_header(LocalOpenFile(file.fileno(), "m"), "m")
        assert file.tell() == 5


def test_short_reads_are_continued(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:3]], offset))
    assert list(read(scratch, one(entry())).tensors) == ["a"]


@pytest.mark.parametrize("size", [50, 4])
def test_a_file_that_shrinks_while_it_is_read(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    real = os.preadv

    def shrink(fd: int, views: list[memoryview], offset: int) -> int:
        done = real(fd, views, offset)
        os.truncate(scratch, size)
        return done

    monkeypatch.setattr(os, "preadv", shrink)
    with pytest.raises(HeaderError, match="became shorter"):
        read(scratch, one(entry()))


def test_what_the_system_cannot_read_is_an_io_fault(tmp_path: Path) -> None:
    with pytest.raises(FileSystemError, match="not a regular file"), open_read(tmp_path):
        pass
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileSystemError, match="directory"):
            read_header(LocalOpenFile(fd, "m"), "m")
    finally:
        os.close(fd)


def test_a_huge_length_is_refused_before_anything_is_read(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = os.preadv

    def spy(fd: int, views: list[memoryview], offset: int) -> int:
        asked.append(len(views[0]))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", spy)
    for length in (MAX_HEADER_SIZE, 2**40, U64):
        with pytest.raises(HeaderError):
            read(scratch, length.to_bytes(8, "little") + b"{}" * 50)
    assert max(asked) <= 64


def test_the_data_are_not_read(scratch: Path) -> None:
    size = 1 << 36
    text = framed(f'{{"a":{entry(shape=f"[{size}]", offsets=f"[0,{size}]")}}}')
    scratch.write_bytes(text)
    os.truncate(scratch, len(text) + size)  # sparse
    with open_read(scratch) as file:
        assert read_header(file, "m").tensors["a"].nbytes == size


# -------- speed


def timed(path: Path, content: bytes) -> float:
    """Seconds of processor time, which other programs do not lengthen."""
    path.write_bytes(content)
    start = time.process_time()
    with open_read(path) as file, contextlib.suppress(HeaderError):
        read_header(file, "m")
    return time.process_time() - start


def big_headers() -> Iterator[tuple[str, bytes]]:
    count = 100_000
    names = [f"model.layers.{i}.mlp.experts.up_proj.weight" for i in range(count)]
    places = {
        name: {"dtype": "BF16", "shape": [1, 1], "data_offsets": [2 * i, 2 * i + 2]}
        for i, name in enumerate(names)
    }
    yield "valid", framed(json.dumps(places), bytes(2 * count))
    yield "backwards", framed(json.dumps(dict(reversed(places.items()))), bytes(2 * count))
    text = json.dumps(places)
    yield "with a name twice", framed(text[:-1] + "," + text[1:], bytes(2 * count))
    yield (
        "all empty in one place",
        framed(json.dumps({name: {**places[name], "shape": [0], "data_offsets": [0, 0]} for name in names})),
    )
    yield "of ones", one(entry(shape="[" + "1," * 1_000_000 + "2]"))
    yield "of large lengths", one(entry(shape="[" + "9999999999," * 500_000 + "2]"))
    yield "one number", one(entry(shape="[" + "9" * 5_000_000 + "]"))
    yield "one fraction", empty_tensor("0." + "9" * 5_000_000)
    yield "escapes", one(entry(more=',"x":"' + r"\ud83d\ude00" * 300_000 + '"'))
    yield "backslashes", one(entry(more=',"x":"' + r"\\" * 1_000_000 + '"'))
    yield "spaces", framed("{" + A + "}" + " " * 5_000_000, b"xy")


@pytest.mark.long
def test_no_header_takes_long(scratch: Path) -> None:
    for kind, content in big_headers():
        assert timed(scratch, content) < 6, kind
