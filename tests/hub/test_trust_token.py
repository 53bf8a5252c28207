"""The token goes to the endpoint alone, and no secret is told: not in errors, logs, tracebacks, records or cards."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, build_tiny
from fake_hub import TOKEN, FakeHub, Fault, Repo, hub_environment, run_qkpatch
from typer.testing import Result

from qkpatch.cli.redaction import Redacted
from qkpatch.errors import HubError, QKPatchError, redact
from qkpatch.hub.errors import httpx, hub_errors
from qkpatch.hub.token import hub_api

LONG = "hf_" + "aZ3" * 11 + "x"  # as the Hub makes them
SHARDS = [["embed_tokens", "layers.0."], ["layers.1."], ["layers.2."]]


@pytest.fixture
def published(hub: FakeHub, tmp_path: Path) -> Repo:
    hub.repos["org/tiny"] = Repo(build_tiny(tmp_path / "tiny", shards=SHARDS).path)
    return hub.repos["org/tiny"]


@pytest.fixture
def environment(hub: FakeHub, published: Repo, tmp_path: Path) -> dict[str, str]:
    return hub_environment(hub.endpoint, tmp_path / "home")


def assert_kept(hub: FakeHub, *texts: str) -> None:
    """The other host saw neither token nor cookie, and nobody reads the token."""
    elsewhere = [request for request in hub.log if request.host == "cdn"]
    assert {(request.token, request.cookie) for request in elsewhere} <= {(None, None)}
    for text in texts:
        assert TOKEN not in text


# -------- the token


@dataclass(frozen=True)
class Attack:
    """What the Hub answers, so that a token goes to ``{cdn}``; and the command that asks."""

    command: tuple[str, ...]
    match: str = ""  # of the paths that are answered so
    headers: tuple[tuple[str, str], ...] = ()
    kind: str = "headers"
    actions: tuple[tuple[str, str], ...] = ()  # of an upload to large-file storage
    is_refused: bool = True  # or else it is followed, without the token


PLAN, APPLY = ("plan", "org/tiny"), ("apply", "org/tiny", "-o", "{out}")
NO_CACHE, PUSH = (*APPLY, "--no-cache"), (*APPLY, "--push", "me/new")
XET = ("X-Xet-Hash", "0" * 64)
ATTACKS = {
    "next page": Attack(PLAN, "/tree/", (("Link", '<{cdn}/next?cursor=1&sig=abc>; rel="next"'),)),
    "next page, apply": Attack(APPLY, "/tree/", (("Link", '<{cdn}/next>; rel="next"'),)),
    "next page, no cache": Attack(NO_CACHE, "/tree/", (("Link", '<{cdn}/next>; rel="next"'),)),
    "next page, push": Attack(PUSH, "/tree/", (("Link", '<{cdn}/next>; rel="next"'),)),
    "next page, by a name before the host": Attack(
        PLAN, "/tree/", (("Link", '<http://127.0.0.1:{port}@{cdn_host}/next>; rel="next"'),)
    ),
    "next page, the Hub's own name": Attack(
        PLAN, "/tree/", (("Link", '<https://huggingface.co/api/next>; rel="next"'),)
    ),
    "xet link": Attack(APPLY, "/resolve/", (XET, ("Link", '<{cdn}/xet>; rel="xet-auth"'))),
    "xet header": Attack(APPLY, "/resolve/", (XET, ("X-Xet-Refresh-Route", "{cdn}/xet"))),
    "xet header that two readers read differently": Attack(
        APPLY, "/resolve/", (XET, ("X-Xet-Refresh-Route", "http://{cdn_host}\\@127.0.0.1:{port}/xet"))
    ),
    "listing redirected": Attack(
        PLAN, "/tree/", (("Location", "{cdn}/moved"),), "status 307", is_refused=False
    ),
    "revision redirected": Attack(
        PLAN, "/revision/", (("Location", "{cdn}/moved"),), "status 308", is_refused=False
    ),
    "upload verified": Attack(PUSH, actions=(("verify", "{cdn}/verify?X-Amz-Signature=abc"),)),
    "upload with a password": Attack(PUSH, actions=(("upload", "http://user:pw@{cdn_host}/up"),)),
    "preupload redirected": Attack(
        PUSH, "/preupload/", (("Location", "{cdn}/moved"),), "status 307", is_refused=False
    ),
    "commit redirected": Attack(
        PUSH, "/commit/", (("Location", "{cdn}/moved"),), "status 307", is_refused=False
    ),
}  # fmt: skip


def launch(attack: Attack, hub: FakeHub, environment: dict[str, str], out: Path) -> Any:
    """Run the command against a Hub that answers so."""
    places = {
        "cdn": hub.cdn,
        "cdn_host": hub.cdn.removeprefix("http://"),
        "port": hub.endpoint.rpartition(":")[2],
        "out": str(out),
    }
    if attack.match:
        headers = {key: value.format_map(places) for key, value in attack.headers}
        hub.faults.append(Fault(attack.kind, attack.match, 1000, headers, host="hub"))
    hub.lfs_actions = {name: {"href": href.format_map(places)} for name, href in attack.actions}
    return run_qkpatch(environment, *(word.format_map(places) for word in attack.command))


def check_attack(name: str, hub: FakeHub, environment: dict[str, str], tmp_path: Path) -> None:
    attack = ATTACKS[name]
    environment["HF_HUB_DISABLE_XET"] = "01"[not name.startswith("xet")]
    result = launch(attack, hub, environment, tmp_path / "out")
    assert_kept(hub, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    if attack.is_refused:
        assert result.returncode == 4
        assert "the token was to be sent to http" in result.stderr
        assert "HF_ENDPOINT" in result.stderr
        assert all(secret not in result.stderr for secret in ("abc", "user:pw", "cursor"))
        asked = [request.path for request in hub.log if request.host == "cdn"]
        assert [path for path in asked if not path.startswith(("/signed-", "/upload/"))] == []


def test_a_listing_s_next_page_elsewhere_gets_no_token(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    check_attack("next page", hub, environment, tmp_path)
    assert len([r for r in hub.log if "/tree/" in r.path]) == 1  # it is not tried again


@pytest.mark.stress
@pytest.mark.parametrize("name", ATTACKS)
def test_the_token_stays(hub: FakeHub, environment: dict[str, str], tmp_path: Path, name: str) -> None:
    check_attack(name, hub, environment, tmp_path)


def test_an_upload_s_verification_elsewhere_gets_no_token(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    check_attack("upload verified", hub, environment, tmp_path)


def test_without_a_token_all_is_followed(hub: FakeHub, environment: dict[str, str]) -> None:
    del environment["HF_TOKEN"]
    link = {"Link": f'<{hub.cdn}/next>; rel="next"', "X-Xet-Refresh-Route": f"{hub.cdn}/xet"}
    hub.faults.append(Fault("headers", "/tree/", 1, link))
    result = run_qkpatch(environment, "plan", "org/tiny")
    assert result.returncode == 0, result.stderr
    assert next(request.path for request in hub.log if request.host == "cdn") == "/next"


@pytest.mark.parametrize("more", [(), ("--no-cache",)])
def test_storage_elsewhere_gets_neither_token_nor_cookie_and_gives_its_files(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path, more: tuple[str, ...]
) -> None:
    hub.faults.append(Fault("headers", "", 10**6, {"Set-Cookie": "session=secret; Path=/"}, host="hub"))
    result = run_qkpatch(environment, "apply", "org/tiny", "-o", tmp_path / "out", *more)
    assert result.returncode == 0, result.stderr
    assert_kept(hub, result.stdout, result.stderr)
    assert any(request.host == "cdn" for request in hub.log)


# -------- in a host process: its client, its threads, its requests


class Web:
    """A web of hosts without a network, and a client that the host made for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: dict[str, dict[str, str]]) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import _http

        self.library, self.http = httpx(), _http
        self.asked: list[tuple[str, str | None]] = []
        self.answers = answers
        self.hook_calls = 0
        monkeypatch.setattr(constants, "ENDPOINT", "http://hub.test")
        monkeypatch.setattr(_http, "_GLOBAL_CLIENT", None)
        monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", self.client)
        self.session = _http.get_session()

    def client(self) -> Any:
        def note(request: Any) -> None:
            self.hook_calls += 1

        transport = self.library.MockTransport(self.answer)
        return self.library.Client(
            transport=transport, follow_redirects=True, event_hooks={"request": [note]}
        )

    def answer(self, request: Any) -> Any:
        self.asked.append((str(request.url), request.headers.get("authorization")))
        headers = self.answers.get(str(request.url), {})
        return self.library.Response(307 if "location" in headers else 200, headers=headers, json={})

    def get(self, url: str, agent: str = "host") -> Any:
        headers = {"authorization": f"Bearer {TOKEN}", "user-agent": agent}
        return self.http.http_backoff("GET", url, headers=headers)

    @property
    def sent(self) -> set[str]:
        """Hosts that have seen the token."""
        return {self.library.URL(url).host for url, token in self.asked if token is not None}


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Web:
    return Web(monkeypatch, {"http://hub.test/up": {"location": "https://hub.test/up"}})


