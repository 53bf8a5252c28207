"""The record is exact: settings as they were given, wherever they are told; and records of earlier versions hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, Tiny, build_tiny
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]

# What qkpatch 0.1.0 recorded, when all numbers had nine digits: the edits, by the name of the file in goldens/.
GOLDENS = {
    "defaults": (),
    "a third": ("--alpha", repr(1 / 3), "--layers", "1", "--select", "random", "--seed", 2**63 - 1),
    "sharded": (
        "--alpha", "0.123456789012", "--layers", "0,2", "--heads", "1", "--max-shard-size", "5KB",
        "--digest", "files",
    ),
}  # fmt: skip


def build_source(path: Path) -> Tiny:
    """The same bytes everywhere: weights that no random generator made, and facts with more than nine digits."""
    tiny = build_tiny(path)
    file = tiny.path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        numbers = torch.arange(len(name), len(name) + tensor.numel(), dtype=torch.int64)
        values = (numbers * 2654435761 % 2**32 >> 16) - 2**15
        tensors[name] = (values.double() / 2**17).to(tensor.dtype).view(tensor.shape)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tiny.path / "config.json").read_text())
    facts = {"attention_multiplier": 8**-0.5, "attn_logit_softcapping": 50.0, "use_qk_norm": False}
    (tiny.path / "config.json").write_text(json.dumps({**config, **facts}))
    return tiny


def golden(name: str) -> Path:
    return REPO / "tests" / "goldens" / f"{name.replace(' ', '_')}.json"


@pytest.mark.parametrize("name", GOLDENS)
def test_records_of_earlier_versions_are_accepted(tmp_path: Path, run: Run, name: str) -> None:
    source, out = build_source(tmp_path / "source").path, tmp_path / "out"
    assert run("apply", source, "-o", out, *GOLDENS[name]).exit_code == 0
    (out / "qkpatch.json").write_bytes(golden(name).read_bytes())
    sums = out / "SHA256SUMS"
    if sums.exists():
        sums.write_bytes(golden(name).with_suffix(".sums").read_bytes())
    result = run("verify", out, "--source", source)
    assert result.exit_code == 0, result.output
