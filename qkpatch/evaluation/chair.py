"""CHAIR: how much of what captions name is not there (Rohrbach et al., 2018, arXiv 1809.02156).

    CHAIR_i = mentions of absent objects / all mentions of objects
    CHAIR_s = captions that mention an absent object / all captions
    recall  = distinct present objects that are mentioned / all present objects

Mentions are counted as often as they are made. Each figure is a ratio of two sums over pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np

from qkpatch.evaluation.statistics import Array, ratio


class CaptionScore(NamedTuple):
    """What one caption says, in numbers."""

    mentions: int
    absent: int  # mentions of what is not there
    found: int  # distinct present objects that are mentioned
    present: int

    @classmethod
    def of(cls, mentioned: Sequence[str], present: AbstractSet[str]) -> CaptionScore:
        """Score the objects that a caption mentions, given what is in its picture."""
        absent = sum(name not in present for name in mentioned)
        return cls(len(mentioned), absent, len(present & set(mentioned)), len(present))


def chair_columns(scores: Sequence[CaptionScore] | Array) -> dict[str, Array]:
    """Numerator and denominator of each figure, (captions, 2); ``length`` in mentions per caption."""
    mentions, absent, found, present = np.array(scores, float).reshape(-1, 4).T
    ones = np.ones_like(mentions)
    pairs = {
        "chair_s": ((absent > 0).astype(float), ones),
        "chair_i": (absent, mentions),
        "recall": (found, present),
        "length": (mentions, ones),
    }
    return {name: np.stack(pair, -1) for name, pair in pairs.items()}


def figures(columns: Mapping[str, Array]) -> dict[str, float]:
    """The figures over all pictures."""
    return {name: float(ratio(pair.sum(0))) for name, pair in columns.items()}
