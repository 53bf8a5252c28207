"""Hand-built checkpoints of families that transformers cannot build, in the layouts that their own code documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# The recipes whose layout is all that a test can show. internlm2's test is in test_layouts.py.
REMOTE = {
    "cogvlm2",
    "deepseek-vl2",
    "emu3-original",
    "glm-4v-9b",
    "internvl-chat",
    "internvl-internlm2",
    "internvl-phi3",
    "llava-original",
    "minicpm-o",
    "minicpm-v",
    "molmo",
    "moondream2",
    "moondream2-phi",
    "multi-modality",
    "ovis",
    "phi3-v",
    "video-llama-3-original",
}

H, K, G, D_HEAD, LAYERS = 6, 2, 3, 8, 3
D_MODEL = 24  # of families with a head_dim in their config, where it is not hidden / heads
WIDE = H * D_HEAD  # of those without one
Q_ROWS, KV_ROWS, FUSED_ROWS = H * D_HEAD, K * D_HEAD, (H + 2 * K) * D_HEAD
COUNTS = {"num_hidden_layers": LAYERS, "num_attention_heads": H, "num_key_value_heads": K}
NUMBERS = {**COUNTS, "hidden_size": D_MODEL, "head_dim": D_HEAD}
SQUARE = {**COUNTS, "hidden_size": WIDE}
Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Heads:
    """One layer's weights, split as the family's modelling code splits them."""

    queries: torch.Tensor  # (H, head_dim, hidden)
    keys: torch.Tensor  # (H, head_dim, hidden): what each query head meets, weighed by the gains of the norms
    rest: torch.Tensor | None = None  # the edited tensor's other rows


@dataclass(frozen=True)
class Remote:
    """A remote family: its config, its names, and the modelling code's own split of a layer."""

    config: dict[str, object]
    stem: str  # a layer's names begin with it
    query: str  # the tensor that is edited
    shapes: Shapes  # of a layer
    split: Callable[[Tensors, str], Heads]
    decoys: tuple[str, ...]  # query-like names outside the language model
    attention: str | None = None  # for --attention


