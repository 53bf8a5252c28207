"""A kill at any call to the store: OUT is whole, or no loader takes it for a model and the next run ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, build_tiny
from s3_server import upload

import qkpatch
from qkpatch.checkpoint.names import CLAIM
from qkpatch.errors import QKPatchError

Run = Callable[..., tuple[int, int]]
STEP = 8  # tests share the calls, so that workers can


@pytest.fixture
def killed(cloud: str) -> Iterator[Run]:
    command = [sys.executable, str(REPO / "tests" / "kit" / "store_kills.py")]
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None

        def run(source: object, out: str, at: int = 0, **how: Any) -> tuple[int, int]:
            assert driver.stdin is not None
            assert driver.stdout is not None
            request = {"source": str(source), "out": out, "at": at, "how": how}
            driver.stdin.write(json.dumps(request) + "\n")
            driver.stdin.flush()
            code, calls = json.loads(driver.stdout.readline())
            return code, calls

        yield run
        driver.stdin.close()


def check_kill(at: int, cloud: str, folder: Path, source: str, killed: Run) -> None:
    import fsspec

    scheme, _, place = cloud.partition("://")
    out = f"{cloud}/out-{at}"
    code, _ = killed(source, out, at)
    assert code == -signal.SIGKILL
    fs = fsspec.filesystem(scheme, use_listings_cache=False)
    found = {path.rpartition("/")[2] for path in fs.find(out)}
    if "qkpatch.json" in found:
        assert qkpatch.verify(out, folder).ok
    elif found:
        # Loaders begin with config.json, which comes when all weights are there; qkpatch itself is not deceived.
        assert "config.json" not in found or {p.name for p in folder.iterdir()} <= found
        assert CLAIM in found
        with pytest.raises(QKPatchError, match="not finished"):
            qkpatch.plan(out)
    assert killed(source, out, resume=True)[0] == 0
    assert qkpatch.verify(out, folder).ok
    assert CLAIM not in {path.rpartition("/")[2] for path in fs.find(out)}
    if scheme == "s3":
        prefix = f"{place.partition('/')[2]}/"
        assert not fs.call_s3("list_multipart_uploads", Bucket="models", Prefix=prefix).get("Uploads")


@pytest.fixture
def source(cloud: str, tmp_path: Path) -> tuple[Path, str]:
    folder = build_tiny(tmp_path / "tiny", shards=[["layers.0.", "embed"], ["layers.1."], ["layers.2."]]).path
    return folder, upload(folder, "models", f"{tmp_path.name}/in", cloud.partition(":")[0])


@pytest.mark.long
def test_a_kill_in_the_midst_of_it(cloud: str, source: tuple[Path, str], killed: Run) -> None:
    check_kill(41, cloud, *source, killed)


@pytest.mark.stress
@pytest.mark.parametrize("first", range(1, STEP + 1))
def test_a_kill_at_every_call(cloud: str, source: tuple[Path, str], killed: Run, first: int) -> None:
    folder, url = source
    _, calls = killed(url, f"{cloud}/out")
    assert calls > 41
    for at in range(first, calls + 1, STEP):
        check_kill(at, cloud, folder, url, killed)
