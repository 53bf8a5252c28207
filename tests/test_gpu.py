"""On a CUDA device: the same result as on the CPU, within one unit in the last place. Skipped without one."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import torch
from conftest import Tiny
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("select", ["dominant", "random", "subspace", "shrink"])
@pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])
def test_cuda_and_cpu_agree_within_one_ulp(
    channel: str, select: str, tiny: Tiny, run, tmp_path: Path
) -> None:
    if select == "subspace" and channel != "full":
        pytest.skip("a subspace belongs to no channel")
    flags = ("--layers", "0-2", "--modes", 2, "--channel", channel, "--select", select)
    weights = {}
    for device in ("cpu", "cuda"):
        result = run("apply", tiny.path, *flags, "--device", device, "-o", tmp_path / device)
        assert result.exit_code == 0, result.output
        weights[device] = load_file(tmp_path / device / "model.safetensors")
    manifest = json.loads((tmp_path / "cuda" / "qkpatch.json").read_text())
    assert manifest["compute"] == {"device": "cuda", "dtype": "float64"}
    for name, on_cpu in weights["cpu"].items():
        on_cuda = weights["cuda"][name]
        assert oracle.ulps(on_cpu.double().numpy(), on_cuda.double().numpy(), "BF16") <= 1