def test_the_host_s_client_is_as_it_was_afterwards(web: Web) -> None:
    before = {kind: list(hooks) for kind, hooks in web.session.event_hooks.items()}
    with pytest.raises(HubError, match="http://elsewhere"), hub_errors("x"), hub_errors("y"):
        web.get("http://elsewhere.test/")
    with hub_errors("x"):
        web.get("http://hub.test/")
    assert web.http.get_session() is web.session
    assert web.session.event_hooks == before
    assert web.http._GLOBAL_CLIENT_FACTORY == web.client
    assert web.sent == {"hub.test"}
    assert web.hook_calls == 2  # the host's own hook saw both
    web.get("http://elsewhere.test/")  # which is its own affair again
    assert web.sent == {"hub.test", "elsewhere.test"}


def test_requests_of_the_host_s_other_threads_are_its_own_and_those_for_us_are_not(web: Web) -> None:
    with hub_errors("x"), ThreadPoolExecutor(2) as threads:
        threads.submit(web.get, "http://elsewhere.test/").result()
        ours = hub_api()._build_hf_headers(token=TOKEN)["user-agent"]
        refused = threads.submit(web.get, "http://stranger.test/", ours)
        assert isinstance(refused.exception(), HubError)
        inner = threads.submit(web.get, "http://hub.test/", ours)
        assert inner.result().status_code == 200
    assert web.sent == {"elsewhere.test", "hub.test"}


