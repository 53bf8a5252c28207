"""What a Hub may answer to harm: each is refused soon, in bounded memory, with a reason.

An answer is a row of a table. One of a kind is tried here, all of them under ``stress``.
"""

from __future__ import annotations

import gzip
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny
from fake_hub import TOKEN, FakeHub, Repo
from typer.testing import Result

from qkpatch.hub import answers

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
DIGEST = {"oid": "0" * 64, "size": 1, "pointerSize": 1}


def blank() -> bytes:
    return gzip.compress(b"[" + b" " * (64 << 20) + b"]")


def entries(*changes: dict[str, object]) -> Callable[[Any], None]:
    return says([{**ENTRY, **change} for change in changes])


def many(path: Callable[[int], str]) -> Callable[[Any], None]:
    return lambda handler: entries(*({"path": path(i)} for i in range(20_000)))(handler)


HUB = {
    "a compressed listing": (TREE, lambda h: says(blank(), **{"Content-Encoding": "gzip"})(h), "compressed"),
    "pages without end": (TREE, next_page, "1,001 pages"),
    "a listing without end": (TREE, without_end(b"[]," * 10_000), "says more than any Hub"),
    "a revision without end": (REVISION, without_end(b" " * 100_000), "says more than any Hub"),
    "a listing that is blank": (TREE, lambda h: says(b" " * (65 << 20))(h), "says more than any Hub"),
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
    "folders without end": (TREE, many(lambda i: "/".join([str(i), *["a" * 30] * 60])),
                            "more folders than any file"),
    "deep folders": (TREE, entries({"path": "a/" * 100_000 + "a"}), "no plain path"),
    "folders of rubbish": (TREE, many(lambda i: f"{i}/.DS_Store"), "no .safetensors"),
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
    pytest.param(
        name,
        marks=pytest.mark.long if name == "pages without end" else () if name in ONE_OF_A_KIND else pytest.mark.stress,
    )
    for name in HUB
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
