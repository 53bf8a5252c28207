"""Inputs that would take minutes, gigabytes or a traceback: each is refused soon, in bounded memory, with a reason.

A bomb is a row of a table. Those that take long are under ``stress``; one of a kind is not.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import Tiny, build_tiny
from fake_hub import TOKEN, FakeHub, Repo, command
from typer.testing import Result

from qkpatch.checkpoint.files import machine_errors, open_read
from qkpatch.checkpoint.header import parse_header
from qkpatch.checkpoint.names import usual_beside
from qkpatch.checkpoint.source import Stored
from qkpatch.common.interrupts import Terminated, unwinding_on_kill
from qkpatch.common.json_text import MAX_VALUES, load_json
from qkpatch.common.strict_yaml import load_yaml
from qkpatch.compare.renaming import spelled_as
from qkpatch.errors import (
    CheckpointError,
    FileSystemError,
    HeaderError,
    QKPatchError,
    UnexpectedError,
    plain,
    redact,
)
from qkpatch.hub import answers
from qkpatch.planning.manifest import Manifest

LONG_NUMBER = "9" * 400
MIB = 1 << 20
REPO_ROOT = Path(__file__).resolve().parents[2]


# -------- files


@dataclass(frozen=True)
class Bomb:
    """A file, what reads it, and what is said."""

    name: str
    content: Callable[[], bytes]
    says: str
    read: Callable[[bytes], object] = lambda raw: load_json(raw, "x.json")


def yaml(raw: bytes) -> object:
    return load_yaml(raw, "x.yaml")


def header(raw: bytes) -> object:
    return parse_header(raw, shard="m", file_size=8 + len(raw))


FILES = [
    Bomb("short entries", lambda: b'{"weight_map":{' + b'"a":"b",' * MAX_VALUES + b'"a":"b"}}', "values"),
    Bomb("empty lists", lambda: b"[" + b"[]," * MAX_VALUES + b"0]", "values"),
    Bomb("empty objects", lambda: b"[" + b'{"":0},' * MAX_VALUES + b"0]", "values"),
    Bomb("numbers", lambda: b"[" + b"0," * MAX_VALUES + b"0]", "values"),
    Bomb("nested lists", lambda: b"[" * 100_000, "JSON"),
    Bomb("nested objects", lambda: b'{"a":' * 100_000, "JSON"),
    Bomb("a long number", lambda: f'{{"a": {LONG_NUMBER}}}'.encode(), "a number of 400 digits"),
    Bomb("a number longer than Python reads", lambda: b"9" * 10_000, "a number of 10,000 digits"),
    Bomb("numbers in a header", lambda: b'{"a":{"x":[' + b"0," * MAX_VALUES + b"0]}}", "values", header),
    Bomb("nested header", lambda: b'{"a":' * 100_000, "JSON", header),
    Bomb("a long number in a header", lambda: b'{"a":{"x":' + b"9" * 400 + b"}}", "no finite number", header),
    Bomb("a long number in YAML", lambda: f"layers: {LONG_NUMBER}".encode(), "no", yaml),
    Bomb("nested YAML", lambda: b"[" * 100_000, "nested too deeply", yaml),
    Bomb("nested YAML in blocks", lambda: b"- " * 100_000, "nested too deeply", yaml),
    Bomb("large YAML", lambda: b"[" + b"[]," * 400_000 + b"]", "bytes of YAML", yaml),
]


@pytest.mark.parametrize("bomb", FILES, ids=lambda bomb: bomb.name)
def test_a_file_is_refused_before_it_is_built_in_memory(bomb: Bomb) -> None:
    raw = bomb.content()
    begun = time.process_time()
    with pytest.raises(QKPatchError, match=bomb.says):
        bomb.read(raw)
    assert time.process_time() - begun < 5


def as_json(raw: bytes) -> object:
    return load_json(raw, "x.json")


def redacted(raw: bytes) -> object:
    return redact(raw.decode())


def tensors(n: int) -> bytes:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps({f"t{i}": entry for i in range(n)}).encode()


GOLDEN = json.loads((REPO_ROOT / "tests" / "planning" / "goldens" / "defaults.json").read_bytes())


def manifest(part: str) -> Callable[[int], bytes]:
    """A manifest that has ``n`` of something."""
    edit, head, file = GOLDEN["edits"][0], GOLDEN["edits"][0]["heads"][0], GOLDEN["files"][0]

    def make(n: int) -> bytes:
        changes: dict[str, Callable[[], dict[str, Any]]] = {
            "heads": lambda: {"edits": [{**edit, "heads": [{**head, "head": i} for i in range(n)]}]},
            "edits": lambda: {"edits": [{**edit, "tensor": f"t{i}", "heads": []} for i in range(n)]},
            "figures": lambda: {"edits": [{**edit, "heads": [{**head, "values_before": [0.123456789] * n}]}]},
            "files": lambda: {"files": [{**file, "name": f"f{i}"} for i in range(n)]},
            "layers": lambda: {"edit": {**GOLDEN["edit"], "layers": [*range(n)], "skipped_layers": []}},
            "warnings": lambda: {"warnings": [f"w{i}" for i in range(n)]},
            "keys": lambda: {"recipe": {**GOLDEN["recipe"], "config": {f"k{i}": [i] for i in range(n)}}},
            "further keys": lambda: {"run": {**GOLDEN["run"], **{f"k{i}": i for i in range(n)}}},
        }
        return json.dumps({**GOLDEN, **changes[part]()}).encode()

    return make


def prefixes(n: int) -> bytes:
    """Two models without a name in common, and with as many prefixes as names."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps([{f"{side}{i}z.m{i}.w": entry for i in range(n)} for side in "ab"]).encode()


