"""Attention that has no product of stored weights: each kind of ``configs/refused`` is refused by its reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import CLIP, SIZE
from safetensors.torch import save_file

from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.refused import refused_kinds

KINDS = {kind.name: kind for kind in refused_kinds()}
# Names beside the query weight that tell of each kind, and the word that config.json has, in the families' own layouts.
TELLING = {
    "mla": ("kv_a_proj_with_mqa.weight", "kv_b_proj.weight"),
    "kda": ("q_conv1d.weight",),
    "convolved_keys": ("k_sconv.conv1d.weight",),
    "temperature": ("tau.wq",),
    "after_rope": ("query_layernorm.weight", "key_layernorm.weight"),
    "lightning": ("output_gate.weight",),
    "latent_queries": ("inter_norm.weight", "wq.weight"),
}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def write(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def refusal(run, source: Path, *options: object) -> str:
    result = run("plan", source, "--layers", 1, *options)
    assert result.exit_code == 3, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def told(name: str) -> str:
    return " ".join(KINDS[name].reason.split())


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [(kind.name, architecture) for kind in KINDS.values() for architecture in kind.architectures],
)
def test_a_class_that_is_always_so_is_refused_by_its_name_alone(
    kind: str, architecture: str, run, tmp_path: Path
) -> None:
    """Quantised, or as another program names its tensors: no tensor tells."""
    packed = {"blk.1.attn_q.weight": torch.zeros(8, 8)}
    source = write(tmp_path / "source", {"model_type": "any", "architectures": [architecture]}, packed)
    message = refusal(run, source)
    assert f"{architecture}: {told(kind)}" in message
    assert "cannot be edited by qkpatch" in message


@pytest.mark.parametrize("kind", TELLING)
@pytest.mark.parametrize("chosen", [(), ("--recipe", "llama")], ids=["by itself", "as llama"])
def test_the_tensors_tell_whatever_the_class_is_called(
    kind: str, chosen: tuple[str, ...], run, tmp_path: Path
) -> None:
    counts = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 8}
    config = {"model_type": f"fork_{KINDS[kind].word}", "architectures": ["ForkForCausalLM"], **counts}
    tensors = {
        f"model.layers.{layer}.self_attn.{name}": torch.zeros(32, 32)
        for layer in range(2)
        for name in ("q_proj.weight", "k_proj.weight", *TELLING[kind])
    }
    source = write(tmp_path / "source", config, tensors)
    assert told(kind) in refusal(run, source, *chosen)


def hunyuan_vl() -> Any:
    vision = {
        **CLIP,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "text_hidden_size": 32,
        "img_max_token_num": 16,
    }
    return transformers.HunYuanVLConfig(text_config={**SIZE, "head_dim": 8}, vision_config=vision)


def kimi_k25() -> Any:
    text = {"model_type": "deepseek_v3", **SIZE, **MLA, "num_key_value_heads": 4, "first_k_dense_replace": 3}
    vision = {**CLIP, "hidden_size": 32, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2}
    return transformers.Kimi_K25Config(text_config=text, vision_config=vision)


def mistral4() -> Any:
    return transformers.Mistral4Config(**{**SIZE, "num_key_value_heads": 4}, **MLA, first_k_dense_replace=3)


# The transformers classes that the lists name, built small where they can be: their own tensors, not ours, must tell.
BUILT = {
    "HunYuanVLForConditionalGeneration": ("after_rope", hunyuan_vl),
    "Kimi_K25ForConditionalGeneration": ("mla", kimi_k25),
    "Mistral4ForCausalLM": ("mla", mistral4),
}


@pytest.mark.parametrize("architecture", BUILT)
def test_a_model_of_the_class_itself_is_refused_by_its_own_tensors(
    architecture: str, run, tmp_path: Path
) -> None:
    kind, config = BUILT[architecture]
    getattr(transformers, architecture)(config()).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "architectures": ["RenamedForCausalLM"]}))
    assert told(kind) in refusal(run, tmp_path / "source")


# Too large to build small: what their classes' source says of the tensors that the kind's pattern looks for.
READ = {
    "MistralLarge4ForConditionalGeneration": ("mla", "mistral_large4", "MistralLarge4TextAttention"),
    "Dots3NoteForConditionalGeneration": ("mla", "dots3_note", "Dots3NoteTextAttention"),
    "Glm5NextForConditionalGeneration": ("mla", "glm5_next", "Glm5NextTextAttention"),
    "InklingForConditionalGeneration": ("convolved_keys", "inkling", "InklingAttention"),
    "Inkling2ForConditionalGeneration": ("convolved_keys", "inkling2", "Inkling2FullAttention"),
}


@pytest.mark.parametrize("architecture", READ)
def test_the_attention_class_has_the_modules_that_tell(architecture: str) -> None:
    import importlib
    import inspect

    kind, family, attention = READ[architecture]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert hasattr(module, architecture)
    source = inspect.getsource(getattr(module, attention).__init__)
    modules = re.findall(r"self\.(\w+) = ", source)
    assert KINDS[kind].tensors is not None
    assert any(KINDS[kind].tensors.search(f"layers.1.self_attn.{name}.weight") for name in modules)


def test_no_class_is_both_edited_and_refused() -> None:
    edited = {name for recipe in shipped_recipes().values() for name in recipe.architectures}
    refused = [name for kind in KINDS.values() for name in kind.architectures]
    assert len(refused) == len(set(refused))
    assert not edited.intersection(refused)
    assert all(kind.sources for kind in KINDS.values())


def test_lightning_layers_beside_softmax_ones_do_not_refuse_those(run, tmp_path: Path) -> None:
    """MiniMax-M1's published config and names, three layers of it."""
    counts = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = {
        "model_type": "minimax_m1",
        "architectures": ["MiniMaxM1ForCausalLM"],
        "num_hidden_layers": 3,
        **counts,
    }
    shapes = {"q_proj": (64, 32), "k_proj": (32, 32), "v_proj": (32, 32)}
    tensors = {
        f"model.layers.1.self_attn.{name}.weight": torch.randn(shape) for name, shape in shapes.items()
    }
    for layer in (0, 2):
        for name in ("qkv_proj", "output_gate", "norm"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.randn(32, 32)
    source = write(tmp_path / "source", config, tensors)
    result = run("plan", source, "--layers", "0-2", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["edit"]["skipped_layers"] == [0, 2]


def test_a_half_that_is_quantised_is_refused_by_its_method(run, tmp_path: Path) -> None:
    """A served family whose queries are packed and whose keys are not."""
    numbers = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {
        "model_type": "glm_ocr", "architectures": ["GlmOcrForConditionalGeneration"],
        "text_config": {"model_type": "glm_ocr_text", **numbers, "head_dim": 8},
    }  # fmt: skip
    tensors = {}
    for layer in range(2):
        stem = f"model.language_model.layers.{layer}.self_attn."
        tensors[stem + "q_proj.weight_packed"] = torch.zeros(32, 4, dtype=torch.int32)
        tensors[stem + "q_proj.weight_scale"] = torch.zeros(32, 1)
        tensors[stem + "k_proj.weight"] = torch.randn(16, 32)
    assert "compressed-tensors" in refusal(run, write(tmp_path / "source", config, tensors))
