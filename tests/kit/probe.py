"""A recipe of one's own, a tiny checkpoint of it, and the commands on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import torch
from conftest import build_tiny
from safetensors.torch import load_file
from typer.testing import Result

from qkpatch.planning.settings import DEFAULT_ALPHA

H, K, D_HEAD, D_MODEL = 4, 2, 8, 24
NUMBERS = {
    "num_hidden_layers": 3, "hidden_size": D_MODEL, "num_attention_heads": H, "num_key_value_heads": K,
    "head_dim": D_HEAD,
}  # fmt: skip
SELF = {"query": "self_attn.q_proj.weight", "key": "self_attn.k_proj.weight"}
CROSS = {"query": "cross.q_proj.weight", "key": "cross.k_proj.weight"}


def document(config: dict[str, Any] | None = None, **tensors: Any) -> str:
    """A recipe called ``probe``, as YAML; what is not said is plain."""
    reading = {"sections": ["."], "class_defaults": {"probe": {}}, **(config or {})}
    names = {"prefixes": ["model.layers.{layer}."], "orientation": "out_in", **SELF, **tensors}
    return json.dumps({
        "name": "probe", "title": "Probe", "default_repo": "nobody/probe", "tested": "documented layout",
        "match": {"model_types": ["probe"], "architectures": ["ProbeForCausalLM"]},
        "config": reading, "tensors": names, "defaults": {"layers": "middle-third", "modes": 2},
    })  # fmt: skip


def build(folder: Path, recipe: str, extra: dict[str, torch.Tensor] | None = None, /, **config: Any) -> Path:
    """A checkpoint ``source`` of three layers of :data:`NUMBERS`, where ``config`` says nothing else."""
    (folder / "probe.yaml").write_text(recipe)
    whole = {"model_type": "probe", "architectures": ["ProbeForCausalLM"], **NUMBERS, **config}
    return build_tiny(folder / "source", config=whole, extra=extra).path


def ask(run, command: str, source: Path, *flags: object) -> Result:
    return run(command, source, "--recipe", source.parent / "probe.yaml", *flags)


def apply(run, source: Path, *flags: object, out: str = "out") -> dict[str, Any]:
    """Edit, prove, return the manifest."""
    result = ask(run, "apply", source, *flags, "-o", source.parent / out)
    assert result.exit_code == 0, result.output
    proof = run("verify", source.parent / out, "--source", source, "--recipe", source.parent / "probe.yaml")
    assert proof.exit_code == 0, proof.output
    manifest: dict[str, Any] = json.loads((source.parent / out / "qkpatch.json").read_text())
    return manifest


def check_edit(
    source: Path, out: Path, edit: dict[str, Any], modes: int = 2, alpha: float = DEFAULT_ALPHA
) -> None:
    """Each head of one edited tensor against the dense oracle."""
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    d, n_kv = edit["head_dim"], edit["num_key_value_heads"]
    old, new, keys = (
        t[edit[k]].double().view(-1, d, D_MODEL).numpy()
        for t, k in ((before, "tensor"), (after, "tensor"), (before, "key_tensor"))
    )
    assert (len(old), len(keys)) == (H, n_kv)
    for head in range(H):
        W_K = keys[head * n_kv // H]
        assert edit["heads"][head]["kv_head"] == head * n_kv // H
        expected = oracle.edit(old[head], W_K, "full", range(modes), alpha).W_Q
        assert oracle.ulps(new[head], oracle.round_to(expected, "BF16"), "BF16") <= 1
        assert not np.allclose(new[head], old[head], rtol=0.05)
