"""On a CUDA device: what a CPU stores, within one unit in the last place, in bounded memory. Skipped without one.

What these edits compute is tested on the CPU, by the same code and in the same batches (test_batches).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import test_fold_norm
import test_fp8
import test_norms
import torch
from conftest import REPO, Tiny, build_tiny
from safetensors.torch import load_file
from test_batches import KEY_HEADS, every_rule, numbers

from qkpatch.patching.device import MOST_TOGETHER
from qkpatch.planning.memory import WORK_ARRAYS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
FORMATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def read(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def both(run, source: Path, *flags: object) -> dict[str, Any]:
    """Edit on either device; compare what is stored, and the figures; return CUDA's manifest."""
    weights, manifests = {}, {}
    for device in ("cpu", "cuda"):
        out = source.parent / device
        result = run("apply", source, *flags, "--device", device, "-o", out)
        assert result.exit_code == 0, result.output
        weights[device] = read(out)
        manifests[device] = json.loads((out / "qkpatch.json").read_text())
    assert manifests["cuda"]["compute"] == {"device": "cuda", "dtype": "float64"}
    for name, on_cpu in weights["cpu"].items():
        on_cuda = weights["cuda"][name]
        if on_cpu.dtype in FORMATS:
            x, y = on_cpu.double().numpy(), on_cuda.double().numpy()
            assert oracle.ulps(x, y, FORMATS[on_cpu.dtype]) <= 1
        else:  # codes of FP8 and their scales: the next number at most
            apart = on_cpu.view(torch.uint8).int() - on_cuda.view(torch.uint8).int()
            assert apart.abs().max() <= 1
    figures = [numbers([edit["heads"] for edit in manifests[d]["edits"]]) for d in ("cpu", "cuda")]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5, abs=1e-9)
    return manifests["cuda"]


@every_rule
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_rule(channel: str, select: str, dtype: torch.dtype, run, tmp_path: Path) -> None:
    tiny = build_tiny(tmp_path / "source", dtype=dtype)
    both(run, tiny.path, "--layers", "0-2", "--modes", 2, "--channel", channel, "--select", select)


@pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])
@pytest.mark.parametrize("shape", KEY_HEADS)
@pytest.mark.parametrize("threads", [1, 4])
def test_heads_of_a_real_size_that_share_keys(
    shape: str, channel: str, threads: int, run, tmp_path: Path
) -> None:
    sizes = {"d_head": 128, "d_model": 1024, "n_heads": {"GQA": 6}.get(shape, 5)}
    tiny = build_tiny(tmp_path / "source", n_kv_heads=KEY_HEADS[shape], **sizes)
    both(run, tiny.path, "--layers", "0-2", "--modes", 3, "--channel", channel, "--threads", threads)


@pytest.mark.parametrize("name", test_norms.CASES)
def test_norms_of_queries_and_keys(name: str, run, tmp_path: Path) -> None:
    source = test_norms.build(tmp_path / "source", test_norms.CASES[name])
    both(run, source, "--recipe", tmp_path / "probe.yaml", "--layers", 1, "--modes", 2)


@pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])
def test_a_folded_norm(channel: str, run, tmp_path: Path) -> None:
    source = test_fold_norm.build(tmp_path / "source", "gemma3-text")
    both(run, source, "--layers", 1, "--modes", 2, "--channel", channel, "--fold-norm")


@pytest.mark.parametrize("scales", [torch.float32, torch.uint8], ids=["F32", "F8_E8M0"])
def test_block_fp8(scales: torch.dtype, run, tmp_path: Path) -> None:
    test_fp8.build(tmp_path / "source", scales)
    both(run, tmp_path / "source", "--layers", "0-1", "--modes", 2, "--alpha", 0)


def test_spectra(tiny: Tiny, run) -> None:
    found = [
        json.loads(run("inspect", tiny.path, "--modes", 2, "--json", "--device", device).stdout)
        for device in ("cpu", "cuda")
    ]
    assert numbers(found[1]) == pytest.approx(numbers(found[0]), rel=1e-9, abs=1e-12)


def test_a_nan_is_found_and_named(tiny: Tiny, run, tmp_path: Path) -> None:
    from test_batches import rewrite

    rewrite(tiny.path, tiny.name(1, "q"), slice(16, 24), torch.nan)
    result = run("apply", tiny.path, "--layers", 1, "--modes", 2, "--device", "cuda", "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert "query head 2 of layer 1 holds NaN or Inf" in result.output


@pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])
def test_memory_on_the_card_is_that_of_the_heads_computed_at_once(channel: str, run, tmp_path: Path) -> None:
    tiny = build_tiny(tmp_path / "source", d_head=128, d_model=2048, n_heads=40, n_kv_heads=40, n_layers=1)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flags = ("--layers", 0, "--modes", 4, "--channel", channel, "--threads", 1, "--device", "cuda")
    assert run("apply", tiny.path, *flags, "-o", tmp_path / "out").exit_code == 0
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= WORK_ARRAYS * 8 * 128 * 2048 * MOST_TOGETHER


def test_the_benchmark_compares_with_a_cpu() -> None:
    command = [
        sys.executable,
        "-m",
        "scripts.bench.heads",
        "--device",
        "cuda",
        "--channel",
        "full",
        "--heads",
        "8",
    ]
    command += ["--kv-heads", "2", "--hidden", "512"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert "differ from a CPU's, by at most" in done.stdout
    assert int(done.stdout.split("at most")[1].split()[0]) <= 1
