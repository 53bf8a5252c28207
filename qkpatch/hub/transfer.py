"""Byte ranges of a repository's files over HTTP: exactly what was asked for, of one commit, or an error.

The session is huggingface_hub's, with its proxies and certificates; redirects are followed here, since the token
must not leave the Hub and a signed address is good for many ranges.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urljoin, urlsplit

import qkpatch
from qkpatch.common.interrupts import pause
from qkpatch.errors import HubError
from qkpatch.hub.answers import httpx, retry_after
from qkpatch.hub.errors import hub_errors, is_tls_failure
from qkpatch.hub.listing import Listed
from qkpatch.hub.token import NAME

_REDIRECTS = 10
_FAILURES = 6  # in a row, without a byte between them
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_MOVED = {301, 302, 303, 307, 308}
_STALE = {401, 403, 404, 410}  # of an address that was redirected to: its signature has expired
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)


class _BrokenError(Exception):
    """Worth another try, after ``wait`` seconds where the server says so."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class Transfer:
    """One repository at one commit; any number of threads."""

    def __init__(self, repo: str, commit: str) -> None:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self._repo, self._commit = repo, commit
        self._headers = build_hf_headers(library_name=NAME, library_version=qkpatch.__version__)
        self._lock = threading.Lock()
        self._places: dict[str, str] = {}  # where a file's address leads to
        self._tags: dict[tuple[str, str], str] = {}  # ETags, by file and host

    def fetch(
        self, file: Listed, begin: int, end: int, buffer: memoryview, is_given_up: Callable[[], bool]
    ) -> None:
        """Fill ``buffer`` with the bytes ``begin:end``; goes on where a connection broke off.

        Raises:
            HubError: refused, or broken too often; the answer is not what was asked for.
        """
        done = failures = 0
        while begin + done < end and not is_given_up():
            try:
                for chunk in self._range(file, begin + done, end):
                    buffer[done : done + len(chunk)] = chunk
                    done, failures = done + len(chunk), 0
                    if is_given_up():
                        return
            except _BrokenError as broken:
                failures += 1
                self._pause(file, broken, failures, is_given_up)

    def whole(self, file: Listed) -> bytes:
        """All of a small file."""
        failures = 0
        while True:
            try:
                with self._answer(file, {}) as response:
                    return b"".join(self._body(file, response, file.size))
            except _BrokenError as broken:
                failures += 1
                self._pause(file, broken, failures, lambda: False)

    def _pause(
        self, file: Listed, broken: _BrokenError, failures: int, is_given_up: Callable[[], bool]
    ) -> None:
        if failures > _FAILURES:
            what = f"the connection broke {failures} times in a row: {broken}"
            raise self._error(file, what, "try again later") from broken
        usual = min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT)
        pause(usual if broken.wait is None else broken.wait, is_given_up)

    def _range(self, file: Listed, begin: int, end: int) -> Iterator[bytes]:
        asked = {"Range": f"bytes={begin}-{end - 1}"}
        with self._answer(file, asked) as response:
            if response.status_code == 200:  # whose body is not read
                what = "the answer is the whole file, not the bytes that were asked for"
                cure = f"download the model once: `hf download {self._repo}`, or choose another HF_ENDPOINT"
                raise self._error(file, what, f"a proxy in between may not know ranges; {cure}")
            said = _RANGE.fullmatch(response.headers.get("content-range", "").strip())
            numbers = said and tuple(map(int, said.groups()))
            if response.status_code != 206 or numbers != (begin, end - 1, file.size):
                came = response.headers.get("content-range", "nothing")
                wanted = f"bytes {begin}-{end - 1} of {file.size} were asked for"
                fix = "try again; if it stays, what HF_ENDPOINT or a proxy delivers is not the listed file"
                raise self._error(file, f"{wanted}, and {came} came (status {response.status_code})", fix)
            yield from self._body(file, response, end - begin)

    def _body(self, file: Listed, response: Any, size: int) -> Iterator[bytes]:
        self._check_tag(file, response)
        came = 0
        try:
            for chunk in response.iter_raw():  # as they come: what came before a break is kept
                came += len(chunk)
                if came > size:
                    fix = "is there a proxy in between?"
                    raise self._error(file, f"more than the {size} bytes came", fix)
                yield chunk
        except httpx().TransportError as error:
            raise _BrokenError(f"{error or type(error).__name__}") from error
        if came < size:
            raise _BrokenError(f"{came} of {size} bytes came")

    @contextmanager
    def _answer(self, file: Listed, asked: dict[str, str]) -> Iterator[Any]:
        """An answer with content, not yet read; a connection that fails is worth another try."""
        library = httpx()
        with hub_errors(f"{self._repo}: {file.name}"):
            try:
                response = self._open(file, asked)
            except (library.TimeoutException, library.NetworkError, library.RemoteProtocolError) as error:
                if is_tls_failure(error):
                    raise
                raise _BrokenError(f"{error or type(error).__name__}") from error
        with closing(response):
            yield response

    def _open(self, file: Listed, asked: dict[str, str]) -> Any:
        """The answer at the end of all redirects."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

        home = hf_hub_url(self._repo, file.name, revision=self._commit)
        with self._lock:
            url = self._places.get(file.name, home)
        is_remembered = url != home
        client = get_session()
        for _ in range(_REDIRECTS):
            headers, longest = {**self._headers_for(url, home), **asked}, constants.HF_HUB_DOWNLOAD_TIMEOUT
            request = client.build_request("GET", url, headers=headers, timeout=longest)
            response = client.send(request, stream=True, follow_redirects=False)
            if response.status_code in (200, 206):
                if url != home:
                    with self._lock:
                        self._places[file.name] = url
                return response
            with closing(response):
                if response.status_code in _MOVED:
                    url = self._next(file, response, url, home)
                elif is_remembered and response.status_code in _STALE:
                    with self._lock:
                        self._places.pop(file.name, None)
                    what = f"status {response.status_code} of an address that was good before"
                    raise _BrokenError(what, 0.0)
                else:
                    self._refuse(file, response)
        raise self._error(file, f"more than {_REDIRECTS} redirects", "check HF_ENDPOINT")

    def _headers_for(self, url: str, home: str) -> dict[str, str]:
        """The token is for the Hub alone."""
        is_home = _origin(url) == _origin(home)
        return {key: value for key, value in self._headers.items() if is_home or key.lower() == "user-agent"}

    def _next(self, file: Listed, response: Any, url: str, home: str) -> str:
        redirected: str = urljoin(url, response.headers.get("location", ""))
        if _origin(redirected)[0] not in ("https", _origin(url)[0]):
            what = "redirected from https to something else"
            raise self._error(file, what, "check HF_ENDPOINT and proxies")
        if _origin(url) == _origin(home):
            self._check_listing(file, response)
        return redirected

    def _check_listing(self, file: Listed, response: Any) -> None:
        """What the Hub says of the file on the way must be what it listed."""
        said = response.headers
        commit, size = said.get("x-repo-commit", self._commit), said.get("x-linked-size", str(file.size))
        tag = _tag(said.get("x-linked-etag", ""))
        is_other = file.sha256 is not None and re.fullmatch("[0-9a-f]{64}", tag) and tag != file.sha256
        if commit != self._commit or size != str(file.size) or is_other:
            listed = f"commit {self._commit[:12]}, {file.size} bytes"
            now = f"commit {commit[:12]}, {size} bytes"
            what = f"the Hub listed another file: {listed}; now it says {now}"
            raise self._error(file, what, "try again")

    def _check_tag(self, file: Listed, response: Any) -> None:
        tag = _tag(response.headers.get("etag", ""))
        if not tag:
            return
        host = _origin(str(response.url))
        with self._lock:
            first = self._tags.setdefault((file.name, str(host)), tag)
        if first != tag:
            raise self._error(file, "the file changed while it was read (its ETag did)", "try again")

    def _refuse(self, file: Listed, response: Any) -> None:
        status = response.status_code
        if status in _AGAIN:
            raise _BrokenError(f"the Hub answered {status}", retry_after(response.headers))
        if status == 416:
            what = f"the Hub lists {file.size} bytes, and says that there are fewer"
            raise self._error(file, what, "try again")
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        response.read()
        hf_raise_for_status(response)
        raise self._error(file, f"the answer has status {status}", "check HF_ENDPOINT")

    def _error(self, file: Listed, what: str, fix: str) -> HubError:
        return HubError(what, where=f"{self._repo}@{self._commit[:12]}: {file.name}", fix=fix)


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


def _tag(text: str) -> str:
    return text.strip().removeprefix("W/").strip('"')