def per_query_head(keys: torch.Tensor) -> torch.Tensor:
    """``repeat_kv``: each key head in turn, as often as there are query heads to it."""
    return keys.repeat_interleave(H // len(keys), dim=0)


def separate(tensors: Tensors, stem: str) -> Heads:
    W_Q, W_K = (tensors[f"{stem}self_attn.{which}_proj.weight"] for which in "qk")
    return Heads(W_Q.view(H, D_HEAD, -1), per_query_head(W_K.view(K, D_HEAD, -1)))


def normed(tensors: Tensors, stem: str) -> Heads:
    """Qwen3Attention: RMSNorm of each head, one gain for all of them."""
    heads = separate(tensors, stem)
    gain_q, gain_k = (tensors[f"{stem}self_attn.{which}_norm.weight"].double() for which in "qk")
    return Heads(heads.queries, heads.keys.double() * (gain_q * gain_k)[:, None])


def qkv(name: str) -> Callable[[Tensors, str], Heads]:
    """``split([H d, K d, K d])``, then ``view`` by head: Phi 3, Molmo, ChatGLM, CogVLM 2, Moondream 2 alike."""

    def split(tensors: Tensors, stem: str) -> Heads:
        queries, keys, values = tensors[stem + name].split([Q_ROWS, KV_ROWS, KV_ROWS])
        return Heads(queries.view(H, D_HEAD, -1), per_query_head(keys.reshape(K, D_HEAD, -1)), values)

    return split


def thirds(tensors: Tensors, stem: str) -> Heads:
    """The Phi of Moondream 2's first revisions: ``Wqkv(x).chunk(3)``, so as many key heads as query heads."""
    queries, keys, values = tensors[stem + "mixer.Wqkv.weight"].chunk(3)
    return Heads(queries.view(H, D_HEAD, -1), keys.reshape(H, D_HEAD, -1), values)


def grouped_qkv(tensors: Tensors, stem: str) -> Heads:
    """InternLM2Attention: ``b q (h gs d) -> b q h gs d``, queries ``[:g]``, key ``[-2]``, value ``[-1]``."""
    W = tensors[stem + "attention.wqkv.weight"]
    groups = W.view(K, G + 2, D_HEAD, -1)
    queries = groups[:, :G].reshape(H, D_HEAD, -1)
    return Heads(queries, per_query_head(groups[:, -2]), groups[:, -1])


def molmo_normed(tensors: Tensors, stem: str) -> Heads:
    """MolmoBlock.attention: RMSNorm of all queries at once, and of all keys, before ``view`` by head."""
    heads = qkv("att_proj.weight")(tensors, stem)
    gain_q = tensors[stem + "q_norm.weight"].double().view(H, D_HEAD)
    gain_k = per_query_head(tensors[stem + "k_norm.weight"].double().view(K, D_HEAD))
    return Heads(heads.queries, heads.keys.double() * (gain_q * gain_k)[..., None], heads.rest)


def projections(d_model: int = D_MODEL, *, bias: bool = False, norms: bool = False) -> Shapes:
    """Separate projections behind an RMSNorm."""
    shapes: Shapes = {
        "input_layernorm.weight": (d_model,),
        "self_attn.q_proj.weight": (Q_ROWS, d_model),
        "self_attn.k_proj.weight": (KV_ROWS, d_model),
        "self_attn.v_proj.weight": (KV_ROWS, d_model),
    }
    if bias:
        shapes |= {"self_attn.q_proj.bias": (Q_ROWS,), "self_attn.k_proj.bias": (KV_ROWS,)}
    if norms:
        shapes |= {"self_attn.q_norm.weight": (D_HEAD,), "self_attn.k_norm.weight": (D_HEAD,)}
    return shapes


def llava(model_type: str, backbone: str, *, bias: bool = False) -> Remote:
    return Remote(
        {"model_type": model_type, "architectures": [f"Llava{backbone}ForCausalLM"], **SQUARE},
        "model.layers.{}.",
        "self_attn.q_proj.weight",
        projections(WIDE, bias=bias),
        separate,
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight",
            "model.mm_projector.0.weight",
        ),
    )


def internvl(text_type: str, shapes: Shapes, split: Callable[[Tensors, str], Heads], query: str) -> Remote:
    return Remote(
        {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "llm_config": {"model_type": text_type, **NUMBERS},
        },
        "language_model.model.layers.{}.",
        query,
        shapes,
        split,
        ("vision_model.encoder.layers.1.attn.qkv.weight", "vision_model.encoder.layers.1.attn.q_norm.weight"),
    )


def minicpm(kind: str, *, norms: bool) -> Remote:
    speech = ("apm.layers.1.self_attn.q_proj.weight", "tts.model.layers.1.self_attn.q_proj.weight")
    return Remote(
        {"model_type": f"minicpm{kind}", "architectures": [f"MiniCPM{kind.upper()}"], **NUMBERS},
        "llm.model.layers.{}.",
        "self_attn.q_proj.weight",
        projections(bias=not norms, norms=norms),
        normed if norms else separate,
        (
            "vpm.encoder.layers.1.self_attn.q_proj.weight",
            "resampler.attn.in_proj_weight",
            "resampler.kv_proj.weight",
            *(speech if kind == "o" else ()),
        ),
    )


def molmo(*, norms: bool) -> Remote:
    shapes: Shapes = {
        "attn_norm.weight": (WIDE,),
        "att_proj.weight": (FUSED_ROWS, WIDE),
        "att_proj.bias": (FUSED_ROWS,),
    }
    if norms:
        shapes |= {"q_norm.weight": (Q_ROWS,), "k_norm.weight": (KV_ROWS,)}
    return Remote(
        {"model_type": "molmo", "architectures": ["MolmoForCausalLM"], **SQUARE, "clip_qkv": None},
        "model.transformer.blocks.{}.",
        "att_proj.weight",
        shapes,
        molmo_normed if norms else qkv("att_proj.weight"),
        ("model.vision_backbone.image_vit.transformer.resblocks.1.attention.wq.weight",),
    )


