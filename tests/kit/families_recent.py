"""Cases for recent families: shared keys, per-layer heads, thinkers, text-only saves of classes with vision."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from families import SIZE, Case, H, K, Tensors, llava, normed, separate
from families_more import VISION, composite
from families_special import GLM_VISION, HALF_ROPE, ROPE, gated, gates, nested, qwen3_5
from families_special import VISION as QWEN_VISION
from transformers import LlamaConfig, MistralConfig, Qwen2Config

# A head_dim of hidden / heads = 8 needs sections that sum to 4.
NARROW_ROPE = {**ROPE, "mrope_section": [1, 1, 2]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PATCHES = {key: value for key, value in VISION.items() if key != "image_size"}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN_TOWER = {"depth": 3, "num_heads": 4, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32}
AUDIO_TOWER = {
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "output_dim": 32,
    "num_mel_bins": 16,
    "max_source_positions": 16,
}
MEDIA = {"image_token_id": 3, "video_token_id": 2, "audio_token_id": 1}


def qwen2_5_omni_thinker() -> Any:
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config={**SIZE, "rope_parameters": NARROW_ROPE},
        vision_config=QWEN_TOWER,
        audio_config=AUDIO_TOWER,
        image_token_index=3,
        video_token_index=2,
        audio_token_index=1,
    )


def qwen2_5_omni() -> Any:
    """Thinker, talker and vocoder; the talker's heads are others than the thinker's."""
    vocoder = {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "mel_dim": 8,
        "num_embeds": 32, "emb_dim": 16, "look_ahead_layers": [1], "look_backward_layers": [0],
        "enc_emb_dim": 16, "enc_dim": 16, "enc_channels": [16] * 5, "enc_attention_channels": 8,
    }  # fmt: skip
    return transformers.Qwen2_5OmniConfig(
        thinker_config=qwen2_5_omni_thinker().to_dict(),
        talker_config={**SIZE, "head_dim": 16, "embedding_size": 32, "rope_parameters": ROPE},
        token2wav_config={
            "dit_config": vocoder,
            "bigvgan_config": {"mel_dim": 8, "upsample_initial_channel": 64},
        },
    )


def qwen3_omni_thinker() -> Any:
    return transformers.Qwen3OmniMoeThinkerConfig(
        text_config={**SIZE, **EXPERTS, "head_dim": 16, "rope_parameters": ROPE},
        vision_config={**QWEN_TOWER, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        audio_config={**AUDIO_TOWER, "downsample_hidden_size": 8},
        **MEDIA,
    )


def qwen3_omni() -> Any:
    talker = {
        "text_config": {
            **SIZE, **EXPERTS, "head_dim": 16, "rope_parameters": ROPE, "shared_expert_intermediate_size": 16
        },
        "code_predictor_config": {**SIZE, "head_dim": 16, "num_code_groups": 4},
        "thinker_hidden_size": 32, "num_code_groups": 4, "spatial_merge_size": 2,
    }  # fmt: skip
    vocoder = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 32, "decoder_dim": 64, "codebook_size": 16, "num_quantizers": 4,
    }  # fmt: skip
    return transformers.Qwen3OmniMoeConfig(
        thinker_config=qwen3_omni_thinker().to_dict(), talker_config=talker, code2wav_config=vocoder
    )


def qwen3_5_moe_text() -> dict[str, object]:
    kinds = ["linear_attention" if layer == 2 else "full_attention" for layer in range(4)]
    return {
        **SIZE, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4,
        "layer_types": kinds, "head_dim": 16, "rope_parameters": HALF_ROPE,
    }  # fmt: skip


def glm46v(kind: str) -> Any:
    """The dense language model has no head_dim; the mixture of experts does."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    heads = {"hidden_size": 64} if kind == "glm4v" else {**experts, "head_dim": 16}
    text = {
        **SIZE,
        **heads,
        "model_type": f"{kind}_text",
        "pad_token_id": 0,
        "rope_parameters": HALF_ROPE,
    }
    vision = {**GLM_VISION, "model_type": f"{kind}_vision", "out_hidden_size": text["hidden_size"]}
    return nested("Glm46V", text, vision)


def gemma2() -> Any:
    return transformers.Gemma2Config(**SIZE, head_dim=16)


KINDS = ["sliding_attention", "full_attention"]
PER_LAYER_INPUT = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}


def gemma3n_text() -> Any:
    return transformers.Gemma3nTextConfig(
        **{**SIZE, "num_hidden_layers": 4},
        **PER_LAYER_INPUT,
        head_dim=16,
        num_kv_shared_layers=2,
        layer_types=KINDS * 2,
        laurel_rank=8,
    )


