"""What the tiny models of families_older do not show: other layouts, refusals, and that products are the logits'."""

from __future__ import annotations

import json
from pathlib import Path

import families_older
import oracle
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
H, K, D_HEAD, D_MODEL, LAYERS = 6, 2, 8, 24, 3


def build(name: str, path: Path, **options: object) -> Path:
    case = families_older.CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, case.model_class)(case.config())
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(path, **options)
    return path


def test_fuyu_with_the_flat_config_of_the_hub_is_edited_like_the_nested_one(run, tmp_path: Path) -> None:
    nested, flat = (build("fuyu", tmp_path / name) for name in ("nested", "flat"))
    config = json.loads((flat / "config.json").read_text())
    text = config.pop("text_config")
    numbers = ("hidden_size", "num_hidden_layers", "num_attention_heads", "qk_layernorm", "intermediate_size")
    config |= {key: text[key] for key in (*numbers, "vocab_size")}
    (flat / "config.json").write_text(json.dumps(config))

    options = ["--layers", "1-2", "--modes", 2, "--alpha", 0]
    for source in (nested, flat):
        result = run("apply", source, *options, "-o", tmp_path / f"{source.name}-out")
        assert result.exit_code == 0, result.output
        assert "recipe fuyu," in result.stdout
    edited = [load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("nested", "flat")]
    assert all(torch.equal(edited[0][name], edited[1][name]) for name in edited[0])
    before = load_file(nested / "model.safetensors")
    assert [name for name in before if not torch.equal(before[name], edited[0][name])] == [
        f"language_model.model.layers.{i}.self_attn.query_key_value.weight" for i in (1, 2)
    ]
    _, report = transformers.FuyuForCausalLM.from_pretrained(tmp_path / "flat-out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]


@pytest.mark.parametrize("family", ["Blip2", "InstructBlip", "InstructBlipVideo"])
def test_t5_is_refused_by_the_names_of_its_tensors(family: str, run, tmp_path: Path) -> None:
    t5 = {
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 2,
        "d_ff": 32,
        "vocab_size": 64,
    }
    model = getattr(transformers, f"{family}ForConditionalGeneration")(families_older.blip(family, t5))
    model.save_pretrained(tmp_path / "source")
    result = run("plan", tmp_path / "source")
    assert result.exit_code == 3
    expected = "language_model.model.decoder.layers." if family == "Blip2" else "language_model.model.layers."
    assert "is known, but no query tensor has the expected name" in result.stderr
    assert f"expects {expected}{{layer}}.self_attn.q_proj.weight" in result.stderr


@pytest.mark.parametrize(
    ("name", "original", "stands_before"),
    [
        ("molmo2", True, True),
        ("molmo2:olmo", True, False),
        ("molmo2-hf", False, True),
        ("molmo2-hf:olmo", False, False),
        ("chameleon", True, True),
        ("chameleon:swin", True, False),
    ],
)
def test_a_norm_that_stands_behind_attention_is_not_folded(
    name: str, original: bool, stands_before: bool, run, tmp_path: Path
) -> None:
    source = build(name, tmp_path / "source", save_original_format=original)
    result = run("plan", source, "--fold-norm")
    if stands_before:
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code == 3
        assert "--fold-norm" in result.stderr


def test_idefics_leaves_cross_attention_and_the_resampler_alone(run, tmp_path: Path) -> None:
    source, out = build("idefics", tmp_path / "source"), tmp_path / "out"
    assert run("apply", source, "--layers", "0-2", "--modes", 2, "--alpha", 0, "-o", out).exit_code == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    for decoy in (
        "model.gated_cross_attn_layers.1.cross_attn.q_proj.weight",
        "model.perceiver_resampler.blocks.1.0.q_proj.weight",
        "model.vision_model.encoder.layers.1.self_attn.q_proj.weight",
    ):
        assert decoy in before
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)
    }