def cogvlm2(attention: str | None) -> Remote:
    language, vision = (f"self_attn.{kind}_expert_query_key_value" for kind in ("language", "vision"))
    counts = {"num_hidden_layers": LAYERS, "num_attention_heads": H, "num_multi_query_heads": K}
    edited = f"{vision if attention == 'vision' else language}.weight"
    return Remote(
        {"architectures": ["CogVLMForCausalLM"], **counts, "hidden_size": WIDE},
        "model.layers.{}.",
        edited,
        {
            "input_layernorm.weight": (WIDE,),
            f"{language}.weight": (FUSED_ROWS, WIDE),
            f"{vision}.weight": (FUSED_ROWS, WIDE),
            f"{vision}.bias": (FUSED_ROWS,),
        },
        qkv(edited),
        ("model.vision.transformer.layers.1.attention.query_key_value.weight",),
        attention,
    )


def ovis(model_type: str, text_type: str, *, norms: bool = False) -> Remote:
    architecture = {"ovis": "Ovis", "ovis2_5": "Ovis2_5"}[model_type]
    return Remote(
        {
            "model_type": model_type,
            "architectures": [architecture],
            "llm_config": {"model_type": text_type, **NUMBERS},
        },
        "llm.model.layers.{}.",
        "self_attn.q_proj.weight",
        projections(norms=norms, bias=text_type == "qwen2"),
        normed if norms else separate,
        (
            "visual_tokenizer.vit.vision_model.encoder.layers.1.self_attn.q_proj.weight",
            "visual_tokenizer.backbone.vision_model.encoder.layers.1.self_attn.q_proj.weight",
        ),
    )


def deepseek(architecture: str, model_type: str, stem: str, decoy: str) -> Remote:
    sizes = {"use_mla": False, "kv_lora_rank": None, "v_head_dim": 0, **SQUARE}
    config = {"model_type": model_type, "architectures": [architecture], "language_config": sizes}
    return Remote(config, stem, "self_attn.q_proj.weight", projections(WIDE), separate, (decoy,))


def moondream_phi(section: str, text_type: str, stem: str) -> Remote:
    counts = {"num_hidden_layers": LAYERS, "num_attention_heads": H, "hidden_size": WIDE}
    return Remote(
        {
            "model_type": "moondream1",
            "architectures": ["Moondream"],
            section: {"model_type": text_type, **counts},
        },
        stem,
        "mixer.Wqkv.weight",
        {"ln.weight": (WIDE,), "mixer.Wqkv.weight": (3 * WIDE, WIDE), "mixer.Wqkv.bias": (3 * WIDE,)},
        thirds,
        ("vision_encoder.encoder.model.visual.blocks.1.attn.qkv.weight",),
    )


