"""``--ray``: parts as tasks of a real cluster of two nodes on this machine, a worker of which dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, build_tiny

import qkpatch
from qkpatch.cluster.on_ray import apply_on_ray
from qkpatch.cluster.place import place_of
from qkpatch.common.observer import UNSEEN
from qkpatch.errors import UsageError

COUNT = 4


def contents(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {p.name: p.read_bytes() for p in out.iterdir()}
    return {**found, "qkpatch.json": {**json.loads(found["qkpatch.json"]), "run": None}}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a cluster of two nodes with a processor each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def writers(place: Path) -> Iterator[int]:
    """Processes that have a file of an unfinished part open."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(str(fd.readlink()).startswith(f"{place}/.") for fd in (process / "fd").iterdir()):
                yield int(process.name)


@pytest.mark.stress
def test_a_part_whose_worker_is_killed_is_written_by_another(tmp_path: Path, address: str) -> None:
    shards = [[f"layers.{n}."] for n in range(8)] + [[""]]
    sizes = {"n_layers": 8, "n_heads": 32, "n_kv_heads": 8, "d_head": 32, "d_model": 256}
    source = build_tiny(tmp_path / "source", shards=shards, **sizes).path
    plan, out = qkpatch.plan(source, layers="0-7", modes=2), tmp_path / "out"
    qkpatch.apply(plan, tmp_path / "one")
    command = [sys.executable, "-m", "qkpatch", "apply", source, "-o", out, "--layers", "0-7", "--modes", 2]
    killed = set[int]()
    with subprocess.Popen(
        [*map(str, command), "--ray", address, "--part", str(COUNT), "--quiet"],
        env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        while not killed and process.poll() is None:
            for worker in writers(place_of(out)):
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
                break
            time.sleep(0.001)
        said, _ = process.communicate(timeout=120)
    assert killed
    assert process.returncode == 0, said
    assert contents(out) == contents(tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_ray_or_without_a_cluster_there_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"source": str(build_tiny(tmp_path / "tiny").path), "layers": "0"}
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"qkpatch\[ray\]"):
        apply_on_ray(plan, tmp_path / "out", 2, address="local", observer=UNSEEN, threads=1, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
