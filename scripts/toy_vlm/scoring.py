"""CHAIR: how much of what captions name is not there (Rohrbach et al., 2018, arXiv 1809.02156).

    CHAIR_i = mentions of absent objects / all mentions of objects
    CHAIR_s = captions that mention an absent object / all captions
    recall  = distinct present objects that are mentioned / all present objects

Mentions are counted as often as they are made. Objects that can hardly be seen are there, and count as present.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from scripts.toy_vlm.glyphs import OBJECTS

_NOUNS = frozenset(OBJECTS)


@dataclass(frozen=True)
class CaptionScore:
    """What one caption says, in numbers."""

    mentions: int
    absent: int  # mentions of what is not there
    found: int  # distinct present objects that are mentioned
    present: int
    words: int

    @classmethod
    def of(cls, caption: Sequence[str], present: AbstractSet[str]) -> CaptionScore:
        """Score ``caption``, given what is in its scene."""
        mentioned = [word for word in caption if word in _NOUNS]
        absent = sum(word not in present for word in mentioned)
        return cls(len(mentioned), absent, len(present & set(mentioned)), len(present), len(caption))


@dataclass(frozen=True)
class Chair:
    """Scores over captions, each between 0 and 1; ``length`` in mentions per caption."""

    chair_s: float
    chair_i: float
    recall: float
    length: float

    @classmethod
    def of(cls, scores: Sequence[CaptionScore]) -> Chair:
        """Average the scores: CHAIR_s and length over captions, CHAIR_i over mentions, recall over objects."""
        mentions = sum(score.mentions for score in scores)
        return cls(
            chair_s=sum(score.absent > 0 for score in scores) / len(scores),
            chair_i=sum(score.absent for score in scores) / mentions if mentions else 0.0,
            recall=sum(score.found for score in scores) / sum(score.present for score in scores),
            length=mentions / len(scores),
        )