def gemma4_text(name: str = "Gemma4", **more: Any) -> Any:
    """Full-attention layers (1, 3, 5) have a head_dim of their own; the last two layers use the keys of 2 and 3."""
    config = getattr(transformers, f"{name}TextConfig")
    size = {**SIZE, "num_hidden_layers": 6}
    return config(
        **size, **more, head_dim=16, global_head_dim=32, num_kv_shared_layers=2, layer_types=KINDS * 3
    )


ONE_GLOBAL_KEY_HEAD = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


def gemma4() -> Any:
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 8, "intermediate_size": 32, "position_embedding_size": 16,
    }  # fmt: skip
    audio = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "output_proj_dims": 32,
        "subsampling_conv_channels": [8, 8],
    }  # fmt: skip
    text = gemma4_text(**PER_LAYER_INPUT, **ONE_GLOBAL_KEY_HEAD)
    return transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=audio, **MEDIA)


def gemma4_unified() -> Any:
    """No encoders, so no tower that could be a decoy."""
    text = gemma4_text("Gemma4Unified", **ONE_GLOBAL_KEY_HEAD)
    vision = {"mm_posemb_size": 16, "mm_embed_dim": 32}
    return transformers.Gemma4UnifiedConfig(text_config=text, vision_config=vision, **MEDIA)


def per_layer_heads(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gemma 4: head_dim is what the layer's norm has; keys are as many as fit."""
    W_Q, W_K = tensors[f"{stem}.q_proj.weight"], tensors[f"{stem}.k_proj.weight"]
    q_gain, k_gain = (tensors[f"{stem}.{which}_norm.weight"].double() for which in "qk")
    keys = W_K.double().view(-1, len(k_gain), W_K.shape[1])
    assert len(keys) == (K if len(k_gain) == 16 or f"{stem}.v_proj.weight" in tensors else 1)
    return W_Q.view(H, len(q_gain), W_Q.shape[1]), keys * (q_gain * k_gain)[:, None]


def llama4_text() -> Any:
    """Layers 1 and 3 without RoPE, and a mixture of experts in them."""
    size = {**SIZE, "num_hidden_layers": 4, "intermediate_size_mlp": 32}
    return transformers.Llama4TextConfig(
        **size, head_dim=16, num_local_experts=2, interleave_moe_layer_step=2, no_rope_layer_interval=2
    )


def llama4() -> Any:
    vision = {
        **VISION,
        "intermediate_size": 128,
        "vision_output_dim": 32,
    }  # 128: what the pixel shuffle makes of 32
    projector = {"projector_input_dim": 32, "projector_output_dim": 32}
    return transformers.Llama4Config(
        text_config=llama4_text(), vision_config={**vision, **projector}, image_token_index=3
    )


def internvl(text: Any) -> Any:
    return composite("InternVL", text, {**VISION, "image_size": [28, 28], "patch_size": [14, 14]})


def lfm2_vl(name: str) -> Any:
    kinds = ["conv" if layer == 2 else "full_attention" for layer in range(4)]
    size = {**SIZE, "num_hidden_layers": 4, "layer_types": kinds}
    mixture = {**EXPERTS, "num_dense_layers": 1} if name == "Lfm2Moe" else {"block_auto_adjust_ff_dim": False}
    return transformers.Lfm2VlConfig(
        text_config=getattr(transformers, f"{name}Config")(**size, **mixture),
        vision_config=transformers.Siglip2VisionConfig(**PATCHES, num_patches=16),
        image_token_id=3,
        projector_hidden_size=32,
    )


def layernormed(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor]:
    """LFM2 calls its RMSNorm of queries and keys layernorm."""
    W_Q, W_K = separate(tensors, stem)
    gains = [tensors[f"{stem}.{which}_layernorm.weight"].double() for which in "qk"]
    return W_Q, W_K.double() * (gains[0] * gains[1])[:, None]


def got_ocr2() -> Any:
    vision = {
        "hidden_size": 32, "output_channels": 8, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 64, "patch_size": 16, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 2,
    }  # fmt: skip
    return transformers.GotOcr2Config(
        text_config=Qwen2Config(**SIZE), vision_config=vision, image_token_index=3
    )


def minicpmv4_6() -> Any:
    vision = {**VISION, "insert_layer_id": 1}
    text = qwen3_5().text_config
    return transformers.MiniCPMV4_6Config(
        text_config=text, vision_config=vision, insert_layer_id=1, image_token_id=3, video_token_id=2
    )


def exaone4_5() -> Any:
    return transformers.Exaone4_5_Config(
        text_config=transformers.Exaone4Config(**SIZE, head_dim=16),
        vision_config={**QWEN_TOWER, "num_key_value_heads": 2},
        image_token_id=3,
        video_token_id=2,
    )


def ernie4_5_vl() -> Any:
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16]}
    vision = {key: value for key, value in QWEN_TOWER.items() if key != "out_hidden_size"}
    return nested("Ernie4_5_VLMoe", {**SIZE, **experts, "rope_parameters": NARROW_ROPE}, vision)


