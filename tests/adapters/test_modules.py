"""Names of modules: every class that a recipe reads has one rule or is refused; vLLM's rules of names, applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import build_tiny

import qkpatch
from qkpatch.adapters.modules import VLLM_RANKS, Runtime
from qkpatch.errors import UnsupportedError
from qkpatch.recipes.catalogue import recipe_text, shipped_recipes

TABLE = yaml.safe_load((Path(qkpatch.__file__).parent / "adapters" / "modules.yaml").read_text())
NOT_IN_PEFT = {
    # PEFT 0.21 renames their weights' keys once too often, and leaves the adapter at zero with a warning.
    "DeepseekOcr2ForConditionalGeneration", "UnlimitedOcrForConditionalGeneration",
    # Code beside checkpoints that may take a weight out of its module; has adapters of its own; is of two generations.
    "HfMoondream", "Moondream", "Phi4MMForCausalLM", "Ernie4_5_VL_MoeForConditionalGeneration",
}  # fmt: skip

# vLLM's hf_to_vllm_mapper of each class that has one: what a name begins with, or holds, and what takes its place.
LANGUAGE_MODEL = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
FLAT = {**LANGUAGE_MODEL, "model.": "language_model.model."}
THINKER = {
    "thinker.lm_head.": "language_model.lm_head.",
    "thinker.model.": "language_model.model.",
    "thinker.": "",
}
OCR = {"model.layers.": "language_model.model.layers.", "lm_head.": "language_model.lm_head.", "model.": ""}
MAPPERS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    **{
        name: (LANGUAGE_MODEL, {})
        for name in (
            "Gemma3ForConditionalGeneration", "Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration",
            "InternVLForConditionalGeneration", "Lfm2VlForConditionalGeneration", "LlavaForConditionalGeneration",
            "LlavaNextForConditionalGeneration", "LlavaNextVideoForConditionalGeneration",
            "PaliGemmaForConditionalGeneration", "Qwen3VLForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForConditionalGeneration",
        )
    },
    **{
        name: (FLAT, {})
        for name in (
            "Exaone4_5_ForConditionalGeneration", "Mistral3ForConditionalGeneration",
            "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
        )
    },
    **{
        name: (THINKER, {})
        for name in (
            "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel", "Qwen2_5OmniThinkerForConditionalGeneration",
            "Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration",
        )
    },
    "DeepseekOCRForCausalLM": (OCR, {}),
    "DeepseekOCR2ForCausalLM": (OCR, {}),
    "Gemma4ForConditionalGeneration": ({**LANGUAGE_MODEL, "model": "language_model.model"}, {}),
    "Gemma4ForCausalLM": ({"model.language_model.": "model."}, {}),
    "GptOssForCausalLM": ({}, {".self_attn.": ".attn."}),
    "Lfm2ForCausalLM": ({}, {".conv.": ".short_conv."}),
    "Lfm2MoeForCausalLM": ({}, {".conv.": ".short_conv."}),
    "MolmoForCausalLM": ({"model.transformer.blocks.": "model.layers."}, {"att_proj": "self_attn.qkv_proj"}),
    "OPTForCausalLM": ({"decoder.": "model.decoder."}, {}),
}  # fmt: skip
# Where its classes without a mapper, or with another than of names above, hold the language model's layers.
PLACES = {
    "Blip2ForConditionalGeneration": "language_model.model.decoder.layers.0.self_attn.q_proj",
    "GptOssForCausalLM": "model.layers.0.attn.q_proj",
    "Idefics3ForConditionalGeneration": "model.text_model.layers.0.self_attn.q_proj",
    "InternLM2ForCausalLM": "model.layers.0.attention.wqkv",
    "InternVLChatModel": "language_model.model.layers.0.self_attn.q_proj",
    "Llama4ForConditionalGeneration": "language_model.model.layers.0.self_attn.q_proj",
    "MiniCPMO": "llm.model.layers.0.self_attn.q_proj",
    "MiniCPMV": "llm.model.layers.0.self_attn.q_proj",
    "MolmoForCausalLM": "model.layers.0.self_attn.qkv_proj",
    "OPTForCausalLM": "model.decoder.layers.0.self_attn.q_proj",
    "Phi3ForCausalLM": "model.layers.0.self_attn.qkv_proj",
    "SmolVLMForConditionalGeneration": "model.text_model.layers.0.self_attn.q_proj",
}


def mapped(name: str, prefixes: dict[str, str], parts: dict[str, str]) -> str:
    """As vLLM maps the name of an adapter's weight: parts first, then beginnings, one after the other."""
    for old, new in parts.items():
        name = name.replace(old, new, 1)
    for old, new in prefixes.items():
        if name.startswith(old):
            name = new + name[len(old) :]
    return name


