"""A web server of directories that knows byte ranges and ETags, with an index of each folder."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    has_ranges = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_GET()
            return
        data, said = path.read_bytes(), self.headers.get("Range", "")
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", said) if self.has_ranges else None
        begin, end = (int(found[1]), min(int(found[2]) + 1, len(data))) if found else (0, len(data))
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self._facts(path, end - begin)
        self.wfile.write(data[begin:end])

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_HEAD()
            return
        self.send_response(200)
        self._facts(path, path.stat().st_size)

    def _facts(self, path: Path, length: int) -> None:
        status = path.stat()
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{status.st_mtime_ns:x}-{status.st_size:x}"')
        if not self.has_ranges:
            self.send_header("Accept-Ranges", "none")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def range_server(folder: Path, *, has_ranges: bool = True) -> Iterator[str]:
    """Serve ``folder``; the address."""
    kind = type("Handler", (_Handler,), {"has_ranges": has_ranges})
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: kind(*a, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