def respell(raw: bytes) -> object:
    sides = []
    for side in json.loads(raw):
        header = json.dumps(side).encode()
        read = parse_header(header, shard="m", file_size=8 + len(header))
        sides.append(Stored(where="", root=None, headers={"m": read}, files={}))
    return spelled_as(*sides)


def read_manifest(raw: bytes) -> object:
    return Manifest.loads(raw, "qkpatch.json")


# What is read, how much of it at first, and what reads it.
LINEAR: dict[str, tuple[Callable[[int], bytes], int, Callable[[bytes], object]]] = {
    "a long name": (lambda n: b'{"' + b"a" * n + b'": 0}', 200_000, as_json),
    "escapes": (lambda n: b'{"' + b"\\u0041" * n + b'": 0}', 100_000, as_json),
    "keys": (lambda n: json.dumps({f"{i}": i for i in range(n)}).encode(), 100_000, as_json),
    "YAML lists": (lambda n: b"[" + b"[]," * n + b"]", 10_000, yaml),
    "YAML keys": (lambda n: b"".join(b"k%d: 1\n" % i for i in range(n)), 5_000, yaml),
    "tensors": (tensors, 20_000, header),
    "text with schemes": (lambda n: b"a://b:c" * n, 20_000, redacted),
    "text with letters": (lambda n: b"a" * n, 100_000, redacted),
    "text with dots": (lambda n: b"." * n, 200_000, redacted),
    "text with questions": (lambda n: b"a://?" * n, 20_000, redacted),
    "text with tokens": (lambda n: b"hf_" * n, 50_000, redacted),
    "prefixes": (prefixes, 2_000, respell),
    "rubbish": (
        lambda n: b" ".join(b"x%d/._a" % i for i in range(n)), 20_000,
        lambda raw: usual_beside(raw.decode().split()),
    ),
    "controls": (lambda n: b"\x1b" * n, 100_000, lambda raw: plain(raw.decode())),
    **{
        f"{part} of a manifest": (manifest(part), n, read_manifest)
        for part, n in [
            ("heads", 1_000), ("edits", 3_000), ("figures", 200_000), ("files", 10_000), ("layers", 50_000),
            ("warnings", 100_000), ("keys", 20_000), ("further keys", 20_000),
        ]
    },
}  # fmt: skip


def seconds(read: Callable[[bytes], object], raw: bytes) -> float:
    """The least of three goes: what else runs on the machine only adds to it, and passes over other tests' objects."""
    took = []
    gc.disable()
    try:
        for _ in range(3):
            begun = time.process_time()
            read(raw)
            took.append(time.process_time() - begun)
    finally:
        gc.enable()
    return min(took)


