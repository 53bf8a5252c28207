"""One model against another on the same pictures: intervals, McNemar's test, what was kept, captions cut shorter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from qkpatch.common.text import warned
from qkpatch.evaluation.chair import CaptionScore, chair_columns
from qkpatch.evaluation.measure import Side, Task
from qkpatch.evaluation.pope import KINDS, yes_no_columns
from qkpatch.evaluation.records import Record
from qkpatch.evaluation.statistics import (
    Array,
    Figure,
    Interval,
    McNemar,
    excess_over_curve,
    figures_beside,
    mcnemar,
)
from qkpatch.evaluation.vocabulary import WORD

EQUAL_RECALL = "chair_s_at_equal_recall"  # of the base: of its captions under a bias towards their end
BIASES = 33
LEAST = 1e-12  # a probability that rounding leaves


@dataclass(frozen=True)
class Comparison:
    """A model and what it is held against; differences are the model's figure less the base's."""

    model: int  # which of the sides
    base: int
    figures: Mapping[str, Figure]
    mcnemar: Mapping[str, McNemar]
    kept: Mapping[str, float]
    kl: tuple[float, ...]  # by picture: of the next token after the prompt, from the base, in nats
    warnings: tuple[str, ...]

    def is_better(self, name: str = "chair_s") -> bool:
        """Whether a figure is lower, beyond chance."""
        return self.figures[name].difference.high < 0


def columns(task: Task, side: Side, bias: float = 0.0) -> dict[str, Array]:
    """Numerators and denominators of all figures by picture; of captions alone, where a bias ends these sooner."""
    said = [task.vocabulary.mentions(ended(record, bias)) for record in side.records]
    there = list(task.pictures.present.values())
    found = chair_columns([CaptionScore.of(*pair) for pair in zip(said, there, strict=True)])
    if bias:
        return found
    words = np.array([len(WORD.findall(record.caption)) for record in side.records], float)
    found["words"] = np.stack([words, np.ones_like(words)], -1)
    for kind in KINDS if task.questions else ():
        answers = yes_no_columns(answered(task, side, kind))
        found |= {f"{kind}_{name}": pair for name, pair in answers.items()}
    return found


def answered(task: Task, side: Side, kind: str) -> list[list[tuple[float, bool]]]:
    """By picture: P(yes) for what is there and for what is not, and which of both."""
    return [
        [(record.answers[thing], part == "present") for part in ("present", kind) for thing in asked[part]]
        for record, asked in zip(side.records, task.questions.values(), strict=True)
    ]


def compare(task: Task, sides: Sequence[Side], model: int, base: int) -> Comparison:
    """Hold one side against another."""
    a, b = sides[model], sides[base]
    ours, theirs = columns(task, a), columns(task, b)
    (named,) = figures_beside([ours], theirs, task.protocol.sample_seed)
    named[EQUAL_RECALL] = Figure.of(named["chair_s"].model, _stop_earlier(task, a, b))
    tests = {"chair_s": mcnemar(*(each["chair_s"][:, 0] > 0 for each in (theirs, ours)))}
    for kind in KINDS if task.questions else ():
        right = ([(p > 0.5) == t for rows in answered(task, s, kind) for p, t in rows] for s in (b, a))
        tests[kind] = mcnemar(*right)
    warnings = []
    if named["length"].difference.high < 0:
        warnings.append(warned(f"fewer objects are named than before: look at {EQUAL_RECALL}"))
    unfinished = fmean(not record.finished for side in (a, b) for record in side.records)
    if unfinished > 0.05:
        warnings.append(warned(f"{unfinished:.0%} of the captions were cut short by max_new_tokens"))
    return Comparison(model, base, named, tests, *kept(a, b), tuple(warnings))


def kept(side: Side, base: Side) -> tuple[dict[str, float], tuple[float, ...]]:
    """How far next-token distributions are from the base's, and the perplexities; the former by picture too."""
    pairs = zip(base.records, side.records, strict=True)
    divergences = tuple(divergence(a.next_tokens, b.next_tokens) for a, b in pairs)
    found = {"kl_prompts": fmean(divergences)}
    if base.losses:
        found["kl_text"] = fmean(map(divergence, base.reading, side.reading))
        found["perplexity_base"], found["perplexity"] = (math.exp(fmean(s.losses)) for s in (base, side))
        found["perplexity_ratio"] = found["perplexity"] / found["perplexity_base"]
    return found, divergences


def _stop_earlier(task: Task, side: Side, base: Side) -> Interval:
    """How far CHAIR_s lies above that of the base under a bias towards the end, at the same recall."""
    margins = [margin for record in base.records for margin, _ in record.stops] or [1.0]
    biases = np.unique(np.quantile(margins, np.linspace(0, 1, BIASES)))
    cuts = [columns(task, side), columns(task, base), *(columns(task, base, bias) for bias in biases)]
    curve = np.stack([np.stack([cut["chair_s"], cut["recall"]]) for cut in cuts])
    return excess_over_curve(curve, seed=task.protocol.sample_seed)


def ended(record: Record, bias: float) -> str:
    """The caption under a bias: greedily, it is the same up to where it ends."""
    at = next((letters for margin, letters in record.stops if margin <= bias), None)
    return record.caption if at is None else record.caption[:at]


def divergence(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    """KL(p ‖ q) in nats over the tokens that both keep, and all others as one: at most what it is over all tokens."""
    both = sorted(p.keys() & q.keys())
    parts = [(math.exp(p[token]), p[token] - q[token]) for token in both]
    rest = [max(LEAST, 1 - sum(math.exp(side[token]) for token in both)) for side in (p, q)]
    return max(0.0, sum(share * log for share, log in parts) + rest[0] * math.log(rest[0] / rest[1]))