def test_a_client_that_takes_the_place_of_one_is_guarded_too(web: Web) -> None:
    with hub_errors("x"):
        web.http.close_session()
        with pytest.raises(HubError, match="http://stranger"):
            web.get("http://stranger.test/")
    assert web.sent == set()
    assert all(len(hooks) <= 1 for hooks in web.http.get_session().event_hooks.values())


def test_calls_side_by_side_share_the_guard(web: Web) -> None:
    begun, done = threading.Event(), threading.Event()

    def other() -> None:
        with hub_errors("other"):
            begun.set()
            assert done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(10)
    with hub_errors("mine"):
        pass
    done.set()
    thread.join()
    assert [len(hooks) for hooks in web.session.event_hooks.values()] == [1, 0]
    with pytest.raises(HubError), hub_errors("x"):
        web.get("http://stranger.test/")
    assert web.sent == set()


def test_the_same_host_by_another_scheme_is_elsewhere(web: Web) -> None:
    with pytest.raises(HubError, match="https://hub"), hub_errors("x"):
        web.get("http://hub.test/up")
    assert [url for url, _ in web.asked] == ["http://hub.test/up"]


def test_a_refusal_that_was_wrapped_arrives_as_itself(web: Web) -> None:
    def wrapping() -> None:
        try:
            web.get("http://stranger.test/?X-Amz-Signature=abc")
        except Exception as error:
            raise RuntimeError("Error while uploading") from error

    with pytest.raises(HubError) as raised, hub_errors("org/name"):
        wrapping()
    assert raised.value.where == "org/name"
    assert "http://stranger.test/?... " in raised.value.what
    assert "abc" not in str(raised.value)


# -------- secrets in what is said


