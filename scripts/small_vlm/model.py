"""SmolLM2 and the toy's vision tower as one LLaVA, and the projector between them as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts.toy_vlm.model import IMAGE_TOKENS, load_model, make_processor
from scripts.toy_vlm.vocabulary import IMAGE

REPO = Path(__file__).resolve().parent.parent.parent
LANGUAGE, EYES = REPO / ".cache" / "fixtures" / "smollm2-135m", REPO / "demo" / "toy-0"

# SmolLM2's own, without its system turn, and with pictures.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def assemble(language: Path, eyes: Path, projector: Mapping[str, Tensor] | None = None) -> Any:
    """The model in float32, which is what a processor computes fastest; without ``projector``, with a random one."""
    from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    load: Any = AutoModelForCausalLM.from_pretrained
    text, toy = load(language, dtype=torch.float32, local_files_only=True), load_model(eyes)
    words = text.config.vocab_size
    text.resize_token_embeddings(words + 1, mean_resizing=False)  # the image token, which is never said
    text.get_input_embeddings().weight.data[words] = 0
    make: Any = LlavaConfig
    config = make(
        text_config=text.config.to_dict(),
        vision_config=toy.config.vision_config.to_dict(),
        image_token_index=words,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        architectures=["LlavaForConditionalGeneration"],
    )

    with no_init_weights():
        model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.model.vision_tower.load_state_dict(toy.model.vision_tower.state_dict())
    if projector is not None:
        model.model.multi_modal_projector.load_state_dict(projector)
    model.tie_weights()
    model.generation_config = text.generation_config
    return model.eval().requires_grad_(False)


def make_tokenizer(language: Path) -> Any:
    """SmolLM2's, with the image token behind all others."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(language, local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.padding_side, tokenizer.chat_template = "left", CHAT_TEMPLATE
    return tokenizer


def save(model: Any, language: Path, out: Path) -> None:
    """Write a directory that transformers loads with its auto classes."""
    model.save_pretrained(out)
    processor = make_processor(make_tokenizer(language))
    processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(out)


def save_projector(model: Any, file: Path) -> None:
    """Write the projector, in bfloat16."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = model.model.multi_modal_projector.state_dict()
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, file, {"format": "pt"})


def load_projector(file: Path) -> dict[str, Tensor]:
    """Read it, in float32."""
    return {name: tensor.float() for name, tensor in load_file(file).items()}
