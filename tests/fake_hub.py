"""A model Hub on 127.0.0.1, as much of it as a snapshot download asks for, serving directories."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
REPO_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Repo:
    """A directory served as a repository with one commit, known by some branch names."""

    path: Path
    branches: tuple[str, ...] = ("main",)
    gated: bool = False

    @cached_property
    def files(self) -> dict[str, bytes]:
        return {
            p.relative_to(self.path).as_posix(): p.read_bytes() for p in self.path.rglob("*") if p.is_file()
        }

    @cached_property
    def commit(self) -> str:
        content = "".join(f"{name}{_sha1(data)}" for name, data in sorted(self.files.items()))
        return _sha1(content.encode())

    def has_revision(self, revision: str) -> bool:
        return revision in (*self.branches, self.commit)

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": _sha1(data)}
            for name, data in self.files.items()
        ]


@dataclass(frozen=True)
class Request:
    """One request that the server has seen."""

    method: str
    path: str
    token: str | None


@dataclass
class FakeHub:
    """The server: its address, what it serves, what it was asked. ``fault`` breaks all answers."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)
    fault: str | None = None  # "hang up", "error 503" or "not a hub"

    def paths(self, method: str) -> list[str]:
        return [request.path for request in self.log if request.method == method]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running Hub."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def hub_environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that knows this Hub and no other, and a cache of its own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return {
        **inherited,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(REPO_ROOT),
        **more,
    }


def run_qkpatch(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qkpatch", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        self.state.log.append(Request(self.command, path, token))
        if self.state.fault == "hang up":
            self.close_connection = True
        elif self.state.fault == "error 503":
            self._send(503, b"overloaded", {"Content-Type": "text/plain"})
        elif self.state.fault == "not a hub":
            self._send(200, b"<html>Sign in to this network</html>", {"Content-Type": "text/html"})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._model_info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if repo := self._repo(found[1], found[2]):
                self._send_json(repo.tree())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
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
            self._send_json({"id": name, "sha": repo.commit, "siblings": siblings})

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        data = repo.files.get(file)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        headers = {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._send(200, data, headers)
            return
        begin, end = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
        self._send(206, data[begin : end + 1], headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
