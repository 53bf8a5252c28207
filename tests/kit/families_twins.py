"""Cases of twins: text-only saves of language models that a family wraps, and classes that extend a known one."""

from __future__ import annotations

from typing import Any

import transformers
from families import CLIP, SIZE, Case
from families_more import VISION
from families_recent import EXPERTS, HYBRID, LINEAR, case, layernormed, lfm2_vl, rms, text_only
from families_special import HALF_ROPE, gated, gates, mllama, nested, qwen3_5
from families_special import VISION as QWEN_VISION

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SAM = {
    "hidden_size": 32, "output_channels": 8, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 16, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 2,
    "downsample_channels": [16, 32],
}  # fmt: skip


def lfm3() -> Any:
    kinds = ["conv" if layer == 2 else "full_attention" for layer in range(4)]
    size = {**SIZE, "num_hidden_layers": 4}
    return transformers.Lfm3Config(**size, **IDS, layer_types=kinds, head_dim=16)


def lfm3_vl() -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "patch_size": 14,
    }  # fmt: skip
    ids = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    return transformers.Lfm3VlConfig(
        text_config=lfm3(), vision_config=vision, projector_hidden_size=32, **ids
    )


def qwen4_exp() -> dict[str, object]:
    """An indexer of its own norms, and several residual streams."""
    kinds = ["linear_attention" if layer == 2 else "indexed_attention" for layer in range(4)]
    indexer = {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    }  # fmt: skip
    return {
        **SIZE, **LINEAR, **EXPERTS, **indexer, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4,
        "layer_types": kinds, "head_dim": 16, "rope_parameters": HALF_ROPE, "hc_lowrank": 4,
    }  # fmt: skip


def granite_docling() -> Any:
    vision = {
        **CLIP, "hidden_size": 32, "image_size": 56, "out_hidden_size": 32, "scale_factor": 2,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return nested("GraniteDocling", {**SIZE, **IDS}, vision)


def ocr(name: str, encoder: dict[str, object], n_kv_heads: int = SIZE["num_key_value_heads"]) -> Any:
    """A mixture of experts beside two vision encoders, of which DeepSeek-OCR 2's second is a Qwen2 stack."""
    text = {
        **SIZE, **IDS, "num_key_value_heads": n_kv_heads, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse", "sparse"],
    }  # fmt: skip
    return nested(name, text, {"sam_config": SAM, "encoder_config": encoder})


def minicpmv4_7() -> Any:
    ids = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")
    return transformers.MiniCPMV4_7Config(
        text_config=qwen3_5().text_config,
        vision_config={**VISION, "insert_layer_id": 1},
        insert_layer_id=1,
        image_token_id=3,
        video_token_id=2,
        **{name: 4 + i for i, name in enumerate(ids)},
    )


GATED = {"kept": gates, **HYBRID}
CASES: dict[str, Case] = {
    "qwen3-moe": text_only(
        "Qwen3Moe", lambda: transformers.Qwen3MoeConfig(**SIZE, **EXPERTS, head_dim=16), rms
    ),
    "gpt-oss": text_only(
        "GptOss",
        lambda: transformers.GptOssConfig(**SIZE, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
    ),
    "ministral3": text_only("Ministral3", lambda: transformers.Ministral3Config(**SIZE, head_dim=16)),
    "gemma-text": text_only("Gemma", lambda: transformers.GemmaConfig(**SIZE, head_dim=16)),
    "qwen3.5:text": text_only("Qwen3_5", lambda: qwen3_5().text_config, gated, **GATED),
    "mllama:text": text_only("Mllama", lambda: mllama().text_config, **HYBRID),
    "aria:text": text_only(
        "AriaText",
        lambda: transformers.AriaTextConfig(
            **SIZE, head_dim=16, moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1
        ),
    ),
    "emu3:text": text_only("Emu3", lambda: transformers.Emu3TextConfig(**SIZE, **IDS)),
    "exaone4.5:text": text_only("Exaone4", lambda: transformers.Exaone4Config(**SIZE, head_dim=16), rms),
    "lfm2-vl:text": text_only("Lfm2", lambda: lfm2_vl("Lfm2").text_config, layernormed, **HYBRID),
    "lfm2-vl:text of experts": text_only(
        "Lfm2Moe", lambda: lfm2_vl("Lfm2Moe").text_config, layernormed, **HYBRID
    ),
    "lfm3-vl": case("Lfm3Vl", lfm3_vl, rms, **HYBRID),
    "lfm3-vl:text": text_only("Lfm3", lfm3, rms, **HYBRID),
    "qwen4-exp": case("Qwen4Exp", lambda: nested("Qwen4Exp", qwen4_exp(), QWEN_VISION), gated, **GATED),
    "qwen4-exp:text": text_only(
        "Qwen4Exp", lambda: transformers.Qwen4ExpTextConfig(**qwen4_exp()), gated, **GATED
    ),
    "minicpm-v-4.6:4.7": case("MiniCPMV4_7", minicpmv4_7, gated, **GATED),
    "granite-docling": case("GraniteDocling", granite_docling),
    "deepseek-ocr2": case("DeepseekOcr2", lambda: ocr("DeepseekOcr2", {**SIZE, **IDS}), decoy="sam_"),
    "deepseek-ocr2:unlimited": case(
        # Its attention knows no groups.
        "UnlimitedOcr",
        lambda: ocr("UnlimitedOcr", {**VISION, "patch_size": 14}, 4),
        decoy="sam_",
    ),
}
