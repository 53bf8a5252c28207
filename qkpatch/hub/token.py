"""The token goes to the endpoint alone, whatever address an answer names: the next page, a redirect, an upload.

huggingface_hub has one client for the whole process. Two hooks hang in it while a call of qkpatch's runs, and look at
requests of such calls alone: those of the calling thread, and in huggingface_hub's own threads those that say so.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import qkpatch
from qkpatch.common.interrupts import aside, is_own_process
from qkpatch.errors import HubError
from qkpatch.hub.answers import Call, RefusedError, httpx, limit_answer, limit_request

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Whoever sends the token for us has its headers from `hub_api`, and so names us in the same breath.
NAME = "qkpatch"

_calling: ContextVar[Call | None] = ContextVar("qkpatch_is_calling_the_hub", default=None)


def hub_api() -> HfApi:
    """huggingface_hub's client of the Hub, whose requests say that they are qkpatch's."""
    from huggingface_hub import HfApi

    return HfApi(library_name=NAME, library_version=qkpatch.__version__)


@contextmanager
def token_guarded() -> Iterator[None]:
    """What huggingface_hub sends for this block carries the token to the endpoint, or is refused; answers are bounded.

    Raises:
        RefusedError: a request that would have taken it elsewhere, or an answer; perhaps as the cause of another error.
        HubError: HF_ENDPOINT has a user name or a password in it.
    """
    _check_endpoint()
    token = _calling.set(Call())
    try:
        _hooks.hang()
        yield
    finally:
        _calling.reset(token)
        _hooks.take_down()


def refusal_in(error: BaseException | None) -> RefusedError | None:
    """The refusal that led to ``error``; None where there was none."""
    while error is not None and not isinstance(error, RefusedError):
        error = error.__cause__ or error.__context__
    return error


def _check_endpoint() -> None:
    from huggingface_hub import constants

    if "@" in urlsplit(constants.ENDPOINT).netloc:
        what = "HF_ENDPOINT has a user name or a password in it, which would be sent in place of the token"
        fix = "leave them out; what the endpoint is to know of you goes into HF_TOKEN"
        raise HubError(what, where=constants.ENDPOINT, fix=fix)


def _check_request(request: Any) -> None:
    if not _is_ours(request):
        return
    limit_request(request)
    if not _is_home(request.url):
        # The Hub's own, which a part of its domain may see; no redirect needs it.
        request.headers.pop("cookie", None)
        if "authorization" in request.headers:
            raise _refusal(str(request.url))
    for host in _hosts(request.url) if is_own_process() else ():
        _look_up(host)


def _hosts(url: Any) -> list[str]:
    """The hosts whose addresses a request takes: its own, or those of the proxies that may look that up."""
    proxies = {} if proxy_bypass(url.host) else getproxies()
    through = [proxy for kind, proxy in proxies.items() if kind in (url.scheme, "all")]
    # Without a scheme it is http, as for the library.
    found = [urlsplit(proxy if "://" in proxy else f"http://{proxy}").hostname for proxy in through]
    return [host for host in found if host] or [url.host]


@lru_cache
def _look_up(host: str) -> None:
    """Find a host's address before it is asked for: the system's resolver, which may take a minute, hears no signal."""
    try:
        aside(socket.getaddrinfo, host, None)
    except OSError as error:
        raise httpx().ConnectError(str(error)) from error


def _check_answer(response: Any) -> None:
    """Addresses that are not followed here: hf_xet fetches its keys from them by itself, with the token."""
    from huggingface_hub import constants

    if not _is_ours(response.request):
        return
    limit_answer(response, _calling.get())
    if "authorization" not in response.request.headers:
        return
    # By their beginning, which all readers of addresses read alike; huggingface_hub puts the endpoint for the first.
    home = urlsplit(constants.ENDPOINT)
    known = (constants.HUGGINGFACE_CO_URL_HOME, f"{home.scheme}://{home.netloc}/")
    link = response.links.get(constants.HUGGINGFACE_HEADER_LINK_XET_AUTH_KEY, {}).get("url")
    for place in (link, response.headers.get(constants.HUGGINGFACE_HEADER_X_XET_REFRESH_ROUTE)):
        if place is not None and not place.startswith(known):
            raise _refusal(place)


def _is_ours(request: Any) -> bool:
    return _calling.get() is not None or request.headers.get("user-agent", "").startswith(f"{NAME}/")


def _is_home(url: Any) -> bool:
    """By the HTTP library's own reading of both addresses."""
    from huggingface_hub import constants

    home = type(url)(constants.ENDPOINT)
    return bool((url.scheme, url.host, url.port) == (home.scheme, home.host, home.port))


def _refusal(place: str) -> RefusedError:
    cures = "name it in HF_ENDPOINT; HF_HUB_DISABLE_IMPLICIT_TOKEN=1 goes on without a token"
    what = f"the token was to be sent to {place}, which is not the endpoint; nothing was sent"
    return RefusedError(what, fix=f"if that is the Hub you mean, {cures}")


class _Hooks:
    """Hung into the client, and into any that takes its place, from the first call's begin to the last one's end."""

    def __init__(self) -> None:
        self._lock, self._calls = threading.Lock(), 0
        self._plain: Callable[[], Any] | None = None

    def hang(self) -> None:
        """Note one more call, and hang the hooks into the client."""
        http = _library()
        with self._lock:
            self._calls += 1
            if http._GLOBAL_CLIENT_FACTORY != self._client:  # also where the host has just set another
                self._plain, http._GLOBAL_CLIENT_FACTORY = http._GLOBAL_CLIENT_FACTORY, self._client
            _change(http.get_session(), hung=True)

    def take_down(self) -> None:
        """Note that a call has ended; after the last one the client is as it was."""
        http = _library()
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                if http._GLOBAL_CLIENT_FACTORY == self._client:
                    http._GLOBAL_CLIENT_FACTORY = self._plain
                if http._GLOBAL_CLIENT is not None:
                    _change(http._GLOBAL_CLIENT, hung=False)

    def _client(self) -> Any:
        """A new client with the hooks in it, in place of one that was closed."""
        assert self._plain is not None
        client = self._plain()
        _change(client, hung=True)
        return client


def _library() -> Any:
    """Where huggingface_hub keeps its client and what makes it: to set that by its own function closes the host's."""
    from huggingface_hub.utils import _http

    return _http


def _change(client: Any, *, hung: bool) -> None:
    ours: dict[str, Callable[[Any], None]] = {"request": _check_request, "response": _check_answer}
    # New lists: another thread may be going through the old ones.
    client.event_hooks = {
        kind: [hook for hook in hooks if hook is not ours.get(kind)] + ([ours[kind]] if hung else [])
        for kind, hooks in client.event_hooks.items()
    }


_hooks = _Hooks()
