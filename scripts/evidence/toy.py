"""The toy: a grid on validation scenes, a choice by a rule fixed beforehand, and one look at test scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from qkpatch.common.json_text import exact
from qkpatch.evaluation.chair import chair_columns
from qkpatch.evaluation.records import Store
from qkpatch.evaluation.statistics import Array
from qkpatch.spectral.rule import Channel
from scripts.evidence.edits import DRAWN, Edit, Editor, How, applied, thirds
from scripts.toy_vlm.captioning import Seen, answers, caption_losses, captions
from scripts.toy_vlm.model import load_model
from scripts.toy_vlm.scenes import ABILITIES, ASKED_OF_EACH, scenes
from scripts.toy_vlm.scoring import score
from scripts.toy_vlm.training import sha256

VERSION = 1  # raise it when what is measured changes: it makes stored results stale
SCENE_SEED, VALIDATION_STREAM, TEST_STREAM = 2026, 1, 2
CHOSEN = "chosen"  # the name of the setting that validation picks
CHANNELS: tuple[Channel, ...] = (Channel.full, Channel.symmetric, Channel.antisymmetric)
# The rule of choice: lowest CHAIR_s on validation scenes, at no more than this loss of recall. Means over models.
RECALL_ALLOWANCE = 0.02


@dataclass(frozen=True)
class Budget:
    """How much is measured."""

    validation_scenes: int = 200
    test_scenes: int = 500
    asked_scenes: int = 400  # of the test scenes, for answers and perplexity: 1,600 questions of each ability
    draws: int = 10  # of random modes, as many and of equal norm
    draws_of_others: int = 3  # of subspaces and of noise
    modes: tuple[int, ...] = (1, 4, 8)
    modes_of_drawn: tuple[int, ...] = (4,)  # in the grid
    alphas: tuple[float, ...] = (0.0, 0.5, 0.8)
    ranges: tuple[str, ...] = ("early", "middle", "late", "all")
    stop_biases: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)

    def draws_of(self, edit: Edit | None) -> int:
        """How often a setting is drawn on test scenes; once where nothing is drawn."""
        if edit is None or edit.how not in DRAWN:
            return 1
        return self.draws if edit.how in ("random", "equal-norm") else self.draws_of_others


@dataclass(frozen=True)
class Measured:
    """One setting on one model: per scene, what :meth:`columns` takes its figures from."""

    change: float
    scores: Array  # (scenes, 4): mentions, absent, found, present
    losses: Array | None  # (asked scenes, 2): nats, tokens
    right: Array | None  # (asked scenes, 3): right answers by ability

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Measured:
        """From the store."""
        arrays = {
            name: None if raw[name] is None else np.array(raw[name], float) for name in ("losses", "right")
        }
        return cls(raw["change"], np.array(raw["scores"], float), **arrays)

    def columns(self, figure: str) -> Array:
        """Numerator and denominator of a figure, (scenes, 2)."""
        if figure == "perplexity":
            assert self.losses is not None
            return self.losses
        if figure in ABILITIES:
            assert self.right is not None
            right = self.right[:, ABILITIES.index(figure)]
            return np.stack([right, np.full_like(right, ASKED_OF_EACH)], -1)
        return chair_columns(self.scores)[figure]

    def figure(self, name: str) -> float:
        """The figure over all scenes."""
        top, bottom = self.columns(name).sum(0)
        value = float(top / bottom) if bottom else 0.0
        return float(np.exp(value)) if name == "perplexity" else value


class Subject:
    """One trained model, and everything measured on it."""

    def __init__(self, path: Path, results: Path, budget: Budget) -> None:
        self.name, self._path, self._budget = path.name, path, budget
        digest = sha256(path / "model.safetensors")
        self.store = Store(results / f"toy-v{VERSION}-{digest[:12]}.jsonl", {})

    @cached_property
    def editor(self) -> Editor:
        """Its heads."""
        return Editor(self._path)

    @cached_property
    def _model(self) -> Any:
        return load_model(self._path)

    @cached_property
    def _validation(self) -> Seen:
        return self._look(VALIDATION_STREAM, self._budget.validation_scenes)

    @cached_property
    def _test(self) -> Seen:
        return self._look(TEST_STREAM, self._budget.test_scenes)

    @cached_property
    def _asked(self) -> Seen:
        n = self._budget.asked_scenes
        return Seen(self._test.scenes[:n], self._test.features[:n])

    def _look(self, stream: int, n: int) -> Seen:
        return Seen.by(self._model, list(islice(scenes("broken", SCENE_SEED, stream), n)))

    def validation(self, edit: Edit | None) -> Measured:
        """Captions, on validation scenes."""
        return self._measured("validation", edit, is_full=False)

    def test(self, edit: Edit | None, stop_bias: float = 0.0) -> Measured:
        """Captions on test scenes; perplexity and answers too, but for draws after the first and under a stop bias."""
        is_full = not stop_bias and (edit is None or edit.how not in DRAWN or edit.draw == 0)
        return self._measured("test", edit, stop_bias, is_full=is_full)

    def wrong_picture(self) -> Measured:
        """The unedited model's test captions, scored against the next scene: what it says without looking."""
        return Measured.read(self.store.once(f"{self._sizes('test')} wrong picture", self._wrong_picture))

    def _sizes(self, part: str) -> str:
        n = self._budget.validation_scenes if part == "validation" else self._budget.test_scenes
        return f"{part} {n}" if part == "validation" else f"{part} {n} asked {self._budget.asked_scenes}"

    def _measured(self, part: str, edit: Edit | None, stop_bias: float = 0.0, *, is_full: bool) -> Measured:
        name = "base" if edit is None else edit.key
        key = f"{self._sizes(part)} {name}" + (f", stop bias {stop_bias:g}" if stop_bias else "")

        def make() -> dict[str, Any]:
            seen = self._validation if part == "validation" else self._test
            edited = None if edit is None else self.editor.edit(edit)
            layers = self._model.model.language_model.layers
            with nullcontext() if edited is None else applied(layers, edited):
                said = captions(self._model, seen, stop_bias)
                losses = caption_losses(self._model, self._asked) if is_full else None
                right = answers(self._model, self._asked) if is_full else None
            return {
                "change": 0.0 if edited is None else edited.change,
                "scores": _scores(said, seen),
                "losses": losses and [(round(loss, 5), n) for loss, n in losses],
                "right": right and [[counts[ability] for ability in ABILITIES] for counts in right],
            }

        return Measured.read(self.store.once(key, make))

    def _wrong_picture(self) -> dict[str, Any]:
        seen = self._test
        moved = Seen((*seen.scenes[1:], seen.scenes[0]), seen.features)
        scores = _scores(captions(self._model, moved), moved)
        return {"change": 0.0, "scores": scores, "losses": None, "right": None}


