"""Paired differences with their uncertainty: over scenes, over trained models, and over draws of a control.

The bootstrap is crossed (Owen, 2007, arXiv 0705.2111): every replicate draws models, scenes and draws anew,
each with replacement, and takes the same scenes for all models and for both sides, as they are the same scenes. Three
models are few: an interval over models is a rough one, and is given beside the one for these three models alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from qkpatch.evaluation.statistics import REPLICATES, Array, Interval, above_curve, ratio, resampled, weighted

# From sums over scenes to one figure: ``CHAIR_i`` is a ratio of sums, not a mean of ratios.
Figure = Callable[[Array], Array]


@dataclass(frozen=True)
class Difference:
    """``a − b`` averaged over models, with uncertainty over all three factors and over scenes alone."""

    crossed: Interval
    scenes_only: Interval
    by_model: tuple[float, ...]


def difference(
    a: Array, b: Array, figure: Figure = ratio, *, seed: int = 0, replicates: int = REPLICATES
) -> Difference:
    """Compare two settings; each is (models, draws, scenes, columns), with one draw where nothing is drawn.

    The figure of a model is the mean over draws of ``figure`` of the sums over scenes.
    """
    rng = np.random.default_rng(seed)
    each = _by_model(a, figure) - _by_model(b, figure)
    n_models, n_scenes = a.shape[0], a.shape[2]
    everything, scenes_only = [], []
    for weights in resampled(n_scenes, replicates, rng):
        both = figure(weighted(a, weights)), figure(weighted(b, weights))  # (replicates, models, draws)
        scenes_only.append((both[0].mean(2) - both[1].mean(2)).mean(1))
        n, models = len(weights), rng.integers(n_models, size=(len(weights), n_models, 1))
        drawn = []
        for figures in both:
            draws = rng.integers(figures.shape[2], size=(n, n_models, figures.shape[2]))
            drawn.append(figures[np.arange(n)[:, None, None], models, draws].mean(2))
        everything.append((drawn[0] - drawn[1]).mean(1))
    return _difference(each, everything, scenes_only)


def excess_over_curve(
    setting: tuple[Array, Array],
    curve: Sequence[tuple[Array, Array]],
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Difference:
    """How far a setting lies above a trade-off curve at its own place on it, averaged over models.

    ``setting`` is the columns of (effect, place), each (models, scenes, 2); ``curve`` is such pairs, joined by straight
    lines. Beyond an end of the curve, the end counts. Below zero is better than the curve where less effect is better.
    """
    rng = np.random.default_rng(seed)
    columns = np.stack(
        [np.stack(pair) for pair in (setting, *curve)]
    )  # (settings, 2, models, scenes, columns)
    n_models, n_scenes = columns.shape[2:4]

    def excess(sums: Array) -> Array:
        return np.array([above_curve(sums[:, :, model]) for model in range(n_models)])

    everything, scenes_only = [], []
    for weights in resampled(n_scenes, replicates, rng):
        found = np.array([excess(sums) for sums in weighted(columns, weights)])  # (replicates, models)
        scenes_only.append(found.mean(1))
        models = rng.integers(n_models, size=(len(weights), n_models))
        everything.append(np.take_along_axis(found, models, 1).mean(1))
    return _difference(excess(columns.sum(3)), everything, scenes_only)


def scenes_needed(
    rate: float, relative: float, discordance: float, power: float = 0.8, level: float = 0.05
) -> int:
    """Pairs for McNemar's test to find a drop of ``relative · rate`` when a share ``discordance`` of pairs differs.

    ``n = (z_α/2 √ψ + z_power √(ψ − δ²))² / δ²``, with ψ the discordance and δ the difference (Connor, 1987).
    """
    z, delta = NormalDist().inv_cdf, rate * relative
    if discordance < delta:
        raise ValueError(f"a share {discordance} of differing pairs cannot make a difference of {delta}")
    root = z(1 - level / 2) * math.sqrt(discordance) + z(power) * math.sqrt(discordance - delta**2)
    return math.ceil((root / delta) ** 2)


def _difference(each: Array, everything: Sequence[Array], scenes_only: Sequence[Array]) -> Difference:
    estimate = float(each.mean())
    intervals = [Interval.of(estimate, np.concatenate(parts)) for parts in (everything, scenes_only)]
    return Difference(intervals[0], intervals[1], tuple(float(x) for x in each))


def _by_model(x: Array, figure: Figure) -> Array:
    means: Array = figure(x.sum(2)).mean(1)
    return means
