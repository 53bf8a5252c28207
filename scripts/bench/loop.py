"""The common way to edit a checkpoint: load a shard, edit its tensors, save it. A process of its own.

python scripts/bench/loop.py SOURCE OUT LAYERS MODES [float32|float64]

Shards without an edited layer are copied, as tools for abliteration do; everything is synced at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ALPHA = 0.5
QUERY = re.compile(r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight")


def edit(W_Q: Tensor, W_K: Tensor, d_head: int, modes: int, dtype: torch.dtype) -> Tensor:
    """All heads of a layer at once: the strongest modes of each ``W_Qᵀ W_K`` times α."""
    queries, keys = (W.to(dtype).view(-1, d_head, W.shape[1]) for W in (W_Q, W_K))
    keys = keys.repeat_interleave(len(queries) // len(keys), 0)
    basis, R_q = torch.linalg.qr(queries.mT)
    R_k = torch.linalg.qr(keys.mT, mode="r").R
    U = basis @ torch.linalg.svd(R_q @ R_k.mT, full_matrices=False).U[..., :modes]
    edited = queries - (1 - ALPHA) * (queries @ U) @ U.mT
    stored: Tensor = edited.view(W_Q.shape).to(W_Q.dtype)
    return stored


def main(source: Path, out: Path, layers: str, modes: int, dtype: torch.dtype) -> None:
    """Edit ``source`` into ``out``."""
    first, last = map(int, layers.split("-"))
    config = json.loads((source / "config.json").read_text())
    out.mkdir()
    for path in sorted(source.iterdir()):
        target = out / path.name
        if path.suffix == ".safetensors" and (names := _edited(path, first, last)):
            tensors = load_file(path)
            for name in names:
                key = tensors[name.replace("q_proj", "k_proj")]
                tensors[name] = edit(tensors[name], key, config["head_dim"], modes, dtype)
            save_file(tensors, target, metadata={"format": "pt"})
            del tensors
        else:
            shutil.copy(path, target)
        fd = os.open(target, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _edited(path: Path, first: int, last: int) -> list[str]:
    with safe_open(path, "pt") as file:
        names: list[str] = list(file.keys())
        found = [(name, QUERY.fullmatch(name)) for name in names]
    return [name for name, match in found if match and first <= int(match[1]) <= last]


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]),
        getattr(torch, (*sys.argv, "float32")[5]),
    )
