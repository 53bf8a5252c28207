"""What an answer may be, whoever gives it: not compressed, of bounded size, in pages that end, and coming at all."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from qkpatch.common.interrupts import check_stop
from qkpatch.common.json_text import MAX_VALUES, count_values
from qkpatch.errors import HubError

# Of all answers to one call that are no files. The Hub lists 1000 files on a page of some 300 kB.
MOST_BYTES, MOST_PAGES = 64 << 20, 1000
LONGEST_WAIT = 60  # seconds; a server that asks for more is told of, not waited for
SLOWEST, WINDOW = 100, 60.0  # bytes a second, over so many seconds of waiting
# Seconds until something comes, where huggingface_hub sets no limit, and until an answer has begun with all its
# headers; a commit is long in the making.
_TIMEOUT, _LONG_TIMEOUT = 60, 600


class RefusedError(HubError):
    """Of what a hook refuses; raised in the midst of huggingface_hub, which retries no such error."""


def httpx() -> Any:
    """The HTTP library that this version of huggingface_hub uses: httpx2 since 2.0, httpx before."""
    try:
        from huggingface_hub.utils import httpx as library  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        import httpx as library  # type: ignore[no-redef,import-not-found,unused-ignore]
    return library


class Call:
    """How much came in answer to one call, but for files."""

    def __init__(self) -> None:
        self._pages = self._bytes = self._values = 0

    def count(self, body: bytes, pages: int = 0) -> None:
        """Count what came; raises :class:`RefusedError` where it is too much."""
        self._pages, self._bytes = self._pages + pages, self._bytes + len(body)
        self._values += count_values(body)
        if self._pages > MOST_PAGES or self._bytes > MOST_BYTES or self._values > MAX_VALUES:
            said = f"{self._pages:,} pages, {self._bytes:,} bytes, {self._values:,} values"
            fix = "check HF_ENDPOINT: is that a Hub, and the repository sound?"
            raise RefusedError(f"it says more than any Hub: {said}", fix=fix)


class Patience:
    """How long a read may take, as the HTTP library's time limit: each read asks, of an answer's head and of its body.

    Limits of the library's own begin anew with each read, for which a byte is enough.
    """

    def __init__(self, each: float, whole: float) -> None:
        self._each, self.until = each, time.monotonic() + whole

    def __float__(self) -> float:
        return self._each

    def __index__(self) -> int:
        check_stop()
        left = self.until - time.monotonic()
        if left <= 0:
            what = f"it sends less than {SLOWEST} bytes a second, or headers without end"
            raise RefusedError(what, fix="try again later")
        return max(1, round(min(self._each, left)))


def limit_request(request: Any) -> None:
    """Ask for no compression, under which a small answer may be a large one, and wait for no answer without end."""
    request.headers["accept-encoding"] = "identity"
    longest = _TIMEOUT if request.method in ("GET", "HEAD") else _LONG_TIMEOUT
    given = request.extensions.get("timeout", {})
    limits = {kind: given.get(kind) or longest for kind in ("connect", "read", "write", "pool")}
    request.extensions["timeout"] = {**limits, "read": Patience(float(limits["read"]), longest)}


def limit_answer(response: Any, call: Call | None) -> None:
    """Refuse an answer by its headers, or later, when its body comes; ``call`` is what it is counted for, where known.

    Raises:
        RefusedError: it is compressed, asks to wait too long, or is one of too many pages.
    """
    from huggingface_hub import constants

    request, wait = response.request, retry_after(response.headers)
    if response.status_code >= 400 and wait is not None and wait > LONGEST_WAIT:
        what = f"the Hub's rate limit is reached, for {wait:,} seconds more"
        raise RefusedError(what, fix="wait, or set HF_TOKEN: its limits are higher")
    if request.method != "HEAD" and response.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError("the answer is compressed, which was not asked for", fix="is there a proxy?")
    call = call or Call()
    call.count(b"", pages="next" in response.links)
    # The sizes of files are known, and checked elsewhere.
    is_api = request.url.path.startswith(urlsplit(constants.ENDPOINT).path.rstrip("/") + "/api/")
    is_file = request.method == "GET" and response.status_code in (200, 206) and not is_api
    patience = request.extensions["timeout"]["read"]
    response.stream = _bounded()(response.stream, None if is_file else call, patience)


@cache
def _bounded() -> Any:
    class Bounded(httpx().SyncByteStream):  # type: ignore[misc]
        """A body that is given up where it comes too slowly, or is too long."""

        def __init__(self, stream: Any, call: Call | None, patience: Patience) -> None:
            self._stream, self._call, self._patience = stream, call, patience

        def __iter__(self) -> Iterator[bytes]:
            came, self._patience.until = 0, time.monotonic() + WINDOW
            for chunk in self._stream:
                now, came = time.monotonic(), came + len(chunk)
                if came >= SLOWEST * WINDOW:
                    came, self._patience.until = 0, now + WINDOW
                if self._call is not None:
                    self._call.count(chunk)
                yield chunk
                self._patience.until += time.monotonic() - now  # of whoever took it

        def close(self) -> None:
            self._stream.close()

    return Bounded


def retry_after(headers: Any) -> int | None:
    """For how many seconds the server asks to be left alone; None where it does not."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,300}", text, re.ASCII):
        return int(text)
    info = parse_ratelimit_headers(headers)
    return info.reset_in_seconds if info is not None and info.remaining == 0 else None