SAID = {
    "user:pw@": "http://user:pw@host/path",
    "p@w@": "https://user:p@w@host",
    "user": "HTTPS://user@host:8080/x?",
    "p/w": "http://user:p/w@host/",
    "X-Amz": "403 for https://cdn/f?X-Amz-Signature=abc&X-Amz-Date=1 (see log)",
    "sig=": "GET /path?sv=1&sig=abc%3D refused",
    "pw@h": r'{"url":"https:\/\/user:pw@h\/f?Signature=abc"}',
    LONG: f"token {LONG}.",
    "hf_secret": "Invalid token hf_secret, sorry",
    "aZ3": f"http://host/{LONG}/x",
    "pw%40": "s3://user%3Apw%40bucket/x",
    "pw%2540": "s3://user:pw%2540bucket/x",
    "Signature%3D": "403 for https://cdn/f%3FX-Amz-Signature%3Dabc",
    "%3Dabc": "GET /f%26sig%3Dabc",
    ";sig": "https://cdn/f;sig=abc/g",
    "abc": "two: http://a/?x=abc http://b/?y=abc",
    "&sig=": "https://cdn/f&sig=abc?x",
}  # fmt: skip
KEPT = [
    "huggingface_hub/hf_api.py, hf_hub_download, hf_xet", "/data/hf_models/tiny", "hf_models/tiny",
    "mkdir -p /x/hf_checkpoints", "https://huggingface.co/org/name@main", "http://127.0.0.1:8080/org/name@main",
    "is it expired? Make a new one: hf auth login", "--layers 10-18,20 --alpha 0.8", "me@example.org", "a & b = c",
    "s3://bucket/model@v2/a%20b;c", "a; b=c",
]  # fmt: skip


@pytest.mark.parametrize(("secret", "text"), SAID.items())
def test_secrets_are_redacted_once_and_for_all(secret: str, text: str) -> None:
    assert secret in text
    assert secret not in redact(text)
    assert redact(redact(text)) == redact(text)
    error = QKPatchError(text, where=text, fix=text)
    assert secret not in f"{error} {error.args} {error!r} {json.dumps(error.to_json())}"


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_the_token_of_the_environment_is_known_whatever_it_looks_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", " org.tok-en/123 \n")
    assert redact("path/org.tok-en/123/x") == "path/hf_***/x"
    monkeypatch.setenv("HF_TOKEN", "none")  # a word
    assert redact("none") == "none"


def test_lines_in_pieces_and_of_several_threads_are_redacted_whole() -> None:
    plain = StringIO()
    stream = Redacted(plain)
    for piece in ("see http:/", "/user:", "p", "w@host/?", "sig", "=abc"):
        stream.write(piece)
        stream.flush()
        thread = threading.Thread(target=stream.write, args=("noise\n",))
        thread.start()
        thread.join()
    assert plain.getvalue() == "noise\n" * 6
    stream.write("\nlast http://user:pw@host")
    assert plain.getvalue() == "noise\n" * 6 + "see http://***@host/?...\n"
    stream._finish()
    assert plain.getvalue().endswith("last http://***@host")


EVERYWHERE = f"""
import logging, sys, threading, warnings
from qkpatch.cli.console import note, prepare_streams, show_warnings
prepare_streams()
secret = "http://user:pa55@host/f?X-Amz-Signature=5ec4e7&t={LONG} {LONG}"
note(secret)
show_warnings([secret])
warnings.warn(secret)
from huggingface_hub.utils import logging as hub_logging
hub_logging.get_logger("huggingface_hub.x").warning("at %s", secret)
logging.getLogger("other").error(secret)
logging.basicConfig(); logging.getLogger("third").error(secret)
def fail():
    try:
        raise ValueError(secret)
    except ValueError as error:
        raise RuntimeError(secret) from error
thread = threading.Thread(target=fail)
thread.start(); thread.join()
sys.stderr.write("http://user:pa"); sys.stderr.flush(); sys.stderr.write("55@host"); sys.stderr.flush()
print("", file=sys.stderr)
sys.stderr.write(secret + " ")
fail()
"""


