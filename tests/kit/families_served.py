"""Cases for families that are served and were read in transformers' own code, and text models that people try first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from families import CLIP, SIZE, Case, H, K, Tensors, normed, qwen, separate
from families_more import VISION, composite
from families_recent import EXPERTS, HYBRID, PATCHES, case, per_layer_heads, rms, text_only
from families_special import GLM_VISION, HALF_ROPE, QWEN3_VISION, ROPE, gated, gates, nested, qwen3_5

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMPASS_ROPE = dict.fromkeys(("full_attention", "sliding_attention"), ROPE)
FOUR = {**SIZE, "num_hidden_layers": 4}
MUSE_VISION = {
    **CLIP,
    "hidden_size": 32,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "max_position_embeddings": 16,
}
BART = {
    "d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "vocab_size": 64,
    "max_position_embeddings": 32, **IDS,
}  # fmt: skip
WHISPER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_mel_bins": 16, "max_source_positions": 16,
}  # fmt: skip
BERT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 64,
    "max_position_embeddings": 32, **IDS,
}  # fmt: skip


def moved(rename: dict[str, str], heads: Callable[[Tensors, str], Any] = separate) -> Callable[..., Any]:
    """Heads where a family's names are others: ``rename`` from its own to those that ``heads`` reads."""

    def extract(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor]:
        renamed = {f"{stem}.{new}": tensors[f"{stem}.{old}"] for old, new in rename.items()}
        return heads(renamed, stem)

    return extract


def projections(query: str, key: str) -> Callable[..., Any]:
    return moved({f"{query}.weight": "q_proj.weight", f"{key}.weight": "k_proj.weight"})


def head_major(n_parts: Callable[[int], int]) -> Callable[..., Any]:
    """Fused [its queries, key, value] per key head, by the view that the family's own code takes of the rows."""

    def extract(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor]:
        W = tensors[f"{stem}.query_key_value.weight"]
        groups = n_parts(len(W))
        d_head = 32 // H
        parts = W.view(groups, -1, d_head, W.shape[1])
        return parts[:, :-2].reshape(-1, d_head, W.shape[1]), parts[:, -2]

    return extract


def diffusion_gemma() -> Any:
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 8, "intermediate_size": 32, "position_embedding_size": 16,
    }  # fmt: skip
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    heads = {"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1}
    kinds = ["sliding_attention", "full_attention"] * 2
    text = transformers.DiffusionGemmaTextConfig(**FOUR, **experts, **heads, layer_types=kinds)
    return transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=4)


def nemotron_h() -> dict[str, Any]:
    kinds = ["linear_attention", "full_attention", "mlp", "full_attention"]
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}
    size = {key: value for key, value in SIZE.items() if key != "num_hidden_layers"}
    return {**size, **mamba, **IDS, "layers_block_type": kinds, "head_dim": 16}


def nemotron_h_omni() -> Any:
    vision = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32,
        "patch_size": 16, "image_size": 32, "video_temporal_patch_size": 2,
    }  # fmt: skip
    return transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config={"model_type": "nemotron_h", **nemotron_h()},
        vision_config={"model_type": "radio", **vision},
        projector_hidden_size=32,
        vision_hidden_size=32,
        image_token_id=3,
    )


def pi0() -> Any:
    text = {"model_type": "gemma", **SIZE, "head_dim": 16}
    vlm = {
        "model_type": "paligemma", "text_config": text, "projection_dim": 32, "image_token_id": 3,
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
    }  # fmt: skip
    sizes = {"max_action_dim": 4, "max_state_dim": 4, "chunk_size": 3}
    return transformers.PI0Config(vlm_config=vlm, dit_config=text, **sizes)


def t5gemma2() -> Any:
    text = {**SIZE, "head_dim": 16, **IDS, "query_pre_attn_scalar": 16}
    encoder = {
        "text_config": text, "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4, "image_token_index": 3,
    }  # fmt: skip
    return transformers.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=3)


