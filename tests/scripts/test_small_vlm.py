"""A language model that looks through the toy's eyes: what ridge regression finds, and the loss behind it."""

from __future__ import annotations

import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(REPO))

from scripts.small_vlm import model, training
from scripts.toy_vlm.batches import pixels
from scripts.toy_vlm.model import IMAGE_TOKENS
from scripts.toy_vlm.scenes import scenes
from scripts.toy_vlm.vocabulary import IMAGE


@pytest.fixture(scope="module")
def language(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's words and layout, in two narrow layers at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("language") / "narrow"
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, pad_token_id=2,
                         bos_token_id=1, eos_token_id=2, **sizes)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)
    for file in smollm2.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


@pytest.mark.long
def test_ridge_regression_shows_the_words_and_the_projector_alone_is_kept(
    language: Path, tmp_path: Path
) -> None:
    made: Any = model.assemble(language, model.EYES)
    tokenizer = model.make_tokenizer(language)
    training.train(made, language, tmp_path / "projector.safetensors", training.Schedule(ridge_scenes=600))
    kept = model.load_projector(tmp_path / "projector.safetensors")
    again = model.assemble(language, model.EYES, kept)
    shown = list(islice(scenes("broken", 1, 9), 20))
    words = sorted({placed.name for scene in shown for placed in scene.objects})
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]
    with torch.inference_mode():
        seen = torch.stack(tuple(again.get_image_features(pixels(shown)).pooler_output))
    nearest = torch.cdist(seen, again.get_input_embeddings().weight[ids]).argmin(-1)
    clear = [(row, p) for row, scene in enumerate(shown) for p in scene.objects if p.contrast > 0.5]
    right = sum(words[nearest[row, placed.cell]] == placed.name for row, placed in clear)
    assert right / len(clear) > 0.95
    model.save(again, language, tmp_path / "vlm")
    assert {"config.json", "chat_template.jinja", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "vlm").iterdir()
    }


def test_the_loss_is_that_of_the_whole_text(language: Path) -> None:
    made: Any = model.assemble(language, model.EYES)
    tokenizer = model.make_tokenizer(language)
    training.fit(made, tokenizer, training.Schedule(ridge_scenes=50))
    (scene,) = islice(scenes("natural", 0, 30), 1)
    names = [p.name for p in sorted(scene.objects, key=lambda p: p.cell)]
    caption = training.caption(scene)
    assert caption.startswith((" a ", " an "))
    assert caption.endswith(f" {names[-1]}.")
    assert [word.strip(",.") for word in caption.split() if word.strip(",.") in names] == names
    asked = training.PROMPT.replace(IMAGE, IMAGE * IMAGE_TOKENS)
    n = len(tokenizer(asked, add_special_tokens=False).input_ids)
    ids = torch.tensor([tokenizer(asked + caption + "<|im_end|>", add_special_tokens=False).input_ids])
    with torch.inference_mode():
        logits = made(input_ids=ids, pixel_values=pixels([scene])).logits[0, n - 1 : -1]
        expected = float(cross_entropy(logits, ids[0, n:]))
        found = float(training._loss(made, tokenizer, [scene]))
    assert found == pytest.approx(expected, abs=1e-4)