@pytest.mark.parametrize("name", LINEAR)
def test_four_times_as_much_takes_four_times_as_long(name: str) -> None:
    make, n, read = LINEAR[name]
    assert seconds(read, make(2 * n)) < 9 * max(seconds(read, make(n // 2)), 0.01)  # 16 if it were quadratic


@pytest.mark.parametrize(
    "part",
    [
        "heads",
        *(pytest.param(p, marks=pytest.mark.stress) for p in ("files", "edits", "figures", "warnings")),
    ],
)
def test_a_manifest_of_ten_megabytes_is_read_in_seconds(part: str) -> None:
    make = manifest(part)
    n = 10_000_000 * 1000 // (len(make(2000)) - len(make(1000)))
    raw = make(n)
    assert len(raw) > 9_000_000
    assert seconds(read_manifest, raw) < 3


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{**GOLDEN["files"][0], "name": "a/" * 1_000_000 + "a"}]},
        {"files": [{**GOLDEN["files"][0], "name": "a" * 5000}]},
        {"output": {**GOLDEN["output"], "exclude": [f"*a{i}*b" for i in range(100_000)]}},
        {"output": {**GOLDEN["output"], "exclude": ["*a" * 1_000_000]}},
    ],
    ids=["folders", "a long name", "globs", "a long glob"],
)
def test_a_manifest_names_nothing_that_would_take_minutes(change: dict[str, Any]) -> None:
    raw = json.dumps({**GOLDEN, **change}).encode()
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=r"no plain path|longer than anybody writes"):
        read_manifest(raw)
    assert time.process_time() - begun < 5


# torch is there already: it takes seconds to be imported.
DRIVER = """
import re, sys
if sys.argv.pop(1) == "torch": import torch
from qkpatch.cli import main
try: main()
finally: print("PEAK", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def driven(*arguments: object, torch: bool = False) -> list[str]:
    """The command line of the command, which says at the end what it took of memory."""
    return [sys.executable, "-c", DRIVER, "torch" if torch else "", *map(str, arguments)]


def peak(*arguments: object) -> tuple[int, int, str]:
    """Exit code and peak resident MiB of a process of its own, and what it said."""
    done = subprocess.run(driven(*arguments), capture_output=True, text=True, check=False, cwd=REPO_ROOT)
    kibibytes = re.search(r"PEAK (\d+)", done.stderr)
    assert kibibytes is not None, done.stderr
    return done.returncode, int(kibibytes[1]) >> 10, done.stderr


def large_index(tiny: Tiny, size: int) -> None:
    entries = b'"%010d":"model.safetensors",'
    n = size // len(entries % 0)
    with open(tiny.path / "model.safetensors.index.json", "wb") as file:
        file.write(b'{"weight_map":{')
        for begin in range(0, n, 10**5):
            file.write(b"".join(entries % i for i in range(begin, min(begin + 10**5, n))))
        file.write(b'"last":"model.safetensors"}}')


@pytest.mark.parametrize(
    "size", [250 * MIB, pytest.param(60 * MIB, marks=pytest.mark.stress)], ids=["250 MiB", "60 MiB"]
)
def test_an_index_takes_no_gigabytes(size: int, tiny: Tiny) -> None:
    large_index(tiny, size)
    code, mebibytes, said = peak("plan", tiny.path)
    assert code == 3, said
    assert mebibytes < (200 if size > 64 * MIB else 1200)


def test_an_index_of_200_000_tensors_is_read(tmp_path: Path) -> None:
    """As many as 10^12 parameters take."""
    names = [f"model.layers.{i % 61}.mlp.experts.{i}.down_proj.weight_scale_inv" for i in range(200_000)]
    raw = json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00163.safetensors")}).encode()
    assert len(load_json(raw, "index", unique=True)["weight_map"]) == 200_000
    entries = {n: {"dtype": "U8", "shape": [0, 1], "data_offsets": [0, 0]} for n in names}
    raw = json.dumps(entries).encode()
    assert len(parse_header(raw, shard="m", file_size=8 + len(raw)).tensors) == 200_000


# -------- long names


@pytest.mark.parametrize("make", [lambda n: "." * n, lambda n: "a" * n, lambda n: "layers.0." * (n // 9)],
                         ids=["dots", "letters", "layers"])  # fmt: skip
@pytest.mark.parametrize(
    "name", [("plan",), ("recipes", "check"), pytest.param(("diff",), marks=pytest.mark.stress)]
)
def test_a_long_tensor_name_costs_no_more_than_its_length(
    name: tuple[str, ...], make: Callable[[int], str], tmp_path: Path, run: Callable[..., Result]
) -> None:
    import torch

    took = []
    for n in (100_000, 200_000):
        extra = {make(n): torch.zeros(1)}
        tiny = build_tiny(tmp_path / str(n), extra=extra)
        run("plan", tiny.path)  # so that all is imported
        begun = time.process_time()
        both = (tiny.path, tiny.path) if name == ("diff",) else (tiny.path,)
        assert run(*name, *both).exit_code == 0
        took.append(time.process_time() - begun)
    assert took[1] < 3.5 * max(took[0], 0.3)


# -------- the Hub


@pytest.fixture
def published(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repo:
    """A repository that commands in this process find, with a cache of their own."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which tests with transformers ask for
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    hub.repos["org/tiny"] = Repo(build_tiny(tmp_path / "published").path)
    return hub.repos["org/tiny"]


