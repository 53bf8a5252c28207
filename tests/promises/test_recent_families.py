"""What one tiny model per recipe does not show: whole omni models, dead keys, older configs, timm's towers, MLA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import families_recent
import oracle
import pytest
import torch
import transformers
from families import SIZE, Tensors, normed, separate
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config

Heads = Callable[[Tensors, str], tuple[torch.Tensor, torch.Tensor]]
Run = Callable[..., Any]
EDIT = ("--modes", 2, "--alpha", 0)


def read(path: Path) -> Tensors:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def tiny(model_class: str, config: Any) -> Any:
    """A random model whose gains are not all ones."""
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.to(torch.bfloat16)


def write(path: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def edited_names(before: Tensors, after: Tensors) -> list[str]:
    assert set(before) == set(after)
    return sorted(name for name in before if not families.same(before[name], after[name]))


def assert_edited(before: Tensors, after: Tensors, stem: str, heads: Heads) -> None:
    """Each head of one layer lost its two strongest modes, and nothing more."""
    (old, keys), (new, keys_after) = heads(before, stem), heads(after, stem)
    assert torch.equal(keys, keys_after)
    for h in range(len(old)):
        W_Q, W_K = old[h].double().numpy(), keys[h * len(keys) // len(old)].double().numpy()
        dense = oracle.decompose(W_Q, W_K, "full")
        modes = oracle.choose(dense, "full", "dominant", 2)
        expected = oracle.round_to(oracle.edit(W_Q, W_K, "full", modes, 0.0, dense).W_Q, "BF16")
        assert oracle.ulps(new[h].double().numpy(), expected, "BF16") <= 1, f"head {h} of {stem}"


OMNI = {
    "qwen2.5-omni": ("Qwen2_5Omni", "Qwen2_5OmniModel", families_recent.qwen2_5_omni, separate),
    "qwen3-omni-moe": ("Qwen3OmniMoe", None, families_recent.qwen3_omni, normed(plus_one=False)),
}
OTHER_QUERIES = {
    "qwen2.5-omni": (".visual.blocks.1.attn.q.weight",),
    "qwen3-omni-moe": (
        ".visual.blocks.1.attn.qkv.weight",
        "talker.code_predictor.model.layers.1.self_attn.q_proj.weight",
        "code2wav.pre_transformer.layers.1.self_attn.q_proj.weight",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("original", [True, False], ids=["Hub names", "module names"])
@pytest.mark.parametrize("recipe", OMNI)
def test_a_whole_omni_model_is_edited_in_its_thinkers_language_model_alone(
    recipe: str, original: bool, run: Run, tmp_path: Path
) -> None:
    name, hub_architecture, config, heads = OMNI[recipe]
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny(f"{name}ForConditionalGeneration", config())
    model.save_pretrained(source, save_original_format=original, max_shard_size="200KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    if hub_architecture is not None:
        hub = {**config_of(source), "architectures": [hub_architecture]}
        (source / "config.json").write_text(json.dumps(hub))

    result = run("apply", source, "--layers", "1-2", *EDIT, "-o", out)
    assert result.exit_code == 0, result.output
    assert f"recipe {recipe}," in result.stdout
    assert run("verify", out, "--source", source).exit_code == 0

    before, after = read(source), read(out)
    middle = "model" if original else "model.language_model"
    stems = [f"thinker.{middle}.layers.{layer}.self_attn" for layer in (1, 2)]
    assert edited_names(before, after) == [f"{stem}.q_proj.weight" for stem in stems]
    for decoy in (
        "talker.model.layers.1.self_attn.q_proj.weight",
        "audio_tower.layers.1.self_attn.q_proj.weight",
        *OTHER_QUERIES[recipe],
    ):
        assert any(found.endswith(decoy) for found in before), decoy
    for stem in stems:
        assert_edited(before, after, stem, heads)

    thinker = getattr(transformers, f"{name}ThinkerForConditionalGeneration")
    loaded, report = thinker.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        ids = torch.arange(4, 12)[None]
        old = thinker.from_pretrained(source).float()(input_ids=ids).logits
        assert not torch.allclose(old, loaded.float()(input_ids=ids).logits)


SHARED = {
    "gemma3n": ("Gemma3n", families_recent.gemma3n_text, 2, 4),
    "gemma4": ("Gemma4", lambda: families_recent.gemma4_text(**families_recent.PER_LAYER_INPUT), 4, 6),
}


@pytest.mark.parametrize("recipe", SHARED)
def test_layers_with_another_layers_keys_are_skipped_though_they_store_their_own(
    recipe: str, run: Run, tmp_path: Path
) -> None:
    name, config, first_shared, n_layers = SHARED[recipe]
    source, out = tmp_path / "source", tmp_path / "out"
    tiny(f"{name}ForCausalLM", config()).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tail = range(first_shared, n_layers)
    for layer in tail:  # as the Hub's checkpoints have them; they have no effect
        for part in ("k_proj", "k_norm"):
            from_layer, to_layer = (f"model.layers.{i}.self_attn.{part}.weight" for i in (layer - 2, layer))
            assert to_layer not in tensors
            tensors[to_layer] = tensors[from_layer].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    result = run("apply", source, "--layers", f"0-{n_layers - 1}", *EDIT, "-o", out)
    assert result.exit_code == 0, result.output
    assert edited_names(tensors, read(out)) == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(first_shared)
    ]
    manifest = json.loads((out / "qkpatch.json").read_text())
    assert manifest["edit"]["skipped_layers"] == list(tail)
    result = run("plan", source, "--layers", f"{first_shared}-{n_layers - 1}")
    assert result.exit_code == 2
    assert f"0-{first_shared - 1}" in result.stderr


@pytest.mark.parametrize("with_types", [True, False], ids=["layer_types", "every sixth and the last"])
def test_gemma4_reads_the_keys_of_older_configs_as_the_per_layer_ones(
    with_types: bool, run: Run, tmp_path: Path
) -> None:
    size = {**SIZE, "num_hidden_layers": 8}
    heads = {"head_dim": 16, "global_head_dim": 32, **families_recent.ONE_GLOBAL_KEY_HEAD}
    config = transformers.Gemma4TextConfig(**size, **heads, **families_recent.PER_LAYER_INPUT)
    source = tmp_path / "source"
    tiny("Gemma4ForCausalLM", config).save_pretrained(source)
    saved = config_of(source)
    assert set(saved.pop("per_layer_config")) == {"5", "7"}
    if not with_types:
        del saved["layer_types"]
    older = write(tmp_path / "older", {**saved, **heads}, load_file(source / "model.safetensors"))
    for path in (source, older):
        result = run("apply", path, "--layers", "4-7", *EDIT, "-o", tmp_path / f"{path.name}-out")
        assert result.exit_code == 0, result.output
    before, after = read(source), read(tmp_path / "older-out")
    assert not edited_names(read(tmp_path / "source-out"), after)
    for layer in (4, 5, 6, 7):
        assert_edited(before, after, f"model.layers.{layer}.self_attn", families_recent.per_layer_heads)

    wrong = write(tmp_path / "wrong", {**saved, **heads, "attention_k_eq_v": False}, before)
    result = run("plan", wrong, "--layers", 5)
    assert result.exit_code != 0
    assert "config.json says [64, 32]: 2 heads × head_dim 32" in result.stderr


@pytest.mark.parametrize(
    ("recipe", "model_type"), [("paddleocr-vl", "paddleocr_vl"), ("ernie4.5-vl", "ernie4_5_moe_vl")]
)
def test_a_flat_config_of_the_hub_reads_as_the_nested_one(
    recipe: str, model_type: str, run: Run, tmp_path: Path
) -> None:
    case = families_recent.CASES[recipe]
    source = tmp_path / "source"
    tiny(case.model_class, case.config()).save_pretrained(source)
    nested = config_of(source)
    config = {**nested.pop("text_config"), **nested, "model_type": model_type}
    flat = write(tmp_path / "flat", config, read(source))
    for path in (source, flat):
        result = run("apply", path, "--layers", 1, *EDIT, "-o", tmp_path / f"{path.name}-out")
        assert result.exit_code == 0, result.output
    before, after = read(flat), read(tmp_path / "flat-out")
    assert edited_names(before, after) == ["model.layers.1.self_attn.q_proj.weight"]
    assert not edited_names(read(tmp_path / "source-out"), after)


# The language model of the class, and query-like names beside it as the class stores them with timm's tower.
TIMM = {
    "perception-lm": (
        "PerceptionLM", "perception_lm", "Llama", lambda: LlamaConfig(**SIZE, head_dim=16), separate,
        ("model.vision_tower.timm_model.blocks.1.attn.qkv.weight",),
    ),
    "fast-vlm": (
        "FastVlm", "fast_vlm", "Qwen2", lambda: Qwen2Config(**SIZE), separate,
        ("model.vision_tower.timm_model.stages.4.blocks.1.token_mixer.qkv.weight",),
    ),
    "gemma3n": (
        "Gemma3n", "gemma3n", "Gemma3n", families_recent.gemma3n_text, normed(plus_one=False),
        (
            "model.audio_tower.conformer.1.attention.attn.q_proj.weight",
            "model.vision_tower.timm_model.blocks.2.11.attn.query.proj.weight",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", TIMM)
def test_beside_a_vision_tower_of_timms_the_language_model_alone_is_edited(
    recipe: str, run: Run, tmp_path: Path
) -> None:
    name, model_type, text, config, heads, decoys = TIMM[recipe]
    tiny(f"{text}ForCausalLM", config()).save_pretrained(tmp_path / "text")
    before = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(tmp_path / "text" / "model.safetensors").items()
    }
    before |= {decoy: torch.randn(64, 32).to(torch.bfloat16) for decoy in decoys}
    whole = {
        "model_type": model_type,
        "architectures": [f"{name}ForConditionalGeneration"],
        "text_config": config_of(tmp_path / "text"),
    }
    source, out = write(tmp_path / "source", whole, before), tmp_path / "out"
    result = run("apply", source, "--layers", "0-1", *EDIT, "-o", out)
    assert result.exit_code == 0, result.output
    assert f"recipe {recipe}," in result.stdout
    after, stems = read(out), [f"model.language_model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert edited_names(before, after) == [f"{stem}.q_proj.weight" for stem in stems]
    for stem in stems:
        assert_edited(before, after, stem, heads)


@pytest.mark.parametrize(
    ("recipe", "logits"),
    [
        ("gemma2-text", {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0}),
        ("paligemma", {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0}),
        ("gemma3-text", {"query_pre_attn_scalar": 256}),
        ("llama4", {"use_qk_norm": True, "attn_temperature_tuning": True}),
    ],
)
def test_what_rescales_or_clips_logits_is_recorded_by_class_default_too(
    recipe: str, logits: dict[str, object], run: Run, tmp_path: Path
) -> None:
    import families
    import families_more

    case = {**families.CASES, **families_more.CASES, **families_recent.CASES}[recipe]
    source = tmp_path / "source"
    tiny(case.model_class, case.config()).save_pretrained(source)
    config = config_of(source)
    section = config.get("text_config", config)
    for key in logits:
        assert section.pop(key) == logits[key]
    (source / "config.json").write_text(json.dumps(config))
    result = run("apply", source, "--layers", 1, *EDIT, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "qkpatch.json").read_text())
    assert manifest["model"]["logits"] == logits


@pytest.mark.parametrize("chosen", [(), ("--recipe", "llava-1.5")], ids=["by itself", "as llava"])
def test_kimi_vl_is_refused_for_its_latent_attention(
    chosen: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    stem = "language_model.model.layers.0.self_attn."
    shapes = {"q_proj": (64, 32), "kv_a_proj_with_mqa": (24, 32), "kv_b_proj": (64, 16)}
    tensors = {f"{stem}{part}.weight": torch.randn(shape) for part, shape in shapes.items()}
    config = {
        "model_type": "kimi_vl",
        "architectures": ["KimiVLForConditionalGeneration"],
        "text_config": {**SIZE, "model_type": "deepseek_v3", "num_hidden_layers": 1},
    }
    source = write(tmp_path / "source", config, tensors)
    result = run("plan", source, "--layers", 0, *chosen)
    assert result.exit_code == 3
    assert "multi-head latent attention (MLA)" in result.stderr
