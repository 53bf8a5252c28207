"""The families' tiny models and what ``apply`` makes of them, once for all tests of a process that look at them."""

from __future__ import annotations

import atexit
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import families
import families_more
import families_older
import families_recent
import families_served
import families_special
import families_twins
import numpy as np
import oracle
import torch
import transformers
from families import Case, Tensors
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from qkpatch.cli import app

CASES: dict[str, Case] = {
    **families.CASES,
    **families_special.CASES,
    **families_more.CASES,
    **families_recent.CASES,
    **families_older.CASES,
    **families_twins.CASES,
    **families_served.CASES,
}


def way(name: str) -> tuple[object, ...]:
    """How a family stores queries and keys: what tells it from those that are handled alike."""
    case = CASES[name]
    return (
        case.heads.__module__,
        case.heads.__qualname__,
        case.kept is None,
        bool(case.skipped),
        case.original,
    )


PROJECTIONS = ("q_proj", "k_proj", "qkv", "query_key_value")


@dataclass(frozen=True)
class Edited:
    """A model on disk, and what its two strongest modes' removal made of it."""

    source: Path
    out: Path
    result: Result

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "qkpatch.json").read_text())
        return found


@cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory()  # which goes when this process does
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def saved(key: str) -> dict[bool, Path]:
    """A random model of the case, by whether its names are the Hub's: in both layouts that exist on disk, in shards.

    Norm gains and biases matter, queries and keys are large enough for uneven attention.
    """
    case = CASES[key]
    torch.manual_seed(0)
    model = getattr(transformers, case.model_class)(case.config())
    for name, parameter in model.named_parameters():
        is_projection = any(projection in name for projection in PROJECTIONS)
        if name.endswith("bias") and (is_projection or "norm" in name):
            parameter.data.uniform_(-0.5, 0.5)
        elif "norm" in name:  # all ones would hide a wrong or forgotten one
            parameter.data.uniform_(0.5, 1.5)
        elif is_projection:
            parameter.data *= 8
    model.to(torch.bfloat16)
    paths = {}
    for original in (True, False) if case.original is None else (case.original,):
        paths[original] = _scratch() / key / ("hub" if original else "modules")
        model.save_pretrained(paths[original], save_original_format=original, max_shard_size="40KB")
    return paths


@cache
def edited(key: str, original: bool) -> Edited:
    """The case's layers without their two strongest modes."""
    case, source = CASES[key], saved(key)[original]
    out = source.with_name(f"{source.name}-edited")
    layers = f"{case.edited[0]}-{case.edited[-1]}"
    words = ["apply", str(source), "--layers", layers, "--modes", "2", "--alpha", "0", "-o", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return Edited(source, out, result)


def read_all(path: Path) -> Tensors:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def edited_head(W_Q: np.ndarray, W_K: np.ndarray) -> np.ndarray:
    """The two strongest modes removed, by the dense oracle."""
    dense = oracle.decompose(W_Q, W_K, "full")
    modes = oracle.choose(dense, "full", "dominant", 2)
    return oracle.edit(W_Q, W_K, "full", modes, 0.0, dense).W_Q
