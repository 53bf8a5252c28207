"""What the tiny models of families_older do not show: other layouts, refusals, and that products are the logits'."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import families
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
    assert [name for name in before if not families.same(before[name], edited[0][name])] == [
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
    assert {name for name in before if not families.same(before[name], after[name])} == {
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
    assert [name for name in before if not families.same(before[name], after[name])] == [edited]

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


def remember(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: object,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The eager attention of the family's own module, with what it is given remembered."""
    module.met = query[0] * options["scaling"], key[0]
    return sys.modules[type(module).__module__].eager_attention_forward(
        module, query, key, value, mask, **options
    )


def no_rotation(_module: torch.nn.Module, _args: object, output: Any) -> Any:
    """RoPE with cosine 1 and sine 0."""
    return (torch.ones_like(output[0]), torch.zeros_like(output[1])) if isinstance(output, tuple) else output


def text_attention(model: torch.nn.Module) -> tuple[str, torch.nn.Module]:
    """The self-attention of the language model's second layer."""
    towers = ("vision", "encoder", "embed_tokens_extend")
    (found,) = (
        (name, module)
        for name, module in model.named_modules()
        if name.endswith("layers.1.self_attn") and not any(tower in name for tower in towers)
    )
    return found


def denominator(raw: torch.Tensor, kind: str | None, eps: float) -> torch.Tensor:
    """What the norm divides (n, heads, d_head) by."""
    if kind is None:
        return torch.ones_like(raw[..., :1])
    if kind == "projection":
        return (raw.flatten(1).pow(2).mean(-1) + eps).sqrt()[:, None, None]
    if kind == "layer":
        raw = raw - raw.mean(-1, keepdim=True)
    return (raw.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def raw_projections(attention: torch.nn.Module, x: torch.Tensor, d_head: int) -> list[torch.Tensor]:
    """Queries and keys before their norm, (n, heads, d_head)."""
    if hasattr(attention, "query_key_value"):
        rows = attention.query_key_value(x[None])
        return [rows[0] for rows in attention._split_heads(rows)[:2]]
    if hasattr(attention, "qkv_proj"):  # no norm, so that any rows do
        return [attention.qkv_proj(x).view(len(x), -1, d_head)] * 2
    return [getattr(attention, f"{which}_proj")(x).view(len(x), -1, d_head) for which in "qk"]


# Which norm queries and keys have; the rest have none.
NORMS = {
    "fuyu": "layer", "persimmon": "layer", "chameleon": "layer", "chameleon:swin": "layer", "cohere": "layer",
    "olmo2": "projection", "olmo2:olmo3": "projection", "molmo2-hf": "head", "molmo2-hf:olmo": "projection",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, case in families_older.CASES.items() if not case.original])
def test_what_attention_is_given_is_the_product_that_is_edited(name: str) -> None:
    """What the class's own forward hands to attention, times the norms' denominators, is xᵀ M x without biases."""
    case, kind = families_older.CASES[name], NORMS.get(name)
    torch.manual_seed(0)
    model = getattr(transformers, case.model_class)(case.config()).eval().requires_grad_(False)
    stem, attention = text_attention(model)
    for parameter_name, parameter in attention.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
        elif "norm" in parameter_name:
            parameter.data.uniform_(0.5, 1.5)
    norms = [module for name, module in attention.named_modules() if name.startswith("q_") and "norm" in name]
    assert bool(norms) == (kind is not None)
    eps = float(next((value for n in norms for k, value in vars(n).items() if "eps" in k), 0))
    seen: Tensors = {}
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=(args[0] if args else kwargs["hidden_states"])[0]),
        with_kwargs=True,
    )
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.register_forward_hook(no_rotation)
    transformers.AttentionInterface.register("remembering", remember)
    transformers.AttentionMaskInterface.register("remembering", transformers.masking_utils.eager_mask)
    attention.config._attn_implementation = "remembering"
    model(**case.inputs())
    (q, k), x = (t.double() for t in attention.met), seen["x"].double()

    queries, keys = case.heads({f"{stem}.{n}": t for n, t in attention.double().state_dict().items()}, stem)
    n_heads, d_head, _ = queries.shape
    raw = raw_projections(attention, x, d_head)
    below_q, below_k = (denominator(each, kind, eps).transpose(0, 1) for each in raw)
    assert q.shape[0] == n_heads
    for h in range(n_heads):
        j = h * len(k) // n_heads
        product = queries[h].T @ keys[h * len(keys) // n_heads] * d_head**-0.5
        met = (q[h] * below_q[h % len(below_q)]) @ (k[j] * below_k[j % len(below_k)]).T
        another = queries[(h + 1) % n_heads].T @ keys[h * len(keys) // n_heads] * d_head**-0.5
        small = 1e-5 * float(met.abs().max())
        assert torch.allclose(x @ product @ x.T, met, rtol=0, atol=small)
        assert not torch.allclose(x @ another @ x.T, met, rtol=0, atol=100 * small)
