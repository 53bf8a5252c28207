"""Shared fixtures: tiny random checkpoints in known layouts, and the real ones that `make fixtures` builds."""

from __future__ import annotations

import os

# Small matrices, many of them: a second thread only spins, here as in the processes that tests start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commands
import emulators
import portable
import pytest
import torch
from fake_hub import FakeHub, fake_hub
from s3_server import S3, make_bucket, s3_server
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from qkpatch.cli import app

REPO = Path(__file__).resolve().parent.parent
REAL = REPO / ".cache" / "fixtures"
commands.built_once()


portable.taken_away_where_asked()


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is there by then stays, millions of objects: no garbage collection of a test goes through them."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint and its numbers."""

    path: Path
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    prefix: str

    def name(self, layer: int | str, which: str) -> str:
        """The stored name of layer ``layer``'s ``q`` or ``k`` weight."""
        return f"{self.prefix.format(layer=layer)}{which}_proj.weight"


def build_tiny(
    path: Path,
    *,
    n_layers: int = 3,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    d_head: int = 8,
    d_model: int = 24,
    dtype: torch.dtype = torch.bfloat16,
    shards: Sequence[Sequence[str]] | None = None,
    prefix: str = "model.layers.{layer}.self_attn.",
    config: dict[str, object] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> Tiny:
    """Write a `llama` checkpoint (or whatever ``config`` and ``prefix`` say) with random weights.

    ``shards`` lists, per shard, the substrings of the tensor names it takes; the first match wins. Without it,
    one ``model.safetensors`` and no index.
    """
    tiny = Tiny(path, n_layers, n_heads, n_kv_heads, d_head, d_model, prefix)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.2).to(dtype)

    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": random(11, d_model)}
    for layer in range(n_layers):
        tensors[tiny.name(layer, "q")] = random(n_heads * d_head, d_model)
        tensors[tiny.name(layer, "k")] = random(n_kv_heads * d_head, d_model)
        tensors[tiny.name(layer, "v")] = random(n_kv_heads * d_head, d_model)
    tensors.update(extra or {})
    path.mkdir(parents=True)
    numbers = {
        "num_hidden_layers": n_layers,
        "hidden_size": d_model,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": d_head,
    }
    document = config or {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **numbers}
    (path / "config.json").write_text(json.dumps(document))
    (path / "tokenizer.json").write_text("{}")
    if shards is None:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return tiny
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        chosen = {n: t for n, t in tensors.items() if n not in weight_map and any(key in n for key in keys)}
        weight_map |= dict.fromkeys(chosen, file)
        save_file(chosen, path / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tiny


def build_tiny_folder(path: Path, **options: Any) -> Path:
    """:func:`build_tiny`, with files beside and below."""
    build_tiny(path, **options)
    (path / "side.bin").write_bytes(b"side" * 1000)
    (path / "sub").mkdir()
    (path / "sub" / "notes.txt").write_text("notes")
    return path


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty scenes of the toy: `pictures/`, `objects.jsonl`, `text.txt`."""
    if str(REPO) not in sys.path:
        sys.path.insert(0, str(REPO))
    from scripts.toy_vlm.album import write_album

    folder = tmp_path_factory.mktemp("scenes") / "album"
    write_album(folder, 40, 2026, 4)
    return folder


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A model Hub on this machine."""
    with fake_hub() as server:
        yield server


@pytest.fixture(scope="session")
def s3_session() -> Iterator[S3]:
    """An S3 server on this machine, where moto and s3fs are installed."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_session: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server, without faults, and the environment that leads clients to it."""
    s3_session.clear()
    for name, value in s3_session.environment.items():
        monkeypatch.setenv(name, value)
    yield s3_session
    s3_session.clear()


@pytest.fixture(scope="session")
def gs_session() -> Iterator[dict[str, str]]:
    """Google's store on this machine, where an emulator of it is at hand."""
    with emulators.google() as environment:
        yield environment


@pytest.fixture(scope="session")
def az_session() -> Iterator[dict[str, str]]:
    """Likewise Azure's."""
    with emulators.azure() as environment:
        yield environment


@pytest.fixture
def memory() -> Iterator[dict[str, Any]]:
    """What is in the store of this process, by path."""
    import fsspec

    fs = fsspec.filesystem("memory")
    yield fs.store
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def reached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Leads the client of a scheme to a store on this machine; the URL of a bucket there."""

    def reach(scheme: str) -> str:
        if scheme in ("gs", "az"):
            for name, value in request.getfixturevalue(f"{scheme}_session").items():
                monkeypatch.setenv(name, value)
        else:
            request.getfixturevalue(scheme)
        return make_bucket("models", scheme)

    return reach


@pytest.fixture(params=["memory", "gs", "az"])
def place(request: pytest.FixtureRequest, reached: Callable[[str], str], tmp_path: Path) -> str:
    """The URL of a folder in each store whose client is called as any; of S3, which is called otherwise, there are
    tests of its own."""
    return f"{reached(request.param)}/{tmp_path.name}"


@pytest.fixture(params=["s3", "gs", "az"])
def cloud(request: pytest.FixtureRequest, reached: Callable[[str], str], tmp_path: Path) -> str:
    """The URL of a folder in each store that is a server."""
    return f"{reached(request.param)}/{tmp_path.name}"


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """A one-file bf16 llama: 3 layers, 4 query and 2 key heads of 8 (≠ 24 / 4)."""
    return build_tiny(tmp_path / "tiny")


@pytest.fixture
def run() -> Callable[..., Result]:
    """Call the command line in this process: ``run("apply", path, "-o", out)``."""
    runner = CliRunner()

    def call(*arguments: object) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments])

    return call


def _real(name: str) -> Path:
    path = REAL / name
    if not path.is_dir():
        pytest.skip(f"{path.name} is not built; run `make fixtures`")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a plain three-shard llama checkpoint."""
    return _real("smollm2-135m")


@pytest.fixture(scope="session")
def smolvlm() -> Path:
    """The same weights as the language tower of a SmolVLM, with q_proj decoys in a random vision tower."""
    return _real("smolvlm-layout")
