"""What is fuzzed, with what, and what counts as a finding. No fuzzer in here: tests run the same mutators.

Each target reads bytes that somebody else wrote. Only its typed errors may leave it. The header parser must
also say what the safetensors library says, but for the differences that ``qkpatch/checkpoint/header.py`` lists.
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import safetensors

from qkpatch.checkpoint.files import LocalOpenFile
from qkpatch.checkpoint.header import MAX_HEADER_SIZE, Header, read_header
from qkpatch.checkpoint.source import _read_config, open_checkpoint
from qkpatch.checkpoint.tree import source_file
from qkpatch.common.dtypes import DTYPE_BITS
from qkpatch.common.json_text import canonical_json
from qkpatch.errors import (
    CheckpointError,
    HeaderError,
    QKPatchError,
    RecipeError,
    UnsupportedError,
    UsageError,
)
from qkpatch.model.tower import read_tower
from qkpatch.planning import blocks
from qkpatch.planning.manifest import EditRecord, FileRecord, HeadRecord, Manifest
from qkpatch.planning.request import parse_request
from qkpatch.recipes.catalogue import backbone, shipped_recipes
from qkpatch.recipes.heads import RowLayout
from qkpatch.recipes.reading import parse_recipe
from qkpatch.spectral.rule import Channel, Select

U64 = 2**64


class FindingError(AssertionError):
    """A verdict that should have been another."""


@dataclass(frozen=True)
class Target:
    """A reader: bytes that it takes, what may come out, how to make bytes of interest."""

    check: Callable[[bytes], None]  # raises FindingError, or anything that is not a typed error
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]


# -------- JSON as written: numbers keep their spelling, objects their repeated keys


@dataclass(frozen=True)
class Raw:
    """A piece of JSON text as it stands."""

    text: str


class Pairs(list[Any]):
    """A JSON object as ``[key, value]`` lists, in order."""


def parse_json(text: str) -> Any:
    """The tree of a JSON text; ``ValueError`` or ``RecursionError`` where it is none."""
    return json.loads(
        text,
        object_pairs_hook=lambda pairs: Pairs([key, value] for key, value in pairs),
        parse_int=Raw,
        parse_float=Raw,
        parse_constant=Raw,
    )


def write_json(tree: Any, rng: random.Random, oddity: float) -> str:
    """The tree as text; with probability ``oddity`` a string is escaped or a token surrounded by white space."""

    def text(value: str) -> str:
        plain = json.dumps(value, ensure_ascii=rng.random() < 0.3)
        if rng.random() >= oddity:
            return plain
        return '"' + "".join(_escaped(c, rng) for c in value) + '"'

    def space() -> str:
        return rng.choice((" ", "\n", "\t", "\r", "  ")) if rng.random() < oddity / 2 else ""

    def write(value: Any) -> str:
        if isinstance(value, Raw):
            return value.text
        if isinstance(value, str):
            return text(value)
        if isinstance(value, Pairs):
            return "{" + ",".join(f"{space()}{text(k)}{space()}:{write(v)}" for k, v in value) + space() + "}"
        if isinstance(value, list):
            return "[" + ",".join(space() + write(v) for v in value) + space() + "]"
        return json.dumps(value)

    return write(tree)


def _escaped(character: str, rng: random.Random) -> str:
    if rng.random() < 0.5 or character in '"\\' or character < " ":
        units = character.encode("utf-16-be", "surrogatepass")
        codes = [int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2)]
        return "".join(rng.choice((f"\\u{code:04x}", f"\\u{code:04X}")) for code in codes)
    return "\\/" if character == "/" else character


NUMBERS = [
    *(str(n) for n in (0, 1, 2, 3, 4, 7, 8, 16, 127, 128, 255, 256, 10**6, 2**20, 2**31, 2**32, 2**53, 2**62)),
    *(str(n) for n in (2**63 - 1, 2**63, U64 - 1, U64, U64 + 1, 2**61, 2**60, 10**9, 10**18, 10**19, 10**20)),
    "-0", "-1", "-2", str(-(2**63)), str(-(2**63) - 1), "00", "01", "+1", "1.", ".5", "0x10", "1_0", "٣",
    "0.0", "1.0", "2.0", "2e0", "2E+0", "-0.0", "1e5", "1e308", "-1e308", "1.7976931348623157e308", "1.5e308",
    "1e309", "1e-400", "1e400", "1e99999999999", "0e999", "NaN", "Infinity", "-Infinity", "9" * 25, "9" * 310,
    "1" + "0" * 400, "0." + "9" * 400, "9" * 5000, "1e+", "--1", "1e",
]  # fmt: skip
LITERALS = ["null", "true", "false", "nul", "True", "{}", "[]", '""', "[[]]", "{", "}", "[", "]", ""]
STRINGS = [
    "", "a", "b", "__metadata__", "dtype", "shape", "data_offsets", "format", "pt", "é", "重み", "\U0001f600",
    "\0", "\n", "\x1b[31m", "\x7f", "\x9b", "\u200f", "\u202e", "\ufeff", "\ud800", "\udc00", "\ude00\ud83d",
    "x" * 300, "../x", "/etc/passwd", "a/b", ".", "\\", '"', "model.safetensors", "0", "1.5", *DTYPE_BITS, "f32", "NF4",
]  # fmt: skip
ESCAPES = [
    "\\u12",
    "\\u+123",
    "\\ud83d",
    "\\udE00",
    "\\ud83d\\ud83d\\ude00",
    "\\x41",
    "\\",
    "\\U0001f600",
    "\t",
    "\0",
]


def _nested(rng: random.Random) -> Raw:
    depth = rng.choice((2, 60, 122, 123, 124, 125, 125, 126, 126, 127, 128, 400, 900, 3000))
    opening, inner, closing = rng.choice((("[", "", "]"), ('{"y":', "1", "}"), ('[{"y":', "0", "}]")))
    return Raw(opening * depth + inner + closing * (depth - (rng.random() < 0.05)))


def _any_value(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.45:
        return Raw(rng.choice(NUMBERS))
    if kind < 0.6:
        return Raw(rng.choice(LITERALS))
    if kind < 0.85:
        return rng.choice(STRINGS)
    if kind < 0.9:
        return Raw('"' + rng.choice(("", "a", "U8")) + rng.choice(ESCAPES) + '"')
    if kind < 0.95:
        return _nested(rng)
    return rng.choice(([Raw("0"), Raw("2")], Pairs([["U8", Raw("null")]]), Pairs(), [], [Raw("2")], ["U8"]))


def _containers(tree: Any) -> list[list[Any]]:
    """All arrays and objects of the tree."""
    found: list[list[Any]] = []
    queue = [tree]
    while queue:
        value = queue.pop()
        if isinstance(value, list):
            found.append(value)
            queue.extend(pair[1] for pair in value) if isinstance(value, Pairs) else queue.extend(value)
    return found


def _copied(tree: Any) -> Any:
    if isinstance(tree, Pairs):
        return Pairs([key, _copied(value)] for key, value in tree)
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """One change somewhere in the tree, in place; the new root."""
    containers = _containers(tree)
    if not containers or rng.random() < 0.01:
        return _any_value(rng)
    place = rng.choice(containers)
    is_object = isinstance(place, Pairs)
    at = rng.randrange(len(place)) if place else 0
    action = rng.random()
    if not place or action < 0.12:
        new = _any_value(rng)
        place.insert(at, [rng.choice(STRINGS), new] if is_object else new)
    elif action < 0.22:
        del place[at]
    elif action < 0.34:
        place.insert(rng.randrange(len(place) + 1), _copied(rng.choice(place)))
    elif action < 0.40:
        other = rng.randrange(len(place))
        place[at], place[other] = place[other], place[at]
    elif action < 0.52 and is_object:
        place[at][0] = rng.choice(STRINGS) if rng.random() < 0.6 else place[at][0] + rng.choice(STRINGS)
    else:
        old = place[at][1] if is_object else place[at]
        new = _changed(old, rng)
        if is_object:
            place[at][1] = new
        else:
            place[at] = new
    return tree


def _changed(old: Any, rng: random.Random) -> Any:
    action = rng.random()
    if isinstance(old, Raw) and re.fullmatch(r"-?[0-9]{1,25}", old.text) and action < 0.6:
        n = int(old.text)
        new = rng.choice((n + 1, n - 1, 2 * n, n // 2, -n, n + 8, n ^ (1 << rng.randrange(64)), n + U64))
        return Raw(f"{new}{rng.choice(('', '', '', '.0', 'e0', 'E1'))}")
    if isinstance(old, str) and action < 0.5:
        at = rng.randrange(len(old) + 1)
        return old[:at] + rng.choice(STRINGS) + old[at + rng.randrange(2) :]
    if action < 0.6:
        return rng.choice(([old], Pairs([["x", old]]), Pairs([[rng.choice(STRINGS), old]])))
    return _any_value(rng)


TOKENS = [
    t.encode("utf-8", "surrogatepass")
    for t in (*NUMBERS, *LITERALS, *ESCAPES, ",", ":", '"', "\\", " ", "\n")
]


def mutate_bytes(data: bytes, rng: random.Random, tokens: Sequence[bytes] = tuple(TOKENS)) -> bytes:
    """Some changes of single bytes, of ranges, and of tokens."""
    target = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(target) + 1)
        action = rng.randrange(7)
        if action == 0 and at < len(target):
            target[at] ^= 1 << rng.randrange(8)
        elif action == 1 and at < len(target):
            target[at] = rng.randrange(256)
        elif action == 2:
            del target[at : at + rng.choice((1, 1, 2, 4, 16))]
        elif action == 3:
            target[at:at] = target[at : at + rng.choice((1, 4, 16, 64))]
        elif action == 4:
            start = rng.randrange(len(target) + 1)
            target[at:at] = target[start : start + rng.choice((4, 16, 64))]
        elif action == 5:
            target[at:at] = rng.choice(tokens)
        else:
            token = rng.choice(tokens)
            target[at : at + len(token)] = token
    return bytes(target)


def change_json(
    text: bytes, rng: random.Random, rework: Callable[[Any], Any] = lambda tree: tree
) -> bytes | None:
    """Changes to the tree of a JSON text, and what ``rework`` makes of it; None where the text is no JSON."""
    try:
        tree = parse_json(text.decode("utf-8"))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            tree = mutate_tree(tree, rng)
        return write_json(rework(tree), rng, rng.choice((0, 0, 0.1, 0.4))).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Changes to the tree of a JSON text, or to its bytes."""
    changed = change_json(data, rng) if rng.random() < 0.85 else None
    return mutate_bytes(data, rng) if changed is None else changed


