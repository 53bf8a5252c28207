"""Tiny configs of families that need an image, have LayerNorm on queries and keys, fused rows or an encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from families import CLIP, SIZE, Case, H, K, Tensors, qkv, separate, text

UNGROUPED = {key: value for key, value in SIZE.items() if key != "num_key_value_heads"}
OPT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 32, "vocab_size": 64,
    "word_embed_proj_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {"hidden_size": 32, **CLIP}
Q_FORMER = {**UNGROUPED, "num_hidden_layers": 2, "encoder_hidden_size": 32}
IMAGE_TOKENS = 4
# In Florence-2 these differ between encoder and decoder on purpose: each set has to read its own.
BART = {
    "model_type": "bart", "d_model": 32, "encoder_layers": 4, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64,
    "max_position_embeddings": 64, "decoder_start_token_id": 2,
}  # fmt: skip
Heads = tuple[torch.Tensor, torch.Tensor]


def blip(name: str, text_config: dict[str, object]) -> object:
    config = getattr(transformers, f"{name}Config")
    token = "video_token_index" if "Video" in name else "image_token_index"
    return config(
        vision_config=VISION,
        qformer_config=Q_FORMER,
        text_config=text_config,
        num_query_tokens=IMAGE_TOKENS,
        **{token: 3},
    )


def vicuna() -> dict[str, object]:
    return {"model_type": "llama", **SIZE, "head_dim": 16}


def kosmos2() -> object:
    text_config = {"vocab_size": 64, "embed_dim": 32, "layers": 3, "ffn_dim": 32, "attention_heads": 4}
    return transformers.Kosmos2Config(
        text_config=text_config, vision_config=VISION, latent_query_num=IMAGE_TOKENS
    )


def kosmos2_5() -> object:
    text_config = {"vocab_size": 64, "embed_dim": 32, "layers": 3, "ffn_dim": 32, "attention_heads": 4}
    vision = {
        "hidden_size": 32, "patch_embed_hidden_size": 48, "intermediate_size": 32, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    return transformers.Kosmos2_5Config(
        text_config=text_config, vision_config=vision, latent_query_num=IMAGE_TOKENS
    )


def florence2() -> object:
    vision = {
        "depths": [1, 1], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1],
        "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4],
        "window_size": 4, "projection_dim": 32,
    }  # fmt: skip
    return transformers.Florence2Config(text_config=BART, vision_config=vision, image_token_id=3)


def fuyu(**text_config: object) -> object:
    persimmon = {"model_type": "persimmon", **UNGROUPED, **text_config}
    return transformers.FuyuConfig(text_config=persimmon, patch_size=8, image_token_id=3)


def molmo2(qk_norm_type: str = "qwen3") -> object:
    tower = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
        "intermediate_size": 32,
    }  # fmt: skip
    image = {"num_hidden_layers": 3, "image_size": [28, 28], "patch_size": 14}
    return transformers.Molmo2Config(
        text_config={
            **SIZE,
            "head_dim": 16,
            "qk_norm_type": qk_norm_type,
            "norm_after": qk_norm_type == "olmo",
            "additional_vocab_size": 8,
        },
        vision_config={**tower, **image},
        adapter_config={**tower, "text_hidden_size": 32, "vision_feature_layer": [2, 1]},
        **dict.fromkeys(
            ("image_start_token_id", "low_res_image_start_token_id", "image_end_token_id", "image_patch_id"),
            3,
        ),
    )


def phi4_multimodal() -> object:
    vision = {**VISION, "num_hidden_layers": 2, "crop_size": 28, "image_token_id": 3}
    audio = {
        "hidden_size": 32, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 4,
        "ext_pw_out_channel": 32, "nemo_conv_channels": 32, "audio_token_id": 2, "nemo_activation": "relu",
    }  # fmt: skip
    return transformers.Phi4MultimodalConfig(
        **SIZE, vision_config=vision, audio_config=audio, bos_token_id=0, eos_token_id=1, pad_token_id=0
    )


def chameleon(**text_config: object) -> object:
    vq = {
        "embed_dim": 16, "num_embeddings": 16, "latent_channels": 16, "resolution": 32, "base_channels": 32,
        "channel_multiplier": [1], "num_res_blocks": 1,
    }  # fmt: skip
    return transformers.ChameleonConfig(
        **SIZE, **text_config, vq_config=vq, vocabulary_map={"<image>": 3, "IMGIMGBSZ": 2}, image_token_id=3
    )


def idefics() -> object:
    vision = {"embed_dim": 48, "image_size": 28, "patch_size": 14, "num_hidden_layers": 2}
    perceiver = {
        "use_resampler": True, "resampler_n_latents": IMAGE_TOKENS, "resampler_depth": 2, "resampler_n_heads": 4,
        "resampler_head_dim": 8,
    }  # fmt: skip
    return transformers.IdeficsConfig(
        **UNGROUPED,
        additional_vocab_size=2,
        cross_layer_interval=1,
        qk_layer_norms=True,  # of the cross-attention layers
        use_resampler=True,
        vision_config={**vision, "intermediate_size": 32, "num_attention_heads": 4},
        perceiver_config=perceiver,
    )


def ungrouped(tensors: Tensors, stem: str) -> Heads:
    """As many key heads as query heads."""
    W_Q, W_K = tensors[f"{stem}.q_proj.weight"], tensors[f"{stem}.k_proj.weight"]
    return W_Q.view(H, -1, W_Q.shape[1]), W_K.view(H, -1, W_K.shape[1])


def centred(keys: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """What a query meets when LayerNorm takes the mean from queries and keys, and weighs them."""
    d_head = keys.shape[-2]
    centring = torch.eye(d_head, dtype=torch.float64) - 1 / d_head
    return centring @ torch.diag_embed(gain.double()) @ centring @ keys.double()


def persimmon(tensors: Tensors, stem: str) -> Heads:
    """[q, k, v] per head, split and normed as PersimmonAttention does; LayerNorm over head_dim."""
    W = tensors[f"{stem}.query_key_value.weight"]
    queries, keys, _ = W.view(H, 3, -1, W.shape[1]).unbind(1)
    if f"{stem}.q_layernorm.weight" not in tensors:
        return queries, keys
    gain = [tensors[f"{stem}.{which}_layernorm.weight"].double() for which in "qk"]
    return queries, centred(keys, gain[0] * gain[1])


def values(tensors: Tensors, stem: str) -> torch.Tensor:
    W = tensors[f"{stem}.query_key_value.weight"]
    return W.view(H, 3, -1, W.shape[1])[:, 1:]


def gains_of_each_head(weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., Heads]:
    """Norms whose gains differ from head to head: a query head meets keys of its own."""

    def extract(tensors: Tensors, stem: str) -> Heads:
        W_Q, W_K = tensors[f"{stem}.q_proj.weight"], tensors[f"{stem}.k_proj.weight"]
        queries, keys = W_Q.view(H, -1, W_Q.shape[1]), W_K.view(K, -1, W_K.shape[1]).double()
        g_q = tensors[f"{stem}.q_norm.weight"].double().view(H, -1)
        g_k = tensors[f"{stem}.k_norm.weight"].double().view(K, -1).repeat_interleave(H // K, 0)
        return queries, weigh(keys.repeat_interleave(H // K, 0), g_q * g_k)

    return extract


layer_normed = gains_of_each_head(centred)
projection_normed = gains_of_each_head(lambda keys, gain: keys * gain[..., None])


def molmo2_heads(fused: bool) -> Callable[[Tensors, str], Heads]:
    """Fused or split projections under gains that all heads share (qwen3) or that each has of its own (olmo)."""

    def extract(tensors: Tensors, stem: str) -> Heads:
        if fused:
            queries, keys = qkv({f"{stem}.qkv_proj.weight": tensors[f"{stem}.att_proj.weight"]}, stem)
        else:
            queries, keys = separate(tensors, stem)
        d_head = queries.shape[1]
        g_q, g_k = (tensors[f"{stem}.{which}_norm.weight"].double().view(-1, d_head) for which in "qk")
        keys = keys.double().repeat_interleave(H // K, 0)
        gain = g_q.expand(H, -1) * (g_k if len(g_k) == 1 else g_k.repeat_interleave(H // K, 0))
        return queries, keys * gain[..., None]

    return extract


def behind_queries(projection: str, n_heads: int = H + 2 * K) -> Callable[[Tensors, str], torch.Tensor]:
    """The rows of keys and values in [queries; keys; values]."""

    def rows(tensors: Tensors, stem: str) -> torch.Tensor:
        W = tensors[f"{stem}.{projection}.weight"]
        return W[W.shape[0] * H // n_heads :]

    return rows


def prompt(images: int = 0) -> torch.Tensor:
    return torch.tensor([[3] * images + list(range(4, 12))])


def pixels(*shape: int) -> torch.Tensor:
    return (
        torch.linspace(-1, 1, 3 * 28 * 28)
        .view(1, *(1 for _ in shape), 3, 28, 28)
        .expand(1, *shape, 3, 28, 28)
    )


def blip_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(), "input_ids": prompt(IMAGE_TOKENS)}


def instructblip_inputs() -> dict[str, torch.Tensor]:
    return {**blip_inputs(), "qformer_input_ids": prompt()}


def instructblipvideo_inputs() -> dict[str, torch.Tensor]:
    frames = 2
    return {
        "pixel_values": pixels(frames),
        "input_ids": prompt(frames * IMAGE_TOKENS),
        "qformer_input_ids": prompt(),
    }


def kosmos2_inputs() -> dict[str, torch.Tensor]:
    ids = prompt(IMAGE_TOKENS)
    return {"pixel_values": pixels(), "input_ids": ids, "image_embeds_position_mask": ids == 3}


def kosmos2_5_inputs() -> dict[str, torch.Tensor]:
    ids = prompt(IMAGE_TOKENS)
    patches = torch.linspace(-1, 1, 6 * 50).view(1, 6, 50)
    patches[..., :2] = torch.tensor([[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]])  # row and column
    return {"flattened_patches": patches, "input_ids": ids, "image_embeds_position_mask": (ids == 3).long()}


def florence2_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": prompt(), "decoder_input_ids": prompt()}


def idefics_inputs() -> dict[str, torch.Tensor]:
    ids = prompt()
    return {
        "input_ids": ids,
        "pixel_values": pixels(1),
        "image_attention_mask": torch.ones(1, ids.shape[1], 1, dtype=torch.long),
    }


CASES: dict[str, Case] = {
    "blip2": Case(
        "Blip2ForConditionalGeneration",
        lambda: blip("Blip2", {"model_type": "opt", **OPT}),
        ungrouped,
        inputs=blip_inputs,
    ),
    "instructblip": Case(
        "InstructBlipForConditionalGeneration",
        lambda: blip("InstructBlip", vicuna()),
        inputs=instructblip_inputs,
    ),
    "instructblip:video": Case(
        "InstructBlipVideoForConditionalGeneration",
        lambda: blip("InstructBlipVideo", vicuna()),
        inputs=instructblipvideo_inputs,
    ),
    "kosmos2": Case("Kosmos2ForConditionalGeneration", kosmos2, ungrouped, inputs=kosmos2_inputs),
    "kosmos2:2.5": Case(
        "Kosmos2_5ForConditionalGeneration",
        kosmos2_5,
        ungrouped,
        decoy="image_to_text",
        inputs=kosmos2_5_inputs,
    ),
    "florence2": Case("Florence2ForConditionalGeneration", florence2, ungrouped, inputs=florence2_inputs),
    "fuyu": Case("FuyuForCausalLM", fuyu, persimmon, has_vision=False, kept=values),
    "fuyu:no-norm": Case(
        "FuyuForCausalLM", lambda: fuyu(qk_layernorm=False), persimmon, has_vision=False, kept=values
    ),
    "persimmon": Case(
        "PersimmonForCausalLM",
        lambda: transformers.PersimmonConfig(**UNGROUPED),
        persimmon,
        has_vision=False,
        kept=values,
    ),
    "molmo2": Case(
        "Molmo2ForConditionalGeneration",
        molmo2,
        molmo2_heads(fused=True),
        kept=behind_queries("att_proj"),
        original=True,
    ),
    "molmo2:olmo": Case(
        "Molmo2ForConditionalGeneration",
        lambda: molmo2("olmo"),
        molmo2_heads(fused=True),
        kept=behind_queries("att_proj"),
        original=True,
    ),
    "molmo2-hf": Case("Molmo2ForConditionalGeneration", molmo2, molmo2_heads(fused=False), original=False),
    "molmo2-hf:olmo": Case(
        "Molmo2ForConditionalGeneration", lambda: molmo2("olmo"), molmo2_heads(fused=False), original=False
    ),
    "phi4-multimodal": Case(
        "Phi4MultimodalForCausalLM",
        phi4_multimodal,
        qkv,
        decoy="embed_tokens_extend",
        kept=behind_queries("qkv_proj"),
    ),
    "cohere": text(
        "CohereForCausalLM", lambda: transformers.CohereConfig(**SIZE, use_qk_norm=True), layer_normed
    ),
    "cohere:no-norm": text("CohereForCausalLM", lambda: transformers.CohereConfig(**SIZE)),
    "cohere:2": text("Cohere2ForCausalLM", lambda: transformers.Cohere2Config(**SIZE)),
    "olmo2": text("Olmo2ForCausalLM", lambda: transformers.Olmo2Config(**SIZE), projection_normed),
    "olmo2:olmo3": text("Olmo3ForCausalLM", lambda: transformers.Olmo3Config(**SIZE), projection_normed),
    "opt": text("OPTForCausalLM", lambda: transformers.OPTConfig(**OPT), ungrouped),
    "chameleon": text("ChameleonForConditionalGeneration", chameleon, layer_normed),
    "chameleon:swin": text(
        "ChameleonForConditionalGeneration", lambda: chameleon(swin_norm=True), layer_normed
    ),
    "idefics": Case(
        "IdeficsForVisionText2Text", idefics, ungrouped, decoy="cross_attn", inputs=idefics_inputs
    ),
}
# Remote code that transformers cannot build: its layout is tested in test_older_layouts.py.
REMOTE: set[str] = {"phi4mm"}
