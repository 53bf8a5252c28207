"""SOURCE in a store: what is fetched of it, that it stays the same, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import torch
from conftest import build_tiny, build_tiny_folder
from fsspec.registry import _registry
from range_server import range_server
from s3_server import S3, SECRET, Fault, upload

import qkpatch
from qkpatch.errors import CheckpointError, FileSystemError, QKPatchError, StoreError, UsageError
from qkpatch.stores import store, web
from qkpatch.stores.range_reader import BLOCK
from qkpatch.stores.url import StoreUrl

EDIT: dict[str, Any] = {"layers": "0-1", "modes": 2}
Place = Callable[[Path], str]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.01)


@pytest.fixture
def stored(memory: dict[str, Any]) -> Place:
    """Puts a directory into the store of this process."""
    return lambda folder: upload(folder, "models", "model", "memory")


@pytest.fixture(params=["memory", "s3", "gs", "az", "http"])
def put(request: pytest.FixtureRequest, reached: Callable[[str], str], tmp_path: Path) -> Iterator[Place]:
    """Puts a directory where the parameter says; putting it anew changes its objects."""
    if request.param != "http":
        reached(request.param)
        yield lambda folder: upload(folder, "models", tmp_path.name, request.param)
    else:
        pytest.importorskip("aiohttp")
        served = tmp_path / "served"
        with range_server(served) as address:

            def copied(folder: Path) -> str:
                shutil.copytree(folder, served / "a model", dirs_exist_ok=True)
                return f"{address}/a%20model"

            yield copied


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_store_gives_what_a_directory_gives(put: Place, tmp_path: Path) -> None:
    folder = build_tiny_folder(tmp_path / "tiny", shards=[["layers.0.", "embed"], ["layers"]])
    url = put(folder)
    here, there = tmp_path / "here", tmp_path / "there"
    assert qkpatch.spectra(url, layers="0-1", modes=2) == qkpatch.spectra(folder, layers="0-1", modes=2)
    ours = qkpatch.apply(qkpatch.plan(folder, **EDIT), here)
    theirs = qkpatch.apply(qkpatch.plan(url, **EDIT), there)
    a, b = files_of(here), files_of(there)
    assert a.pop("qkpatch.json") != b.pop("qkpatch.json")
    assert a == b
    assert (theirs.source.kind, theirs.source.name) == ("store", url)
    assert theirs == ours.__class__(**{**vars(ours), "source": theirs.source})
    assert qkpatch.verify(there, url).ok
    assert qkpatch.verify(there).ok  # its manifest says where SOURCE is
    assert qkpatch.verify(there, folder).ok
    assert qkpatch.apply(qkpatch.plan(url, **EDIT), there).run.already_done
    assert qkpatch.diff(folder, url).equal
    assert [d.a.name for d in qkpatch.diff(url, there).changed] == [edit.tensor for edit in ours.edits]
    # One byte beside the planned rows, and the digests do not know.
    weights = there / "model-00001-of-00002.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert not qkpatch.verify(there, url, recompute=False).ok


def test_what_is_needed_is_fetched_and_no_more(s3: S3, tmp_path: Path) -> None:
    wide = {"d_model": 512, "n_heads": 8, "n_kv_heads": 2, "d_head": 64, "n_layers": 4}
    padding = {"model.padding.weight": torch.zeros(8 << 20, dtype=torch.uint8)}
    tiny = build_tiny(tmp_path / "tiny", extra=padding, shards=[["padding"], ["layers"], ["embed"]], **wide)
    url = upload(tiny.path, "models", tmp_path.name)
    s3.clear()
    qkpatch.plan(url, **EDIT)
    assert {seen.what for seen in s3.log} == {"LIST", "GET"}
    headers = s3.received
    assert headers < 4 * (70 << 10)
    assert all("HTTP_IF_MATCH" in seen.asked for seen in s3.of("GET"))
    s3.clear()
    qkpatch.spectra(url, layers=[2], modes=2)
    rows = (8 + 2) * 64 * 512 * 2
    assert headers + rows <= s3.received < headers + rows + rows // 50


def test_a_sweep_takes_parts_of_a_source_in_a_store(stored: Place, tmp_path: Path) -> None:
    url, grid = stored(build_tiny(tmp_path / "tiny").path), {"modes": [1], "layers": ["0-1"]}
    qkpatch.sweep(url, grid, tmp_path / "whole", form="none")
    for part in ((1, 2), (2, 2), None):
        qkpatch.sweep(url, grid, tmp_path / "swept", form="none", part=part)
    assert files_of(tmp_path / "swept") == files_of(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "whole", "swept"}


@pytest.mark.parametrize("moment", ["planned", "while it is read"])
def test_a_file_that_changes_meanwhile_is_an_error(put: Place, moment: str, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "tiny", d_model=2048).path
    url = put(folder)
    plan = qkpatch.plan(url, **EDIT)
    file = plan.model.checkpoint.files["model.safetensors"]
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    if moment == "planned":
        put(folder)
        with pytest.raises(FileSystemError, match="changed while qkpatch was running"):
            qkpatch.apply(plan, tmp_path / "out")
    else:

        def read() -> None:
            with file.open() as opened:
                opened.read(8, 0)
                put(folder)
                opened.read(8, 1 << 17)

        with pytest.raises(StoreError, match="changed while qkpatch was running"):
            read()
    assert not (tmp_path / "out").exists()


def test_one_more_file_is_noticed(stored: Place, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "tiny").path
    plan = qkpatch.plan(stored(folder), **EDIT)
    (folder / "more.txt").write_text("more")
    stored(folder)
    with pytest.raises(FileSystemError, match="changed"):
        qkpatch.apply(plan, tmp_path / "out")


def test_what_had_come_whole_is_taken_over(
    stored: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_tiny(tmp_path / "tiny", shards=[["layers.0.", "embed"], ["layers"]]).path
    plan, get, fetched = qkpatch.plan(stored(folder), **EDIT), store.Store._get, list[str]()

    def broken(self: store.Store, entry: store.Entry, begin: int, end: int) -> bytes:
        fetched.append(entry.name)
        if entry.name == "tokenizer.json":
            raise ConnectionError("it broke")
        return get(self, entry, begin, end)

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "_get", broken)
        patched.setattr("qkpatch.stores.errors.is_theirs", lambda _: True)
        with pytest.raises(StoreError) as told:
            qkpatch.apply(plan, tmp_path / "out")
    assert "--resume" in str(told.value.fix)
    assert not (tmp_path / "out").exists()
    made = qkpatch.apply(plan, tmp_path / "out", resume=True)
    assert (made.run.copied_by or {})["resumed"] >= 1
    assert qkpatch.verify(tmp_path / "out", folder).ok


class Sometimes:
    """A fault of the first so many requests of a kind, or of all."""

    def __init__(self, fault: Fault, times: int, what: str = "GET") -> None:
        self.fault, self.left, self.what = fault, times, what

    def __call__(self, seen: Any) -> Fault | None:
        if seen.what != self.what or self.left == 0:
            return None
        self.left -= 1
        return self.fault


PASSING = {"busy": Fault("SlowDown"), "breaks": Fault("", after=100), "internal": Fault("InternalError")}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_waited_for(name: str, s3: S3, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "tiny").path
    url = upload(folder, "models", tmp_path.name)
    s3.fault = Sometimes(PASSING[name], 2)
    qkpatch.apply(qkpatch.plan(url, **EDIT), tmp_path / "out")
    assert s3.fault.left == 0
    assert qkpatch.verify(tmp_path / "out", folder).ok


REFUSED = {
    "AccessDenied": (Fault("AccessDenied", "403 Forbidden"), "the store forbids it", "credentials"),
    "NoSuchBucket": (Fault("NoSuchBucket", "404 Not Found"), "no such bucket", "check the URL"),
    "RequestTimeTooSkewed": (
        Fault("RequestTimeTooSkewed", "403 Forbidden"),
        "time of this machine",
        "set the clock",
    ),
    "SlowDown": (Fault("SlowDown"), "busy, and stays so", "later"),
}


@pytest.mark.parametrize("code", REFUSED)
@pytest.mark.parametrize("what", ["LIST", "GET"])
def test_what_stays_is_told(
    code: str, what: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    url = upload(build_tiny(tmp_path / "tiny").path, "models", tmp_path.name)
    fault, says, fix = REFUSED[code]
    s3.fault = Sometimes(fault, -1, what)
    with pytest.raises(StoreError) as told:
        qkpatch.plan(url, **EDIT)
    if code != "NoSuchBucket":  # as of an empty one; of one that was listed, as of a change
        assert says in told.value.what
        assert fix in str(told.value.fix)
    assert "tiny" not in told.value.what
    assert str(told.value.where).startswith(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nosuch://bucket/x", "no store is known"),
        ("gs://bucket/x", "not installed"),
        ("az://bucket/x", "the client of az:// is not installed"),
        ("abfs://bucket/x", "the client of abfs:// is not installed"),
        ("s3://bucket/a/../b", "not a folder"),
        ("s3://", "not a folder"),
        ("file:///tmp/x", "a file of this machine"),
        ("simplecache::s3://bucket/x", "inside another"),
        ("memory://nothing/here", "there is nothing"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused(url: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "adlfs", None)
    for scheme in ("gs", "az", "abfs"):
        monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(QKPatchError, match=says) as told:
        qkpatch.plan(url)
    if url.startswith("gs"):
        assert "qkpatch[gcs]" in str(told.value.fix)


def test_a_server_that_is_not_there_is_told_as_that_and_is_not_tried_again_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("aiohttp")
    with socket() as nobody:  # listens there
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(StoreError, match="the server cannot be reached"):
            qkpatch.plan(f"http://127.0.0.1:{nobody.getsockname()[1]}/model")

    class EndpointConnectionError(Exception):
        """As botocore has it, once it has tried for some seconds."""

    tried = list[int]()

    def find(store: store.Store) -> dict[str, Any]:
        tried.append(1)
        raise EndpointConnectionError("Could not connect")

    monkeypatch.setattr(store.Store, "_find", find)
    monkeypatch.setattr("qkpatch.stores.errors.is_theirs", lambda _: True)
    with pytest.raises(StoreError, match="the server cannot be reached"):
        qkpatch.plan("memory://bucket/model")
    assert len(tried) == 1


def test_who_waits_for_a_server_hears_for_which(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qkpatch.common.waiting._SECONDS", 0.01)
    monkeypatch.setattr(store.Store, "_find", lambda _: time.sleep(0.1) or {})
    said = "memory://bucket/model: no answer for 0 s; still trying"
    assert said in run("plan", "memory://bucket/model").stderr
    assert said not in run("plan", "-q", "memory://bucket/model").stderr


SECRETS = [
    "https://user:hunter2secret@host/x", "s3://AKIAKEY:hunter2secret@bucket/x", "sftp://hunter2secret@host/x",
    "https://host/x?X-Amz-Signature=hunter2secret", "https://a.blob.core.windows.net/c/x?sig=hunter2secret",
    "az://c:hunter2secret@account.dfs.core.windows.net/x", "s3://AKIAKEY%3Ahunter2secret%40bucket/x",
    "https://user:hunter2secret%2540host/x", "https://host/x%3fX-Amz-Signature=hunter2secret",
    "https://host/x;sig=hunter2secret", "https://host/x%3Bsig%3Dhunter2secret/y",
    "https://host/https%3A%2F%2Fuser%3Ahunter2secret%40other/x",
]  # fmt: skip


@pytest.mark.parametrize("url", SECRETS)
def test_a_url_with_a_secret_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="which would be shown and recorded") as told:
        qkpatch.plan(url)
    assert "hunter2secret" not in str(told.value)


def test_what_only_looks_like_a_secret_is_a_url() -> None:
    for url in (
        "s3://bucket/model@v2/a%20b",
        "az://c@account.dfs.core.windows.net/x",
        "s3://bucket/12:30/a;b",
    ):
        assert str(StoreUrl.parse(url)).count(url)


@pytest.mark.parametrize("url", [SECRETS[1], SECRETS[3], SECRETS[-1]])
def test_a_url_with_a_secret_is_never_shown(url: str, run: Any, tmp_path: Path) -> None:
    folder, out = build_tiny(tmp_path / "tiny").path, tmp_path / "out"
    for command in (
        ("plan", url), ("plan", url, "--json"), ("inspect", url), ("recipes", "check", url), ("diff", url, folder),
        ("diff", folder, url, "--json"), ("apply", url, "-o", out), ("apply", folder, "-o", url),
        ("plan", folder, "-o", url), ("verify", url, "--source", folder), ("lora", folder, "-o", url),
        ("apply", url, "-o", out, "--debug", "--json"),
    ):  # fmt: skip
        done = run(*command)
        assert done.exit_code != 0, command
        shown = done.output + str(done.exception or "")
        assert "hunter2secret" not in shown, command
    assert not out.exists()


def test_credentials_are_in_no_message_and_no_file(s3: S3, run: Any, tmp_path: Path) -> None:
    url = upload(build_tiny(tmp_path / "tiny").path, "models", tmp_path.name)
    done = run("apply", url, "--layers", "0-1", "--modes", "2", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    s3.fault = Sometimes(Fault(f"Wrong{SECRET}", "400 Bad Request"), -1)
    failed = run("plan", url, "--debug")
    assert failed.exit_code != 0
    said = (
        done.output + failed.output + str(failed.exception) + (tmp_path / "out" / "qkpatch.json").read_text()
    )
    assert SECRET not in said
    assert json.loads((tmp_path / "out" / "qkpatch.json").read_text())["source"]["name"] == url


def test_pages_that_link_on_without_end_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    from fsspec.implementations.http import HTTPFileSystem

    fs, seen = HTTPFileSystem(skip_instance_cache=True), list[str]()

    def links(url: str, **_: Any) -> list[dict[str, Any]]:
        seen.append(url)
        return [{"name": f"{url}/{name}/", "size": None, "type": "directory"} for name in "ab"]

    monkeypatch.setattr(fs, "ls", links)
    monkeypatch.setattr(web, "MOST_PAGES", 99)
    url = StoreUrl.parse("https://host/model")
    assert url is not None
    with pytest.raises(CheckpointError, match="more than 99 folders"):
        store.Store(url, fs).listing()
    assert len(seen) < 100


def test_a_server_without_ranges_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    build_tiny(tmp_path / "served" / "tiny")
    served = range_server(tmp_path / "served", has_ranges=False)
    with served as address, pytest.raises(StoreError, match="no byte ranges"):
        qkpatch.plan(f"{address}/tiny")


def test_a_file_is_read_in_order_a_few_blocks_ahead(s3: S3, tmp_path: Path) -> None:
    size = 2 * BLOCK
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.bin").write_bytes(bytes(range(256)) * (size // 256))
    from qkpatch.stores.remote import StoreFolder
    from qkpatch.stores.url import StoreUrl

    url = StoreUrl.parse(upload(folder, "models", tmp_path.name))
    assert url is not None
    file = StoreFolder.at(url).files["a.bin"]
    s3.clear()
    with file.open() as opened:
        read = b"".join(bytes(opened.read(1 << 20, at)) for at in range(0, size, 1 << 20))
    assert read == (folder / "a.bin").read_bytes()
    assert len(s3.of("GET")) <= 1 + size // (4 << 20)
    assert s3.received <= size + (1 << 20)