def _scores(said: list[tuple[str, ...]], seen: Seen) -> list[tuple[int, int, int, int]]:
    return [score(words, scene.names) for words, scene in zip(said, seen.scenes, strict=True)]


def grid(budget: Budget, n_layers: int) -> Iterator[Edit]:
    """Every setting of the validation grid: dominant in three channels, and each control (drawn ones once)."""
    fixed: tuple[How, ...] = ("bottom", "shrink")
    for name in budget.ranges:
        for modes in budget.modes:
            for alpha in budget.alphas:
                plain = Edit(thirds(n_layers)[name], modes, alpha)
                yield from (replace(plain, channel=channel) for channel in CHANNELS)
                controls = (*fixed, *DRAWN) if modes in budget.modes_of_drawn else fixed
                yield from (replace(plain, how=how) for how in controls)


def companions(edit: Edit, budget: Budget, *, in_full: bool) -> Iterator[Edit]:
    """The setting and its controls at the same layers, modes and α; all of them, or those of the main questions."""
    plain = replace(edit, channel=Channel.full, how="dominant")
    yield from (replace(plain, channel=channel) for channel in CHANNELS)
    yield replace(plain, how="shrink")
    if in_full:
        yield replace(plain, how="bottom")
        yield replace(plain, channel=Channel.antisymmetric, sized_like=Channel.symmetric)
    for how in DRAWN if in_full else ("random",):
        drawn = replace(plain, how=how)
        yield from (replace(drawn, draw=draw) for draw in range(budget.draws_of(drawn)))


def candidates(n_layers: int) -> dict[str, Edit]:
    """What ``qkpatch apply`` could do where nothing is said: the middle third and 4 modes, at two strengths."""
    return {f"α {exact(alpha)}": Edit(thirds(n_layers)["middle"], 4, alpha) for alpha in (0.5, 0.8)}


def choose(subjects: list[Subject], settings: list[Edit]) -> Edit:
    """The setting that the rule of choice picks on validation scenes; the least loss of recall if none is allowed."""
    base_recall = mean(subject.validation(None).figure("recall") for subject in subjects)

    def judged(edit: Edit) -> tuple[bool, float, float]:
        found = [subject.validation(edit) for subject in subjects]
        loss = base_recall - mean(m.figure("recall") for m in found)
        return (loss > RECALL_ALLOWANCE, mean(m.figure("chair_s") for m in found), loss)

    return min(settings, key=judged)


def run_validation(subject: Subject, budget: Budget, tell: Callable[[str], None]) -> None:
    """Measure the whole grid on one model."""
    subject.validation(None)
    settings = list(grid(budget, subject.editor.n_layers))
    for number, edit in enumerate(settings, 1):
        subject.validation(edit)
        if number % 36 == 0 or number == len(settings):
            tell(f"{subject.name}: validation {number}/{len(settings)}")


def run_test(subject: Subject, chosen: list[Edit], budget: Budget, tell: Callable[[str], None]) -> None:
    """Measure the unedited model, the stop biases and the chosen settings with their controls on test scenes."""
    subject.test(None)
    subject.wrong_picture()
    for bias in budget.stop_biases:
        subject.test(None, bias)
    for number, edit in enumerate(chosen, 1):
        subject.test(edit)
        if number % 20 == 0 or number == len(chosen):
            tell(f"{subject.name}: test {number}/{len(chosen)}")
