"""Paired differences over the same pictures, with their uncertainty: bootstrap, McNemar's test, power."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

REPLICATES = 10_000
_AT_A_TIME = 500
_CACHED = 1 << 20  # numbers that stay in a cache


@dataclass(frozen=True)
class Interval:
    """An estimate, its 95 % percentile interval, and a two-sided bootstrap p-value against zero."""

    estimate: float
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, estimate: float, replicates: Array) -> Interval:
        """From bootstrap replicates of the estimate."""
        low, high = np.percentile(replicates, [2.5, 97.5])
        tail = min(int((replicates <= 0).sum()), int((replicates >= 0).sum()))
        p = min(1.0, 2 * (tail + 1) / (len(replicates) + 1))
        return cls(float(estimate), float(low), float(high), p)

    @property
    def smallest_detectable(self) -> float:
        """The effect that is found at 5 % with a power of 80 %: ``(z_α/2 + z_power) · SE``."""
        z = NormalDist().inv_cdf
        return (self.high - self.low) / (2 * z(0.975)) * (z(0.975) + z(0.8))

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Figure:
    """One figure of both, and what these pictures could have shown."""

    base: float
    model: float
    difference: Interval
    smallest_detectable: float  # at 80 % power

    @classmethod
    def of(cls, model: float, difference: Interval) -> Figure:
        """From the model's figure and the difference."""
        return cls(model - difference.estimate, model, difference, difference.smallest_detectable)


@dataclass(frozen=True)
class McNemar:
    """Pairs where something holds for one alone, and the exact two-sided p-value: a fair coin in all of them."""

    only_base: int
    only_model: int
    p: float


def ratio(sums: Array) -> Array:
    """First column over second; sums are (..., 2)."""
    top, bottom = sums[..., 0], sums[..., 1]
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)


def paired(
    a: Array, b: Array, beside: Sequence[int] | None = None, *, seed: int = 0, replicates: int = REPLICATES
) -> list[Interval]:
    """``a − b`` of each figure, both (figures, pictures, 2), over draws of the pictures, which all figures share.

    ``beside`` says which of ``b`` each of ``a`` is held against, where several are against one.
    """
    rng, n, of = np.random.default_rng(seed), len(a), slice(None) if beside is None else [*beside]
    both, drawn = np.concatenate([a, b]), list[Array]()
    for weights in resampled(a.shape[1], replicates, rng, max(1, _CACHED // a.shape[1])):
        sums = ratio(weighted(both, weights))
        drawn.append(sums[:, :n] - sums[:, n:][:, of])
    estimates = ratio(a.sum(1)) - ratio(b.sum(1))[of]
    return [Interval.of(*each) for each in zip(estimates, np.concatenate(drawn).T, strict=True)]


def above_curve(sums: Array) -> float:
    """How far a setting's effect lies above a trade-off curve at its own place: sums are (1 + curve, 2, 2).

    The first row is the setting; the curve's points are joined by straight lines, and beyond an end, the end counts.
    """
    effect, place = ratio(sums).T
    order = np.argsort(place[1:], kind="stable")
    return float(effect[0] - np.interp(place[0], place[1:][order], effect[1:][order]))


def figures_beside(
    models: Sequence[Mapping[str, Array]], base: Mapping[str, Array], seed: int
) -> list[dict[str, Figure]]:
    """Every figure of each model beside the base's, over the same pictures; columns are (pictures, 2)."""
    places = {name: i for i, name in enumerate(base)}
    ours, theirs = np.stack([x for model in models for x in model.values()]), np.stack([*base.values()])
    differences = paired(ours, theirs, [places[name] for model in models for name in model], seed=seed)
    pairs = zip(ratio(ours.sum(1)).tolist(), differences, strict=True)
    return [{name: Figure.of(*next(pairs)) for name in model} for model in models]


def as_pairs(values: Sequence[float]) -> Array:
    """Plain numbers as numerators over one, (questions, 2)."""
    return np.stack([np.array(values, float), np.ones(len(values))], -1)


def grouped(pairs: Array, pictures: Sequence[str]) -> Array:
    """Sums over the questions of each picture, (pictures, 2)."""
    names, places = np.unique(pictures, return_inverse=True)
    sums = np.zeros((len(names), 2))
    np.add.at(sums, places, pairs)
    return sums


def is_yes_or_no(pairs: Array) -> bool:
    """Whether something holds of each question, or does not."""
    return bool((pairs[:, 1] == 1).all() and np.isin(pairs[:, 0], (0, 1)).all())


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of Holm (1979), in the given order. Equivalent to ``statsmodels`` ``multipletests``."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def excess_over_curve(columns: Array, *, seed: int = 0, replicates: int = REPLICATES) -> Interval:
    """:func:`above_curve` with its interval; columns are (1 + curve, 2, pictures, 2)."""
    rng = np.random.default_rng(seed)
    draws = resampled(columns.shape[2], replicates, rng)
    drawn = [above_curve(s) for w in draws for s in weighted(columns, w)]
    return Interval.of(above_curve(columns.sum(2)), np.array(drawn))


def mcnemar(base: Iterable[Any], model: Iterable[Any]) -> McNemar:
    """McNemar's exact test of what holds for either of each pair."""
    counts = Counter(zip(map(bool, base), map(bool, model), strict=True))
    only = counts[True, False], counts[False, True]
    n, tail, ways = sum(only), 0, 1
    for i in range(min(only) + 1):
        tail, ways = tail + ways, ways * (n - i) // (i + 1)  # of n pairs, i
    return McNemar(*only, min(1.0, 2 * tail / (1 << n)))


def resampled(n: int, replicates: int, rng: np.random.Generator, step: int = _AT_A_TIME) -> Iterator[Array]:
    """How often each picture was drawn, (some replicates, n): a product of matrices in place of copies."""
    for first in range(0, replicates, step):
        drawn = rng.integers(n, size=(min(step, replicates - first), n))
        weights = np.empty(drawn.shape)
        for row, counts in zip(drawn, weights, strict=True):
            counts[:] = np.bincount(row, minlength=n)
        yield weights


def weighted(x: Array, weights: Array) -> Array:
    """Sums over pictures: (..., pictures, columns) and (replicates, pictures) to (replicates, ..., columns)."""
    sums: Array = np.tensordot(weights, x, axes=(1, x.ndim - 2))
    return sums
