"""Hand-built checkpoints of served families of remote code; each layout is from a second source, named beside it."""

from __future__ import annotations

from dataclasses import replace

from remote_families import (
    COUNTS,
    D_HEAD,
    D_MODEL,
    FUSED_ROWS,
    NUMBERS,
    Q_ROWS,
    WIDE,
    Heads,
    Remote,
    Shapes,
    Tensors,
    normed,
    per_query_head,
    projections,
    qkv,
    separate,
)

# The recipes whose layout is all that a test can show.
REMOTE = {
    "audio-remote",
    "bagel",
    "cogvlm2-video",
    "extended",
    "infimm",
    "intern-s1-pro",
    "intern-s2",
    "isaac",
    "keye",
    "wrapped",
    "minimax-vl01",
    "ming",
    "openpangu-vl",
    "ovis2.6",
    "phi4-siglip",
    "qwen1",
    "step-vl",
    "xgen-mm",
}

LM, MLM, ML = "language_model.model.layers.{}.", "model.language_model.layers.{}.", "model.layers.{}."
INTERN_VIT = (
    "vision_model.encoder.layers.1.attn.qkv.weight",
    "vision_model.encoder.layers.1.attn.q_norm.weight",
)
SIGLIP = ("vision_model.vision_model.encoder.layers.1.self_attn.q_proj.weight",)
QWEN_VIT = ("model.visual.blocks.1.attn.qkv.weight",)


def wrapped(
    architecture: str,
    text: str,
    decoys: tuple[str, ...],
    *,
    stem: str = LM,
    section: str | None = "text_config",
    model_type: str | None = None,
    shapes: Shapes | None = None,
) -> Remote:
    """A wrapper that says nothing but its class, around a language model of ``text``'s norms and biases."""
    numbers = {**NUMBERS, "model_type": text}
    has_norms = "qwen3" in text
    return Remote(
        {
            "model_type": model_type or architecture.lower(),
            "architectures": [architecture],
            **({section: numbers} if section else {**NUMBERS, "model_type": model_type or text}),
        },
        stem,
        "self_attn.q_proj.weight",
        shapes or projections(bias="qwen2" in text, norms=has_norms),
        normed if has_norms else separate,
        decoys,
    )


def gated(tensors: Tensors, stem: str) -> Heads:
    """Qwen3NextAttention: ``view(H, 2 d).chunk(2)`` of q_proj; the norms' gains are stored less one."""
    W_Q, W_K = (tensors[f"{stem}self_attn.{which}_proj.weight"] for which in "qk")
    queries, gates = W_Q.view(-1, 2 * D_HEAD, D_MODEL).chunk(2, dim=1)
    gains = [1 + tensors[f"{stem}self_attn.{which}_norm.weight"].double() for which in "qk"]
    keys = per_query_head(W_K.view(-1, D_HEAD, D_MODEL)).double() * (gains[0] * gains[1])[:, None]
    return Heads(queries, keys, gates)


def fused_and_normed(tensors: Tensors, stem: str) -> Heads:
    """BailingMoE v2: RMSNorm of each head, one gain for all of them, of the parts of the fused projection."""
    heads = qkv("attention.query_key_value.weight")(tensors, stem)
    gain_q, gain_k = (
        tensors[f"{stem}attention.{which}_layernorm.weight"].double() for which in ("query", "key")
    )
    return replace(heads, keys=heads.keys.double() * (gain_q * gain_k)[:, None])


def generation(tensors: Tensors, stem: str) -> Heads:
    """BAGEL's weights for image latents: ``q_proj_moe_gen`` and its like, split as those for text."""
    suffix = "_moe_gen"
    named = {n.replace(f"{suffix}.weight", ".weight"): t for n, t in tensors.items() if suffix in n}
    return normed(named, stem)


def with_generation(shapes: Shapes) -> Shapes:
    return shapes | {name.replace(".weight", "_moe_gen.weight"): shape for name, shape in shapes.items()}


BAGEL = with_generation(projections(norms=True))
QWEN35 = {
    **projections(norms=True),
    "self_attn.q_proj.weight": (2 * Q_ROWS, D_MODEL),
}

