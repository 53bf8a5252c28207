"""The projector: by ridge regression to the embeddings of the words that it should see, then trained alone.

Ridge regression: the first layer is random and stays so, the second is what is solved for; nothing is backpropagated.
Training: the caption's loss through the frozen language model, in reading order, so that there is no order to guess.
One thread, because sums over threads come out differently.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from scripts.small_vlm.model import make_tokenizer, save_projector
from scripts.toy_vlm.batches import IGNORED, pixels
from scripts.toy_vlm.model import IMAGE_TOKENS
from scripts.toy_vlm.scenes import Scene, scenes
from scripts.toy_vlm.vocabulary import IMAGE

RIDGE_STREAM, TRAINING_STREAM = 20, 21
SEED = 0
NOTHING = " ."  # what an empty cell is to look like
# With two examples of what pictures look like after ridge regression: without, a language model of this size tells a
# story about one of the things.
PROMPT = (
    "Picture: . . cat . . dog . . sun . .\nThere is a cat, a dog and a sun.\n"
    "Picture: . owl . . . bed . . . door . hat .\nThere is an owl, a bed, a door and a hat.\n"
    f"Picture:{IMAGE}\nThere is"
)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    ridge_scenes: int = 2000
    ridge: float = 1e-3  # of the mean energy of a hidden unit
    steps: int = 0
    batch: int = 4
    peak_rate: float = 3e-4
    warm_up: int = 5
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, then the peak, so that a shorter run is the start of a longer one."""
        return self.peak_rate * min(1.0, (step + 1) / self.warm_up)


def caption(scene: Scene) -> str:
    """What is there, in reading order, as the prompt's end goes on: `` a cup, a fork and an anchor.``."""
    names = [placed.name for placed in sorted(scene.objects, key=lambda placed: placed.cell)]
    *others, last = [f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in names]
    return f" {', '.join(others)} and {last}." if others else f" {last}."


@torch.inference_mode()
def features(model: Any, of: Sequence[Scene]) -> Tensor:
    """What the tower makes of every cell, (scenes, cells, width)."""
    seen: Tensor = model.model.vision_tower(pixels(of)).last_hidden_state[:, 1:]
    return seen


@torch.no_grad()
def fit(model: Any, tokenizer: Any, schedule: Schedule) -> None:
    """``linear_2 = argmin Σ w ‖linear_2 h − e‖² + λ ‖linear_2‖²``, with ``h`` the random units, ``e`` embeddings.

    Cells with an object weigh as much, together, as those without.
    """
    projector, embed = model.model.multi_modal_projector, model.get_input_embeddings().weight
    shown = list(islice(scenes("natural", SEED, RIDGE_STREAM), schedule.ridge_scenes))
    x = features(model, shown).flatten(0, 1)
    generator = torch.Generator().manual_seed(SEED)
    mean, std = x.mean(0), x.std(0)
    W = torch.randn(projector.linear_1.weight.shape, generator=generator) / (std * math.sqrt(x.shape[1]))
    projector.linear_1.weight.copy_(W)
    projector.linear_1.bias.copy_(torch.randn(len(W), generator=generator) - W @ mean)
    words = torch.full((len(shown), IMAGE_TOKENS), _token(tokenizer, NOTHING))
    for row, scene in enumerate(shown):
        for placed in scene.objects:
            words[row, placed.cell] = _token(tokenizer, f" {placed.name}")
    there = (words != _token(tokenizer, NOTHING)).flatten()
    weight = torch.where(there, 1 / there.sum(), 1 / (~there).sum())[:, None].double()
    h = pad(projector.act(projector.linear_1(x)), (0, 1), value=1.0).double()
    gram = h.mT @ (weight * h)
    gram.diagonal().add_(schedule.ridge * gram.diagonal()[:-1].mean())
    solved = torch.linalg.solve(gram, h.mT @ (weight * embed[words.flatten()].double())).mT
    projector.linear_2.weight.copy_(solved[:, :-1])
    projector.linear_2.bias.copy_(solved[:, -1])


def _token(tokenizer: Any, word: str) -> int:
    (token,) = tokenizer(word, add_special_tokens=False).input_ids
    return int(token)


def train(
    model: Any, language: Path, out: Path, schedule: Schedule, tell: Callable[[str], None] = print
) -> None:
    """Make the projector, and write it and its log to ``out``."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer(language)
    fit(model, tokenizer, schedule)
    save_projector(model, out)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=schedule.peak_rate, weight_decay=0.0)
    source = islice(scenes("natural", SEED, TRAINING_STREAM), schedule.steps * schedule.batch)
    log: list[dict[str, float]] = []
    started, sums = time.process_time(), 0.0
    for step in range(schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        loss = _loss(model, tokenizer, list(islice(source, schedule.batch)))
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(projector.parameters(), schedule.clip)
        optimiser.step()
        sums += float(loss.detach())
        if (step + 1) % 5 == 0 or step + 1 == schedule.steps:
            log.append({"step": step + 1, "loss": sums / (step % 5 + 1)})
            sums = 0.0
            spent = time.process_time() - started
            tell(f"step {step + 1}/{schedule.steps}: loss {log[-1]['loss']:.4f}, {spent:.0f} s of CPU")
            save_projector(model, out)
    lines = (asdict(schedule), *log)
    out.with_name("training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _start(model: Any, tokenizer: Any, n: int) -> tuple[Any, int]:
    """Keys and values of what stands before the picture, which no projector changes, for ``n`` rows; how many."""
    from transformers import DynamicCache

    ids = torch.tensor([tokenizer(PROMPT.partition(IMAGE)[0], add_special_tokens=False).input_ids])
    cache = DynamicCache()
    with torch.no_grad():
        model.model.language_model(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(n)
    return cache, ids.shape[1]


def _loss(model: Any, tokenizer: Any, of: Sequence[Scene]) -> Tensor:
    """Of the captions' tokens and their end, in nats; rows are padded on the right, where nothing looks."""
    cache, n_before = _start(model, tokenizer, len(of))
    asked = tokenizer(IMAGE * IMAGE_TOKENS + PROMPT.partition(IMAGE)[2], add_special_tokens=False).input_ids
    said = [tokenizer(caption(s) + tokenizer.eos_token, add_special_tokens=False).input_ids for s in of]
    longest = max(map(len, said))
    ids = torch.tensor([asked + words + [tokenizer.pad_token_id] * (longest - len(words)) for words in said])
    labels = torch.full_like(ids, IGNORED)
    for row, words in enumerate(said):
        labels[row, len(asked) : len(asked) + len(words)] = torch.tensor(words)
    embedded = model.get_input_embeddings()(ids)
    pictures = model.model.multi_modal_projector(features(model, of).clone())
    is_picture = (ids == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(is_picture, pictures)
    places = torch.arange(n_before, n_before + ids.shape[1])[None]
    run = model.model.language_model(
        inputs_embeds=embedded, past_key_values=cache, position_ids=places, use_cache=True
    )
    learnt = labels[:, 1:] != IGNORED
    return cross_entropy(model.lm_head(run.last_hidden_state[:, :-1][learnt]), labels[:, 1:][learnt])
