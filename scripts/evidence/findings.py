"""From stored measurements to answers: the comparisons, each with its interval, as plain data for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import numpy as np

from qkpatch.evaluation.statistics import Array, holm, ratio
from qkpatch.spectral.rule import Channel
from scripts.evidence.edits import Edit
from scripts.evidence.statistics import Difference, difference, excess_over_curve
from scripts.evidence.toy import CHOSEN, Budget, Measured, Subject, companions, grid
from scripts.toy_vlm.scenes import ABILITIES

CAPTION_FIGURES = ("chair_s", "chair_i", "recall", "length")
ALL_FIGURES = (*CAPTION_FIGURES, "perplexity", *ABILITIES)


@dataclass(frozen=True)
class Comparison:
    """One question about one setting, answered."""

    question: str
    figure: str
    setting: str
    a: str
    b: str
    found: Difference

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


class Findings:
    """Everything that the report says about the toy."""

    def __init__(
        self, subjects: Sequence[Subject], chosen: dict[str, Edit], budget: Budget, replicates: int
    ) -> None:
        self.subjects, self.chosen, self.budget, self._replicates = subjects, chosen, budget, replicates

    def stack(self, edit: Edit | None, figure: str) -> Array:
        """Columns of a figure on test scenes, (models, draws, scenes, 2)."""
        edits = [edit] if edit is None else [replace(edit, draw=d) for d in range(self.budget.draws_of(edit))]
        return np.stack([np.stack([s.test(e).columns(figure) for e in edits]) for s in self.subjects])

    def compare(self, question: str, figure: str, setting: str, a: Edit, b: Edit | None) -> Comparison:
        """``a − b`` in a figure; perplexity as a difference of logarithms."""
        found = difference(self.stack(a, figure), self.stack(b, figure), ratio, replicates=self._replicates)
        return Comparison(question, figure, setting, a.kind, "base" if b is None else b.kind, found)

    def primary(self) -> list[Comparison]:
        """The four questions, asked of the setting that validation chose and of the candidates for a default."""
        found = []
        for setting, edit in self.chosen.items():
            symmetric = replace(edit, channel=Channel.symmetric)
            antisymmetric = replace(edit, channel=Channel.antisymmetric)
            found += [
                self.compare("dominant > random?", "chair_s", setting, edit, replace(edit, how="random")),
                self.compare("dominant > shrink?", "chair_s", setting, edit, replace(edit, how="shrink")),
                self.compare("symmetric > antisymmetric?", "chair_s", setting, symmetric, antisymmetric),
            ]
            found += [self.compare("capability kept?", ability, setting, edit, None) for ability in ABILITIES]
        return found

    def adjusted(self, comparisons: Sequence[Comparison]) -> list[float]:
        """Holm's p-values over all of them."""
        return holm([comparison.found.crossed.p for comparison in comparisons])

    def secondary(self) -> list[Comparison]:
        """What else a reader asks: against no edit, against the other controls, and in other figures."""
        found = []
        for setting, edit in self.chosen.items():
            for figure in ("chair_s", "chair_i", "recall", "length", "perplexity"):
                found.append(self.compare("dominant − base", figure, setting, edit, None))
            if setting != CHOSEN:
                continue
            for how in ("subspace", "equal-norm", "noise", "bottom"):
                other = replace(edit, how=how)
                found.append(self.compare(f"dominant − {how}", "chair_s", setting, edit, other))
            for how in ("random", "shrink"):
                other = replace(edit, how=how)  # type: ignore[arg-type]
                found.append(self.compare(f"dominant − {how}", "recall", setting, edit, other))
            symmetric = replace(edit, channel=Channel.symmetric)
            rescaled = replace(edit, channel=Channel.antisymmetric, sized_like=Channel.symmetric)
            found.append(
                self.compare("symmetric − antisymmetric, equal ‖ΔW‖", "chair_s", setting, symmetric, rescaled)
            )
        return found

    def over_stopping(self) -> dict[str, dict[str, Difference]]:
        """Per setting and kind: CHAIR_s above what the unedited model has at equal recall when it stops earlier."""
        biases = (0.0, *self.budget.stop_biases)
        curve = [
            tuple(
                np.stack([s.test(None, bias).columns(figure) for s in self.subjects])
                for figure in ("chair_s", "recall")
            )
            for bias in biases
        ]
        found: dict[str, dict[str, Difference]] = {}
        for setting, edit in self.chosen.items():
            found[setting] = {}
            for other in (edit, replace(edit, how="shrink"), replace(edit, channel=Channel.symmetric)):
                pair = tuple(self.stack(other, figure)[:, 0] for figure in ("chair_s", "recall"))
                found[setting][other.kind] = excess_over_curve(
                    (pair[0], pair[1]), [(c[0], c[1]) for c in curve], replicates=self._replicates
                )
        return found

    def figures(self, measured: Sequence[Measured]) -> dict[str, float]:
        """Means over models of whatever was measured."""
        names = [n for n in ALL_FIGURES if n in CAPTION_FIGURES or _has(measured[0], n)]
        return {"change": mean(m.change for m in measured)} | {
            name: mean(m.figure(name) for m in measured) for name in names
        }

    def test_table(self) -> dict[str, dict[str, dict[str, float]]]:
        """Per setting and kind, the figures on test scenes, means over models and draws."""
        table: dict[str, dict[str, dict[str, float]]] = {}
        for setting, edit in self.chosen.items():
            rows: dict[str, dict[str, float]] = {}
            for other in self._kinds(setting, edit):
                draws = self.budget.draws_of(other)
                each = [
                    self.figures([s.test(replace(other, draw=d)) for s in self.subjects])
                    for d in range(draws)
                ]
                rows[other.kind] = {
                    name: mean(figures[name] for figures in each if name in figures) for name in each[0]
                }
                if draws > 1:
                    rows[other.kind]["chair_s lowest draw"] = min(figures["chair_s"] for figures in each)
                    rows[other.kind]["chair_s highest draw"] = max(figures["chair_s"] for figures in each)
            table[setting] = rows
        return table

    def base(self) -> dict[str, dict[str, float]]:
        """Per model, the unedited figures on test scenes, and CHAIR_s against the wrong picture."""
        return {
            s.name: self.figures([s.test(None)])
            | {"chair_s wrong picture": s.wrong_picture().figure("chair_s")}
            for s in self.subjects
        }

    def stop_curve(self) -> list[dict[str, float]]:
        """The unedited model with a bias towards stopping."""
        return [
            {"stop_bias": bias} | self.figures([s.test(None, bias) for s in self.subjects])
            for bias in (0.0, *self.budget.stop_biases)
        ]

    def validation_table(self) -> list[dict[str, Any]]:
        """Every setting of the grid, means over models, with the difference to no edit."""
        base = self.figures([s.validation(None) for s in self.subjects])
        rows: list[dict[str, Any]] = []
        for edit in grid(self.budget, self.subjects[0].editor.n_layers):
            figures = self.figures([s.validation(edit) for s in self.subjects])
            rows.append(
                {"setting": edit.key, "kind": edit.kind, "layers": list(edit.layers), "modes": edit.modes,
                 "alpha": edit.alpha, **figures, "chair_s − base": figures["chair_s"] - base["chair_s"],
                 "recall − base": figures["recall"] - base["recall"]}
            )  # fmt: skip
        return rows

    def _kinds(self, setting: str, edit: Edit) -> list[Edit]:
        """The setting and its controls, one of each kind."""
        every = companions(edit, self.budget, in_full=setting == CHOSEN)
        return [e for e in every if e.draw == 0]

    def power(self, comparisons: Sequence[Comparison]) -> dict[str, float]:
        """Per comparison of CHAIR_s, the difference that would have been found four times in five."""
        return {
            f"{c.setting}: {c.question}": c.found.scenes_only.smallest_detectable
            for c in comparisons
            if c.figure == "chair_s"
        }


def _has(measured: Measured, figure: str) -> bool:
    return (measured.losses if figure == "perplexity" else measured.right) is not None