CASES: dict[str, Remote] = {
    # vLLM: h2ovl.py, nvlm_d.py, skyworkr1v.py extend internvl.py; their own modeling_*.py build `language_model`.
    "wrapped:h2ovl": wrapped("H2OVLChatModel", "llama", INTERN_VIT, section="llm_config", model_type="h2ovl_chat"),
    "wrapped:nvlm": wrapped("NVLM_D_Model", "qwen2", INTERN_VIT, section="llm_config", model_type="NVLM_D"),
    "wrapped:nvlm by vLLM's name": wrapped("NVLM_D", "qwen2", INTERN_VIT, section="llm_config"),
    "wrapped:skywork": wrapped("SkyworkR1VChatModel", "qwen2", INTERN_VIT, section="llm_config"),
    # vLLM: nemotron_vl.py (vision_model is RADIO), internvl.py for the language model.
    "wrapped:nemotron nano": wrapped(
        "Llama_Nemotron_Nano_VL", "llama", ("vision_model.radio_model.model.blocks.1.attn.qkv.weight",),
        section="llm_config",
    ),
    # vLLM: eagle2_5_vl.py (SiglipVisionModel, Qwen2).
    "wrapped:eagle 2.5": wrapped("Eagle2_5_VLForConditionalGeneration", "qwen2", SIGLIP),
    # Published config.json and weight maps.
    "wrapped:eagle 3": wrapped("Eagle3_VLForConditionalGeneration", "qwen3", SIGLIP, model_type="eagle_3_vl"),
    "wrapped:andesvl": wrapped(
        "AndesVLForConditionalGeneration", "qwen3", ("vision_encoder.trunk.blocks.1.attn.qkv.weight",),
        model_type="andesvl-aimv2-qwen3",
    ),
    "wrapped:locateanything": wrapped(
        "LocateAnythingForConditionalGeneration", "qwen2", ("vision_model.encoder.blocks.1.wqkv.weight",),
        model_type="locateanything",
    ),
    # vLLM: opencua.py (hf_to_vllm_mapper: vision_tower beside language_model).
    "wrapped:opencua": wrapped(
        "OpenCUAForConditionalGeneration", "qwen2", ("vision_tower.blocks.1.attn.qkv.weight",)
    ),
    # kakaocorp/kanana-1.5-v-3b-instruct: modeling.py (language_model is LlamaForCausalLM).
    "wrapped:kanana-v": wrapped(
        "KananaVForConditionalGeneration", "llama", ("vision_model.blocks.1.attn.qkv.weight",)
    ),
    # openvla/openvla: prismatic/extern/hf/modeling_prismatic.py (language_model, of text_config).
    "wrapped:openvla": wrapped(
        "OpenVLAForActionPrediction", "llama", ("vision_backbone.featurizer.blocks.1.attn.qkv.weight",),
        model_type="openvla",
    ),
    # vLLM: bee.py and rvl.py extend llava_onevision.py; their mappers name both layouts.
    "wrapped:bee": wrapped(
        "BeeForConditionalGeneration", "qwen3", ("vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight",)
    ),
    "wrapped:r-4b": wrapped(
        "RForConditionalGeneration", "qwen3", ("model.vision_tower.encoder.layers.1.self_attn.q_proj.weight",), stem=MLM
    ),
    # vLLM: cheers.py (hf_to_vllm_mapper).
    "wrapped:cheers": wrapped(
        "CheersForConditionalGeneration", "qwen2",
        ("model.vision_representation.encoder.layers.1.self_attn.q_proj.weight",), stem=MLM,
    ),
    # sglang: llava_onevision2.py (Qwen3Model); the remote code's conversion mapping names the first layout.
    "wrapped:llava-onevision 2": wrapped(
        "LlavaOnevision2ForConditionalGeneration", "qwen3", ("model.visual.encoder.layers.1.self_attn.qkv.weight",),
        stem=MLM,
    ),
    "wrapped:llava-onevision 2, first": wrapped(
        "LlavaOnevision2ForConditionalGeneration", "qwen3", ("visual.encoder.layers.1.self_attn.qkv.weight",), stem=ML
    ),
    # vLLM: interns1.py (InternVL's transformers layout, Qwen3 MoE).
    "wrapped:intern-s1": wrapped(
        "InternS1ForConditionalGeneration", "qwen3_moe",
        ("model.vision_tower.encoder.layer.1.attention.q_proj.weight",), stem=MLM,
    ),
    # sglang: keye.py; the remote code's conversion mapping (visual, mlp_AR, model) names the first layout.
    "keye": wrapped(
        "KeyeForConditionalGeneration", "qwen3", ("visual.vision_model.encoder.layers.1.self_attn.q_proj.weight",),
        stem=ML, section=None, model_type="Keye",
    ),
    "keye:1.5": wrapped(
        "KeyeVL1_5ForConditionalGeneration", "qwen3",
        ("visual.vision_model.encoder.layers.1.self_attn.q_proj.weight",),
        stem=ML, section=None, model_type="KeyeVL1_5",
    ),
    "keye:1.5 nested": wrapped(
        "KeyeVL1_5ForConditionalGeneration", "qwen3_of_keye",
        ("model.visual.vision_model.encoder.layers.1.self_attn.q_proj.weight",), stem=MLM,
    ),
    # NVIDIA-NeMo/Automodel: llava_onevision (model.visual beside model.language_model, a Qwen3Model).
    "keye:llava-onevision 1.5": replace(
        wrapped(
            "LLaVAOneVision1_5_ForConditionalGeneration", "LLaVAOneVision1_5_text",
            ("model.visual.blocks.1.attn.qkv.weight",), stem=MLM, shapes=projections(norms=True),
        ),
        split=normed,
    ),
    # PerceptronAI's modular_isaac.py, two versions (text_model; the model itself).
    "isaac": wrapped(
        "IsaacForConditionalGeneration", "qwen3",
        ("model.vision_embedding.0.encoder.layers.1.self_attn.q_proj.weight",),
        stem="model.text_model.layers.{}.",
    ),
    "isaac:first": wrapped(
        "IsaacForConditionalGeneration", "qwen3",
        ("model.vision_embedding.0.encoder.layers.1.self_attn.q_proj.weight",),
        stem=ML, section=None, model_type="isaac",
    ),
    # Copies of qwen2_navit.py: both kinds of token, each with norms of its own before the rotation.
    "bagel": replace(
        wrapped(
            "BagelForConditionalGeneration", "qwen2",
            ("vit_model.vision_model.encoder.layers.1.self_attn.q_proj.weight",), section="llm_config", shapes=BAGEL,
        ),
        split=normed,
    ),
    # Copies of its configuration (OpenPanguVLTextConfig) and vLLM's mapper; flat and nested.
    "openpangu-vl": wrapped(
        "OpenPanguVLForConditionalGeneration", "qwen2", ("visual.blocks.1.attn.qkv.weight",), stem=ML, section=None,
        model_type="openpangu_vl",
    ),
    "openpangu-vl:nested": wrapped(
        "OpenPanguVLForConditionalGeneration", "openpangu_vl_text", QWEN_VIT, stem=MLM, model_type="openpangu_vl"
    ),
    # OpenMOSS's modeling_moss_audio.py, three copies; vLLM's mappers and module names for the others.
    "audio-remote:moss": wrapped(
        "MossAudioModel", "qwen3", ("audio_encoder.encoder.layers.1.self_attn.q_proj.weight",),
        stem="language_model.layers.{}.", section="language_config",
    ),
    "audio-remote:midasheng": wrapped(
        "MiDashengLMModel", "qwen2", ("audio_encoder.blocks.1.attn.qkv.weight",), stem="decoder.model.layers.{}."
    ),
    "audio-remote:kimi": wrapped(
        "MoonshotKimiaForCausalLM", "qwen2",
        ("model.mimo_layers.1.self_attn.q_proj.weight", "model.encoder.layers.1.self_attn.q_proj.weight"),
        stem=ML, section=None, model_type="kimi_audio",
    ),
    # GPTQModel: ovis2_6_moe.py (module_tree).
    "ovis2.6": wrapped(
        "Ovis2_6ForCausalLM", "qwen3", ("visual_tokenizer.vit.vision_model.encoder.layers.1.self_attn.q_proj.weight",),
        stem="llm.model.layers.{}.", section="llm_config",
    ),
    "ovis2.6:moe": wrapped(
        "Ovis2_6_MoeForCausalLM", "qwen3_moe",
        ("visual_tokenizer.vit.vision_model.encoder.layers.1.self_attn.q_proj.weight",),
        stem="llm.model.layers.{}.", section="llm_config",
    ),
    # Its modeling file: Phi4ForCausalLMV extends Phi3ForCausalLM.
    "phi4-siglip": Remote(
        {"model_type": "phi4_visionr", "architectures": ["Phi4ForCausalLMV"], **NUMBERS},
        ML,
        "self_attn.qkv_proj.weight",
        {"self_attn.qkv_proj.weight": (FUSED_ROWS, D_MODEL), "input_layernorm.weight": (D_MODEL,)},
        qkv("self_attn.qkv_proj.weight"),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight",),
    ),
    # Code that hooks its attention: vlm.lang_model.model.layers.
    "xgen-mm": Remote(
        {
            "model_type": "xgenmm",
            "architectures": ["XGenMMModelForConditionalGeneration"],
            "text_config": {**NUMBERS, "model_type": "phi3"},
        },
        "vlm.lang_model.model.layers.{}.",
        "self_attn.qkv_proj.weight",
        {"self_attn.qkv_proj.weight": (FUSED_ROWS, D_MODEL), "input_layernorm.weight": (D_MODEL,)},
        qkv("self_attn.qkv_proj.weight"),
        ("vlm.vision_encoder.encoder.layers.1.self_attn.q_proj.weight",),
    ),
    # Its configuration_step_vl.py (text_config: Qwen3Config), vLLM's mapper.
    "step-vl": wrapped(
        "StepVLForConditionalGeneration", "qwen3", ("vision_model.transformer.resblocks.1.attn.in_proj_weight",),
        stem=ML, model_type="step_robotics",
    ),
    "intern-s1-pro": wrapped(
        "InternS1ProForConditionalGeneration", "qwen3_moe_of_s1_pro", QWEN_VIT, stem=MLM,
    ),
    # sglang: interns2_mobius.py extends Qwen3.5's classes.
    "intern-s2:preview": replace(
        wrapped("InternS2PreviewForConditionalGeneration", "qwen3_5_moe_text", QWEN_VIT, stem=MLM, shapes=QWEN35),
        split=gated,
    ),
    "intern-s2:mobius": replace(
        wrapped("InternS2MobiusForConditionalGeneration", "interns2_mobius_text", QWEN_VIT, stem=MLM, shapes=QWEN35),
        split=gated,
    ),
    # transformers: MiniMaxAttention beside lightning layers.
    "minimax-vl01": wrapped(
        "MiniMaxVL01ForConditionalGeneration", "minimax_text_01",
        ("vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight",), model_type="minimax_vl_01",
    ),
    # transformers: convert_pixtral_weights_to_hf.py; the class as vLLM calls it.
    "llava-1.5:pixtral": wrapped(
        "PixtralForConditionalGeneration", "mistral", ("vision_tower.transformer.layers.1.attention.q_proj.weight",),
        model_type="pixtral",
    ),
    # sglang: mineru2 extends Qwen2ForCausalLM; a published config.json of dots.ocr is flat.
    "extended:dots.ocr": wrapped(
        "DotsOCRForCausalLM", "qwen2", ("vision_tower.blocks.1.attn.qkv.weight",), stem=ML, section=None,
        model_type="dots_ocr",
    ),
    "extended:mineru": wrapped(
        "Mineru2QwenForCausalLM", "qwen2",
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight",), stem=ML,
        section=None, model_type="mineru2_qwen",
    ),
    # vLLM: mimo.py (loads what Qwen2Model names, and leaves out mtp_layers).
    "extended:mimo": wrapped(
        "MiMoForCausalLM", "qwen2", ("model.mtp_layers.0.self_attn.q_proj.weight",), stem=ML, section=None,
        model_type="mimo",
    ),
    # A published config.json; names by its modelling code, whose cross-attention has to_q and to_kv.
    "infimm": wrapped(
        "InfiMMZephyrModel", "mistral", ("model.lang_encoder.model.layers.1.gated_cross_attn_layer.attn.to_q.weight",),
        stem="model.lang_encoder.model.layers.{}.decoder_layer.", section="language", model_type="infimm-zephyr",
    ),
    # A published config.json of CogVLM2-Caption; its query_key_value is (H + 2 K) heads tall.
    "cogvlm2-video": Remote(
        {
            "architectures": ["CogVLMVideoForCausalLM"], "num_hidden_layers": COUNTS["num_hidden_layers"],
            "num_attention_heads": COUNTS["num_attention_heads"], "hidden_size": WIDE,
            "num_multi_query_heads": COUNTS["num_key_value_heads"],
        },
        ML,
        "self_attn.query_key_value.weight",
        {"input_layernorm.weight": (WIDE,), "self_attn.query_key_value.weight": (FUSED_ROWS, WIDE)},
        qkv("self_attn.query_key_value.weight"),
        ("model.vision.transformer.layers.1.attention.query_key_value.weight",),
    ),
    # sglang: bailing_moe.py loads query_key_value as [queries; keys; values]; a published config.json of Ming-Omni.
    "ming": Remote(
        {
            "model_type": "bailingmm", "architectures": ["BailingMMNativeForConditionalGeneration"],
            "llm_config": {**NUMBERS, "model_type": "bailing_moe"},
        },
        "model.model.layers.{}.",
        "attention.query_key_value.weight",
        {"input_layernorm.weight": (D_MODEL,), "attention.query_key_value.weight": (FUSED_ROWS, D_MODEL)},
        qkv("attention.query_key_value.weight"),
        ("vision.blocks.1.attn.qkv.weight",),
    ),
    "ming:text": Remote(
        {"model_type": "bailing_moe_v2", "architectures": ["BailingMoeV2ForCausalLM"], **NUMBERS},
        ML,
        "attention.query_key_value.weight",
        {
            "input_layernorm.weight": (D_MODEL,), "attention.query_key_value.weight": (FUSED_ROWS, D_MODEL),
            "attention.query_layernorm.weight": (D_HEAD,), "attention.key_layernorm.weight": (D_HEAD,),
        },
        fused_and_normed,
        ("talker.layers.1.attention.query_key_value.weight",),
    ),
    # exllamav3: hyperclovax_v2.py (key_prefix); copies of the remote class build `language_model` of text_config.
    "hyperclovax-vision:2": wrapped(
        "HCXVisionV2ForCausalLM", "hyperclovax", ("model.vision_model.blocks.1.attn.qkv.weight",),
        stem="model.language_model.model.layers.{}.", model_type="vlm",
    ),
    "hyperclovax-vision:1": wrapped(
        "HCXVisionForCausalLM", "llama", ("vision_model.vision_model.encoder.layers.1.self_attn.q_proj.weight",),
        section="language_config", model_type="hyperclovax_vlm",
    ),
    # vLLM: lightonocr.py (hf_to_vllm_mapper), for the class of its first repository.
    "lighton-ocr:first": wrapped(
        "LightOnOCRForConditionalGeneration", "qwen3",
        ("model.vision_encoder.transformer.layers.1.attention.q_proj.weight",), stem=MLM, model_type="mistral3",
    ),
    # vLLM: cosmos3.py drops the generator's `_moe_gen` beside the reasoner's, as unified checkpoints have them.
    "cosmos3:unified": wrapped(
        "Cosmos3ForConditionalGeneration", "qwen3_vl_text", ("blocks.1.attn.qkv.weight",), stem=ML, shapes=BAGEL,
        model_type="cosmos3_omni",
    ),
    # transformers: conversion_mapping.py (nemotron_h: backbone), and llm_config among the Omni class's legacy names.
    "nemotron-h:nano vl 2": Remote(
        {
            "model_type": "NemotronH_Nano_VL_V2", "architectures": ["NemotronH_Nano_VL_V2"],
            "llm_config": {**NUMBERS, "model_type": "nemotron_h"},
        },
        "language_model.backbone.layers.{}.",
        "mixer.q_proj.weight",
        {
            "norm.weight": (D_MODEL,),
            **{n.replace("self_attn", "mixer"): s for n, s in projections().items() if "self_attn" in n},
        },
        lambda tensors, stem: separate({n.replace("mixer", "self_attn"): t for n, t in tensors.items()}, stem),
        ("vision_model.radio_model.model.blocks.1.attn.qkv.weight",),
    ),
    # Copies of modeling_deepseek.py (DeepseekAttention); a published config.json of a DeepSeek 1 model, with head_dim.
    "llama-kin:deepseek": wrapped(
        "DeepseekForCausalLM", "deepseek", ("mtp.layers.1.self_attn.q_proj.weight",), stem=ML, section=None,
        model_type="deepseek",
    ),
    # A published config.json of a retrieval model on Qwen3.5.
    "qwen3.5:colqwen": replace(
        wrapped("ColQwen3_5", "qwen3_5_text", QWEN_VIT, stem=MLM, model_type="qwen3_5", shapes=QWEN35), split=gated
    ),
    # A published weight map of Qwen 1 (c_attn of thrice the width); vLLM: qwen.py splits it in thirds.
    "qwen1": Remote(
        {
            "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "hidden_size": WIDE, "kv_channels": D_HEAD,
            "num_hidden_layers": COUNTS["num_hidden_layers"], "num_attention_heads": COUNTS["num_attention_heads"],
        },
        "transformer.h.{}.",
        "attn.c_attn.weight",
        {"ln_1.weight": (WIDE,), "attn.c_attn.weight": (3 * WIDE, WIDE), "attn.c_attn.bias": (3 * WIDE,)},
        lambda tensors, stem: Heads(*(
            part.reshape(-1, D_HEAD, WIDE) for part in tensors[stem + "attn.c_attn.weight"].chunk(3)
        )),
        ("transformer.visual.transformer.resblocks.1.attn.in_proj.weight",),
    ),
}  # fmt: skip
CASES["bagel:gen"] = replace(
    CASES["bagel"], query="self_attn.q_proj_moe_gen.weight", split=generation, attention="gen"
)