# Cases of a recipe are told apart by what follows its name.
CASES: dict[str, Remote] = {
    "phi3-v": Remote(
        {"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"], **NUMBERS},
        "model.layers.{}.",
        "self_attn.qkv_proj.weight",
        {"self_attn.qkv_proj.weight": (FUSED_ROWS, D_MODEL), "input_layernorm.weight": (D_MODEL,)},
        qkv("self_attn.qkv_proj.weight"),
        ("model.vision_embed_tokens.img_processor.vision_model.encoder.layers.1.self_attn.q_proj.weight",),
    ),
    "llava-original:1.5": llava("llava", "Llama"),
    "llava-original:llama": llava("llava_llama", "Llama"),
    "llava-original:mistral": llava("llava_mistral", "Mistral"),
    "llava-original:onevision": llava("llava", "Qwen", bias=True),
    "llava-original:qwen": llava("llava_qwen", "Qwen", bias=True),
    "internvl-internlm2": internvl(
        "internlm2",
        {"attention.wqkv.weight": (FUSED_ROWS, D_MODEL), "attention_norm.weight": (D_MODEL,)},
        grouped_qkv,
        "attention.wqkv.weight",
    ),
    "internvl-phi3": internvl(
        "phi3",
        {"self_attn.qkv_proj.weight": (FUSED_ROWS, D_MODEL), "input_layernorm.weight": (D_MODEL,)},
        qkv("self_attn.qkv_proj.weight"),
        "self_attn.qkv_proj.weight",
    ),
    **{
        f"internvl-chat:{text_type}": internvl(text_type, shapes, split, "self_attn.q_proj.weight")
        for text_type, shapes, split in (
            ("qwen2", projections(bias=True), separate),
            ("qwen3", projections(norms=True), normed),
            ("qwen3_moe", projections(norms=True), normed),
            ("llama", projections(), separate),
            ("internlm3", projections(), separate),
            ("gpt_oss", {**projections(bias=True), "self_attn.sinks": (H,)}, separate),
        )
    },
    "minicpm-v:2.6": minicpm("v", norms=False),
    "minicpm-v:4.5": minicpm("v", norms=True),
    "minicpm-o:2.6": minicpm("o", norms=False),
    "minicpm-o:4.5": minicpm("o", norms=True),
    "molmo:7B-D": molmo(norms=False),
    "molmo:7B-O": molmo(norms=True),
    "glm-4v-9b": Remote(
        {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "num_layers": LAYERS,
            "hidden_size": D_MODEL,
            "num_attention_heads": H,
            "kv_channels": D_HEAD,
            "multi_query_attention": True,
            "multi_query_group_num": K,
        },
        "transformer.encoder.layers.{}.",
        "self_attention.query_key_value.weight",
        {
            "input_layernorm.weight": (D_MODEL,),
            "self_attention.query_key_value.weight": (FUSED_ROWS, D_MODEL),
            "self_attention.query_key_value.bias": (FUSED_ROWS,),
        },
        qkv("self_attention.query_key_value.weight"),
        ("transformer.vision.transformer.layers.1.attention.query_key_value.weight",),
    ),
    "cogvlm2": cogvlm2(None),
    "cogvlm2:vision": cogvlm2("vision"),
    "moondream2": Remote(
        {
            "model_type": "moondream1",
            "architectures": ["HfMoondream"],
            "config": {"text": {"n_layers": LAYERS, "dim": WIDE, "n_heads": H, "n_kv_heads": K}},
        },
        "model.text.blocks.{}.",
        "attn.qkv.weight",
        {"ln.weight": (WIDE,), "attn.qkv.weight": (FUSED_ROWS, WIDE), "attn.qkv.bias": (FUSED_ROWS,)},
        qkv("attn.qkv.weight"),
        ("model.vision.blocks.1.attn.qkv.weight",),
    ),
    **{
        f"moondream2-phi:{case}": moondream_phi(*what)
        for case, what in {
            "text_config": ("text_config", "phi", "text_model.transformer.h.{}."),
            "phi_config": ("phi_config", "phi", "text_model.transformer.h.{}."),
            "moondream1": ("phi_config", "phi-msft", "text_model.model.transformer.h.{}."),
        }.items()
    },
    "ovis:1.6": ovis("ovis", "gemma2"),
    "ovis:2": ovis("ovis", "qwen2"),
    "ovis:2.5": ovis("ovis2_5", "qwen3", norms=True),
    "ovis:2.5 as trained": ovis("ovis", "qwen3", norms=True),
    "multi-modality": Remote(
        {
            "model_type": "multi_modality",
            "architectures": ["MultiModalityCausalLM"],
            "language_config": {"model_type": "llama", **SQUARE},
        },
        "language_model.model.layers.{}.",
        "self_attn.q_proj.weight",
        projections(WIDE),
        separate,
        (
            "vision_model.vision_tower.blocks.1.attn.qkv.weight",
            "gen_vision_model.encoder.mid.1.q.weight",
            "vision_model.vision_tower_high.vision_tower.blocks.1.attn.qkv.weight",
        ),
    ),
    "deepseek-vl2:tiny": deepseek(
        "DeepseekVLV2ForCausalLM",
        "deepseek_vl_v2",
        "language.model.layers.{}.",
        "vision.blocks.1.attn.qkv.weight",
    ),
    "deepseek-vl2:ocr": deepseek(
        "DeepseekOCRForCausalLM",
        "deepseek_vl_v2",
        "model.layers.{}.",
        "model.vision_model.transformer.layers.1.self_attn.qkv_proj.weight",
    ),
    "deepseek-vl2:ocr saved again": deepseek(
        "DeepseekOCRForCausalLM",
        "DeepseekOCR",
        "model.layers.{}.",
        "model.sam_model.blocks.1.attn.qkv.weight",
    ),
    **{
        f"deepseek-vl2:{architecture}": deepseek(architecture, model_type, "model.layers.{}.", decoy)
        for architecture, model_type, decoy in (
            (
                "DeepseekOCR2ForCausalLM",
                "deepseek_vl_v2",
                "model.qwen2_model.model.model.layers.1.self_attn.q_proj.weight",
            ),
            (
                "UnlimitedOCRForCausalLM",
                "unlimited-ocr",
                "model.vision_model.transformer.layers.1.self_attn.qkv_proj.weight",
            ),
        )
    },
    "video-llama-3-original": Remote(
        {"model_type": "videollama3_qwen2", "architectures": ["Videollama3Qwen2ForCausalLM"], **SQUARE},
        "model.layers.{}.",
        "self_attn.q_proj.weight",
        projections(WIDE, bias=True),
        separate,
        ("model.vision_encoder.encoder.layers.1.self_attn.q_proj.weight",),
    ),
    "emu3-original": Remote(
        {"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"], **SQUARE},
        "model.layers.{}.",
        "self_attn.q_proj.weight",
        projections(WIDE),
        separate,
        ("model.embed_tokens.weight",),
    ),
}

