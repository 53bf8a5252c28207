"""POPE: is there a cup? Which objects are asked about, and how answers are counted (Li et al., 2023)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from qkpatch.evaluation.annotations import Annotations
from qkpatch.evaluation.statistics import Array

KINDS = ("random", "popular", "adversarial")


def questions(among: Annotations, n: int, seed: int) -> dict[str, dict[str, tuple[str, ...]]]:
    """Objects to ask about by picture: ``present`` ones, and as many absent ones of each kind.

    ``popular`` are those that most pictures have, ``adversarial`` those that come most often with what is there.
    """
    often = Counter(name for there in among.present.values() for name in there)
    beside: dict[str, Counter[str]] = {name: Counter() for name in among.names}
    for there in among.present.values():
        for name in there:
            beside[name].update(there)
    asked = {}
    for picture, there in among.present.items():
        rng, absent = random.Random(f"{seed} {picture}"), sorted(among.names - there)
        m = min(n, len(there), len(absent))
        together: Counter[str] = sum((beside[name] for name in sorted(there)), Counter())
        by_company = sorted((-together[name], -often[name], name) for name in absent)
        asked[picture] = {
            "present": tuple(rng.sample(sorted(there), m)),
            "random": tuple(rng.sample(absent, m)),
            "popular": tuple(sorted(absent, key=lambda name: -often[name])[:m]),
            "adversarial": tuple(name for _, _, name in by_company[:m]),
        }
    return asked


def yes_no_columns(answers: Sequence[Sequence[tuple[float, bool]]]) -> dict[str, Array]:
    """Numerator and denominator of each figure, (pictures, 2), from P(yes) and whether it is there, by picture."""
    rows = []
    for of_picture in answers:
        said = [(p > 0.5, is_there) for p, is_there in of_picture]
        right, yes = sum(a == b for a, b in said), sum(a for a, _ in said)
        hits, there = sum(a and b for a, b in said), sum(b for _, b in said)
        rows.append((right, yes, 2 * hits, len(said), yes + there))
    found = np.array(rows, float).reshape(-1, 5)  # right, yes, twice the hits, asked, yes and there
    return {"accuracy": found[:, [0, 3]], "f1": found[:, [2, 4]], "yes": found[:, [1, 3]]}