# -------- headers


def framed(text: str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + data


def header_seeds() -> list[bytes]:
    """Files that are valid, or just not."""

    def entry(dtype: str, shape: str, offsets: str, more: str = "") -> str:
        return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}'

    every, at = [], 0
    for dtype, bits in DTYPE_BITS.items():
        every.append(f'"{dtype}":{entry(dtype, "[2,4]", f"[{at},{at + bits}]")}')
        at += bits
    one = entry("U8", "[2]", "[0,2]")
    deep = [entry("U8", "[2]", "[0,2]", f',"x":{"[" * depth}{"]" * depth}') for depth in (125, 126)]
    undefined = entry("U8", "[2]", "[0,2]", ',"x":[1,-2.5e3,{"y":[true,null]}]')
    return [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        framed("{}"),
        framed(f'{{"a":{one}}}', b"xy"),
        framed(f'{{"__metadata__":{{"format":"pt","k":""}},"a":{one}}}   ', b"xy"),
        framed('{"__metadata__":null}'),
        framed(
            f'{{"b":{entry("U8", "[1]", "[2,3]")},"a":{one},"c":{entry("F32", "[0,7]", "[3,3]")}}}', b"xyz"
        ),
        framed(f'{{"a":{entry("F4", "[4]", "[0,2]")},"b":{entry("F6_E2M3", "[2,2]", "[2,5]")}}}', b"vwxyz"),
        framed(
            f'{{"a":{entry("I16", "[]", "[0,2]")},"é\U0001f600":{entry("BF16", "[1,1,1]", "[2,4]")}}}',
            b"wxyz",
        ),
        framed(rf'{{"\ud83d\ude00\n\u0000":{entry("U8", f"[0,{U64 - 1}]", "[0,0]")}}}'),
        framed(f'{{"a":{undefined}}}', b"xy"),
        *(framed(f'{{"a":{nested}}}', b"xy") for nested in deep),  # the library reads the first
        framed(f'{{"a":{one},"\\u0061":{one}}}', b"xy"),
        framed(f'{{"a":["U8",[2],[0,2]],"b":{entry("NF4", "[5]", "[0,2]")}}}', b"xy"),
        framed("{" + ",".join(every) + "}", bytes(at)),
        framed(
            "{" + ",".join(f'"{i}":{entry("U8", "[1]", f"[{i},{i + 1}]")}' for i in range(30)) + "}",
            bytes(30),
        ),
    ]


