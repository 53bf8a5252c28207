"""Tiny configs of the transformers classes behind the recipes, and how each stores queries and keys."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries when they are imported

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
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


H, K = SIZE["num_attention_heads"], SIZE["num_key_value_heads"]
Tensors = dict[str, torch.Tensor]


def separate(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (H, d_head, d_model) and keys (n_kv, ...) of separate projections."""
    W_Q, W_K = tensors[f"{stem}.q_proj.weight"], tensors[f"{stem}.k_proj.weight"]
    n_kv = H if len(W_K) == len(W_Q) else K
    return W_Q.view(H, -1, W_Q.shape[1]), W_K.view(n_kv, -1, W_K.shape[1])


def normed(plus_one: bool) -> Callable[[Tensors, str], tuple[torch.Tensor, torch.Tensor]]:
    """The same under a query-key norm, whose gains weigh the key rows."""

    def extract(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor]:
        W_Q, W_K = separate(tensors, stem)
        gains = [tensors[f"{stem}.{which}_norm.weight"].double() + plus_one for which in "qk"]
        return W_Q, W_K.double() * (gains[0] * gains[1])[:, None]

    return extract


def qkv(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused [Q; K; V], split as Phi3Attention does."""
    W = tensors[f"{stem}.qkv_proj.weight"]
    d_head = W.shape[0] // (H + 2 * K)
    W_Q, W_K, _ = W.split([H * d_head, K * d_head, K * d_head])
    return W_Q.view(H, d_head, -1), W_K.view(K, d_head, -1)


def token_ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(4, 12)[None]}


def answer(output: Any) -> torch.Tensor:
    """The logits of a language model, the embeddings of a retriever."""
    found: torch.Tensor = output["logits"] if "logits" in output else output["embeddings"]
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal by bytes: some classes leave experts uninitialised, and NaN is not equal to itself."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@dataclass(frozen=True)
class Case:
    """A recipe's transformers class, a tiny config of it, and how its weights hold queries and keys."""

    model_class: str
    config: Callable[[], Any]
    heads: Callable[[Tensors, str], tuple[torch.Tensor, torch.Tensor]] = separate
    has_vision: bool = True
    decoy: str = "vis"  # what names the towers that must stay as they are
    edited: tuple[int, ...] = (1, 2)  # the layers that are asked for: from the first to the last of these
    skipped: tuple[int, ...] = ()  # layers among them that have no query-key product
    kept: Callable[[Tensors, str], torch.Tensor] | None = None  # other rows of the edited tensor
    inputs: Callable[[], dict[str, torch.Tensor]] = token_ids  # what the class's forward needs
    original: bool | None = None  # the recipe is for Hub names only (True), for module names only (False)


def text(model_class: str, config: Callable[[], Any], heads: Any = separate) -> Case:
    return Case(model_class, config, heads, has_vision=False)


CASES = {
    "llama": text("LlamaForCausalLM", lambda: LlamaConfig(**SIZE, head_dim=16)),
    "mistral": text("MistralForCausalLM", lambda: MistralConfig(**SIZE, head_dim=16)),
    "qwen2": text("Qwen2ForCausalLM", lambda: Qwen2Config(**SIZE)),
    "qwen3": text("Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**SIZE, head_dim=16), normed(False)),
    "gemma3-text": text(
        "Gemma3ForCausalLM", lambda: transformers.Gemma3TextConfig(**SIZE, head_dim=16), normed(True)
    ),
    "phi3": text("Phi3ForCausalLM", lambda: transformers.Phi3Config(**SIZE, pad_token_id=0), qkv),
    "llava-1.5": Case(
        "LlavaForConditionalGeneration", lambda: llava("Llava", LlamaConfig(**SIZE, head_dim=16))
    ),
    "llava-next": Case(
        "LlavaNextForConditionalGeneration",
        lambda: llava("LlavaNext", MistralConfig(**SIZE, head_dim=16)),
    ),
    "llava-onevision": Case(
        "LlavaOnevisionForConditionalGeneration",
        lambda: llava("LlavaOnevision", Qwen2Config(**SIZE), SiglipVisionConfig),
    ),
    "qwen2-vl": Case("Qwen2VLForConditionalGeneration", lambda: qwen("Qwen2VL")),
    "qwen2.5-vl": Case("Qwen2_5_VLForConditionalGeneration", lambda: qwen("Qwen2_5_VL")),
    "idefics3": Case("Idefics3ForConditionalGeneration", lambda: idefics("Idefics3")),
    "smolvlm": Case("SmolVLMForConditionalGeneration", lambda: idefics("SmolVLM")),
}
# Remote code that transformers cannot build: their layouts are tested in test_layouts.py.
REMOTE = {"internlm2"}