# What published config.json files and the remote classes' defaults come to:
# layers, query heads, key heads, head_dim, hidden.
PUBLISHED: list[tuple[str, dict[str, object], tuple[int, ...]]] = [
    (
        "llava-original",  # llava-v1.5-7b
        {
            "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 4096,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        },
        (32, 32, 32, 128, 4096),
    ),
    ("llava-original", {"model_type": "llava_mistral"}, (32, 32, 8, 128, 4096)),
    (
        "molmo",  # 7B-D
        {
            "model_type": "molmo", "attention_layer_norm": False, "clip_qkv": None, "hidden_size": 3584,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        },
        (28, 28, 4, 128, 3584),
    ),
    (
        "glm-4v-9b",  # ChatGLM3-6B, of the same layout
        {
            "model_type": "chatglm", "hidden_size": 4096, "kv_channels": 128, "num_layers": 28,
            "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2,
        },
        (28, 32, 2, 128, 4096),
    ),
    ("cogvlm2", {"architectures": ["CogVLMForCausalLM"]}, (32, 32, 8, 128, 4096)),
    ("moondream2", {"model_type": "moondream1", "config": {}}, (24, 32, 32, 64, 2048)),
    ("moondream2-phi", {"model_type": "moondream1", "text_config": {"model_type": "phi"}}, (24, 32, 32, 64, 2048)),
    (
        "moondream2-phi",  # Moondream 1 and the first revisions of Moondream 2
        {"model_type": "moondream1", "phi_config": {"model_type": "phi-msft"}},
        (24, 32, 32, 64, 2048),
    ),
    (
        "deepseek-vl2",  # DeepSeek-OCR
        {
            "model_type": "deepseek_vl_v2",
            "language_config": {
                "hidden_size": 1280, "num_hidden_layers": 12, "num_attention_heads": 10,
                "num_key_value_heads": 10, "use_mla": False, "v_head_dim": 0,
            },
        },
        (12, 10, 10, 128, 1280),
    ),
    ("emu3-original", {"model_type": "Emu3"}, (32, 32, 8, 128, 4096)),
    ("internvl-chat", {"llm_config": {"model_type": "gpt_oss", "num_hidden_layers": 24}}, (24, 64, 8, 64, 2880)),
    ("ovis", {"llm_config": {"model_type": "gemma2"}}, (26, 8, 4, 256, 2304)),
]  # fmt: skip
