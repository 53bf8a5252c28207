"""CHAIR of the toy's captions, a word at a time; objects that can hardly be seen are there, and count as present."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from qkpatch.evaluation.chair import CaptionScore, chair_columns, figures
from scripts.toy_vlm.glyphs import OBJECTS


def score(caption: Sequence[str], present: AbstractSet[str]) -> CaptionScore:
    """Score ``caption``, given what is in its scene."""
    return CaptionScore.of([word for word in caption if word in OBJECTS], present)


def chair(scores: Sequence[CaptionScore]) -> dict[str, float]:
    """CHAIR_s, CHAIR_i, recall, and ``length`` in mentions per caption, over all captions."""
    return figures(chair_columns(scores))
