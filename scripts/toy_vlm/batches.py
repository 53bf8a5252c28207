"""Scenes as tensors: pictures as the image processor would give them, words as the tokenizer would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scripts.toy_vlm.model import IMAGE_TOKENS, MEAN, STD
from scripts.toy_vlm.scenes import Scene
from scripts.toy_vlm.vocabulary import BOS, CAPTION_PROMPT, EOS, ID, IMAGE, PAD

IGNORED = -100
PREFIX = (BOS, *[IMAGE] * IMAGE_TOKENS)


def pixels(scenes: Sequence[Scene]) -> Tensor:
    """Pictures, (scenes, 3, height, width); equal to the processor's ``pixel_values``."""
    pictures = torch.from_numpy(np.stack([scene.picture for scene in scenes]))
    return (pictures.permute(0, 3, 1, 2).float() * (1 / 255) - MEAN) / STD


def caption_prompt(n: int) -> Tensor:
    """The ids that ask for a caption, (n, length)."""
    return torch.tensor([ID[word] for word in (*PREFIX, *CAPTION_PROMPT)]).expand(n, -1)


def caption_text(scene: Scene) -> tuple[list[int], list[bool]]:
    """Ids of the prompt and the scene's caption, and which of them are to be learnt."""
    prompt, answer = (*PREFIX, *CAPTION_PROMPT), (*scene.caption, EOS)
    return [ID[w] for w in (*prompt, *answer)], [False] * len(prompt) + [True] * len(answer)


def question_text(scene: Scene) -> tuple[list[int], list[bool]]:
    """Ids of the scene's questions, each followed by its answer, and which of them are to be learnt."""
    words, learnt = list(PREFIX), [False] * len(PREFIX)
    for question in scene.questions:
        words += [*question.words, question.answer]
        learnt += [False] * len(question.words) + [True]
    return [ID[word] for word in words], learnt


def padded(texts: Sequence[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Ids and labels, (texts, longest); padded on the right, where causal attention does not see it."""
    longest = max(len(ids) for ids, _ in texts)
    ids = torch.full((len(texts), longest), ID[PAD])
    labels = torch.full((len(texts), longest), IGNORED)
    for row, (numbers, learnt) in enumerate(texts):
        ids[row, : len(numbers)] = torch.tensor(numbers)
        labels[row, : len(numbers)] = torch.tensor(
            [number if is_learnt else IGNORED for number, is_learnt in zip(numbers, learnt, strict=True)]
        )
    return ids, labels
