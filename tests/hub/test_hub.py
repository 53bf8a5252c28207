"""SOURCE on the Hub, or in the Hub's cache: what is fetched, what is recorded, what each failure says."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, build_tiny
from fake_hub import TOKEN, FakeHub, Fault, Repo, hub_environment, run_qkpatch
from typer.testing import Result

from qkpatch.hub.repository import HubId
from qkpatch.recipes.catalogue import get_recipe, shipped_recipes

ELSEWHERE = "http://127.0.0.1:9"  # the discard port: nobody answers

LLAVA_CONFIG: dict[str, object] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def published(hub: FakeHub, tiny: Tiny) -> Repo:
    """The tiny checkpoint as ``org/tiny``, with branches ``main`` and ``next``."""
    (tiny.path / "folder").mkdir()
    (tiny.path / "folder" / "notes.txt").write_text("notes\n")
    hub.repos["org/tiny"] = Repo(tiny.path, branches=("main", "next"))
    return hub.repos["org/tiny"]


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def manifest_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "qkpatch.json").read_bytes()))


def assert_explains(code: int, stderr: str, stdout: str, *said: str) -> None:
    """Exit code 4, one short message that says ``said``, no traceback, no token."""
    assert code == 4, stderr
    assert stderr.count("Error:") == 1
    for text in said:
        assert text in stderr
    for text in ("Traceback", TOKEN):
        assert text not in stderr + stdout
    assert len(stderr.strip().splitlines()) <= 6


def test_the_processes_run_the_version_that_is_to_be_tested(home: Path) -> None:
    find = "import huggingface_hub as h; print(h.__version__); print(h.__file__)"
    environment = hub_environment(ELSEWHERE, home)
    version, file = subprocess.check_output([sys.executable, "-c", find], env=environment, text=True).split()
    other = os.environ.get("QKPATCH_TEST_HUB_PATH")
    assert (other is not None) == version.startswith("1.")
    assert other is None or Path(file).is_relative_to(other)


# -------- what arrives


@pytest.mark.floor
def test_a_repository_is_patched_exactly_as_its_directory_is(
    hub: FakeHub, published: Repo, home: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    result = run_qkpatch(hub_environment(hub.endpoint, home), "apply", "org/tiny", "-o", tmp_path / "hub")
    assert result.returncode == 0, result.stderr
    assert run("apply", published.path, "-o", tmp_path / "local").exit_code == 0
    from_hub, from_disk = contents(tmp_path / "hub"), contents(tmp_path / "local")
    ours, theirs = json.loads(from_hub.pop("qkpatch.json")), json.loads(from_disk.pop("qkpatch.json"))
    assert from_hub == from_disk
    for file in (*ours["files"], *theirs["files"]):
        file.pop("source_sha256")  # only the Hub told it
    assert {key for key in ours if ours[key] != theirs[key]} <= {"source", "run"}
    assert ours["source"] == {
        "kind": "hub",
        "name": "org/tiny",
        "requested_revision": None,
        "commit": published.commit,
        "checked": True,
    }
    assert {(request.host, request.token) for request in hub.log} == {("hub", TOKEN), ("cdn", None)}
    for text in (result.stdout, result.stderr, json.dumps(ours)):
        assert TOKEN not in text
    cached = home / "hub" / "models--org--tiny" / "snapshots" / published.commit
    assert contents(cached) == contents(published.path)


@pytest.mark.parametrize("kind", ["branch", "commit"])
def test_a_revision_is_fetched_and_recorded(hub: FakeHub, published: Repo, home: Path, kind: str) -> None:
    revision = "next" if kind == "branch" else published.commit
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", f"org/tiny@{revision}", "--json")
    assert result.returncode == 0, result.stderr
    source = json.loads(result.stdout)["source"]
    assert source["requested_revision"] == revision
    assert source["commit"] == published.commit


def test_a_recipe_name_stands_for_the_recipes_default_repository(
    hub: FakeHub, home: Path, tmp_path: Path
) -> None:
    llava = build_tiny(
        tmp_path / "llava",
        prefix="language_model.model.layers.{layer}.self_attn.",
        config=LLAVA_CONFIG,
    )
    hub.repos["llava-hf/llava-1.5-7b-hf"] = Repo(llava.path)
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "llava-1.5", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["source"]["name"] == "llava-hf/llava-1.5-7b-hf"
    assert plan["recipe"]["name"] == "llava-1.5"
    assert [edit["tensor"] for edit in plan["edits"]] == [llava.name(1, "q")]


def test_a_recipe_without_a_default_repository_says_so(hub: FakeHub, home: Path) -> None:
    assert get_recipe("persimmon").default_repo is None
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "persimmon")
    assert result.returncode == 2
    assert "persimmon stands for no repository" in result.stderr
    assert "org/name[@revision]" in result.stderr
    assert not hub.log


def test_every_default_repository_is_a_name_that_the_hub_can_have() -> None:
    for recipe in shipped_recipes().values():
        assert recipe.default_repo is None or HubId.parse(recipe.default_repo) is not None, recipe.name
        assert recipe.gated in (None, True), recipe.name
        assert recipe.default_repo or not recipe.gated, recipe.name


def test_a_default_repository_may_be_of_a_revision(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    opt = get_recipe("opt").default_repo
    assert opt is not None
    name, _, revision = opt.partition("@")
    text: Any = LLAVA_CONFIG["text_config"]
    config = {**text, "model_type": "opt", "architectures": ["OPTForCausalLM"]}
    tiny = build_tiny(tmp_path / "opt", prefix="model.decoder.layers.{layer}.self_attn.", config=config)
    hub.repos[name] = Repo(tiny.path, branches=("main", revision))
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "opt", "--json")
    assert result.returncode == 0, result.stderr
    source = json.loads(result.stdout)["source"]
    assert (source["name"], source["requested_revision"]) == (name, revision)


def test_quiet_keeps_quiet_while_downloading(hub: FakeHub, published: Repo, home: Path) -> None:
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "org/tiny", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# -------- the cache


def test_offline_a_cached_repository_is_found_without_a_request(
    hub: FakeHub, published: Repo, home: Path, tmp_path: Path
) -> None:
    online = hub_environment(hub.endpoint, home)
    assert run_qkpatch(online, "apply", "org/tiny", "-o", tmp_path / "out", "--quiet").returncode == 0
    hub.log.clear()
    offline = hub_environment(hub.endpoint, home, HF_HUB_OFFLINE="1")
    result = run_qkpatch(offline, "plan", "org/tiny", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["source"]["commit"] == published.commit
    assert hub.log == []


def make_snapshot(cache: Path, files: dict[str, bytes], commit: str) -> Path:
    """``files`` as the Hub cache lays them out: links in snapshots/<commit> to blobs."""
    repo = cache / "models--org--tiny"
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True)
    for number, (name, data) in enumerate(files.items()):
        blob = repo / "blobs" / f"{number:040x}"
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_cache_snapshot_as_source_keeps_its_blobs_and_names_its_commit(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "c0ffee" + "0" * 34
    snapshot = make_snapshot(tmp_path / "hub", contents(tiny.path), commit)
    before = contents(tmp_path / "hub")
    assert run("apply", snapshot, "-o", tmp_path / "out").exit_code == 0
    assert contents(tmp_path / "hub") == before
    assert all(path.is_file() and not path.is_symlink() for path in (tmp_path / "out").iterdir())
    source = manifest_of(tmp_path / "out")["source"]
    assert (source["kind"], source["name"], source["commit"]) == ("hub", "org/tiny", commit)
    assert run("verify", tmp_path / "out", "--source", snapshot).exit_code == 0


def test_a_folder_that_only_looks_like_a_cache_snapshot_is_a_directory(
    tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    snapshot = make_snapshot(tmp_path / "elsewhere", contents(tiny.path), "c0ffee" + "0" * 34)
    assert run("apply", snapshot, "-o", tmp_path / "out").exit_code == 0
    source = manifest_of(tmp_path / "out")["source"]
    assert (source["kind"], source["commit"]) == ("directory", None)


# -------- failures


def test_a_missing_repository_is_an_error_with_a_way_out(hub: FakeHub, home: Path) -> None:
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "org/none")
    assert_explains(result.returncode, result.stderr, result.stdout, "no such model repository", "org/none")


def test_a_gated_repository_is_an_error_with_a_way_out(hub: FakeHub, tiny: Tiny, home: Path) -> None:
    hub.repos["org/gated"] = Repo(tiny.path, gated=True)
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "org/gated")
    assert_explains(result.returncode, result.stderr, result.stdout, "gated", "accept its terms")


@pytest.mark.parametrize("answer", ["gated", "no such repository"])
def test_a_default_repository_that_is_gated_is_said_to_be(
    answer: str, hub: FakeHub, tiny: Tiny, home: Path
) -> None:
    """The Hub says of some that there is no such repository, where no token was sent."""
    repo = get_recipe("mllama").default_repo
    assert repo is not None
    if answer == "gated":
        hub.repos[repo] = Repo(tiny.path, gated=True)
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "mllama")
    assert_explains(result.returncode, result.stderr, result.stdout, "gated", repo, "HF_TOKEN")


@pytest.mark.floor
def test_an_unknown_revision_is_an_error_with_a_way_out(hub: FakeHub, published: Repo, home: Path) -> None:
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "org/tiny@nowhere")
    assert_explains(result.returncode, result.stderr, result.stdout, "no such branch", "org/tiny@nowhere")


def test_an_expired_token_is_an_error_with_a_way_out(hub: FakeHub, published: Repo, home: Path) -> None:
    hub.bad_token = True
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "org/tiny")
    assert_explains(result.returncode, result.stderr, result.stdout, "does not accept the token", "HF_TOKEN")


def test_a_rate_limit_is_an_error_with_a_way_out(hub: FakeHub, published: Repo, home: Path) -> None:
    hub.faults.append(Fault("status 429", "/api/models", 99))
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "org/tiny")
    assert_explains(result.returncode, result.stderr, result.stdout, "rate limit", "HF_TOKEN")


def test_a_connection_that_is_not_secure_is_an_error_with_a_way_out(hub: FakeHub, home: Path) -> None:
    endpoint = hub.endpoint.replace("http:", "https:")  # where no TLS is spoken
    result = run_qkpatch(hub_environment(endpoint, home), "plan", "org/tiny")
    assert_explains(result.returncode, result.stderr, result.stdout, "no secure connection", "SSL_CERT_FILE")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_a_certificate_that_nobody_vouches_for_is_an_error_with_a_way_out(
    hub: FakeHub, home: Path, tmp_path: Path
) -> None:
    make = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout key.pem -out cert.pem"
    )
    subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        endpoint = f"https://127.0.0.1:{server.server_port}"
        result = run_qkpatch(hub_environment(endpoint, home), "plan", "org/tiny")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert_explains(result.returncode, result.stderr, result.stdout, "no secure connection", "SSL_CERT_FILE")


def test_a_repository_without_safetensors_is_an_error_that_names_what_is_there(
    hub: FakeHub, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"0")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("nothing here")
    hub.repos |= {"org/old": Repo(tmp_path / "old"), "org/docs": Repo(tmp_path / "docs")}
    for repo, said in (
        ("org/old", "only pickled weights: pytorch_model.bin"),
        ("org/docs", "only README.md"),
    ):
        result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", repo)
        assert result.returncode == 3, result.stderr
        assert said in result.stderr
        assert repo in result.stderr


def test_offline_with_a_part_of_a_snapshot_is_an_error_with_a_way_out(
    hub: FakeHub, published: Repo, home: Path
) -> None:
    fetch = "from huggingface_hub import snapshot_download; snapshot_download('org/tiny')"
    online = hub_environment(hub.endpoint, home)
    subprocess.run([sys.executable, "-c", fetch], env=online, check=True)
    next((home / "hub").rglob("snapshots/*/model.safetensors")).unlink()
    result = run_qkpatch({**online, "HF_HUB_OFFLINE": "1"}, "plan", "org/tiny")
    assert_explains(
        result.returncode, result.stderr, result.stdout, "only a part of it is in the local cache"
    )


def test_offline_without_a_cache_is_an_error_with_a_way_out(
    hub: FakeHub, published: Repo, home: Path
) -> None:
    environment = hub_environment(hub.endpoint, home, HF_HUB_OFFLINE="1")
    result = run_qkpatch(environment, "plan", "org/tiny")
    assert_explains(result.returncode, result.stderr, result.stdout, "not in the local cache")
    assert hub.log == []


def test_an_unreachable_hub_is_an_error_with_a_way_out(home: Path) -> None:
    result = run_qkpatch(hub_environment(ELSEWHERE, home), "plan", "org/tiny")
    assert_explains(result.returncode, result.stderr, result.stdout, "cannot be reached")


@pytest.mark.parametrize("fault", ["hang up", "error 503", "not a hub"])
def test_a_hub_that_answers_nonsense_is_an_error_with_a_way_out(
    hub: FakeHub, published: Repo, home: Path, fault: str
) -> None:
    hub.fault = fault
    result = run_qkpatch(hub_environment(hub.endpoint, home), "plan", "org/tiny")
    assert_explains(result.returncode, result.stderr, result.stdout, "org/tiny")


def test_a_failed_apply_from_the_hub_writes_nothing(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    result = run_qkpatch(hub_environment(hub.endpoint, home), "apply", "org/none", "-o", folder / "out")
    assert_explains(result.returncode, result.stderr, result.stdout, "no such model repository")
    assert list(folder.iterdir()) == []