def case(name: str, config: Any, heads: Any = separate, **more: Any) -> Case:
    return Case(f"{name}ForConditionalGeneration", config, heads, **more)


def text_only(name: str, config: Any, heads: Any = separate, **more: Any) -> Case:
    return Case(f"{name}ForCausalLM", config, heads, has_vision=False, **more)


rms = normed(plus_one=False)
HYBRID = {"edited": (1, 3), "skipped": (2,)}
CASES: dict[str, Case] = {
    "llava-next-video": case(
        "LlavaNextVideo", lambda: llava("LlavaNextVideo", MistralConfig(**SIZE, head_dim=16))
    ),
    "qwen2.5-omni": case("Qwen2_5OmniThinker", qwen2_5_omni_thinker, decoy="audio_tower"),
    "qwen3-omni-moe": case("Qwen3OmniMoeThinker", qwen3_omni_thinker, rms, decoy="audio_tower"),
    "qwen3.5-moe": case(
        "Qwen3_5Moe",
        lambda: nested("Qwen3_5Moe", qwen3_5_moe_text(), QWEN_VISION),
        gated,
        kept=gates,
        **HYBRID,
    ),
    "qwen3.5-moe:text": text_only(
        "Qwen3_5Moe",
        lambda: transformers.Qwen3_5MoeTextConfig(**qwen3_5_moe_text()),
        gated,
        kept=gates,
        **HYBRID,
    ),
    "glm4v:glm46v": case("Glm46V", lambda: glm46v("glm4v")),
    "glm4v:glm46v with experts": case("Glm46V", lambda: glm46v("glm4v_moe")),
    "gemma2-text": text_only("Gemma2", gemma2),
    "paligemma:gemma": case(
        "PaliGemma",
        lambda: transformers.PaliGemmaConfig(
            text_config=transformers.GemmaConfig(**SIZE, head_dim=16),
            vision_config=transformers.SiglipVisionConfig(**VISION),
            projection_dim=32,
            image_token_index=3,
        ),
    ),
    "gemma3n:text": text_only("Gemma3n", gemma3n_text, rms, edited=(0, 1)),
    "gemma4": case("Gemma4", gemma4, per_layer_heads, edited=(1, 2, 3)),
    "gemma4:unified": case(
        "Gemma4Unified", gemma4_unified, per_layer_heads, edited=(1, 2, 3), has_vision=False
    ),
    "gemma4:text": text_only(
        "Gemma4", lambda: gemma4_text(**PER_LAYER_INPUT), per_layer_heads, edited=(1, 2, 3)
    ),
    "gemma4:unified text": text_only(
        "Gemma4Unified", lambda: gemma4_text("Gemma4Unified"), per_layer_heads, edited=(1, 2, 3)
    ),
    "llama4": case("Llama4", llama4, edited=(1, 2, 3)),
    "llama4:text": text_only("Llama4", llama4_text, edited=(1, 2, 3)),
    "internvl:qwen3": case("InternVL", lambda: internvl(transformers.Qwen3Config(**SIZE, head_dim=16)), rms),
    "internvl:qwen3_moe": case(
        "InternVL", lambda: internvl(transformers.Qwen3MoeConfig(**SIZE, **EXPERTS, head_dim=16)), rms
    ),
    "internvl:llama": case("InternVL", lambda: internvl(LlamaConfig(**SIZE, head_dim=16))),
    "lfm2-vl": case("Lfm2Vl", lambda: lfm2_vl("Lfm2"), layernormed, **HYBRID),
    "lfm2-vl:lfm2_moe": case("Lfm2Vl", lambda: lfm2_vl("Lfm2Moe"), layernormed, **HYBRID),
    "video-llama-3": case("VideoLlama3", lambda: nested("VideoLlama3", Qwen2Config(**SIZE), PATCHES)),
    "got-ocr2": case("GotOcr2", got_ocr2),
    "minicpm-v-4.6": case("MiniCPMV4_6", minicpmv4_6, gated, kept=gates, **HYBRID),
    "exaone4.5": case("Exaone4_5_", exaone4_5, rms),
    "paddleocr-vl": case(
        "PaddleOCRVL",
        lambda: nested("PaddleOCRVL", {**SIZE, "head_dim": 16, "rope_parameters": ROPE}, VISION),
    ),
    "ernie4.5-vl": case("Ernie4_5_VLMoe", ernie4_5_vl),
}
# Their vision towers are timm's, which the tests do without: their layouts are tested in test_recent_families.py.
REMOTE: set[str] = {"perception-lm", "fast-vlm"}
