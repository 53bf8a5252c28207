"""Row layouts against the reshapes of the modelling code they come from, alone and through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from qkpatch.checkpoint.header import TensorRef
from qkpatch.recipes.heads import HeadLayout, RowLayout

SIZES = [(4, 4), (4, 2), (6, 2), (4, 1)]
D_HEAD, D_MODEL = 3, 5


def reference(rows: RowLayout, n_heads: int, n_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Row numbers of each query head and each key head, by the modelling code's own reshapes."""
    H, K, g, d = n_heads, n_kv_heads, n_heads // n_kv_heads, D_HEAD
    if rows is RowLayout.separate:
        return torch.arange(H * d).view(H, d), torch.arange(K * d).view(K, d), H * d
    if rows is RowLayout.gated:  # q_proj(x).view(..., H, 2 d).chunk(2, -1)[0], as in Qwen3-Next and Qwen3.5
        return (
            torch.arange(H * 2 * d).view(H, 2 * d).chunk(2, -1)[0],
            torch.arange(K * d).view(K, d),
            2 * H * d,
        )
    if rows is RowLayout.qkv:  # split([H d, K d, K d]), as in Phi-3, ChatGLM, Molmo
        q, k, _ = torch.arange((H + 2 * K) * d).split([H * d, K * d, K * d])
        return q.view(H, d), k.view(K, d), (H + 2 * K) * d
    if rows is RowLayout.grouped_qkv:  # "b q (h gs d) -> b q h gs d", gs = g + 2, as in InternLM2
        fused = torch.arange(K * (g + 2) * d).view(K, g + 2, d)
        return fused[:, :g].reshape(H, d), fused[:, -2], K * (g + 2) * d
    fused = torch.arange(H * 3 * d).view(H, 3, d)  # view(..., H, 3, d), as in Persimmon and Fuyu
    return fused[:, 0], fused[:, 1], 3 * H * d


@pytest.mark.parametrize("rows", RowLayout)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), SIZES)
def test_each_head_lies_where_the_modelling_code_reads_it(
    rows: RowLayout, n_heads: int, n_kv_heads: int
) -> None:
    if rows is RowLayout.per_head_qkv and n_heads != n_kv_heads:
        return
    layout = HeadLayout(n_heads, n_kv_heads, D_HEAD, D_MODEL, rows)
    queries, keys, n_rows = reference(rows, n_heads, n_kv_heads)
    assert layout.query_shape == (n_rows, D_MODEL)
    begin, row = 1000, 2 * D_MODEL
    ref = TensorRef("q", "s", "BF16", layout.query_shape, begin, begin + n_rows * row)
    for h in range(n_heads):
        first = begin + int(queries[h, 0]) * row
        assert layout.query_range(ref, h) == (first, first + D_HEAD * row)
    key_rows = n_rows if rows.is_fused else n_kv_heads * D_HEAD
    assert layout.key_shape == (key_rows, D_MODEL)
    ref = TensorRef("k", "s", "BF16", layout.key_shape, begin, begin + key_rows * row)
    for j in range(n_kv_heads):
        first = begin + int(keys[j, 0]) * row
        assert layout.key_range(ref, j) == (first, first + D_HEAD * row)


def test_internlm2_is_edited_in_its_query_rows_and_nowhere_else(run, tmp_path: Path) -> None:
    H, K, g, d, D = 6, 2, 3, 8, 24
    generator = torch.Generator().manual_seed(0)
    names = {layer: f"model.layers.{layer}.attention.wqkv.weight" for layer in range(3)}
    tensors = {
        n: torch.randn(K * (g + 2) * d, D, generator=generator).to(torch.bfloat16) for n in names.values()
    }
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "num_hidden_layers": 3,
        "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": d,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    result = run("apply", source, "--layers", 1, "--modes", 2, "--alpha", 0, "-o", out)
    assert result.exit_code == 0, result.output
    assert run("verify", out, "--source", source).exit_code == 0

    after = load_file(out / "model.safetensors")
    assert torch.equal(after[names[0]], tensors[names[0]])
    old, new = (t[names[1]].view(K, g + 2, d, D) for t in (tensors, after))
    assert torch.equal(old[:, g:], new[:, g:])  # keys and values
    for j in range(K):
        W_K = old[j, g].double().numpy()
        for r in range(g):
            W_Q = old[j, r].double().numpy()
            dense = oracle.decompose(W_Q, W_K, "full")
            expected = oracle.edit(W_Q, W_K, "full", (0, 1), 0.0, dense).W_Q
            assert oracle.ulps(new[j, r].double().numpy(), oracle.round_to(expected, "BF16"), "BF16") <= 1
            wrong = oracle.edit(W_Q, old[1 - j, g].double().numpy(), "full", (0, 1), 0.0).W_Q
            assert not np.allclose(new[j, r].double().numpy(), wrong, rtol=0.05)


def test_a_norm_that_the_recipe_does_not_declare_is_refused(run, tmp_path: Path, tiny) -> None:
    path = tiny.path / "model.safetensors"
    norm = "model.layers.1.self_attn.q_norm.weight"
    save_file({**load_file(path), norm: torch.ones(8)}, path, {"format": "pt"})
    result = run("plan", tiny.path, "--layers", 1)
    assert result.exit_code == 3
    assert "which recipe llama does not declare" in result.stderr
    assert run("plan", tiny.path, "--layers", 0).exit_code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_norm": None}, "has no model.layers.1.self_attn.q_norm.weight"),
        (
            {"q_norm": torch.ones(32)},
            "a norm of queries or keys holds [8] or [4, 8] numbers (head_dim 8), this is F32 [32]",
        ),
        ({"k_norm": torch.full((8,), float("nan"))}, "a query-key norm of layer 1 holds NaN or Inf"),
    ],
)
def test_a_norm_that_is_not_what_the_recipe_declares_is_refused(
    change: dict[str, torch.Tensor | None], message: str, run, tmp_path: Path, tiny
) -> None:
    path = tiny.path / "model.safetensors"
    norms = {"q_norm": torch.ones(8), "k_norm": torch.ones(8), **change}
    stem = "model.layers.1.self_attn."
    save_file(
        {**load_file(path), **{f"{stem}{n}.weight": t for n, t in norms.items() if t is not None}},
        path,
        {"format": "pt"},
    )
    config = json.loads((tiny.path / "config.json").read_text())
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (tiny.path / "config.json").write_text(json.dumps(config))
    result = run("apply", tiny.path, "--layers", 1, "--modes", 2, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert message in " ".join(result.stderr.split())


def test_the_manifest_names_norms_and_biases(run, tmp_path: Path, tiny) -> None:
    path = tiny.path / "model.safetensors"
    stem = "model.layers.1.self_attn."
    extra = {f"{stem}q_norm.weight": torch.ones(8), f"{stem}k_norm.weight": torch.ones(8)}
    save_file({**load_file(path), **extra, f"{stem}q_proj.bias": torch.ones(32)}, path, {"format": "pt"})
    config = json.loads((tiny.path / "config.json").read_text())
    (tiny.path / "config.json").write_text(
        json.dumps(config | {"model_type": "qwen3", "architectures": None})
    )
    result = run(
        "apply", tiny.path, "--layers", 1, "--modes", 2, "--select", "shrink", "-o", tmp_path / "out"
    )
    assert "normalised per head, so shrinking W_Q only gives their bias more weight" in result.stderr
    edit = json.loads((tmp_path / "out" / "qkpatch.json").read_text())["edits"][0]
    assert edit["norms"] == list(extra)
    assert edit["biases"] == [f"{stem}q_proj.bias"]
