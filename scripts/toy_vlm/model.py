"""The toy as Hugging Face sees it: a LLaVA with a CLIP tower and a Llama of grouped queries, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from scripts.toy_vlm.glyphs import SIZE
from scripts.toy_vlm.scenes import IMAGE_SIZE
from scripts.toy_vlm.vocabulary import BOS, EOS, ID, IMAGE, PAD, WORDS, make_tokenizer

N_LAYERS, N_HEADS, N_KV_HEADS, D_HEAD, D_MODEL = 9, 4, 2, 32, 128
IMAGE_TOKENS = (IMAGE_SIZE // SIZE) ** 2
# Transformers' 0.02 suits wide models: here attention would start flat, and stay blind to the image for long.
INITIAL = 0.08
MEAN, STD = 0.1, 0.3  # of the image processor: the background becomes zero

TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": D_MODEL,
    "intermediate_size": 256,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "head_dim": D_HEAD,
    "max_position_embeddings": 128,
    "bos_token_id": ID[BOS],
    "eos_token_id": ID[EOS],
    "pad_token_id": ID[PAD],
    "initializer_range": INITIAL,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": SIZE,
    "projection_dim": 96,
    "initializer_range": INITIAL,
}

# How LLaVA's language tower is called: on the Hub and as transformers 5 saves it, or as some 4.52 versions did.
Layout = Literal["hub", "in-memory"]
LANGUAGE_TOWER: dict[Layout, str] = {"hub": "language_model.model.", "in-memory": "model.language_model."}


def make_config() -> Any:
    """The ``LlavaConfig``."""
    from transformers import LlavaConfig

    make: Any = LlavaConfig
    return make(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=ID[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
    )


def make_model(seed: int) -> Any:
    """A ``LlavaForConditionalGeneration`` before training; the same for the same seed."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(make_config())


def make_processor(tokenizer: Any = None) -> Any:
    """The ``LlavaProcessor``, of the toy's own words or others; its image processor needs no torchvision."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=square, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    make: Any = LlavaProcessor
    return make(
        image_processor=images,
        tokenizer=tokenizer or make_tokenizer(),
        patch_size=SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def load_model(path: Path) -> Any:
    """The model in float32, ready to run."""
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    )
    return model.eval()


def save_checkpoint(model: Any, path: Path) -> None:
    """Write the directory as ``save_pretrained`` would on the Hub: bfloat16, one file, processor files beside it."""
    path.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(path)
    make_processor().save_pretrained(path)


def relayout(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the Hub's layout, renamed to ``layout``."""
    if layout == "hub":
        return dict(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        new = name.replace(LANGUAGE_TOWER["hub"], LANGUAGE_TOWER[layout], 1)
        if new == name:
            new = "lm_head.weight" if name == "language_model.lm_head.weight" else f"model.{name}"
        renamed[new] = tensor
    return renamed


def write_layout(source: Path, path: Path, layout: Layout) -> None:
    """Copy a checkpoint of ours with its tensors under the names of ``layout``."""
    from safetensors.torch import load_file

    path.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            (path / file.name).write_bytes(file.read_bytes())
    save_file(
        relayout(load_file(source / "model.safetensors"), layout),
        path / "model.safetensors",
        {"format": "pt"},
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it is stored."""
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config
