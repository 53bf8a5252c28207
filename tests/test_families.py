"""Each shipped recipe on a tiny random model of its own transformers class, in both layouts that exist on disk."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

# Grouped heads everywhere, and head_dim ≠ hidden / heads wherever the class has a head_dim.
SIZE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "vocab_size": 64,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
CLIP = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 3, "num_heads": 4, "embed_dim": 32, "hidden_size": 32, "intermediate_size": 32}


def llava(name: str, text: Any, vision: type = CLIPVisionConfig) -> Any:
    config = getattr(transformers, f"{name}Config")
    return config(text_config=text, vision_config=vision(hidden_size=32, **CLIP), image_token_index=3)


def qwen(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")
    return config(text_config={**SIZE, "rope_parameters": ROPE}, vision_config=QWEN_VISION, image_token_id=3)


def idefics(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")
    vision = {"hidden_size": 32, **CLIP}
    return config(
        text_config=LlamaConfig(**SIZE, head_dim=16), vision_config=vision, image_token_id=3, scale_factor=2
    )


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: LlamaConfig(**SIZE, head_dim=16)),
    "llava-1.5": ("LlavaForConditionalGeneration", lambda: llava("Llava", LlamaConfig(**SIZE, head_dim=16))),
    "llava-next": (
        "LlavaNextForConditionalGeneration",
        lambda: llava("LlavaNext", MistralConfig(**SIZE, head_dim=16)),
    ),
    "llava-onevision": (
        "LlavaOnevisionForConditionalGeneration",
        lambda: llava("LlavaOnevision", Qwen2Config(**SIZE), SiglipVisionConfig),
    ),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", lambda: qwen("Qwen2VL")),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", lambda: qwen("Qwen2_5_VL")),
    "idefics3": ("Idefics3ForConditionalGeneration", lambda: idefics("Idefics3")),
    "smolvlm": ("SmolVLMForConditionalGeneration", lambda: idefics("SmolVLM")),
}


@pytest.mark.parametrize("original", [True, False], ids=["Hub names", "module names"])
@pytest.mark.parametrize("recipe", CASES)
def test_the_language_tower_and_nothing_else_is_edited_and_the_model_loads(
    recipe: str, original: bool, run, tmp_path: Path
) -> None:
    class_name, make_config = CASES[recipe]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(make_config()).to(torch.bfloat16)
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source, save_original_format=original, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 1

    result = run("apply", source, "--layers", "1-2", "--modes", 2, "--alpha", 0, "-o", out)
    assert result.exit_code == 0, result.output
    assert f"recipe {recipe}," in result.stdout

    before, after = read_all(source), read_all(out)
    assert list(before) == list(after)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    decoys = [name for name in before if name.endswith("q_proj.weight") or "qkv" in name]
    towers = {name.split(".layers.")[0].split(".blocks.")[0] for name in changed}
    assert len(changed) == 2
    assert all(
        name.endswith(("layers.1.self_attn.q_proj.weight", "layers.2.self_attn.q_proj.weight"))
        for name in changed
    )
    (tower,) = towers
    assert "visi" not in tower
    assert "visual" not in tower
    if recipe != "llama":
        assert any("visi" in name or "visual" in name for name in decoys), (
            "the vision tower must hold a decoy"
        )

    for name in changed:
        W_Q, W_K = (before[name.replace("q_proj", which)].double().numpy() for which in ("q_proj", "k_proj"))
        d_head = W_Q.shape[0] // 4
        expected = np.concatenate(
            [
                edited_head(W_Q[h * d_head : (h + 1) * d_head], W_K[h // 2 * d_head : (h // 2 + 1) * d_head])
                for h in range(4)
            ]
        )
        assert oracle.ulps(after[name].double().numpy(), oracle.round_to(expected, "BF16"), "BF16") <= 1

    loaded, report = model_class.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        original_logits = model_class.from_pretrained(source).float()(input_ids=ids).logits
        edited_logits = loaded.float()(input_ids=ids).logits
    assert not torch.allclose(original_logits, edited_logits)


def test_every_recipe_has_a_case() -> None:
    from qkpatch.catalogue import shipped_recipes

    assert set(CASES) == set(shipped_recipes())


def edited_head(W_Q: np.ndarray, W_K: np.ndarray) -> np.ndarray:
    """The two strongest modes removed, by the dense oracle."""
    dense = oracle.decompose(W_Q, W_K, "full")
    modes = oracle.choose(dense, "full", "dominant", 2)
    return oracle.edit(W_Q, W_K, "full", modes, 0.0, dense).W_Q


def read_all(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}
