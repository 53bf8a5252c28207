"""Cases for the vision-language families whose language model has separate queries and keys without a norm."""

from __future__ import annotations

from typing import Any

import transformers
from families import CLIP, SIZE, Case, llava
from transformers import LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

VISION = {"hidden_size": 32, **CLIP}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}


def llama() -> Any:
    return LlamaConfig(**SIZE, head_dim=16)


def mistral() -> Any:
    return MistralConfig(**SIZE, head_dim=16)


def composite(name: str, text: Any, vision: Any = None, **other: Any) -> Any:
    """Config of a class that takes ``image_token_id``, with a SigLIP tower unless told otherwise."""
    config = getattr(transformers, f"{name}Config")
    return config(
        text_config=text, vision_config=vision or SiglipVisionConfig(**VISION), image_token_id=3, **other
    )


def idefics2() -> Any:
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": 4,
        "resampler_depth": 3,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    return composite("Idefics2", mistral(), VISION, perceiver_config=perceiver)


def paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        text_config=transformers.Gemma2Config(**SIZE, head_dim=16),
        vision_config=SiglipVisionConfig(**VISION),
        projection_dim=32,
        hidden_size=32,
        image_token_index=3,
    )


def aria() -> Any:
    return transformers.AriaConfig(
        text_config=transformers.AriaTextConfig(**SIZE, head_dim=16, moe_num_experts=4),
        vision_config={"model_type": "idefics3_vision", **VISION},
        projector_patch_to_query_dict={4: 4},
        image_token_index=3,
    )


def emu3() -> Any:
    vq = {**VQ, "codebook_size": 16, "hidden_size": 32, "attn_resolutions": [1]}
    return transformers.Emu3Config(
        text_config=transformers.Emu3TextConfig(**SIZE, pad_token_id=0),
        vq_config=vq,
        vocabulary_map={"<image>": 3},
    )


def janus() -> Any:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 32,
    }
    vq = {
        **VQ,
        "latent_channels": 32,
        "num_embeddings": 16,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
        "num_patches": 2,
    }
    return composite("Janus", llama(), vision, vq_config=vq)


def deepseek_vl_hybrid() -> Any:
    sam = transformers.SamVisionConfig(
        hidden_size=32,
        output_channels=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
        mlp_dim=32,
        global_attn_indexes=[1],
        window_size=2,
        num_pos_feats=16,
    )
    return composite("DeepseekVLHybrid", llama(), high_res_vision_config=sam)


def ovis2() -> Any:
    return composite(
        "Ovis2",
        Qwen2Config(**SIZE),
        {**VISION, "vocab_size": 16},
        visual_indicator_token_ids=[1, 2, 61, 62, 63],
        vocab_size=64,
        hidden_size=32,
    )


def internvl() -> Any:
    vision = {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}
    return composite("InternVL", Qwen2Config(**SIZE), vision)


def pixtral(**size: Any) -> Any:
    """Vision tower of Mistral 3."""
    return transformers.PixtralVisionConfig(**size, head_dim=8)


def cohere2() -> Any:
    return transformers.Cohere2Config(**SIZE)


def case(name: str, config: Any, **more: Any) -> Case:
    return Case(f"{name}ForConditionalGeneration", config, **more)


CASES: dict[str, Case] = {
    "vipllava": case("VipLlava", lambda: llava("VipLlava", llama())),
    "video-llava": case("VideoLlava", lambda: llava("VideoLlava", llama()), decoy="_tower"),
    "idefics2": case("Idefics2", idefics2),
    "paligemma": case("PaliGemma", paligemma),
    "mistral3": case("Mistral3", lambda: llava("Mistral3", mistral(), pixtral)),
    "aria": case("Aria", aria),
    "aya-vision": case("AyaVision", lambda: llava("AyaVision", cohere2(), SiglipVisionConfig)),
    "cohere2-vision": case(
        "Cohere2Vision", lambda: composite("Cohere2Vision", cohere2(), alignment_intermediate_size=32)
    ),
    "emu3": case("Emu3", emu3, decoy="vqmodel"),
    "janus": case("Janus", janus),
    "deepseek-vl": case("DeepseekVL", lambda: composite("DeepseekVL", llama())),
    "deepseek-vl-hybrid": case("DeepseekVLHybrid", deepseek_vl_hybrid),
    "ovis2": case("Ovis2", ovis2),
    "internvl": case("InternVL", internvl),
}
