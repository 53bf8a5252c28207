"""A model Hub on 127.0.0.1, as much of it as qkpatch asks for: directories served as repositories, large files from
another host by redirect, commits taken, faults on order, and a log of every request."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import warm

TOKEN = "hf_secret"
REPO_ROOT = Path(__file__).resolve().parents[2]
PIECE = 1 << 20
HASHED = 64 << 20  # larger files are named by their name and size: tests have sparse ones of many gigabytes
REVISION = "(refs/pr/[0-9]+|[^/]+)"


@dataclass(frozen=True)
class Repo:
    """A directory served as a repository with one commit, known by some branch names."""

    path: Path
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    lfs: tuple[str, ...] = (".safetensors",)  # kept in large-file storage, on another host

    @cached_property
    def files(self) -> dict[str, Path]:
        return {p.relative_to(self.path).as_posix(): p for p in self.path.rglob("*") if p.is_file()}

    @cached_property
    def commit(self) -> str:
        return _sha1("".join(f"{name}{self.oid(name)}" for name in sorted(self.files)).encode())

    def has_revision(self, revision: str) -> bool:
        return revision in (*self.branches, self.commit)

    def is_lfs(self, name: str) -> bool:
        return name.endswith(self.lfs)

    def oid(self, name: str) -> str:
        """As Git names it."""
        content = self._identity(name)
        return _sha1(b"blob %d\0" % len(content) + content)

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self._identity(name)).hexdigest()

    def _identity(self, name: str) -> bytes:
        path = self.files[name]
        size = path.stat().st_size
        return path.read_bytes() if size <= HASHED else f"{name} {size}".encode()

    def entry(self, name: str) -> dict[str, object]:
        size = self.files[name].stat().st_size
        entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": self.oid(name)}
        if self.is_lfs(name):
            entry["lfs"] = {"oid": self.sha256(name), "size": size, "pointerSize": 134}
            entry["xetHash"] = hashlib.sha256(b"xet" + self._identity(name)).hexdigest()
        return entry

    def tree(self) -> list[dict[str, object]]:
        folders = sorted({str(Path(n).parent) for n in self.files} - {"."})
        return [{"type": "directory", "path": n, "oid": _sha1(n.encode()), "size": 0} for n in folders] + [
            self.entry(name) for name in self.files
        ]


@dataclass(frozen=True)
class Request:
    """One request that a server has seen."""

    method: str
    path: str
    token: str | None
    host: str = "hub"  # or "cdn"
    range: str | None = None
    cookie: str | None = None


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose path matches."""

    # "headers" alone, "status 503", "cut", "stall", "whole", "other range", "other etag", "other commit", "gzip" or
    # "damage"
    kind: str
    match: str = ""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    host: str = ""  # "hub", "cdn", or either
    skip: int = 0  # requests that still go well


@dataclass
class Commit:
    """One that was made."""

    repo: str
    summary: str
    files: dict[str, bytes]  # sent whole
    large: dict[str, str]  # by SHA-256
    is_pull_request: bool


@dataclass
class FakeHub:
    """The servers: their address, what they serve, what they were asked. ``fault`` breaks all answers."""

    endpoint: str = ""
    cdn: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)
    fault: str | None = None  # "hang up", "error 503" or "not a hub"
    faults: list[Fault] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # bytes of bodies, by path
    substitutes: dict[str, Path] = field(default_factory=dict)  # delivered in place of a file, by its name
    bad_token: bool = False
    created: dict[str, dict[str, Any]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    broken_uploads: bool = False
    ignored: list[str | None] = field(default_factory=list)  # patterns that came with files to be uploaded
    duplicated: list[dict[str, Any]] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    lfs_actions: dict[str, Any] = field(default_factory=dict)  # beside "upload", or in its place
    commit_answer: dict[str, str] = field(default_factory=dict)  # beside, or in place of, the usual
    meddle: dict[str, Callable[[], object]] = field(
        default_factory=dict
    )  # done once a path like that is asked for
    answers: dict[str, Callable[[Any], None]] = field(default_factory=dict)  # in place of the usual, by path
    signature: int = 0  # of addresses on the other host; raise it and the ones before are refused
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paths(self, method: str) -> list[str]:
        return [request.path for request in self.log if request.method == method]

    def sent_of(self, suffix: str) -> int:
        """Bytes sent of files whose names end so, by either host."""
        return sum(n for path, n in self.sent.items() if path.endswith(suffix))

    def take_fault(self, path: str, host: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, path) and fault.host in ("", host):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running Hub, and the other host that it keeps large files on."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    class Elsewhere(_Elsewhere):
        state = hub

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Handler, Elsewhere)]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def hub_environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that knows this Hub and no other, and a cache of its own.

    ``QKPATCH_TEST_HUB_PATH`` is a folder with another version of huggingface_hub to test with.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    other = os.environ.get("QKPATCH_TEST_HUB_PATH")
    return {
        **inherited,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([*([other] if other else []), str(REPO_ROOT)]),
        **more,
    }


