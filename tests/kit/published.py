"""A Hub with a repository, and an output that was made from it, for whoever attacks what is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from conftest import Tiny, build_tiny
from fake_hub import FakeHub, Repo, fake_hub, hub_environment, run_qkpatch

SHARDS = [["layers.0."], ["layers.1."], [""]]
UNTOUCHED, PATCHED = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
CARD = "---\nlicense: mit\n---\n\n# Base\n"
stress = pytest.mark.stress


@dataclass(frozen=True)
class World:
    """A Hub with a repository, an output that was made from it, and its own copy of that for a test."""

    hub: FakeHub
    base: Tiny
    repo: Repo
    environment: dict[str, str]
    out: Path

    def card(self, *flags: object, **more: Any) -> CompletedProcess[str]:
        return run_qkpatch(self.environment, "card", self.out, "--push", "me/new", *flags, **more)

    def verify(self, source: object) -> CompletedProcess[str]:
        return run_qkpatch(self.environment, "verify", self.out, "--source", source)

    def cache(self) -> Path:
        """The snapshot in the Hub cache."""
        return next((Path(self.environment["HF_HOME"]) / "hub").rglob("snapshots/*"))


def sub_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("made")
    wide = {"n_layers": 3, "d_head": 32, "d_model": 128}
    base = build_tiny(folder / "base", shards=SHARDS, **wide)  # type: ignore[arg-type]
    (base.path / "README.md").write_text(CARD)
    (base.path / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    with fake_hub() as hub:
        hub.repos["org/base"] = Repo(base.path)
        environment = hub_environment(hub.endpoint, folder / "home")
        out = folder / "out"
        result = run_qkpatch(environment, "apply", "org/base", "-o", out, "--heads", "0-1", "--quiet")
        assert result.returncode == 0, result.stderr
        yield World(hub, base, hub.repos["org/base"], environment, out)


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    shutil.copytree(made.out, tmp_path / "out")
    made.hub.commits.clear()
    made.hub.created.clear()
    made.hub.uploads.clear()
    made.hub.duplicated.clear()
    made.hub.log.clear()
    made.hub.sent.clear()
    made.hub.meddle.clear()
    made.hub.repos = {"org/base": made.repo}
    return World(made.hub, made.base, made.repo, made.environment, tmp_path / "out")


def flip(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rewrite(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((out / "qkpatch.json").read_bytes())
    change(document)
    (out / "qkpatch.json").write_text(json.dumps(document))


def refused(world: World, result: CompletedProcess[str], code: int, said: str) -> None:
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert world.hub.commits == []