def says(body: object, status: int = 200, **headers: str) -> Callable[[Any], None]:
    """An answer: bytes as they are, anything else as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler: Any) -> None:
        handler._send(status, raw, {"Content-Type": "application/json", **headers})

    return answer


def without_end(piece: bytes, every: float = 0.0) -> Callable[[Any], None]:
    """A body of unknown length that never ends."""

    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"1\r\n[\r\n")
        while True:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            time.sleep(every)

    return answer


def next_page(handler: Any) -> None:
    handler._send(200, b"[]", {"Link": f'<{handler.state.endpoint}{handler.path}>; rel="next"'})


REVISION, TREE, FILE = "/revision/|/models/org/tiny$", "/tree/", "/resolve/.*config.json"
ENTRY = {"type": "file", "path": "a", "size": 1, "oid": "0" * 40}
HALF = json.dumps([{**ENTRY, "path": "\ud800"}]).encode()
BLANK = gzip.compress(b"[" + b" " * (64 << 20) + b"]")
DIGEST = {"oid": "0" * 64, "size": 1, "pointerSize": 1}


def entries(*changes: dict[str, object]) -> Callable[[Any], None]:
    return says([{**ENTRY, **change} for change in changes])


HUB = {
    "a compressed listing": (TREE, says(BLANK, **{"Content-Encoding": "gzip"}), "compressed"),
    "pages without end": (TREE, next_page, "1,001 pages"),
    "a listing without end": (TREE, without_end(b"[]," * 10_000), "says more than any Hub"),
    "a revision without end": (REVISION, without_end(b" " * 100_000), "says more than any Hub"),
    "a listing that is blank": (TREE, says(b" " * (65 << 20)), "says more than any Hub"),
    "come again in days": (TREE, says({}, 429, **{"Retry-After": "1000000"}), "1,000,000 seconds"),
    "come again in days, of an overload": (REVISION, says({}, 503, **{"Retry-After": "1000000"}), "1,000,000 seconds"),
    "come again in ages": (TREE, says({}, 429, **{"Retry-After": "9" * 200}), "seconds more"),
    "a limit of days": (TREE, says({}, 429, ratelimit='"api";r=0;t=1000000'), "1,000,000 seconds"),
    "come again in days, of a file": (FILE, says({}, 429, **{"Retry-After": "1000000"}), "1,000,000 seconds"),
    "a file without end": (FILE, without_end(b" " * 100_000), "more than the"),
    "a file compressed": (FILE, says(gzip.compress(b"{}"), **{"Content-Encoding": "gzip"}), "compressed"),
    "an error without end": (FILE, lambda h: without_end(b"x" * 100_000)(Status(h, 400)), "says more than any Hub"),
    # what is no listing, in fourteen shapes
    "no JSON": (TREE, says(b"<html>"), "transfer failed"),
    "no UTF-8": (TREE, says(b"\xff\xfe["), ""),
    "cut off": (TREE, says(b"[{"), "transfer failed"),
    "null": (TREE, says(None), "none that a Hub gives"),
    "a number": (TREE, says(7), "none that a Hub gives"),
    "a text": (TREE, says("abc"), ""),
    "an object": (TREE, says({"error": "x"}), ""),
    "a list of null": (TREE, says([None]), "none that a Hub gives"),
    "a list of lists": (TREE, says([[]]), "none that a Hub gives"),
    "an entry of nothing": (TREE, says([{}]), ""),
    "an entry without a path": (TREE, says([{"type": "file", "size": 1, "oid": "0" * 40}]), ""),
    "large files as a list": (TREE, entries({"lfs": []}), ""),
    "nested without end": (TREE, says(b"[" * 100_000), ""),
    "a long number": (TREE, says(b'[{"type":"file","path":"a","oid":"0","size":' + b"9" * 5000 + b"}]"), ""),
    "a revision of null": (REVISION, says(None), "none that a Hub gives"),
    "a revision of nothing": (REVISION, says({}), ""),
    "a revision of no commit": (REVISION, says({"id": "org/tiny", "sha": "../../x"}), "names no commit"),
    "a revision that is a number": (REVISION, says({"id": "org/tiny", "sha": 7}), "none that a Hub gives"),
    # what no sound repository lists
    "a name that is a number": (TREE, entries({"path": 7}), "no plain path"),
    "a name that leads out": (TREE, entries({"path": "../a"}), "no plain path"),
    "a name of half a pair": (TREE, says(HALF), "no file can be called"),
    "a long name": (TREE, entries({"path": "a" * 256}), "no file can be called"),
    "a long path": (TREE, entries({"path": "/".join(["a" * 200] * 12)}), "no file can be called"),
    "twice": (TREE, entries({}, {}), "there twice"),
    "a file that is a directory": (TREE, entries({}, {"path": "a/b"}), "a directory as well"),
    "a negative size": (TREE, entries({"size": -1}), "has -1 bytes"),
    "a size of exabytes": (TREE, entries({"size": 10**30}), "bytes"),
    "a size that is a text": (TREE, entries({"size": "1"}), "bytes"),
    "a size that is true": (TREE, entries({"size": True}), "bytes"),
    "no digest": (TREE, entries({"oid": "../x"}), "no digest"),
    "no digest of a large file": (TREE, entries({"lfs": {**DIGEST, "oid": "x"}}), "no digest"),
    "folders without end": (TREE, entries(*({"path": "/".join([str(i), *["a" * 30] * 60])} for i in range(20_000))),
                            "more folders than any file"),
    "deep folders": (TREE, entries({"path": "a/" * 100_000 + "a"}), "no plain path"),
    "folders of rubbish": (TREE, entries(*({"path": f"{i}/.DS_Store"} for i in range(20_000))), "no .safetensors"),
    # where it leads
    "controls in an address": (FILE, says(b"", 302, Location="http://\x7f/\x01a"), ""),
    "a port that is none": (FILE, says(b"", 302, Location="http://x:abc/"), ""),
    "no address": (FILE, says(b"", 302), "redirects"),
    "an address of another kind": (FILE, says(b"", 302, Location="file:///etc/passwd"), "redirected"),
    "a listing moved to controls": (TREE, says(b"", 302, Location="http://\x7f/\x01a"), ""),
    "a listing moved to itself": (TREE, says(b"", 302, Location="?"), ""),
}  # fmt: skip

ONE_OF_A_KIND = {
    "a compressed listing", "pages without end", "a listing without end", "come again in days", "a list of null",
    "a file without end", "controls in an address", "a file that is a directory", "a negative size", "a long name",
    "a revision of no commit", "folders without end", "folders of rubbish",
}  # fmt: skip


class Status:
    """A handler that answers with another status."""

    def __init__(self, handler: Any, status: int) -> None:
        self._handler, self._status = handler, status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    def send_response(self, _: int) -> None:
        self._handler.send_response(self._status)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ONE_OF_A_KIND else pytest.mark.stress) for name in HUB
])  # fmt: skip
def test_an_answer_is_refused_before_anything_is_written(
    name: str, hub: FakeHub, published: Repo, tmp_path: Path, run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, answer, message = HUB[name]
    hub.answers[path] = answer
    from huggingface_hub.utils import _http

    naps: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", naps.append)  # between tries, of which there are few
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    result = run("apply", "org/tiny", "-o", tmp_path / "out", "--json")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (3, 4), result.output
    error = json.loads(result.stdout)["error"]
    assert message in error["what"], error
    assert error["fix"]
    assert error["where"].startswith("org/tiny")
    assert sum(naps) < 120
    assert time.process_time() - begun < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1500 << 10
    assert {entry.name for entry in tmp_path.iterdir()} <= {"published", "cache"}


def test_a_trickle_is_given_up(
    hub: FakeHub, published: Repo, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "WINDOW", 1.0)
    hub.answers[TREE] = without_end(b" ", every=0.3)
    begun = time.monotonic()
    result = run("plan", "org/tiny")
    assert result.exit_code == 4, result.output
    assert "less than 100 bytes a second" in result.stderr
    assert time.monotonic() - begun < 20


def trickling(begin: bytes, piece: bytes, every: float) -> Callable[[Any], None]:
    """An answer, all of it raw, that goes on a piece at a time."""

    def answer(handler: Any) -> None:
        handler.wfile.write(begin)
        while True:
            handler.wfile.write(piece)
            time.sleep(every)

    return answer


OK = b"HTTP/1.1 200 OK\r\n"
TRICKLES = {
    "a status": (b"HTTP/1.1 200 ", b"O"),
    "a header": (OK + b"X-A: ", b"a"),
    "headers": (OK, b"X-A: a\r\n"),
    "a redirect": (b"HTTP/1.1 302 Found\r\nLocation: /", b"a"),
    "an error": (b"HTTP/1.1 503 Busy\r\nX-A: ", b"a"),
    "other answers before it": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "the size of a piece": (OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a"),
    "what follows the last piece": (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-A: ", b"a"),
}


@pytest.mark.parametrize("path", ["tree", "file"])
@pytest.mark.parametrize("what", TRICKLES)
def test_an_answer_that_trickles_before_its_body_is_given_up(
    what: str, path: str, hub: FakeHub, published: Repo, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(answers, "WINDOW", 1.0)
    monkeypatch.setattr(answers, "_TIMEOUT", 1.0)
    hub.answers[{"tree": TREE, "file": FILE}[path]] = trickling(*TRICKLES[what], 0.2)
    begun = time.monotonic()
    result = run("plan", "org/tiny")
    assert result.exit_code == 4, result.output
    assert "less than 100 bytes a second, or headers without end" in result.stderr
    assert time.monotonic() - begun < 10


@pytest.mark.stress
@pytest.mark.parametrize("path", [TREE, FILE])
@pytest.mark.parametrize("part", ["head", "body"])
def test_a_byte_every_three_seconds_is_given_up(
    part: str, path: str, hub: FakeHub, published: Repo, run: Callable[..., Result]
) -> None:
    head = trickling(*TRICKLES["a header"], 3)
    hub.answers[path] = head if part == "head" else without_end(b" ", every=3)
    begun = time.monotonic()
    result = run("plan", "org/tiny")
    assert result.exit_code == 4, result.output
    assert time.monotonic() - begun < 120


def test_a_page_after_another_is_read(hub: FakeHub, published: Repo, run: Callable[..., Result]) -> None:
    """Pages are what large repositories come in."""
    rest = published.tree()

    def page(handler: Any) -> None:
        link = f'<{handler.state.endpoint}{handler.path}&cursor=1>; rel="next"'
        more = {} if "cursor" in handler.path else {"Link": link}
        handler._send(200, json.dumps(rest[:1] if more else rest[1:]).encode(), more)

    hub.answers[TREE] = page
    result = run("plan", "org/tiny")
    assert result.exit_code == 0, result.output


# -------- holes, and signals


def checkpoint_with_a_hole(path: Path, size: int) -> Tiny:
    """A checkpoint beside a file that is one hole."""
    tiny = build_tiny(path)
    with open(tiny.path / "hole.dat", "wb") as file:
        file.truncate(size)
    return tiny


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.stress)])
@pytest.mark.parametrize(
    "arguments",
    [
        ("apply", "{source}", "-o", "{out}", "--digest", "files"),
        pytest.param(("diff", "{source}", "{source}"), marks=pytest.mark.stress),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_signal_is_heard_in_a_hole(arguments: tuple[str, ...], number: int, tmp_path: Path) -> None:
    tiny = checkpoint_with_a_hole(tmp_path / "tiny", 300 << 30)
    given = [a.format(source=tiny.path, out=tmp_path / "out") for a in arguments]
    if arguments[0] == "diff":
        other = checkpoint_with_a_hole(tmp_path / "other", 300 << 30)
        given[-1] = str(other.path)
    log = tmp_path / "log"
    with open(log, "w") as file, subprocess.Popen(
        driven(*given, torch=True), stderr=file, stdout=file, cwd=REPO_ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        try:
            wait_for_hole(process)
            begun = time.monotonic()
            process.send_signal(number)
            code = process.wait(30)
            took = time.monotonic() - begun
        finally:
            process.kill()
    assert code == 128 + number, log.read_text()
    assert took < 10  # a second, and what else the machine does
    assert not [p.name for p in tmp_path.iterdir() if "out" in p.name]


def wait_for_hole(process: subprocess.Popen[Any]) -> None:
    """Until the process has had the hole open for a while."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opened = [str(fd.readlink()) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            opened = []
        if any(name.endswith("hole.dat") for name in opened):
            time.sleep(1)
            return
        time.sleep(0.05)