def classes(runtime: str) -> dict[str, str]:
    return {name: path for path, names in TABLE[runtime].items() for name in names}


def test_classes_are_those_of_recipes_each_once_and_none_that_an_adapter_may_miss() -> None:
    known = {name for recipe in shipped_recipes().values() for name in recipe.architectures}
    for runtime in ("peft", "vllm"):
        named = [name for names in TABLE[runtime].values() for name in names]
        assert len(named) == len(set(named))
        assert set(named) <= known
    assert known >= NOT_IN_PEFT
    assert not NOT_IN_PEFT & set(classes("peft"))


def test_the_table_can_be_read_over() -> None:
    for names in (names for runtime in TABLE.values() for names in runtime.values()):
        assert names == sorted(names, key=lambda name: name.replace("_", "\x7f"))  # as it stands, by letter


@pytest.mark.parametrize("name", sorted(set(classes("vllm")) - set(TABLE["vllm"]["without"])))
def test_vllm_finds_each_module_under_its_own_name(name: str) -> None:
    path = classes("vllm")[name]
    recipe = next(r for r in shipped_recipes().values() if name in r.architectures)
    prefixes, parts = MAPPERS.get(name, ({}, {}))
    for prefix in recipe.tensors.prefixes if path == "stored" else ("",):
        if path == "stored" and name.endswith("ForCausalLM") and "language" in prefix:
            continue  # of the recipe's class with vision
        stored = f"{path}layers.0." if prefix == "" else prefix.format(layer=0)
        found = mapped(f"{stored}{recipe.tensors.query_module}", prefixes, parts)
        usual = "language_model.model.layers.0." if path != "stored" else "model.layers.0."
        assert found == PLACES.get(name, usual + recipe.tensors.query_module)


def tiny(folder: Path, config: dict[str, Any], prefix: str) -> Path:
    numbers = {
        "num_hidden_layers": 3,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return build_tiny(folder, config={**config, **numbers, "text_config": numbers}, prefix=prefix).path


def test_vllm_names_are_its_own_and_peft_names_are_transformers(tmp_path: Path) -> None:
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    source = tiny(tmp_path / "llava", config, "language_model.model.layers.{layer}.self_attn.")
    names = {
        runtime: qkpatch.lora(source, tmp_path / runtime, runtime=runtime, layers="1").adapter.modules
        for runtime in ("peft", "vllm")
    }
    assert names == {
        "peft": ("model.language_model.layers.1.self_attn.q_proj",),
        "vllm": ("language_model.model.layers.1.self_attn.q_proj",),
    }


@pytest.mark.parametrize(
    ("architecture", "runtime", "says"),
    [
        ("LlavaOnevisionForConditionalGeneration", "vllm", "without LoRA"),
        ("BrandNewForCausalLM", "peft", "not known here"),
        ("BrandNewForCausalLM", "vllm", "not known here"),
    ],
)
def test_a_class_without_adapters_or_names_is_refused(
    architecture: str, runtime: str, says: str, tmp_path: Path
) -> None:
    is_known = architecture.startswith("Llava")
    config = {"model_type": "llava_onevision" if is_known else "brand_new", "architectures": [architecture]}
    prefix = (
        "language_model.model.layers.{layer}.self_attn." if is_known else "model.layers.{layer}.self_attn."
    )
    source, recipe = tiny(tmp_path / "source", config, prefix), None if is_known else "llama"
    with pytest.raises(UnsupportedError, match=says) as raised:
        qkpatch.lora(source, tmp_path / "a", runtime=runtime, layers="1", recipe=recipe)
    assert "qkpatch apply" in str(raised.value.fix)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_another_stack_of_a_known_class_is_not_taken_for_its_language_model(tmp_path: Path) -> None:
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    source = tiny(tmp_path / "source", config, "talker.model.layers.{layer}.self_attn.")
    own = (
        recipe_text("llama")
        .replace("model.layers", "talker.model.layers")
        .replace("name: llama", "name: own")
    )
    (tmp_path / "own.yaml").write_text(own)
    with pytest.raises(UnsupportedError, match="not known here"):
        qkpatch.lora(source, tmp_path / "a", layers="1", recipe=str(tmp_path / "own.yaml"))


def test_vllm_is_started_with_the_next_rank_that_it_takes() -> None:
    assert [Runtime.vllm.max_lora_rank(n) for n in (1, 2, 16, 17, 257, 321, 512)] == [
        1,
        8,
        16,
        32,
        320,
        512,
        512,
    ]
    assert Runtime.peft.max_lora_rank(3) is None
    assert sorted(VLLM_RANKS) == list(VLLM_RANKS)
