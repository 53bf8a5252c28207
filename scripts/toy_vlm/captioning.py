"""What a model says about scenes: greedy captions, answers, and how likely it finds the true captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scripts.toy_vlm.batches import IGNORED, caption_prompt, caption_text, padded, pixels, question_text
from scripts.toy_vlm.model import IMAGE_TOKENS
from scripts.toy_vlm.scenes import ABILITIES, Scene
from scripts.toy_vlm.vocabulary import EOS, ID, IMAGE, WORDS

LONGEST = 32  # tokens of a caption: sixteen objects, twice as many as any scene holds
BATCH = 250


@dataclass(frozen=True)
class Seen:
    """Scenes with what the vision tower makes of them, which no edit of the language model changes."""

    scenes: tuple[Scene, ...]
    features: Tensor  # (scenes, IMAGE_TOKENS, d_model)

    @classmethod
    @torch.inference_mode()
    def by(cls, model: Any, scenes: Sequence[Scene]) -> Seen:
        """Look at the scenes once."""
        features = [
            torch.stack(tuple(model.get_image_features(pixels(scenes[i : i + BATCH])).pooler_output))
            for i in range(0, len(scenes), BATCH)
        ]
        return cls(tuple(scenes), torch.cat(features).view(len(scenes), IMAGE_TOKENS, -1))

    @cached_property
    def caption_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and labels of the true captions."""
        return [padded([caption_text(s) for s in part]) for part in self._parts]

    @cached_property
    def question_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and labels of the questions."""
        return [padded([question_text(s) for s in part]) for part in self._parts]

    @property
    def _parts(self) -> list[tuple[Scene, ...]]:
        return [self.scenes[i : i + BATCH] for i in range(0, len(self.scenes), BATCH)]

    def embedded(self, model: Any, ids: Tensor, first: int) -> Tensor:
        """Token embeddings of ``ids``, with the pictures of the scenes from ``first`` on in their places."""
        embeddings: Tensor = model.get_input_embeddings()(ids)
        features = self.features[first : first + len(ids)].to(embeddings.dtype)
        return embeddings.masked_scatter((ids == ID[IMAGE])[..., None], features)


@torch.inference_mode()
def captions(model: Any, seen: Seen, stop_bias: float = 0.0) -> list[tuple[str, ...]]:
    """Greedy captions; ``stop_bias`` is added to the logit of the end of the caption."""
    said: list[tuple[str, ...]] = []
    for first in range(0, len(seen.scenes), BATCH):
        n = min(BATCH, len(seen.scenes) - first)
        inputs = seen.embedded(model, caption_prompt(n), first)
        said += [tuple(WORDS[i] for i in ids) for ids in _greedy(model, inputs, stop_bias)]
    return said


def _greedy(model: Any, inputs: Tensor, stop_bias: float) -> list[list[int]]:
    """Token ids up to, and without, the end of each row; all rows of ``inputs`` (rows, length, d_model) are full."""
    from transformers import DynamicCache

    said: list[list[int]] = [[] for _ in inputs]
    running = torch.arange(len(inputs))
    cache = DynamicCache()
    for _ in range(LONGEST):
        hidden = model.model.language_model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        logits = model.lm_head(hidden.last_hidden_state[:, -1])
        logits[:, ID[EOS]] += stop_bias
        chosen = logits.argmax(-1)
        keep = torch.nonzero(chosen != ID[EOS])[:, 0]
        if len(keep) < len(running):
            running, chosen = running[keep], chosen[keep]
            cache.batch_select_indices(keep)
        if not len(running):
            break
        for row, token in zip(running.tolist(), chosen.tolist(), strict=True):
            said[row].append(token)
        inputs = model.get_input_embeddings()(chosen)[:, None]
    return said


@torch.inference_mode()
def answers(model: Any, seen: Seen) -> list[dict[str, int]]:
    """Per scene, how many questions of each ability are answered right, given earlier answers as they should be."""
    right: list[dict[str, int]] = []
    for i, (ids, labels) in enumerate(seen.question_batches):
        best = _logits(model, seen, ids, i * BATCH).argmax(-1)
        correct = (best == labels[:, 1:])[labels[:, 1:] != IGNORED].view(len(ids), -1)
        for scene, marks in zip(seen.scenes[i * BATCH :], correct.tolist(), strict=False):
            counts: Counter[str] = Counter(dict.fromkeys(ABILITIES, 0))
            counts.update(q.ability for q, mark in zip(scene.questions, marks, strict=True) if mark)
            right.append(dict(counts))
    return right


@torch.inference_mode()
def caption_losses(model: Any, seen: Seen) -> list[tuple[float, int]]:
    """Per scene, the summed negative log-likelihood (nats) of its true caption, and the caption's tokens."""
    losses: list[tuple[float, int]] = []
    for i, (ids, labels) in enumerate(seen.caption_batches):
        logits = _logits(model, seen, ids, i * BATCH)
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
        )
        tokens = (labels[:, 1:] != IGNORED).sum(1)
        losses += zip(each.sum(1).tolist(), tokens.tolist(), strict=True)
    return losses


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """``exp`` of the mean loss per token."""
    return math.exp(sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses))


def _logits(model: Any, seen: Seen, ids: Tensor, first: int) -> Tensor:
    """Logits of every next token, (rows, length − 1, words)."""
    hidden = model.model.language_model(inputs_embeds=seen.embedded(model, ids, first), use_cache=False)
    logits: Tensor = model.lm_head(hidden.last_hidden_state[:, :-1])
    return logits
