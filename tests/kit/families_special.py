"""Tiny configs of families with norms, gates, fused rows, or layers that have no query-key product."""

from __future__ import annotations

import torch
import transformers
from families import CLIP, QWEN_VISION, SIZE, Case, H, Tensors, normed
from transformers import SiglipVisionConfig

# Sections sum to half of the rotated part of head_dim 16.
ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
HALF_ROPE = {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
VISION = {**QWEN_VISION, "out_hidden_size": 32, "num_position_embeddings": 16}
QWEN3_VISION = {**VISION, "deepstack_visual_indexes": [0, 1, 2]}
GLM_VISION = {**QWEN_VISION, "out_hidden_size": 32, "image_size": 28, "patch_size": 14}


def nested(name: str, text: dict[str, object], vision: dict[str, object]) -> object:
    config = getattr(transformers, f"{name}Config")
    return config(text_config=text, vision_config=vision, image_token_id=3)


def gemma3() -> object:
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**SIZE, head_dim=16),
        vision_config=SiglipVisionConfig(hidden_size=32, **CLIP),
        image_token_id=3,
        mm_tokens_per_image=4,
    )


def qwen3_vl_moe() -> object:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text = {**SIZE, **experts, "head_dim": 16, "rope_parameters": ROPE}
    return nested("Qwen3VLMoe", text, QWEN3_VISION)


def glm4v() -> object:
    text = {**SIZE, "hidden_size": 64, "pad_token_id": 0, "rope_parameters": HALF_ROPE}  # head_dim 64 / 4
    return nested("Glm4v", text, {**GLM_VISION, "out_hidden_size": 64})


def glm4v_moe() -> object:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text = {**SIZE, **experts, "head_dim": 16, "pad_token_id": 0, "rope_parameters": HALF_ROPE}
    return nested("Glm4vMoe", text, GLM_VISION)


def mllama() -> object:
    text = {**SIZE, "num_hidden_layers": 4, "cross_attention_layers": [2], "pad_token_id": 0}
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
        "intermediate_size": 32, "vision_output_dim": 64, "image_size": 28, "patch_size": 14,
        "intermediate_layers_indices": [0],
    }  # fmt: skip
    return transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=3)


def qwen3_5() -> object:
    kinds = ["linear_attention" if layer == 2 else "full_attention" for layer in range(4)]
    linear = {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip
    text = {
        **SIZE, **linear, "num_hidden_layers": 4, "layer_types": kinds, "head_dim": 16, "rope_parameters": HALF_ROPE,
    }  # fmt: skip
    return nested("Qwen3_5", text, VISION)


def gated(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and normed keys where q_proj holds [query; gate] per head, split as Qwen3_5Attention does."""
    W = tensors[f"{stem}.q_proj.weight"]
    queries, _ = W.view(H, -1, W.shape[1]).chunk(2, dim=1)
    _, keys = normed(plus_one=True)(tensors, stem)
    return queries, keys


def gates(tensors: Tensors, stem: str) -> torch.Tensor:
    W = tensors[f"{stem}.q_proj.weight"]
    return W.view(H, -1, W.shape[1]).chunk(2, dim=1)[1]


CASES: dict[str, Case] = {
    "qwen3-vl": Case(
        "Qwen3VLForConditionalGeneration",
        lambda: nested("Qwen3VL", {**SIZE, "head_dim": 16, "rope_parameters": ROPE}, QWEN3_VISION),
        normed(plus_one=False),
    ),
    "qwen3-vl-moe": Case("Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe, normed(plus_one=False)),
    "gemma3": Case("Gemma3ForConditionalGeneration", gemma3, normed(plus_one=True)),
    "glm4v": Case("Glm4vForConditionalGeneration", glm4v),
    "glm4v-moe": Case("Glm4vMoeForConditionalGeneration", glm4v_moe),
    "mllama": Case("MllamaForConditionalGeneration", mllama, edited=(1, 3), skipped=(2,)),
    "qwen3.5": Case(
        "Qwen3_5ForConditionalGeneration", qwen3_5, gated, edited=(1, 3), skipped=(2,), kept=gates
    ),
}
