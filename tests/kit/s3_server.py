"""An S3 server on 127.0.0.1, moto's, behind a gate that logs every request, makes faults on order, and counts bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

SECRET = "sEcReTsEcReTsEcReT"


@dataclass(frozen=True)
class Seen:
    """One request: its method, or S3's operation where the query names one; the key; bytes in and out."""

    what: str
    key: str
    sent: int
    asked: Mapping[str, Any] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Fault:
    """What is answered in place of S3: a status with an error's code, or a connection that breaks after some bytes."""

    code: str
    status: str = "503 Service Unavailable"
    after: int | None = None

    @property
    def body(self) -> bytes:
        said = f"<Code>{self.code}</Code><Message>{self.code}, says the test</Message>"
        return f"<?xml version='1.0'?><Error>{said}</Error>".encode()


def operation(environ: Mapping[str, Any]) -> str:
    method, query = (
        environ["REQUEST_METHOD"],
        parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True),
    )
    is_copied = "HTTP_X_AMZ_COPY_SOURCE" in environ
    if "uploads" in query:
        return "CREATE" if method == "POST" else "UPLOADS"
    if "partNumber" in query:
        return "PART_COPY" if is_copied else "PART"
    if "uploadId" in query:
        return "COMPLETE" if method == "POST" else "ABORT"
    if "list-type" in query:
        return "LIST"
    return "COPY" if is_copied else str(method)


class S3:
    """The server; tests use buckets of their own."""

    def __init__(self, app: Any) -> None:
        self._app, self.log, self.received = app, list[Seen](), 0
        self.fault: Callable[[Seen], Fault | None] = lambda _: None
        self.endpoint = ""
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        sent = int(environ.get("CONTENT_LENGTH") or 0)
        seen = Seen(operation(environ), environ["PATH_INFO"].lstrip("/"), sent, environ)
        with self._lock:
            self.log.append(seen)
        fault = self.fault(seen)
        if fault is None:
            return self._counted(self._app(environ, start))
        environ["wsgi.input"].read(sent)
        if fault.after is None:
            start(
                fault.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(fault.body)))]
            )
            return [fault.body]
        return self._broken(self._app(environ, start), fault.after)

    def _counted(self, answer: Any) -> Iterator[bytes]:
        for piece in answer:
            self.received += len(piece)
            yield piece

    def _broken(self, answer: Any, after: int) -> Iterator[bytes]:
        data = b"".join(answer)
        yield data[:after]
        raise ConnectionResetError("the test breaks it")

    def of(self, what: str) -> list[Seen]:
        return [seen for seen in self.log if seen.what == what]

    def clear(self) -> None:
        self.log.clear()
        self.received, self.fault = 0, lambda _: None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def s3_server() -> Iterator[S3]:
    """A server for as long as the block; raises ModuleNotFoundError where moto is not installed."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

        def log_request(self, *_: Any) -> None:
            pass

    s3 = S3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, s3, threaded=True, request_handler=Quiet)
    s3.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        server.shutdown()
        thread.join()


def upload(folder: Path, bucket: str, prefix: str, scheme: str = "s3") -> str:
    """Put a directory into a bucket, with the client itself; its URL."""
    import fsspec

    fs = fsspec.filesystem(scheme, use_listings_cache=False)
    make_bucket(bucket, scheme)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{bucket}/{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"{scheme}://{bucket}/{prefix}"


def make_bucket(name: str, scheme: str = "s3") -> str:
    """Make one, unless it is there; its URL."""
    import fsspec

    fs = fsspec.filesystem(scheme, use_listings_cache=False)
    if scheme != "memory" and not fs.exists(name):
        fs.mkdir(name)
    return f"{scheme}://{name}"
