"""Headers of files that are drawn at random, or damaged, beside the verdict of the library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_header import F4, F16, entry, framed, library_accepts, many, needs_recent, one, read

from qkpatch.checkpoint.header import Header
from qkpatch.common.dtypes import DTYPE_BITS
from qkpatch.errors import HeaderError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "float16",
    "int32",
    "uint32",
    "float32",
    "int64",
    "float64",
]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "m"


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    seed = draw(st.integers(0, 2**32 - 1))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype.kind == "b" else 256, count, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(TEXT.filter(lambda name: name != "__metadata__"), arrays(), max_size=6),
    metadata=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
)
def test_files_the_library_writes(
    tensors: dict[str, np.ndarray], metadata: dict[str, str] | None, scratch: Path
) -> None:
    assume(tensors or metadata != {})  # of nothing and nothing, safetensors 0.8 writes broken JSON
    content = safetensors.numpy.save(tensors, metadata=metadata)
    parsed = read(scratch, content)
    assert parsed.metadata == metadata
    assert parsed.file_size == len(content)
    same_as_the_library(parsed, content)
    assert parsed.tensors.keys() == tensors.keys()
    for name, ref in parsed.tensors.items():
        assert content[ref.begin : ref.end] == tensors[name].tobytes()


def same_as_the_library(parsed: Header, content: bytes) -> None:
    theirs = dict(safetensors.deserialize(content))
    assert parsed.tensors.keys() == theirs.keys()
    for name, ref in parsed.tensors.items():
        assert (ref.name, ref.dtype, list(ref.shape)) == (name, theirs[name]["dtype"], theirs[name]["shape"])
        assert content[ref.begin : ref.end] == theirs[name]["data"]


# What we say where we may be stricter than the library.
STRICTER = ("appears twice", "begin with '{'", "not a JSON object", "no finite number")
SEEDS = [
    one(entry()),
    framed("{}"),
    many(("b", "[1]", "[2,3]"), ("a", "[2]", "[0,2]"), data=b"xyz"),
    framed(
        '{"__metadata__":{"k":"v"},"a":' + entry(F16, "[1,1]", more=',"x":[1,{"y":-0.5e1}]') + "} ", b"xy"
    ),
    framed(rf'{{"\ud83d\ude00":{entry(F4, "[4]")},"é":{entry(shape="[0]", offsets="[2,2]")}}}', b"xy"),
]
BYTE = st.sampled_from(list(b'{}[]",:\\ \n0123456789-+.eEuUdDfFaAnNtx_\x00\x7f\x80\xff')) | st.integers(
    0, 255
)
EDIT = st.tuples(st.sampled_from(["set", "flip", "insert", "delete", "copy"]), st.integers(0, 400), BYTE)


def damaged(content: bytes, edits: list[tuple[str, int, int]], keep_frame: bool) -> bytes:
    """Apply the edits; with ``keep_frame`` to the JSON only, whose length field stays right."""
    length = int.from_bytes(content[:8], "little")
    target = bytearray(content[8 : 8 + length] if keep_frame else content)
    for kind, at, byte in edits:
        at %= len(target) + 1
        if kind == "insert":
            target.insert(at, byte)
        elif kind == "delete":
            del target[at : at + 1 + byte % 4]
        elif kind == "copy":
            target[at:at] = target[at : at + byte % 64]
        elif at < len(target):
            target[at] = byte if kind == "set" else target[at] ^ (1 << byte % 8)
    return framed(bytes(target), content[8 + length :]) if keep_frame else bytes(target)


@pytest.mark.long
@needs_recent
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.sampled_from(SEEDS), edits=st.lists(EDIT, min_size=1, max_size=3), keep_frame=st.booleans())
def test_damaged_files(
    content: bytes, edits: list[tuple[str, int, int]], keep_frame: bool, scratch: Path
) -> None:
    content = damaged(content, edits, keep_frame)
    parsed: Header | None = None
    stricter = laxer = False
    try:
        parsed = read(scratch, content)
        laxer = any(ref.dtype not in DTYPE_BITS for ref in parsed.tensors.values())
    except HeaderError as error:
        stricter = any(reason in error.what for reason in STRICTER)
    if stricter or laxer:
        return
    assert library_accepts(scratch) == (parsed is not None)
    if parsed is not None:
        same_as_the_library(parsed, content)