def encoder_decoder(kind: str) -> Any:
    encoder = transformers.ViTConfig(**VISION)
    decoder = getattr(transformers, f"{kind}Config")(**BART, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def with_audio(name: str, text: Any, encoder: dict[str, Any], **more: Any) -> Any:
    return getattr(transformers, f"{name}Config")(text_config=text, audio_config=encoder, **more)


def granite_speech(name: str) -> Any:
    encoder = {
        "input_dim": 8, "num_layers": 2, "hidden_dim": 32, "num_heads": 4, "dim_head": 8, "output_dim": 8,
        "context_size": 8, "max_pos_emb": 8,
    }  # fmt: skip
    projector = {
        "model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 32, "encoder_hidden_size": 32,
    }  # fmt: skip
    text = transformers.GraniteConfig(**SIZE, **IDS)
    return getattr(transformers, f"{name}Config")(
        text_config=text,
        encoder_config=encoder,
        projector_config=projector,
        audio_token_index=3,
        has_lora_adapter=False,
    )


def vibevoice_asr() -> Any:
    """Its encoders are convolutions, so no tower that could be a decoy."""
    encoder = {"hidden_size": 8, "num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
    return transformers.VibeVoiceAsrConfig(
        text_config=transformers.Qwen2Config(**SIZE),
        acoustic_tokenizer_encoder_config={"model_type": "vibevoice_acoustic_tokenizer_encoder", **encoder},
        semantic_tokenizer_encoder_config={"model_type": "vibevoice_acoustic_tokenizer_encoder", **encoder},
        audio_token_id=3,
    )


def pixels(size: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.ones(1, 3, size, size), **more}


IDS_4 = torch.arange(4, 12)[None]
plus_one = normed(plus_one=True)
flat = moved(
    {"to_q.weight": "q_proj.weight", "to_k.weight": "k_proj.weight", "norm_q.weight": "q_norm.weight",
     "norm_k.weight": "k_norm.weight"},
    rms,
)  # fmt: skip
DITS = {
    "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    "attention_mask": torch.ones_like(IDS_4),
    "state": torch.ones(1, 4),
    "noise": torch.ones(1, 3, 4),
    "timestep": torch.full((1,), 0.5),
}


def cosmos3_omni() -> Any:
    return nested("Cosmos3Omni", {**SIZE, "head_dim": 16, "rope_parameters": ROPE}, QWEN3_VISION)


def cosmos3_edge() -> Any:
    return nested(
        "Cosmos3Edge", {**SIZE, "head_dim": 16, "rope_parameters": ROPE}, {**PATCHES, "num_patches": 16}
    )


def step3p7(**more: Any) -> Any:
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "share_expert_dim": 16,
    }
    text = {**FOUR, **experts, "layer_types": kinds, "sliding_window": 4, "head_dim": 16, **more}
    return nested("Step3p7", text, {**VISION, "max_position_embeddings": 16})


CASES: dict[str, Case] = {
    "cohere-compass": case(
        "CohereCompass", lambda: nested("CohereCompass", {**SIZE, **IDS, "rope_parameters": COMPASS_ROPE}, QWEN3_VISION)
    ),
    "cosmos3:omni": case("Cosmos3Omni", cosmos3_omni, rms, original=False),
    "cosmos3:edge": case("Cosmos3Edge", cosmos3_edge, original=False),
    "cosmos3-flat:omni": case("Cosmos3Omni", cosmos3_omni, flat, original=True, decoy="blocks"),
    "cosmos3-flat:edge": case("Cosmos3Edge", cosmos3_edge, projections("to_q", "to_k"), original=True),
    "diffusion-gemma": Case(
        "DiffusionGemmaForBlockDiffusion",
        diffusion_gemma,
        per_layer_heads,
        has_vision=False,
        edited=(1, 2, 3),
        inputs=lambda: {"input_ids": IDS_4, "decoder_input_ids": IDS_4[:, :4]},
    ),
    "evolla": Case(
        "EvollaForProteinText2Text",
        lambda: transformers.EvollaConfig(
            **SIZE, **IDS, protein_encoder_config=BERT, aligner_num_add_layers=1, resampler_depth=1,
            resampler_dim_head=8, resampler_heads=2, resampler_num_latents=4,
        ),
        has_vision=False,
        inputs=lambda: {
            "input_ids": IDS_4, "attention_mask": torch.ones_like(IDS_4), "protein_input_ids": IDS_4,
            "protein_attention_mask": torch.ones_like(IDS_4),
        },
    ),
    "blip": case(
        "Blip",
        lambda: transformers.BlipConfig(
            text_config={**BERT, "encoder_hidden_size": 32, "is_decoder": True}, vision_config=VISION
        ),
        projections("query", "key"),
        inputs=lambda: pixels(28, input_ids=IDS_4),
    ),
    "git": Case(
        "GitForCausalLM",
        lambda: transformers.GitConfig(**BERT, vision_config=VISION),
        projections("query", "key"),
        decoy="image_encoder",
    ),
    "glm-ocr": case(
        "GlmOcr",
        lambda: nested("GlmOcr", {**SIZE, "head_dim": 16, "pad_token_id": 0, "rope_parameters": HALF_ROPE}, GLM_VISION),
    ),
    "granite4-vision": case(
        "Granite4Vision",
        lambda: transformers.Granite4VisionConfig(
            text_config={**SIZE, **IDS},
            vision_config={"model_type": "siglip_vision_model", **VISION, "hidden_size": 64},
            qformer_config={
                "model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                "intermediate_size": 32, "encoder_hidden_size": 64, "use_qformer_text_input": False,
                "cross_attention_frequency": 1,
            },
            image_token_index=3, downsample_rate="1/2", deepstack_layer_map=[[-1, 0]],
        ),
        decoy="vision_tower",
    ),
    "hyperclovax-vision": case(
        "HyperCLOVAXVisionV2",
        lambda: transformers.HyperCLOVAXVisionV2Config(
            text_config={"model_type": "hyperclovax", **SIZE, **IDS, "head_dim": 16},
            vision_config={"model_type": "qwen2_5_vl_vision", **QWEN3_VISION}, image_token_id=3, video_token_id=4,
        ),
    ),
    "lighton-ocr": case(
        "LightOnOcr",
        lambda: composite(
            "LightOnOcr",
            transformers.Qwen3Config(**SIZE, head_dim=16),
            transformers.PixtralVisionConfig(**{**VISION, "patch_size": 14}),
        ),
        rms,
    ),
    "minicpm-v-4.6:ocr": case(
        "MiniCPMOcr",
        lambda: transformers.MiniCPMOcrConfig(
            text_config=qwen3_5().text_config, vision_config={**VISION, "insert_layer_id": 1}, insert_layer_id=1,
            image_token_id=3, video_token_id=2,
        ),
        gated,
        kept=gates,
        **HYBRID,
    ),
    "minimax-m3": case(
        "MiniMaxM3Sparse",
        lambda: transformers.MiniMaxM3VLConfig(
            text_config={
                **FOUR, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8,
                "dense_intermediate_size": 32, "shared_intermediate_size": 16, "index_n_heads": 2,
                "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 2,
                "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
                "mlp_layer_types": ["dense", "sparse"] * 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            },
            vision_config=VISION, projector_hidden_size=32, image_token_index=3, video_token_index=4,
        ),
        plus_one,
        edited=(1, 2, 3),
    ),
    "muse:glimmer": case(
        "MuseGlimmer",
        lambda: transformers.MuseGlimmerConfig(
            text_config={**SIZE, **IDS, "head_dim": 16}, vision_config=MUSE_VISION, image_token_id=3, video_token_id=4,
            out_hidden_size=32, projector_hidden_size=32,
        ),
    ),
    "muse:spark": case(
        "MuseSpark",
        lambda: transformers.MuseSparkConfig(
            text_config={
                **SIZE, **IDS, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 16, "moe_hidden_size": 16,
            },
            vision_config=MUSE_VISION, image_token_id=3, video_token_id=4, out_hidden_size=32,
            projector_hidden_size=32,
            audio_config={
                "hidden_sizes": [8, 8], "depths": [1, 1], "patch_sizes": [2, 2], "num_hidden_layers": 2,
                "out_hidden_size": 32,
            },
        ),
    ),
    "nemotron-h:omni": Case(
        "NemotronH_Omni_Reasoning_V3", nemotron_h_omni, edited=(1, 3), skipped=(2,)
    ),
    "nemotron-h:text": text_only(
        "NemotronH", lambda: transformers.NemotronHConfig(**nemotron_h()), edited=(1, 3), skipped=(2,)
    ),
    "colpali": Case(
        "ColPaliForRetrieval", lambda: transformers.ColPaliConfig(vlm_config=pi0().vlm_config.to_dict())
    ),
    "colqwen2": Case(
        "ColQwen2ForRetrieval", lambda: transformers.ColQwen2Config(vlm_config=qwen("Qwen2VL").to_dict())
    ),
    "pi0": case("PI0", pi0, inputs=lambda: {"pixel_values": torch.ones(1, 1, 3, 28, 28), "input_ids": IDS_4, **DITS}),
    "pix2struct": case(
        "Pix2Struct",
        lambda: transformers.Pix2StructConfig(
            text_config={
                "hidden_size": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 32, "vocab_size": 64
            },
            vision_config={
                "hidden_size": 32, "patch_embed_hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4,
                "d_kv": 8, "d_ff": 32, "seq_len": 16,
            },
        ),
        projections("query", "key"),
        decoy="encoder.layer",
        inputs=lambda: {"flattened_patches": torch.ones(1, 4, 14), "decoder_input_ids": IDS_4},
    ),
    "pp-formulanet": case(
        "PPFormulaNet",
        lambda: transformers.PPFormulaNetConfig(
            text_config=BART,
            vision_config={
                "hidden_size": 32, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
                "image_size": 64, "patch_size": 16, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 2,
                "post_conv_in_channels": 8, "post_conv_mid_channels": 16, "post_conv_out_channels": 32,
                "decoder_hidden_size": 32,
            },
        ),
        decoy="encoder.layers",
        inputs=lambda: pixels(64, decoder_input_ids=IDS_4),
    ),
    "qianfan-ocr": case(
        "QianfanOCR",
        lambda: composite(
            "QianfanOCR",
            transformers.Qwen3Config(**SIZE, head_dim=16),
            {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        ),
        rms,
    ),
    "step3.7": case("Step3p7", step3p7, plus_one, edited=(1, 2, 3)),
    "step3.7:more query heads": case(
        "Step3p7", lambda: step3p7(num_sliding_attention_heads=8), plus_one, edited=(1, 3), skipped=(2,)
    ),
    "t5gemma2": case(
        "T5Gemma2", t5gemma2, plus_one, inputs=lambda: {"input_ids": IDS_4, "decoder_input_ids": IDS_4}
    ),
    "udop": case(
        "Udop",
        lambda: transformers.UdopConfig(
            d_model=32, num_layers=2, num_decoder_layers=3, num_heads=4, d_kv=8, d_ff=32, vocab_size=64,
            max_2d_position_embeddings=64, image_size=28, patch_size=14, relative_bias_args=[{"type": "1d"}],
        ),
        projections("q", "k"),
        has_vision=False,
        inputs=lambda: {
            "input_ids": IDS_4, "bbox": torch.zeros(1, 8, 4, dtype=torch.long), "decoder_input_ids": IDS_4
        },
    ),
    **{
        f"vision-encoder-decoder:{kind}": Case(
            "VisionEncoderDecoderModel",
            lambda kind=kind: encoder_decoder(kind),
            decoy="encoder.layer",
            inputs=lambda: pixels(28, decoder_input_ids=IDS_4),
        )
        for kind in ("MBart", "TrOCR")
    },
    **{
        f"audio:{name}": case(name, config, heads, decoy="audio")
        for name, config, heads in (
            ("Qwen2Audio", lambda: with_audio(
                "Qwen2Audio", transformers.Qwen2Config(**SIZE),
                {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 32,
                 "num_mel_bins": 16, "max_source_positions": 16}, audio_token_index=3), separate),
            ("AudioFlamingo3", lambda: with_audio(
                "AudioFlamingo3", transformers.Qwen2Config(**SIZE), WHISPER, audio_token_id=3), separate),
            ("MusicFlamingo", lambda: with_audio(
                "MusicFlamingo", transformers.Qwen2Config(**SIZE), {"model_type": "audioflamingo3_encoder", **WHISPER},
                audio_token_id=3), separate),
            ("GlmAsr", lambda: with_audio(
                "GlmAsr", transformers.LlamaConfig(**SIZE, head_dim=16), WHISPER, audio_token_id=3), separate),
            ("MossTranscribeDiarize", lambda: with_audio(
                "MossTranscribeDiarize", transformers.Qwen3Config(**SIZE, head_dim=16), WHISPER,
                audio_token_id=3), rms),
            ("Qwen3ASR", lambda: with_audio(
                "Qwen3ASR", transformers.Qwen3Config(**SIZE, head_dim=16),
                {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 32,
                 "num_mel_bins": 16, "output_dim": 32, "downsample_hidden_size": 8}, audio_token_id=3), rms),
            ("Voxtral", lambda: with_audio(
                "Voxtral", transformers.LlamaConfig(**SIZE, head_dim=16), WHISPER, audio_token_id=3), separate),
        )
    },
    **{
        f"audio:{name}": case(name, lambda name=name: granite_speech(name), has_vision=False)
        for name in ("GraniteSpeech", "GraniteSpeechPlus")
    },
    "audio:VibeVoiceAsr": case("VibeVoiceAsr", vibevoice_asr, has_vision=False),
    **{
        f"llama-kin:{name}": text_only(name, lambda name=name, more=more: getattr(transformers, f"{name}Config")(
            **SIZE, **IDS, **more))
        for name, more in {
            "Mixtral": {"head_dim": 16, "num_local_experts": 2}, "Granite": {}, "SmolLM3": {},
            "Ernie4_5": {"head_dim": 16},
            "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
            "Glm": {"head_dim": 16}, "Glm4": {"head_dim": 16},
            "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 16}, "HyperCLOVAX": {"head_dim": 16},
        }.items()
    },
    "phi2": text_only("Phi", lambda: transformers.PhiConfig(**SIZE, **IDS)),
    "starcoder2": text_only(
        "Starcoder2", lambda: transformers.Starcoder2Config(**{**SIZE, "intermediate_size": 128}, **IDS)
    ),
    "starcoder2:stablelm": text_only("StableLm", lambda: transformers.StableLmConfig(**SIZE, **IDS)),
    "falcon": text_only(
        "Falcon",
        lambda: transformers.FalconConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=H, num_kv_heads=K, vocab_size=64,
            new_decoder_architecture=True, **IDS,
        ),
        head_major(lambda rows: K),
    ),
    "gpt-neox": text_only(
        "GPTNeoX",
        lambda: transformers.GPTNeoXConfig(**BERT),
        head_major(lambda rows: H),
    ),
    "minimax": text_only(
        "MiniMax",
        lambda: transformers.MiniMaxConfig(
            **FOUR, **IDS, head_dim=16, num_local_experts=2, block_size=4,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
        edited=(1, 3),
        skipped=(2,),
    ),
}  # fmt: skip
