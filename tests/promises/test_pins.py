"""The same inputs give the same bytes, here and on the next machine: digests of outputs, pinned.

A change of these is a change of what users get: look at why before you add one. Several may stand side by side, one
for each way in which a platform's LAPACK rounds. `QKPATCH_PINS=show make test` prints what was found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]

EDITS = {
    "defaults": (),
    "all of the middle": ("--alpha", 0.5),
    "removed": ("--layers", "10-11", "--modes", 1, "--alpha", 0),
    "symmetric": ("--layers", "10-11", "--alpha", 0.5, "--channel", "symmetric"),
    "antisymmetric": ("--layers", "10-11", "--alpha", 0.5, "--channel", "antisymmetric", "--modes", 3),
    "random": ("--layers", "10-11", "--alpha", 0.5, "--select", "random", "--seed", 7),
    "subspace": ("--layers", "10-11", "--alpha", 0.5, "--select", "subspace", "--seed", 7),
    "shrink": ("--layers", "10-11", "--alpha", 0.5, "--select", "shrink"),
    "folded": ("--layers", "10-11", "--alpha", 0.5, "--fold-norm"),
    "sharded": ("--layers", "10-11", "--alpha", 0.5, "--max-shard-size", "50MB"),
}
PINS = {
    "defaults": {"e1c38a1d53b830a98b9f9374f4d3829987395e0986740d7714ee030ea2681ef2"},
    "all of the middle": {"4f4b8d244372a3b6f061a04fc31754f1ec92462b108792312e77e6d129ceefc8"},
    "removed": {"ef1cda006728dd2a3d1d14b97b76af96dceff5aeb65f313aabc2311674620a44"},
    "symmetric": {"16b18a777d5256c4eaaff867f01297f35efecca6f90ec461518ff4240f943169"},
    "antisymmetric": {"dd11e5a0e13f260d0f0f1ea78b2267b7787d8d9bbf451cafd38bf07c8da07fb7"},
    "random": {"fed406f666ca7a558d2d46f23ff62d20be5ca19d123c2423e20e40adc12c6ca2"},
    "subspace": {"d0a61acfede65bd8037676ba87cc5a4948c4e6634d71b0d2482801658c658e48"},
    "shrink": {"86f432e80c20d99e8ed466f870c9d082df6ea4ff2ccdd49e5c036d6afb22ba47"},
    "folded": {"7358ca98a149ced008f9b29278206c0ad40d02aa214d6778820dbcd4186bea94"},
    "sharded": {"c50d06559107789ad8b37a18e094fe152ada4d0c64f141e2ad884669bdd1f68a"},
    "smolvlm": {"2262eab025abd4e7eb6355f0f51217c3e461c7c91623fc8536dad955a10ac751"},
    "bfloat16": {"1deceed0d11be8dcd7afe44b2bf071278e566c3bf7a4749bf6cd9777767a60e9"},
    "float16": {"2fd20ac08e4b22e2c499065605b3cace683fb7270873867f7b74417f26dd204b"},
    "float32": {"264974995c713fa5e4dfdae05aad56dd7c70375c5edf4fee3ab959b96c91a694"},
}


def digest(out: Path) -> str:
    """Of the weights and the index; not of the manifest, whose figures may round otherwise."""
    total = hashlib.sha256()
    for file in sorted(out.iterdir()):
        if ".safetensors" in file.name:
            total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def check(name: str, out: Path) -> None:
    found = digest(out)
    if os.environ.get("QKPATCH_PINS") == "show":
        print(f'\n    "{name}": {{"{found}"}},')
        return
    assert found in PINS[name], f"{name}: {found} is new"


@pytest.mark.fixtures
@pytest.mark.parametrize("name", EDITS)
def test_real_weights(smollm2: Path, tmp_path: Path, run: Run, name: str) -> None:
    assert run("apply", smollm2, "-o", tmp_path / "out", *EDITS[name]).exit_code == 0
    check(name, tmp_path / "out")


@pytest.mark.fixtures
def test_a_language_tower(smolvlm: Path, tmp_path: Path, run: Run) -> None:
    assert run("apply", smolvlm, "-o", tmp_path / "out", "--alpha", 0.5).exit_code == 0
    check("smolvlm", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_made_up_weights(tmp_path: Path, run: Run, dtype: torch.dtype) -> None:
    tiny = build_tiny(tmp_path / "tiny", dtype=dtype, d_model=64)
    file = tiny.path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():  # torch.randn, too, rounds as the platform does
        numbers = torch.arange(len(name), len(name) + tensor.numel(), dtype=torch.int64)
        values = (numbers * 2654435761 % 2**32 >> 16) - 2**15
        tensors[name] = (values.double() / 2**17).to(dtype).view(tensor.shape)
    save_file(tensors, file)
    assert run("apply", tiny.path, "-o", tmp_path / "out", "--modes", 2, "--alpha", 0.5).exit_code == 0
    check(str(dtype).removeprefix("torch."), tmp_path / "out")