def test_whatever_is_written_to_stderr_is_redacted() -> None:
    done = subprocess.run([sys.executable, "-c", EVERYWHERE], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("***@host") >= 12
    assert done.stderr.count("Traceback") == 4
    for secret in ("user:", "pa55", "5ec4e7", LONG):
        assert secret not in done.stderr
    assert done.stdout == ""


ENDPOINT = "http://user:pa55word@"


@pytest.mark.parametrize("command", [PLAN, (*PLAN, "--json"), (*PLAN, "--debug"), ("apply", "org/tiny")])
def test_an_endpoint_with_a_password_is_refused_and_not_told(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    environment["HF_ENDPOINT"] = hub.endpoint.replace("http://", ENDPOINT)
    result = run_qkpatch(environment, *command, cwd=tmp_path)
    assert result.returncode == 4
    said = result.stdout + result.stderr
    assert "a user name or a password in it" in said
    assert "pa55word" not in said
    assert hub.log == []


# Where an address with secrets may come from: what the Hub answers, and what the user types.
SIGNED = "http://user:pa55word@127.0.0.1:9/f?X-Amz-Signature=5ec4e7"
LEAKS = {
    "error body": (PLAN, Fault("status 400", "/tree/", 1, {"X-Error-Message": f"bad {SIGNED} {TOKEN} {LONG}"})),
    "forbidden": (PLAN, Fault("status 403", "/tree/", 1, {"X-Error-Message": f"no {SIGNED} {LONG}"})),
    "debug": ((*PLAN, "--debug"), Fault("status 400", "/tree/", 1, {"X-Error-Message": SIGNED})),
    "json": ((*PLAN, "--json"), Fault("status 400", "/tree/", 1, {"X-Error-Message": SIGNED})),
    "moved": (APPLY, Fault("status 302", "/resolve/", 99, {"Location": SIGNED})),
    "moved, no cache": (NO_CACHE, Fault("status 302", "/resolve/", 99, {"Location": SIGNED})),
    "warning": (PLAN, Fault("headers", "/tree/", 1, {"X-HF-Warning": f"topic; see {SIGNED}"})),
    "not an address": (PLAN, Fault("headers", "/tree/", 1, {"Link": '<http://user:pa55word@[/>; rel="next"'})),
    "usage": (("plan", "org/tiny", "--modes", SIGNED), None),
    "usage, no such option": (("plan", f"--{SIGNED}"), None),
    "usage, no such command": ((SIGNED,), None),
    "usage, too much": (("plan", "org/tiny", "x", SIGNED), None),
    "source": (("plan", SIGNED), None),
    "recipe": (("plan", "org/tiny", "--recipe", SIGNED), None),
    "config": (("plan", "org/tiny", "--config", SIGNED), None),
    "target": ((*APPLY, "--push", SIGNED), None),
}  # fmt: skip


def check_leak(name: str, hub: FakeHub, environment: dict[str, str], tmp_path: Path) -> None:
    command, fault = LEAKS[name]
    if fault is not None:
        hub.faults.append(Fault(fault.kind, fault.match, fault.times, fault.headers, host="hub"))
    words = (word.format(out=tmp_path / "out") for word in command)
    result = run_qkpatch({**environment, "COLUMNS": "80"}, *words)
    said = result.stdout + result.stderr
    if name != "warning":
        assert result.returncode != 0, said
    for secret in ("user:pa", "pa55word", "5ec4e7", TOKEN, LONG):
        assert secret not in said


def test_what_the_hub_answers_is_told_without_secrets(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    check_leak("error body", hub, environment, tmp_path)


@pytest.mark.stress
@pytest.mark.parametrize("name", LEAKS)
def test_nothing_is_told_with_secrets(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path, name: str
) -> None:
    check_leak(name, hub, environment, tmp_path)


def test_what_is_published_and_told_of_it_has_no_secrets(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.commit_answer = {"commitUrl": f"{hub.endpoint}/me/new/commit/{'0' * 40}?sig=5ec4e7"}
    result = run_qkpatch(environment, "apply", "org/tiny", "-o", tmp_path / "out", "--push", "me/new")
    assert result.returncode == 0, result.stderr
    (commit,) = hub.commits
    for text in (result.stdout, result.stderr, *(data.decode() for data in commit.files.values())):
        for secret in ("5ec4e7", TOKEN, "signed-0"):
            assert secret not in text
    alone = run_qkpatch(environment, "card", tmp_path / "out", "--push", "me/other")
    assert alone.returncode == 0, alone.stderr
    assert "/commit/" in alone.stdout
    assert "5ec4e7" not in alone.stdout + alone.stderr


def test_arguments_of_an_evaluation_are_published_without_a_token(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
    files = []
    for name in ("base", "patched"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "x_results.json")
        arguments = f"pretrained={name},token={LONG},base_url=http://user:pa55@host/?key=1"
        document = {"results": {"t": {"m,none": 0.5}}, "config": {"model": "llava", "model_args": arguments}}
        files[-1].write_text(json.dumps(document))
    result = run("card", tmp_path / "out", "--base-results", files[0], "--results", files[1])
    assert result.exit_code == 0, result.output
    assert "pretrained=patched,token=hf_***" in result.stdout
    for secret in (LONG, "pa55", "key=1"):
        assert secret not in result.stdout