def _repaired(tree: Any) -> int | None:
    """Give the tensors offsets that fit their shapes, one behind the other; the bytes they take."""
    at = 0
    for name, entry in tree:
        if name == "__metadata__" or not isinstance(entry, Pairs):
            continue
        fields = {key: value for key, value in entry if isinstance(key, str)}
        shape, bits = fields.get("shape"), 1
        if (
            not isinstance(shape, list)
            or isinstance(shape, Pairs)
            or not isinstance(fields.get("dtype"), str)
        ):
            continue
        for length in shape:
            if not isinstance(length, Raw) or not re.fullmatch("[0-9]{1,20}", length.text):
                return None
            bits *= int(length.text)
        bits *= DTYPE_BITS.get(fields["dtype"], 8)
        if bits > 8 << 12:
            return None
        for pair in entry:
            if pair[0] == "data_offsets":
                pair[1] = [Raw(str(at)), Raw(str(at + bits // 8))]
        at += bits // 8
    return at


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Changes within the frame, whose length field mostly stays right; sometimes of the frame itself."""
    length = int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.04 or length > len(data) - 8 or len(data) < 8:
        if rng.random() < 0.5:
            return mutate_bytes(data, rng)
        length = max(0, len(data) - 8 - rng.choice((0, 0, 1, 2, 3)))
    raw, payload = data[8 : 8 + length], data[8 + length :]
    if kind < 0.07:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data) - 8, len(data) - 7, MAX_HEADER_SIZE,
                            MAX_HEADER_SIZE + 1, 2**31, 2**32 + length, 2**63, U64 - 1, U64 - 8))  # fmt: skip
        return (wrong % U64).to_bytes(8, "little") + raw + payload
    if kind < 0.12:
        change = rng.choice((-1, 1, 1, 2, 8, -len(payload)))
        return framed(raw, payload + b"z" * change if change > 0 else payload[:change])
    if kind < 0.16:
        before = rng.choice((b" ", b"\n", b"\xef\xbb\xbf", b"\0"))
        after = rng.choice((b" ", b"\n\t\r ", b"\0", b"\f", b"\xc2\xa0", b"{}", b",", b"\x1f", b" " * 70))
        return framed(before + raw if rng.random() < 0.2 else raw + after, payload)
    if kind < 0.30:
        return framed(mutate_bytes(raw, rng), payload)
    taken: list[int] = []

    def fit(tree: Any) -> Any:
        if isinstance(tree, Pairs) and rng.random() < 0.6 and (size := _repaired(tree)) is not None:
            taken.append(size)
            return mutate_tree(tree, rng) if rng.random() < 0.15 else tree
        return tree

    changed = change_json(raw, rng, fit)
    if changed is None:
        return framed(mutate_bytes(raw, rng), payload)
    return framed(changed, (payload + bytes(taken[0]))[: taken[0]] if taken else payload)


def our_verdict(content: bytes) -> Header | HeaderError:
    """What :func:`read_header` makes of a file with this content."""
    fd = _scratch()
    os.ftruncate(fd, 0)
    os.pwrite(fd, content, 0)
    try:
        return read_header(LocalOpenFile(fd, "m"), "m")
    except HeaderError as error:
        return error


def library(content: bytes) -> dict[str, Any]:
    """The tensors that the safetensors library finds; ``SafetensorError`` where it refuses."""
    return dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]


@cache
def _scratch() -> int:
    return os.memfd_create("fuzz")


def check_header(content: bytes) -> None:
    """Our verdict beside the library's."""
    ours = our_verdict(content)
    try:
        theirs: dict[str, Any] | None = library(content)
        reason = ""
    except safetensors.SafetensorError as error:
        theirs, reason = None, str(error)
    if isinstance(ours, HeaderError):
        if not str(ours).isprintable() or len(str(ours)) > 800 or not ours.fix:
            raise FindingError(f"a message that is not fit for a terminal: {ours!s:.900}")
        if theirs is not None and not is_documented(content):
            raise FindingError(f"we refuse ({ours}) what the library accepts")
    elif theirs is None:
        _check_laxer(content, ours, reason)
    else:
        _check_same(content, ours, theirs)
    if zlib.crc32(content) % 16 == 0:  # dearer, and so far always the same as from memory
        try:
            with safetensors.safe_open(f"/proc/self/fd/{_scratch()}", "numpy") as file:
                if isinstance(ours, Header) and (file.metadata() or None) != (
                    dict(ours.metadata or {}) or None
                ):
                    raise FindingError(f"metadata {ours.metadata}, the library has {file.metadata()}")
        except safetensors.SafetensorError:
            if theirs is not None:
                raise FindingError("the library reads it from memory and not from a file") from None


def _check_same(content: bytes, ours: Header, theirs: dict[str, Any]) -> None:
    if ours.tensors.keys() != theirs.keys():
        raise FindingError(f"tensors {list(ours.tensors)}, the library has {list(theirs)}")
    for name, ref in ours.tensors.items():
        found = theirs[name]
        here = (ref.dtype, list(ref.shape), content[ref.begin : ref.end])
        if here != (found["dtype"], found["shape"], bytes(found["data"])):
            raise FindingError(f"{name!r} is {here}, the library has {found}")


def _check_laxer(content: bytes, ours: Header, reason: str) -> None:
    """We may accept what the library refuses for an unknown dtype, and for nothing besides it."""
    unknown = [ref for ref in ours.tensors.values() if ref.dtype not in DTYPE_BITS]
    if not unknown:
        raise FindingError(f"we accept what the library refuses: {reason}")
    raw = content[8 : ours.data_start]
    document = json.loads(raw)
    for ref in unknown:
        document[ref.name] |= {"dtype": "U8", "shape": [ref.nbytes]}
    try:
        library(framed(json.dumps(document), content[ours.data_start :]))
    except safetensors.SafetensorError as error:
        raise FindingError(f"beside its unknown dtype the library refuses: {error}") from None
    # The same text but for these dtypes must at least be JSON to the library.
    text, times = raw.decode("utf-8"), 0
    for ref in unknown:
        text, n = re.subn(rf'"dtype"(\s*):(\s*){re.escape(json.dumps(ref.dtype))}', r'"dtype"\1:\2"U8"', text)
        times += n
    if times >= len(unknown):
        try:
            library(framed(text, content[ours.data_start :]))
        except safetensors.SafetensorError as error:
            if "invalid JSON" in str(error) and "unknown variant" not in str(error):
                raise FindingError(f"with known dtypes the library cannot read the JSON: {error}") from None


def is_documented(content: bytes) -> bool:
    """Whether a file shows one of the things that only we refuse; found without the parser that refuses them."""
    raw = content[8 : 8 + int.from_bytes(content[:8], "little")]
    if not raw.startswith(b"{"):
        return True
    seen = {"twice": False, "large": False}

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen["twice"] |= len({key for key, _ in items}) < len(items)
        return dict(items)

    def number(digits: str) -> float:
        value = float(digits)
        seen["large"] |= not abs(value) <= 1e308
        return value

    document = json.loads(raw, object_pairs_hook=pairs, parse_int=number, parse_float=number)
    entries = [entry for name, entry in document.items() if name != "__metadata__"]
    return (
        seen["twice"]
        or seen["large"]
        or any(isinstance(entry, list) or isinstance(entry.get("dtype"), dict) for entry in entries)
    )


# -------- settings in YAML


YAML_TOKENS = [
    b"!!bool x", b'!!float ""', b"!!map [a]", b"!!set {a}", b"!!omap [a: b]", b"!!binary aGk=", b"!!python/none x",
    b"&a ", b"*a", b"<<: {a: b}", b"? ", b"- ", b": ", b"{", b"}", b"[", b"]", b"|", b">-", b"%YAML 9.9\n---\n", b"...",
    b"---\n", b'"\\ud800"', b'"\\0"', b'"\\Uffffffff"', b'"\\x1b[31m"', b"\xe2\x80\xae", b"\x85", b"\t", b"null", b"~",
    b"yes", b"010", b"0x4", b"1:30", b"1:30.5", b"1_0", b".inf", b".nan", b"1e5", b"2020-01-01", b"'", b'"', b"#",
    b"\n", b"[" * 90, b"{a: " * 90, b"- " * 90, b"{layer}", b"{0}", b"0-999999", b"9" * 400, b"9" * 5000, b"= ",
    b"middle-third", b"separate", b"qkv", b"true", b"-1", b"0", b"layers: ", b"modes: ", b"\0", b"\xff",
    b"\xef\xbb\xbf",
]  # fmt: skip


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """Lines moved, repeated, indented or given another value; or bytes changed."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng, YAML_TOKENS)
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        action = rng.randrange(6)
        if action == 0 and len(lines) > 1:
            del lines[at]
        elif action == 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif action == 2:
            lines[at] = rng.choice((b" ", b"  ", b"    ", b"- ")) + lines[at]
        elif action == 3:
            lines[at] = lines[at][rng.choice((1, 2)) :]
        else:
            key, colon, _ = lines[at].partition(b":")
            lines[at] = key + colon + b" " + rng.choice(YAML_TOKENS)
    return b"\n".join(lines)


@cache
def _shortest_recipes() -> list[bytes]:
    folder = Path(__file__).resolve().parents[2] / "configs"
    texts = sorted((path.read_bytes() for path in folder.glob("*.yaml")), key=lambda text: (len(text), text))
    special = [text for text in texts if b"layer_types" in text or b"others:" in text or b"norms:" in text]
    return texts[:6] + special[:4]


def check_recipe(content: bytes) -> None:
    """A recipe, or a :class:`RecipeError`; what it says can be written down again."""
    try:
        recipe = parse_recipe(content, "x.yaml", backbone)
    except RecipeError:
        return
    json.dumps(recipe.to_json(), ensure_ascii=False).encode()


def settings_seeds() -> list[bytes]:
    """``EDIT.yaml`` in several ways."""
    return [
        b"layers: 10-18,20\nheads: 0-3\nmodes: 4\nalpha: 0.5\nchannel: full\nselect: dominant\nseed: 7\n",
        b"recipe: llama\nattention: self\nlayers: [10, 11]\nfold_norm: true\nalpha: 1\nmax_shard_size: 5GB\n",
        b"{layers: 3, heads: 1, alpha: 0.25, select: random, channel: symmetric}",
    ]


def check_settings(content: bytes) -> None:
    """A request that can be checked, or a typed error."""
    try:
        parse_request(content, "edit.yaml")
    except (RecipeError, UsageError):
        return


# -------- manifests


def manifest_seeds() -> list[bytes]:
    """A manifest of a made-up edit, with figures and without."""
    head = HeadRecord(0, 0, (1, 2), 8, (3.5, 2.25), (1.75, 1.125), 0.5, 9.0, 8.0, 0.125, 1e-9, None, (0.5,))
    record = EditRecord(
        layer=1, tensor="model.layers.1.self_attn.q_proj.weight", shard="model.safetensors", dtype="BF16",
        shape=(32, 24), byte_range=(100, 1636), attention="self", num_key_value_heads=2, head_dim=8,
        key_tensor="model.layers.1.self_attn.k_proj.weight", key_shard="model.safetensors",
        sha256_before="0" * 64, sha256_after="1" * 64, heads=(head,),
    )  # fmt: skip
    manifest = Manifest(
        tool=blocks.ToolBlock("qkpatch", "0.1.0", "2.13.0"),
        compute=blocks.ComputeBlock("cpu", "float64"),
        source=blocks.SourceBlock("directory", "tiny", None, None),
        recipe=blocks.RecipeBlock("llama", "2" * 64, {"self": "model.layers.{layer}."}, {}, {}, []),
        edit=blocks.EditBlock(
            attention=("self",), layers=(1, 2, 5), skipped_layers=(), heads=(0, 1), modes=2, modes_edited=2,
            alpha=0.5, channel=Channel.full, select=Select.dominant, seed=0, fold_norm=False, from_recipe=("modes",),
        ),
        model=blocks.ModelBlock(
            model_type="llama", text_model_type="llama", num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, hidden_size=24, orientation="out_in", rows=RowLayout.separate,
            logits={"attention_multiplier": 0.5, "use_qk_norm": True},
        ),
        output=blocks.OutputBlock(None),
        edits=(record,),
        files=(FileRecord("config.json", 9, "copied"), FileRecord("model.safetensors", 2000, "patched")),
        warnings=("one",),
        run=blocks.RunBlock("2026-01-01T00:00:00Z"),
    )  # fmt: skip
    planned = EditRecord.without_figures(record)
    source = replace(manifest.source, previous_edit=manifest.edit)
    bare = replace(
        manifest,
        source=source,
        edits=(planned,),
        output=blocks.OutputBlock(5000),
        files=(),
        run=blocks.RunBlock(),
    )
    return [manifest.dumps().encode(), bare.dumps().encode()]


def check_manifest(content: bytes) -> None:
    """A manifest with which ``verify`` can work, or a :class:`CheckpointError`."""
    try:
        manifest = Manifest.loads(content, "qkpatch.json")
    except CheckpointError:
        return
    text = manifest.dumps()
    if Manifest.loads(text.encode(), "again").dumps() != text:
        raise FindingError("a manifest that changes when it is read again")
    try:
        manifest.request()
    except UsageError:
        return


# -------- index and config


def _tensor_file(names: Sequence[str]) -> bytes:
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)
    }
    return framed(json.dumps(entries), bytes(len(names)))


SHARDS = {"model-00001-of-00002.safetensors": ("a", "b"), "model-00002-of-00002.safetensors": ("c", "sub.d")}


@cache
def _sharded() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="fuzz")
    _kept.append(folder)
    root = Path(folder.name) / "sharded"
    root.mkdir()
    for shard, names in SHARDS.items():
        (root / shard).write_bytes(_tensor_file(names))
    (root / "config.json").write_text("{}")
    return root


_kept: list[tempfile.TemporaryDirectory[str]] = []


def index_seeds() -> list[bytes]:
    """The index that fits the shards."""
    weight_map = {name: shard for shard, names in SHARDS.items() for name in names}
    return [json.dumps({"metadata": {"total_size": 4}, "weight_map": weight_map}).encode()]


def check_index(content: bytes) -> None:
    """Two shards with this index: a checkpoint that tells what of it is wrong, or a :class:`CheckpointError`."""
    root = _sharded()
    (root / "model.safetensors.index.json").write_bytes(content)
    try:
        checkpoint = open_checkpoint(root)
    except CheckpointError:
        return
    stored = {ref.name: ref.shard for ref in checkpoint.tensors.values()}
    said = json.loads(content)["weight_map"]
    if checkpoint.disputed.keys() != {
        name for name in {*said, *stored} if said.get(name) != stored.get(name)
    }:
        raise FindingError("an index that disagrees with the shards was taken")


def config_seeds() -> list[bytes]:
    """Configs of several families, the plain ones and those with layers of different kinds."""
    numbers = {
        "num_hidden_layers": 6, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention"] * 3, "attn_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8, "num_kv_shared_layers": 2, "global_head_dim": 16, "use_qk_norm": True,
    }  # fmt: skip
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **numbers}
    per_layer = {"0": {"head_dim": 4}, "5": {"num_key_value_heads": 1}}
    nested = {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", **numbers}}
    return [
        json.dumps(document).encode()
        for document in (plain, {**plain, "per_layer_config": per_layer}, nested)
    ]


CONFIG_RECIPES = ("llama", "gemma4", "gemma3n", "mllama")


def check_config(content: bytes) -> None:
    """The language model's numbers, which can be written down, or a typed error."""
    path = _sharded().parent / f"{_sharded().name}.json"
    path.write_bytes(content)
    try:
        config = _read_config(source_file(path, path.name))
    except CheckpointError:
        return
    for name in CONFIG_RECIPES:
        recipe = shipped_recipes()[name]
        try:
            recipe.matches(config)
            tower = read_tower(recipe, config, insist=True)
        except (CheckpointError, UnsupportedError):
            continue
        if min(tower.layout.n_heads, tower.layout.d_head, tower.layout.d_model, tower.n_layers) < 1:
            raise FindingError(f"a count below one: {tower}")
        # What the manifest takes from config.json.
        recorded = {"a": config.get("model_type"), "b": tower.text_model_type, "c": tower.logits}
        canonical_json(recorded).encode()


TARGETS = {
    "header": Target(check_header, header_seeds, mutate_header),
    "recipe": Target(check_recipe, _shortest_recipes, mutate_yaml),
    "settings": Target(check_settings, settings_seeds, mutate_yaml),
    "manifest": Target(check_manifest, manifest_seeds, mutate_json),
    "index": Target(check_index, index_seeds, mutate_json),
    "config": Target(check_config, config_seeds, mutate_json),
}


def generate(target: Target, seed: int, count: int) -> list[bytes]:
    """``count`` inputs by the target's mutator alone, the same for the same seed: up to four changes of a seed."""
    rng = random.Random(seed)
    seeds = target.seeds()
    made: list[bytes] = []
    while len(made) < count:
        content = rng.choice(seeds)
        for _ in range(rng.randint(1, 4)):
            content = target.mutate(content, rng)
            made.append(content)
    return made[:count]


def run_one(name: str, content: bytes) -> str | None:
    """What is wrong with the target's answer to ``content``, None where nothing is."""
    try:
        TARGETS[name].check(content)
    except QKPatchError as error:
        return f"{type(error).__name__} is not among the errors it declares: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.300}"
    return None
