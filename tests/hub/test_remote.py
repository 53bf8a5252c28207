"""A repository that is read where it is: which bytes are asked for, of whom, and what is not believed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Tiny, build_tiny
from fake_hub import TOKEN, FakeHub, Fault, Repo, command, hub_environment, run_qkpatch
from typer.testing import Result

from qkpatch.stores.range_reader import BLOCK, Block, Fetchers, RangeReader, blocks, merged

SHARDS = [["layers.0.", "layers.1.", "layers.2.", "layers.3."], [""]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Two shards of 8 layers, wide enough for headers to be small beside queries and keys."""
    sizes = {"n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "d_head": 64, "d_model": 512}
    extra = {f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(2048, 512).bfloat16() for n in range(8)}
    return build_tiny(tmp_path_factory.mktemp("wide") / "wide", shards=SHARDS, extra=extra, **sizes)  # type: ignore[arg-type]


@pytest.fixture
def published(hub: FakeHub, wide: Tiny) -> Repo:
    (wide.path / "folder").mkdir(exist_ok=True)
    (wide.path / "folder" / "notes.txt").write_text("notes\n")
    hub.repos["org/wide"] = Repo(wide.path)
    return hub.repos["org/wide"]


def weight_bytes(tiny: Tiny) -> int:
    """Of all queries and keys."""
    return 2 * tiny.n_layers * (tiny.n_heads + tiny.n_kv_heads) * tiny.d_head * tiny.d_model


def header_bytes(repo: Repo) -> int:
    shards = [path.read_bytes()[:8] for name, path in repo.files.items() if repo.is_lfs(name)]
    return sum(8 + int.from_bytes(start, "little") for start in shards)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# -------- what is fetched


def test_inspect_fetches_headers_queries_and_keys_and_little_more(
    hub: FakeHub, published: Repo, wide: Tiny, home: Path, run: Callable[..., Result]
) -> None:
    result = run_qkpatch(hub_environment(hub.endpoint, home), "inspect", "org/wide", "--json")
    assert result.returncode == 0, result.stderr
    assert hub.sent_of(".safetensors") <= 1.03 * weight_bytes(wide) + header_bytes(published)
    shards = [request for request in hub.log if request.path.endswith(".safetensors")]
    assert shards
    for request in shards:
        assert request.method == "GET"
        assert re.fullmatch(r"bytes=\d+-\d+", request.range or "")
    resolved = [request.path for request in hub.log if "/resolve/" in request.path]
    assert {path.split("/resolve/")[1].split("/")[0] for path in resolved} == {published.commit}
    assert {(request.host, request.token) for request in hub.log} == {("hub", TOKEN), ("cdn", None)}
    assert not (home / "hub").exists() or not list((home / "hub").rglob("*.safetensors"))
    # A shard is looked up by the few requests that go out first, and then read where it leads.
    lookups = [path for path in resolved if path.endswith(".safetensors")]
    assert len(lookups) <= 4 < sum(request.host == "cdn" for request in hub.log)
    local = run("inspect", published.path, "--json")
    ours, theirs = json.loads(result.stdout), json.loads(local.stdout)
    assert ours.pop("source") == "org/wide"
    assert theirs.pop("source") == "wide"
    assert ours == theirs


def test_inspect_of_some_heads_fetches_theirs_alone(
    hub: FakeHub, published: Repo, wide: Tiny, home: Path
) -> None:
    arguments = ("inspect", "org/wide", "--layers", "1", "--heads", "0-1", "--json")
    result = run_qkpatch(hub_environment(hub.endpoint, home), *arguments)
    assert result.returncode == 0, result.stderr
    rows = 3 * wide.d_head * wide.d_model * 2  # two query heads and the key head that they share
    assert rows < hub.sent_of(".safetensors") <= rows + 2 * (64 << 10)


@pytest.mark.parametrize("arguments", [("plan",), ("apply", "--dry-run", "-o", "out")])
def test_a_plan_reads_headers_alone(
    hub: FakeHub, published: Repo, home: Path, tmp_path: Path, run: Callable[..., Result],
    arguments: tuple[str, ...],
) -> None:  # fmt: skip
    environment = hub_environment(hub.endpoint, home)
    given = (arguments[0], "org/wide", *arguments[1:], "--json")
    result = run_qkpatch(environment, *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert hub.sent_of(".safetensors") <= 2 * (64 << 10)
    local = json.loads(run("plan", published.path, "--json").stdout)
    ours = json.loads(result.stdout)
    for file in ours["files"]:
        assert file.pop("source_sha256") == (
            published.sha256(file["name"]) if published.is_lfs(file["name"]) else None
        )
    for file in local["files"]:
        assert file.pop("source_sha256") is None
    assert {key for key in ours if ours[key] != local[key]} <= {"source", "costs", "run"}
    assert ours["source"]["commit"] == published.commit
    assert not (tmp_path / "out").exists()


def test_recipes_check_downloads_nothing(hub: FakeHub, published: Repo, home: Path) -> None:
    result = run_qkpatch(hub_environment(hub.endpoint, home), "recipes", "check", "org/wide")
    assert result.returncode == 0, result.stderr
    assert hub.sent_of(".safetensors") <= 2 * (64 << 10)


def test_a_complete_snapshot_is_used_and_a_partial_one_is_not(
    hub: FakeHub, published: Repo, home: Path
) -> None:
    environment = hub_environment(hub.endpoint, home)
    fetch = "from huggingface_hub import snapshot_download; snapshot_download('org/wide')"
    subprocess.run([sys.executable, "-c", fetch], env=environment, check=True)
    hub.log.clear()
    assert run_qkpatch(environment, "plan", "org/wide").returncode == 0
    assert [request.path for request in hub.log] == ["/api/models/org/wide"]
    next((home / "hub").rglob("snapshots/*/model-00001*")).unlink()
    hub.sent.clear()
    assert run_qkpatch(environment, "plan", "org/wide").returncode == 0
    assert 0 < hub.sent_of("model-00001-of-00002.safetensors")


# -------- what is not believed, and what is tried again


def plan(hub: FakeHub, home: Path) -> subprocess.CompletedProcess[str]:
    return run_qkpatch(hub_environment(hub.endpoint, home), "plan", "org/wide", "--json")


def inspect(hub: FakeHub, home: Path) -> subprocess.CompletedProcess[str]:
    environment = hub_environment(hub.endpoint, home, HF_HUB_DOWNLOAD_TIMEOUT="1")
    return run_qkpatch(environment, "inspect", "org/wide", "--layers", "0-1", "--json")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("whole", "safetensors", 99), "the whole file"),
        (Fault("other range", "safetensors", 99), "were asked for"),
        (Fault("other commit", "safetensors", 99), "listed another file"),
        (Fault("gzip", "safetensors", 99), "compressed"),
        (Fault("status 416", "safetensors", 99), "there are fewer"),
        (Fault("status 403", "safetensors", 99, host="hub"), "forbids"),
        (
            Fault("status 403", "safetensors", 99, {"X-Error-Code": "GatedRepo"}, host="hub"),
            "accept its terms",
        ),
        (Fault("status 404", "config.json", 99, {"X-Error-Code": "EntryNotFound"}), "no such file any more"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(
    hub: FakeHub, published: Repo, home: Path, fault: Fault, said: str
) -> None:
    hub.faults.append(fault)
    result = plan(hub, home)
    assert result.returncode == 4, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stderr


def test_a_whole_file_in_place_of_a_range_is_not_swallowed(hub: FakeHub, published: Repo, home: Path) -> None:
    big = published.path / "model-00001-of-00002.safetensors"
    hub.faults.append(Fault("whole", "safetensors", 99))
    assert plan(hub, home).returncode == 4
    assert hub.sent_of(".safetensors") < big.stat().st_size  # what the socket buffers take, of two shards


def test_a_file_that_changes_while_it_is_read_is_refused(hub: FakeHub, published: Repo, home: Path) -> None:
    hub.faults.append(Fault("other etag", "00001-of-00002.safetensors", 1, host="cdn"))
    result = inspect(hub, home)
    assert result.returncode == 4, result.stderr
    assert "changed while it was read" in result.stderr


@pytest.mark.long
def test_busy_cut_and_silent_connections_are_tried_again_from_where_they_broke_off(
    hub: FakeHub, published: Repo, wide: Tiny, home: Path, run: Callable[..., Result]
) -> None:
    hub.faults += [
        Fault("status 503", "safetensors", 2),
        Fault("status 429", "safetensors", 1, {"Retry-After": "1"}),
        Fault("cut", "safetensors", 2, host="cdn"),
        Fault("stall", "safetensors", 1, host="cdn"),
        Fault("cut", "config.json", 1),
        Fault("status 503", "index.json", 1),
    ]
    result = inspect(hub, home)
    assert result.returncode == 0, result.stderr
    assert all(fault.times == 0 for fault in hub.faults)
    rows = 2 * 10 * wide.d_head * wide.d_model * 2
    assert hub.sent_of(".safetensors") == rows + 2 * (64 << 10)  # no byte came twice
    local = run("inspect", published.path, "--layers", "0-1", "--json")
    assert json.loads(result.stdout)["layers"] == json.loads(local.stdout)["layers"]


def test_a_signed_address_that_expired_is_asked_for_anew(hub: FakeHub, published: Repo, home: Path) -> None:
    hub.faults.append(Fault("status 403", "safetensors", 1, host="cdn", skip=2))  # after two headers
    result = inspect(hub, home)
    assert result.returncode == 0, result.stderr
    assert hub.faults[0].times == 0


def test_a_long_rate_limit_is_told_at_once(hub: FakeHub, published: Repo, home: Path) -> None:
    hub.faults.append(Fault("status 429", "safetensors", 99, {"Retry-After": "200"}))
    begun = time.monotonic()
    result = plan(hub, home)
    assert result.returncode == 4
    assert "rate limit is reached, for 200 seconds more" in result.stderr
    assert time.monotonic() - begun < 20


def test_ctrl_c_ends_a_command_that_waits_for_the_hub(hub: FakeHub, published: Repo, home: Path) -> None:
    hub.faults.append(Fault("status 429", "cdn|signed", 99, {"Retry-After": "50"}, host="cdn"))
    environment = hub_environment(hub.endpoint, home)
    arguments = command("inspect", "org/wide")
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whatever the surroundings ignore
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, env=environment, stderr=pipe, text=True, preexec_fn=heed) as process:
        deadline = time.monotonic() + 30
        while not any(request.host == "cdn" for request in hub.log) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert "Interrupted" in stderr


def test_the_tree_must_list_plain_paths(hub: FakeHub, published: Repo, home: Path) -> None:
    published.files["../outside.txt"] = published.files["config.json"]
    result = plan(hub, home)
    assert result.returncode == 3, result.stderr
    assert "no plain path" in result.stderr


# -------- ranges


def test_ranges_are_joined_where_the_gap_is_small_beside_them() -> None:
    assert merged([(500, 600), (0, 100), (100, 500), (0, 100), (7, 7)]) == [(0, 600)]
    assert merged([(0, 12800), (12900, 25700)]) == [(0, 25700)]
    assert merged([(0, 12800), (12901, 25701)]) == [(0, 12800), (12901, 25701)]
    assert merged([(0, 100), (50, 80)]) == [(0, 100)]


def test_joining_never_adds_more_than_a_64th() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        sizes, gaps = torch.randint(1, 5000, (2, 200), generator=generator)
        ranges, at = [], 0
        for size, gap in zip(sizes.tolist(), (gaps // 40).tolist(), strict=True):
            ranges.append((at, at + size))
            at += size + gap
        asked, fetched = (sum(end - begin for begin, end in some) for some in (ranges, merged(ranges)))
        assert asked <= fetched <= asked * 65 / 64


def test_long_ranges_come_in_blocks() -> None:
    assert list(blocks([(1, 2), (10, 10 + 2 * BLOCK + 1)])) == [
        (1, 2), (10, 10 + BLOCK), (10 + BLOCK, 10 + 2 * BLOCK), (10 + 2 * BLOCK, 10 + 2 * BLOCK + 1),
    ]  # fmt: skip


def test_a_reader_gives_the_same_bytes_whatever_was_announced() -> None:
    data = bytes(range(256)) * 40
    asked: list[tuple[int, int]] = []

    def fetch(begin: int, end: int, buffer: memoryview, is_given_up: object) -> None:
        asked.append((begin, end))
        buffer[:] = data[begin:end]

    reader = RangeReader("data", len(data), fetch, Fetchers(3), [(100, 300), (301, 900), (5000, 6000)])
    for begin, end in [(0, len(data)), (150, 200), (250, 350), (890, 5100), (0, 50), (6000, 6000)]:
        buffer = bytearray(end - begin)
        reader.read_into(memoryview(buffer), begin)
        assert buffer == data[begin:end]
    assert b"".join(bytes(piece) for piece in reader.pieces(3, 9000)) == data[3:9000]
    assert asked.count((100, 900)) == 1


def test_what_a_fetch_raises_is_raised_by_whoever_reads() -> None:
    def fetch(begin: int, end: int, buffer: memoryview, is_given_up: object) -> None:
        raise ValueError("no")

    block = Fetchers(1).start(Block(fetch, 0, 10))
    with pytest.raises(ValueError, match="no"):
        block.data()
