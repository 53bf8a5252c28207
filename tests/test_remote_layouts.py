"""Families whose modelling code is not in transformers, and what no tiny model shows, by hand-built checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import families_special
import numpy as np
import oracle
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qkpatch.checkpoint.header import TensorRef
from qkpatch.heads import HeadLayout
from qkpatch.rows import RowLayout

H, K, G, D_HEAD, D_MODEL, LAYERS = 6, 2, 3, 8, 24, 3
NUMBERS = {
    "num_hidden_layers": LAYERS,
    "hidden_size": D_MODEL,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": D_HEAD,
}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Remote:
    """A remote family: its config, its names, and the modelling code's own split of a layer."""

    config: dict[str, object]
    stem: str
    query: str
    shapes: dict[str, tuple[int, int]]
    split: Callable[[Tensors, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
    decoys: tuple[str, ...]


def separate(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor, None]:
    queries = tensors[stem + "q_proj.weight"].view(H, D_HEAD, D_MODEL)
    return queries, tensors[stem + "k_proj.weight"].view(K, D_HEAD, D_MODEL), None


def qkv(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Phi3Attention: ``query_pos = H d``, then K d rows of keys, then values."""
    W = tensors[stem + "qkv_proj.weight"]
    queries, keys, values = W.split([H * D_HEAD, K * D_HEAD, K * D_HEAD])
    return queries.view(H, D_HEAD, D_MODEL), keys.view(K, D_HEAD, D_MODEL), values


def grouped_qkv(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """InternLM2Attention: ``b q (h gs d) -> b q h gs d``, queries ``[:g]``, key ``[-2]``, value ``[-1]``."""
    W = tensors[stem + "wqkv.weight"].view(K, G + 2, D_HEAD, D_MODEL)
    return W[:, :G].reshape(H, D_HEAD, D_MODEL), W[:, -2], W[:, -1]


Q_ROWS, KV_ROWS, FUSED_ROWS = H * D_HEAD, K * D_HEAD, (H + 2 * K) * D_HEAD
CASES = {
    "phi3-v": Remote(
        {"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"], **NUMBERS},
        "model.layers.{}.self_attn.",
        "qkv_proj.weight",
        {"qkv_proj.weight": (FUSED_ROWS, D_MODEL)},
        qkv,
        ("model.vision_embed_tokens.img_processor.vision_model.encoder.layers.1.self_attn.q_proj.weight",),
    ),
    "internvl-internlm2": Remote(
        {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "llm_config": {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], **NUMBERS},
        },
        "language_model.model.layers.{}.attention.",
        "wqkv.weight",
        {"wqkv.weight": (FUSED_ROWS, D_MODEL)},
        grouped_qkv,
        ("vision_model.encoder.layers.1.attn.qkv.weight",),
    ),
    "minicpm-v": Remote(
        {"model_type": "minicpmv", "architectures": ["MiniCPMV"], **NUMBERS},
        "llm.model.layers.{}.self_attn.",
        "q_proj.weight",
        {"q_proj.weight": (Q_ROWS, D_MODEL), "k_proj.weight": (KV_ROWS, D_MODEL)},
        separate,
        ("vpm.encoder.layers.1.self_attn.q_proj.weight", "resampler.kv_proj.weight"),
    ),
}


def write(path: Path, config: dict[str, object], tensors: Tensors) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def build(path: Path, case: Remote) -> tuple[Path, Tensors]:
    generator = torch.Generator().manual_seed(0)
    shapes = {case.stem.format(i) + n: shape for i in range(LAYERS) for n, shape in case.shapes.items()}
    shapes |= dict.fromkeys(case.decoys, (Q_ROWS, D_MODEL))
    tensors = {n: torch.randn(shape, generator=generator).to(torch.bfloat16) for n, shape in shapes.items()}
    return write(path, case.config, tensors), tensors


def test_every_remote_family_has_a_case() -> None:
    assert set(CASES) == families_special.REMOTE


@pytest.mark.parametrize("recipe", CASES)
def test_a_remote_family_is_edited_in_its_query_rows_and_nowhere_else(
    recipe: str, run, tmp_path: Path
) -> None:
    case = CASES[recipe]
    source, before = build(tmp_path / "source", case)
    out = tmp_path / "out"
    result = run("apply", source, "--layers", 1, "--modes", 2, "--alpha", 0, "-o", out)
    assert result.exit_code == 0, result.output
    assert f"recipe {recipe}," in result.stdout
    assert run("verify", out, "--source", source).exit_code == 0

    after, stem = load_file(out / "model.safetensors"), case.stem.format(1)
    assert set(after) == set(before)
    assert [n for n in before if not torch.equal(before[n], after[n])] == [stem + case.query]
    (old, keys, rest), (new, keys_after, rest_after) = case.split(before, stem), case.split(after, stem)
    assert torch.equal(keys, keys_after)
    assert rest is None or torch.equal(rest, rest_after)
    for h in range(H):
        W_Q, W_K = old[h].double().numpy(), keys[h // G].double().numpy()
        edited = new[h].double().numpy()
        expected = oracle.edit(W_Q, W_K, "full", (0, 1), 0.0, oracle.decompose(W_Q, W_K, "full")).W_Q
        assert oracle.ulps(edited, oracle.round_to(expected, "BF16"), "BF16") <= 1
        wrong = oracle.edit(W_Q, keys[1 - h // G].double().numpy(), "full", (0, 1), 0.0).W_Q
        assert not np.allclose(edited, wrong, rtol=0.05)


def test_internvl_with_another_language_model_is_refused(run, tmp_path: Path) -> None:
    case = CASES["internvl-internlm2"]
    _, tensors = build(tmp_path / "internlm2", case)
    config = {**case.config, "llm_config": {"model_type": "qwen2", **NUMBERS}}
    result = run("plan", write(tmp_path / "qwen2", config, tensors))
    assert result.exit_code == 3
    assert "knows the language models internlm2, not 'qwen2'" in result.stderr


def test_minicpm_v_with_a_query_key_norm_is_refused(run, tmp_path: Path) -> None:
    case = CASES["minicpm-v"]
    _, tensors = build(tmp_path / "2.6", case)
    norms = {case.stem.format(1) + f"{which}_norm.weight": torch.ones(D_HEAD) for which in "qk"}
    result = run("plan", write(tmp_path / "4.5", case.config, {**tensors, **norms}), "--layers", 1)
    assert result.exit_code == 3
    assert "which recipe minicpm-v does not declare" in result.stderr


@pytest.mark.parametrize(
    ("recipe", "extra"),
    [
        ("glm4v-moe", "model.language_model.layers.{}.self_attn."),  # numbered past the last layer
        ("qwen3.5", "mtp.layers.0.self_attn."),  # a tree of its own
    ],
)
def test_multi_token_prediction_layers_are_left_alone(recipe: str, extra: str, run, tmp_path: Path) -> None:
    case = families_special.CASES[recipe]
    torch.manual_seed(0)
    source, out = tmp_path / "source", tmp_path / "out"
    model = getattr(transformers, case.model_class)(case.config())
    n_layers = model.config.text_config.num_hidden_layers
    model.to(torch.bfloat16).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    last = f"model.language_model.layers.{n_layers - 1}.self_attn."
    copies = {n.replace(last, extra.format(n_layers)): t.clone() for n, t in tensors.items() if last in n}
    assert extra.format(n_layers) + "q_proj.weight" in copies
    before = {**tensors, **copies}
    save_file(before, source / "model.safetensors", {"format": "pt"})

    result = run("plan", source, "--layers", n_layers)
    assert result.exit_code == 2
    assert f"layer {n_layers} is out of range" in result.stderr
    result = run("apply", source, "--layers", f"0-{n_layers - 1}", "--modes", 2, "--alpha", 0, "-o", out)
    assert result.exit_code == 0, result.output
    after = load_file(out / "model.safetensors")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert changed.isdisjoint(copies)


def test_qwen3_5_norms_the_rows_that_the_gated_layout_calls_queries() -> None:
    """What the module's own forward hands to its query norm, head by head, and what the norm's gain is."""
    case = families_special.CASES["qwen3.5"]
    torch.manual_seed(0)
    model = getattr(transformers, case.model_class)(case.config()).float()
    attention = model.model.language_model.layers[1].self_attn
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data.uniform_(0.5, 1.5)
    seen: dict[str, torch.Tensor] = {}
    attention.q_proj.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0]))
    for which in "qk":
        getattr(attention, f"{which}_norm").register_forward_hook(
            lambda _, inputs, output, which=which: seen.update({which: inputs[0], f"{which} normed": output})
        )
    with torch.no_grad():
        model(input_ids=torch.arange(4, 12)[None])

    W_Q, W_K = attention.q_proj.weight.detach(), attention.k_proj.weight.detach()
    layout = HeadLayout(families_special.H, 2, 16, W_Q.shape[1], RowLayout.gated)
    for which, W, n_heads, place in (
        ("q", W_Q, layout.n_heads, layout.query_range),
        ("k", W_K, layout.n_kv_heads, layout.key_range),
    ):
        assert W.shape == (layout.query_shape if which == "q" else layout.key_shape)
        ref = TensorRef(which, "s", "F32", tuple(W.shape), 0, W.numel() * 4)
        gain = 1 + getattr(attention, f"{which}_norm").weight.detach()
        for h in range(n_heads):
            first, last = (at // (4 * W.shape[1]) for at in place(ref, h))
            projected = seen["x"] @ W[first:last].T
            assert torch.allclose(seen[which][..., h, :], projected, atol=1e-5)
            rms = projected.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
            assert torch.allclose(seen[f"{which} normed"][..., h, :], projected / rms * gain, atol=1e-4)