def phi4mm(path: Path) -> Tensors:
    """microsoft/Phi-4-multimodal-instruct: base weights and two adapters under the projection they adapt."""
    generator = torch.Generator().manual_seed(0)
    wide = H * D_HEAD
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.1.self_attn.q_proj.weight": (
            wide,
            wide,
        ),
        "model.embed_tokens_extend.audio_embed.encoder.encoders.1.self_attn.linear_q.weight": (wide, wide),
    }
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}."
        shapes[stem + "input_layernorm.weight"] = (wide,)
        shapes[stem + "self_attn.qkv_proj.base_layer.weight"] = ((H + 2 * K) * D_HEAD, wide)
        shapes[stem + "self_attn.o_proj.base_layer.weight"] = (wide, wide)
        for adapter, rank in (("vision", 4), ("speech", 5)):
            shapes[stem + f"self_attn.qkv_proj.lora_A.{adapter}.weight"] = (rank, wide)
            shapes[stem + f"self_attn.qkv_proj.lora_B.{adapter}.weight"] = ((H + 2 * K) * D_HEAD, rank)
    tensors = {n: torch.randn(shape, generator=generator).to(torch.bfloat16) for n, shape in shapes.items()}
    config = {
        "model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"], "num_hidden_layers": LAYERS,
        "hidden_size": wide, "num_attention_heads": H, "num_key_value_heads": K,
        "vision_lora": {"r": 4, "lora_alpha": 8}, "speech_lora": {"r": 5, "lora_alpha": 10},
    }  # fmt: skip
    path.mkdir()
    names, shards = list(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for i, shard in enumerate(shards):
        save_file({name: tensors[name] for name in names[i::2]}, path / shard, {"format": "pt"})
    weight_map = {name: shards[i % 2] for i, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    return tensors


def test_phi4mm_is_edited_in_its_base_weights_and_its_adapters_stay(run, tmp_path: Path) -> None:
    assert families_older.REMOTE == {"phi4mm"}
    source, out = tmp_path / "source", tmp_path / "out"
    before = phi4mm(source)
    result = run("apply", source, "--layers", 1, "--modes", 2, "--alpha", 0, "-o", out)
    assert result.exit_code == 0, result.output
    assert "recipe phi4mm," in result.stdout
    assert run("verify", out, "--source", source).exit_code == 0
    after = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    edited = "model.layers.1.self_attn.qkv_proj.base_layer.weight"
    assert set(after) == set(before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [edited]

    # Phi-3's attention: queries up to H d, then K d rows of keys, then values.
    sizes = [H * D_HEAD, K * D_HEAD, K * D_HEAD]
    (old, keys, values), (new, *rest) = before[edited].split(sizes), after[edited].split(sizes)
    assert torch.equal(rest[0], keys)
    assert torch.equal(rest[1], values)
    for h in range(H):
        rows, kv = slice(h * D_HEAD, (h + 1) * D_HEAD), h // (H // K)
        W_Q, W_K = old[rows].double().numpy(), keys[kv * D_HEAD : (kv + 1) * D_HEAD].double().numpy()
        expected = oracle.edit(W_Q, W_K, "full", (0, 1), 0.0, oracle.decompose(W_Q, W_K, "full")).W_Q
        assert oracle.ulps(new[rows].double().numpy(), oracle.round_to(expected, "BF16"), "BF16") <= 1


NORMED = {
    # case: its attention module, the norms' prefix, whether LayerNorm, whether over all heads at once
    "persimmon": ("model.layers.1.self_attn", "layernorm", True, False),
    "chameleon": ("model.layers.1.self_attn", "norm", True, False),
    "cohere": ("model.layers.1.self_attn", "norm", True, False),
    "olmo2": ("model.layers.1.self_attn", "norm", False, True),
    "molmo2-hf": ("model.language_model.layers.1.self_attn", "norm", False, False),
    "molmo2-hf:olmo": ("model.language_model.layers.1.self_attn", "norm", False, True),
}


@pytest.mark.parametrize("name", NORMED)
def test_queries_and_keys_as_the_norm_leaves_them_meet_in_this_product(name: str) -> None:
    """What the class's own forward hands to RoPE, times the norms' denominators, is xᵀ M y without biases."""
    stem, norm, is_layer_norm, is_over_all = NORMED[name]
    case = families_older.CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, case.model_class)(case.config()).double().eval()
    attention = model.get_submodule(stem)
    for parameter_name, parameter in attention.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
        elif "norm" in parameter_name:
            parameter.data.uniform_(0.5, 1.5)
    seen: Tensors = {}
    fused = getattr(attention, "query_key_value", None)
    (fused or attention.q_proj).register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0][0]))
    for which in "qk":
        getattr(attention, f"{which}_{norm}").register_forward_hook(
            lambda _, inputs, output, which=which: seen.update({f"raw {which}": inputs[0], which: output})
        )
    with torch.no_grad():
        model(input_ids=torch.arange(4, 12)[None])
    x = seen["x"]
    length = len(x)
    a_norm = getattr(attention, f"q_{norm}")
    eps = a_norm.variance_epsilon if hasattr(a_norm, "variance_epsilon") else a_norm.eps

    def by_head(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(length, -1, queries.shape[1])

    def denominator(raw: torch.Tensor) -> torch.Tensor:
        if is_over_all:
            raw = raw.reshape(length, 1, -1)
        centred = raw - raw.mean(-1, keepdim=True) if is_layer_norm else raw
        return (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    tensors = {f"{stem}.{n}": t for n, t in attention.state_dict().items()}
    queries, keys = case.heads(tensors, stem)
    q = by_head(seen["q"]) * denominator(by_head(seen["raw q"]))
    k = by_head(seen["k"]) * denominator(by_head(seen["raw k"]))
    for h in range(len(queries)):
        product = queries[h].T @ keys[h * len(keys) // len(queries)]
        meeting = q[:, h] @ k[:, h * k.shape[1] // len(queries)].T
        assert torch.allclose(x @ product @ x.T, meeting, rtol=0, atol=1e-5 * float(meeting.abs().max()))
