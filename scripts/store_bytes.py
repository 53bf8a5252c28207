"""What `plan`, `inspect` and `apply` ask of S3 for a model of Qwen2.5-VL-7B's sizes, as a small server counts it.

The server keeps objects as sparse files: all but the queries and keys are holes, and copies of holes are holes.
"""

from __future__ import annotations

import os
import re
import resource
import secrets
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "kit")]

from scripts.bench.shapes import build  # noqa: E402 - found only then
from scripts.hub_bytes import SHAPE  # noqa: E402

_PIECE = 4 << 20


def copy_sparse(source: Path, begin: int, end: int, destination: Path, at: int) -> None:
    """Copy bytes between files, holes left out."""
    with source.open("rb") as a, destination.open("r+b") as b:
        os.ftruncate(b.fileno(), max(os.fstat(b.fileno()).st_size, at + end - begin))
        position = begin
        while position < end:
            try:
                first = os.lseek(a.fileno(), position, os.SEEK_DATA)
                last = min(os.lseek(a.fileno(), first, os.SEEK_HOLE), end)
            except OSError:
                return  # nothing but a hole is left
            for offset in range(first, last, _PIECE):
                data = os.pread(a.fileno(), min(_PIECE, last - offset), offset)
                os.pwrite(b.fileno(), data, at + offset - begin)
            position = max(last, first)


class Handler(BaseHTTPRequestHandler):
    """As much of S3 as s3fs asks for here."""

    protocol_version = "HTTP/1.1"
    root: Path
    log: Counter[str]
    sent: Counter[str]

    def _answer(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _do(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query, keep_blank_values=True)
        self.file = self.root / unquote(parts.path).lstrip("/")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.source = unquote(self.headers.get("x-amz-copy-source", "")).lstrip("/")
        what = self._what()
        self.log[what] += 1
        self.sent["up"] += len(self.body)
        getattr(self, f"_{what}")()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _do  # noqa: N815 - as http.server calls them

    def _what(self) -> str:
        if "uploads" in self.query:
            return "create" if self.command == "POST" else "uploads"
        if "partNumber" in self.query:
            return "part_copy" if self.source else "part"
        if "uploadId" in self.query:
            return "complete" if self.command == "POST" else "abort"
        if "list-type" in self.query:
            return "list"
        return "copy" if self.source else self.command.lower()

    def _tag(self, path: Path) -> str:
        status = path.stat()
        return f'"{status.st_mtime_ns:x}{status.st_size:x}"'

    def _list(self) -> None:
        prefix = self.query.get("prefix", [""])[0]
        files = sorted(p for p in self.file.rglob("*") if p.is_file())
        named = {p.relative_to(self.file).as_posix(): p for p in files}
        said = "".join(
            f"<Contents><Key>{escape(n)}</Key><Size>{p.stat().st_size}</Size><ETag>{escape(self._tag(p))}</ETag>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for n, p in named.items()
            if n.startswith(prefix)
        )
        self._answer(
            body=f"<ListBucketResult><IsTruncated>false</IsTruncated>{said}</ListBucketResult>".encode()
        )

    def _head(self) -> None:
        if not self.file.is_file():
            self._answer(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.file.stat().st_size))
        self.send_header("ETag", self._tag(self.file))
        self.end_headers()

    def _get(self) -> None:
        if not self.file.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(found[1]), int(found[2]) + 1) if found else (0, self.file.stat().st_size)
        with self.file.open("rb") as opened:
            data = os.pread(opened.fileno(), end - begin, begin)
        self.sent["down"] += len(data)
        self._answer(206 if found else 200, data, ETag=self._tag(self.file))

    def _put(self) -> None:
        if self.headers.get("If-None-Match") and self.file.exists():
            self._answer(
                412, b"<Error><Code>PreconditionFailed</Code><Condition>If-None-Match</Condition></Error>"
            )
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(self.body)
        self._answer(ETag=self._tag(self.file))

    def _copied(self, begin: int, end: int, destination: Path, kind: str) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.touch()
        copy_sparse(self.root / self.source, begin, end, destination, 0)
        body = f"<{kind}><ETag>{escape(self._tag(destination))}</ETag></{kind}>".encode()
        self._answer(body=body)

    def _copy(self) -> None:
        self._copied(0, (self.root / self.source).stat().st_size, self.file, "CopyObjectResult")

    def _create(self) -> None:
        upload = secrets.token_hex(8)
        (self.root / ".parts" / upload).mkdir(parents=True)
        said = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        self._answer(body=said.encode())

    def _part_file(self) -> Path:
        return self.root / ".parts" / self.query["uploadId"][0] / f"{int(self.query['partNumber'][0]):05}"

    def _part(self) -> None:
        self._part_file().write_bytes(self.body)
        self._answer(ETag=self._tag(self._part_file()))

    def _part_copy(self) -> None:
        begin, end = map(int, self.headers["x-amz-copy-source-range"].removeprefix("bytes=").split("-"))
        self._copied(begin, end + 1, self._part_file(), "CopyPartResult")

    def _complete(self) -> None:
        folder, at = self.root / ".parts" / self.query["uploadId"][0], 0
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        for part in sorted(folder.iterdir()):
            size = part.stat().st_size
            copy_sparse(part, 0, size, self.file, at)
            at += size
            part.unlink()
        said = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        self._answer(body=said.encode())

    def _delete(self) -> None:
        self.file.unlink(missing_ok=True)
        self._answer(204)

    _abort = _delete

    def _uploads(self) -> None:
        self._answer(body=b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def served(root: Path) -> Iterator[tuple[str, Counter[str], Counter[str]]]:
    """The address, requests by kind, bytes by direction."""
    log: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    handler: Callable[..., Any] = type("Of", (Handler,), {"root": root, "log": log, "sent": sent})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log, sent
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """Serve the shape, run the commands, print what the server has seen."""
    with tempfile.TemporaryDirectory(prefix="qkpatch-store-") as folder:
        build(SHAPE, Path(folder) / "models")
        with served(Path(folder)) as (endpoint, log, sent):
            environment = {
                **os.environ,
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "any",
                "AWS_SECRET_ACCESS_KEY": "any",
                "AWS_DEFAULT_REGION": "us-east-1",
                "PYTHONPATH": str(ROOT),
            }
            for command in (
                ["plan", "s3://models/qwen-7b"],
                ["inspect", "s3://models/qwen-7b"],
                ["apply", "s3://models/qwen-7b", "-o", "s3://models/edited"],
                ["apply", "s3://models/qwen-7b", "-o", "s3://models/one", "--layers", "14"],
            ):
                log.clear()
                sent.clear()
                done = subprocess.run(
                    [sys.executable, "-m", "qkpatch", *command, "--json"],
                    env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    sys.exit(done.stderr)
                kinds = ", ".join(f"{n} {what}" for what, n in log.most_common())
                print(
                    f"{' '.join(command)}: {log.total()} requests ({kinds}); "
                    f"{sent['down'] / 1e6:.2f} MB down, {sent['up'] / 1e6:.2f} MB up; "
                    f"so far at most {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB of memory",
                    flush=True,
                )


if __name__ == "__main__":
    main()