def test_a_digest_over_a_hole_is_that_of_zeros(tmp_path: Path, run: Callable[..., Result]) -> None:
    import hashlib

    tiny = checkpoint_with_a_hole(tmp_path / "tiny", (9 << 20) + 5)
    assert run("apply", tiny.path, "-o", tmp_path / "out", "--digest", "files").exit_code == 0
    sums = (tmp_path / "out" / "SHA256SUMS").read_text()
    assert f"{hashlib.sha256(bytes((9 << 20) + 5)).hexdigest()}  hole.dat" in sums


# -------- the machine


def limited(limit: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = " ".join(f"'{word}'" for word in command(*arguments))
    return subprocess.run(
        ["bash", "-c", f"{limit}; exec {words}"], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("ulimit -n 12", "ulimit -n"),
        ("ulimit -v 400000", "ulimit -v"),
        pytest.param("ulimit -n 5", "ulimit -n", marks=pytest.mark.stress),
        pytest.param("ulimit -v 250000", "ulimit -v", marks=pytest.mark.stress),
    ],
)
def test_a_limit_is_told_before_anything_is_made(
    limit: str, message: str, tiny: Tiny, tmp_path: Path
) -> None:
    before = tmp_path.stat().st_mtime_ns
    result = limited(limit, "apply", tiny.path, "-o", tmp_path / "out")
    assert result.returncode == 4, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert tmp_path.stat().st_mtime_ns == before  # not even a staging directory