def command(*arguments: object) -> list[str]:
    """The command line of the real command."""
    return [sys.executable, "-m", "qkpatch", *map(str, arguments)]


def run_qkpatch(
    environment: dict[str, str], *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, which has torch already."""
    return warm.run(environment, [str(argument) for argument in arguments], cwd)


class _Base(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub
    host: str
    fault: Fault | None = None

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that hangs up is what some tests are about
            super().handle()

    def _noted(self) -> str:
        """The path, after the request went into the log."""
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        request = Request(
            self.command, path, token, self.host, self.headers.get("Range"), self.headers.get("Cookie")
        )
        self.state.log.append(request)
        for pattern in [p for p in self.state.meddle if re.search(p, path)]:
            self.state.meddle.pop(pattern)()
        self.fault = self.state.take_fault(path, self.host)
        return path

    def _is_broken(self) -> bool:
        """Whether a fault, or what was ordered for this path, has answered."""
        path = unquote(urlsplit(self.path).path)
        if answer := next((a for match, a in self.state.answers.items() if re.search(match, path)), None):
            answer(self)
            return True
        if self.fault is None or not self.fault.kind.startswith("status "):
            return False
        self._send(int(self.fault.kind.split()[1]), b"{}", self.fault.headers)
        return True

    def _content(self, path: Path, headers: dict[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        kind = "" if self.fault is None else self.fault.kind
        if kind == "other etag":
            headers["ETag"] = '"other"'
        if kind == "gzip":
            headers["Content-Encoding"] = "gzip"
        path = self.state.substitutes.get(path.name, path)
        size = path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None or kind == "whole":
            self._stream(200, path, 0, size, headers)
            return
        begin, end = int(span[1]), min(int(span[2] or size - 1), size - 1)
        if begin >= size:
            self._send(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        if kind == "other range":
            begin, end = begin + 1, end + 1
        headers["Content-Range"] = f"bytes {begin}-{end}/{size}"
        self._stream(206, path, begin, end + 1, headers)

    def _stream(self, status: int, path: Path, begin: int, end: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        more = {} if self.fault is None else self.fault.headers
        for key, value in {**headers, **more, "Content-Length": str(end - begin)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        kind = "" if self.fault is None else self.fault.kind
        last = begin + (end - begin) // 2 if kind in ("cut", "stall") else end
        with open(path, "rb") as file:
            file.seek(begin)
            while begin < last:
                data = file.read(min(PIECE, last - begin))
                if kind == "damage":
                    data = bytes([data[0] ^ 1]) + data[1:]
                self.wfile.write(data)
                begin += len(data)
                with self.state.lock:
                    self.state.sent[self.path] = self.state.sent.get(self.path, 0) + len(data)
        if kind == "stall":
            time.sleep(3)
        if kind in ("cut", "stall"):
            self.close_connection = True

    def _refuse(self, status: int, code: str, message: str | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message or code})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        more = {} if self.fault is None else self.fault.headers
        for key, value in {**headers, **more, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _received(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


class _Elsewhere(_Base):
    """Large-file storage: addresses are signed, and it wants no token."""

    host = "cdn"

    def do_GET(self) -> None:
        path = self._noted()
        if self._is_broken():
            return
        if not path.startswith("/signed-"):  # nothing that it was ever asked for by one who means well
            self._send_json([])
            return
        _, signature, owner, name, file = path.split("/", 4)
        repo = self.state.repos[f"{owner}/{name}"]
        if signature != f"signed-{self.state.signature}":
            self._send(403, b"expired", {})
            return
        self._content(repo.files[file], {"ETag": f'"{repo.sha256(file)}"', "Accept-Ranges": "bytes"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._noted()
        self._received()
        self._send_json({})

    def do_PUT(self) -> None:
        self._noted()
        data = self._received()
        if self.state.broken_uploads:
            self._send(400, b"no", {})
            return
        self.state.uploads[hashlib.sha256(data).hexdigest()] = data
        self._send(200, b"", {})


class _Handler(_Base):
    host = "hub"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        path = self._noted()
        body = self._received()
        if self._is_broken():
            return
        if path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            sent = json.loads(body)["files"]
            self.state.ignored.append(json.loads(body).get("gitIgnore"))
            self._send_json({"files": [self._upload_mode(file) for file in sent]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/(.+)", path):
            repo = self.state.repos.get(found[1])
            wanted = parse_qs(body.decode()).get("paths", [])
            self._send_json([repo.entry(n) for n in wanted if n in repo.files] if repo else [])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/lfs-files/duplicate", path):
            self.state.duplicated.append({"from": found[1], **json.loads(body)})
            self._send_json({"failed": []})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._lfs_batch(json.loads(body)["objects"])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(found[1], body)
        else:
            self._refuse(404, "EntryNotFound")

    def _upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.created or name in self.state.repos:
            self._send(409, json.dumps({"url": f"{self.state.endpoint}/{name}"}).encode(), {})
            return
        self.state.created[name] = asked
        self._send_json({"url": f"{self.state.endpoint}/{name}", "name": name, "id": name})

    def _lfs_batch(self, objects: list[dict[str, Any]]) -> None:
        answers = [
            {
                **o,
                "actions": {
                    "upload": {"href": f"{self.state.cdn}/upload/{o['oid']}"},
                    **self.state.lfs_actions,
                },
            }
            for o in objects
        ]
        self._send_json({"transfer": "basic", "objects": answers})

    def _commit(self, repo: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        values = {
            kind: [v["value"] for v in lines if v["key"] == kind] for kind in ("header", "file", "lfsFile")
        }
        is_pull_request = "create_pr" in parse_qs(urlsplit(self.path).query)
        self.state.commits.append(
            Commit(
                repo,
                values["header"][0]["summary"],
                {v["path"]: base64.b64decode(v["content"]) for v in values["file"]},
                {v["path"]: v["oid"] for v in values["lfsFile"]},
                is_pull_request,
            )
        )
        oid = _sha1(body)
        answer = {"commitOid": oid, "commitUrl": f"{self.state.endpoint}/{repo}/commit/{oid}"}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{self.state.endpoint}/{repo}/discussions/1"
        self._send_json({**answer, **self.state.commit_answer})

    def _answer(self) -> None:
        path = self._noted()
        if self.state.fault == "hang up":
            self.close_connection = True
        elif self.state.fault == "error 503":
            self._send(503, b"overloaded", {"Content-Type": "text/plain"})
        elif self.state.fault == "not a hub":
            self._send(200, b"<html>Sign in to this network</html>", {"Content-Type": "text/html"})
        elif self._is_broken():
            pass
        elif self.state.bad_token and self.headers.get("Authorization"):
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif found := re.fullmatch(rf"/api/models/([^/]+/[^/]+)(?:/revision/{REVISION})?", path):
            self._model_info(found[1], found[2] or "main")
        elif found := re.fullmatch(rf"/api/models/([^/]+/[^/]+)/tree/{REVISION}", path):
            if repo := self._repo(found[1], found[2]):
                self._send_json(repo.tree())
        elif found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{REVISION}/(.+)", path):
            self._file(found[1], found[2], found[3])
        else:
            self._refuse(404, "EntryNotFound")

    def _repo(self, name: str, revision: str) -> Repo | None:
        """The repository, if it is there and open to us; or else None, and the refusal is sent."""
        repo = self.state.repos.get(name)
        if repo is None:
            self._refuse(401, "RepoNotFound")
        elif repo.gated:
            self._refuse(403, "GatedRepo")
        elif not repo.has_revision(revision):
            self._refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _model_info(self, name: str, revision: str) -> None:
        if repo := self._repo(name, revision):
            siblings = [{"rfilename": file} for file in repo.files]
            self._send_json({"id": name, "sha": repo.commit, "siblings": siblings, "private": False})

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        path = repo.files.get(file)
        if path is None:
            self._refuse(404, "EntryNotFound")
            return
        is_other = self.fault is not None and self.fault.kind == "other commit"
        headers = {"X-Repo-Commit": "0" * 40 if is_other else repo.commit, "Accept-Ranges": "bytes"}
        if not repo.is_lfs(file):
            self._content(path, {**headers, "ETag": f'"{repo.oid(file)}"'})
            return
        headers["X-Linked-Size"] = str(path.stat().st_size)
        headers["X-Linked-ETag"] = f'"{repo.sha256(file)}"'
        headers["Location"] = f"{self.state.cdn}/signed-{self.state.signature}/{name}/{file}"
        self._send(302, b"", headers)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