@pytest.mark.stress
@pytest.mark.parametrize("arguments", [("plan",), ("inspect",), ("recipes", "check"), ("diff", "{}")])
@pytest.mark.parametrize("limit", ["ulimit -n 6", "ulimit -v 150000"])  # with 4, Python does not begin
def test_no_command_answers_a_limit_with_a_traceback(
    limit: str, arguments: tuple[str, ...], tiny: Tiny
) -> None:
    result = limited(limit, *(a.format(tiny.path) for a in arguments), tiny.path)
    assert result.returncode in (0, 4), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("mode", [0o704, pytest.param(0o700, marks=pytest.mark.stress), 0o701])
@pytest.mark.parametrize(
    "words", [("apply", "{source}", "-o", "{out}"), ("verify", "{out}", "--source", "{source}")]
)
def test_an_out_that_cannot_be_entered(mode: int, words: tuple[str, ...], run: Callable[..., Result]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        source, out = build_tiny(Path(folder) / "source").path, Path(folder) / "out"
        arguments = [word.format(source=source, out=out) for word in words]
        for good in (("apply", source, "-o", out), ("verify", out, "--source", source)):
            assert run(*good).exit_code == 0  # and all is imported, which nobody may not do
        out.chmod(mode)
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                result = run(*arguments)
                code = result.exit_code if isinstance(result.exception, SystemExit) else 98
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = sorted(entry.name for entry in Path(folder).iterdir())
        out.chmod(0o700)
    assert code == 4 or (code == 2 and mode != 0o704)  # what it may not list, the command line refuses
    assert left == ["out", "source"]


STARVED = [
    (MemoryError(), "not enough memory"),
    (OSError(24, "Too many open files", "x"), "ulimit -n"),
    (RuntimeError("can't start new thread"), "not enough memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "not enough memory"),
]


@pytest.mark.parametrize(("raised", "message"), STARVED)
def test_what_the_machine_refuses_is_an_error_of_ours(raised: Exception, message: str) -> None:
    with pytest.raises(FileSystemError) as caught, machine_errors():
        raise raised
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (MemoryError(), 4, "not enough memory"),
        (KeyError("a fault of ours"), UnexpectedError.exit_code, "Please report it"),
        *(pytest.param(raised, 4, said, marks=pytest.mark.stress) for raised, said in STARVED[1:]),
        pytest.param(
            RuntimeError("a fault of ours"),
            UnexpectedError.exit_code,
            "Please report it",
            marks=pytest.mark.stress,
        ),
    ],
)
def test_what_no_command_expects_has_a_code_of_its_own(
    raised: Exception, code: int, message: str, tmp_path: Path
) -> None:
    script = (
        "import sys; from qkpatch import api, cli\n"
        f"def plan(*a, **k): raise {type(raised).__name__}(*{raised.args!r})\n"
        "api.plan = plan; sys.argv = ['qkpatch', 'plan', 'x\\x1by']; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert ("Traceback" in done.stderr) == (code == UnexpectedError.exit_code)


def test_tracebacks_that_were_asked_for_keep_the_exit_code(tiny: Tiny) -> None:
    done = subprocess.run(
        command("plan", tiny.path, "--layers", "99", "--debug"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("to", [">/dev/full", pytest.param("| head -c 0; exit ${PIPESTATUS[0]}")])
@pytest.mark.parametrize("flags", ["", pytest.param("--json", marks=pytest.mark.stress)])
def test_a_mismatch_is_not_hidden_where_nothing_can_be_printed(
    to: str, flags: str, tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    assert run("apply", tiny.path, "-o", out).exit_code == 0
    words = warm.shell("verify", out, "--source", tiny.path)
    shell = ["bash", "-c", f"{words} {flags} {to}"]
    assert subprocess.run(shell, capture_output=True, check=False).returncode in (4, 141, 0)
    (out / "tokenizer.json").write_text("{ }")
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr


# -------- before the work


@pytest.mark.parametrize(
    "manifest", ['{"edit": NaN}', "[]", f'{{"a": {LONG_NUMBER}}}', '{"schema": "qkpatch/1"}']
)
def test_plan_refuses_the_manifest_that_apply_refuses(
    manifest: str, tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    (tiny.path / "qkpatch.json").write_text(manifest)
    codes = [
        run(*words).exit_code for words in (("plan", tiny.path), ("apply", tiny.path, "-o", tmp_path / "out"))
    ]
    assert codes == [3, 3]


@pytest.mark.parametrize("key", ["num_hidden_layers", "head_dim", "hidden_size", "rope_theta", "x"])
def test_a_long_number_in_config(key: str, tiny: Tiny, run: Callable[..., Result]) -> None:
    config = (tiny.path / "config.json").read_text()
    (tiny.path / "config.json").write_text(f'{config[:-1]}, "{key}": {LONG_NUMBER}}}')
    for words in (("plan",), ("inspect",), ("recipes", "check")):
        result = run(*words, tiny.path)
        assert result.exit_code == 3, (words, result.output, result.exception)


def test_errors_of_both_kinds_are_typed() -> None:
    with pytest.raises(CheckpointError):
        load_json(b"[" * 10, "x")
    with pytest.raises(HeaderError):
        header(b"[")


def test_a_signal_ends_what_other_threads_read(tmp_path: Path) -> None:
    """Of a library's pool too, for whose threads the main one waits."""
    hole = tmp_path / "hole"
    with open(hole, "wb") as file:
        file.truncate(100 << 30)

    def read() -> None:
        with open_read(hole) as opened:
            opened.sha256(0, opened.size)

    begun = time.monotonic()

    def interrupted() -> None:
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(read) for _ in range(2)]
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
            for one in running:
                one.result()

    with unwinding_on_kill(), pytest.raises(Terminated):
        interrupted()
    assert time.monotonic() - begun < 10
