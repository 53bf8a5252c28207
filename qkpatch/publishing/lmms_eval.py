"""Results of lmms-eval for the base and the patched model, side by side: on the same questions, or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qkpatch.checkpoint.tree import source_file
from qkpatch.common.json_text import load_json
from qkpatch.errors import CheckpointError, UsageError, redact

# pope_yes_ratio counts the right answers, not the model's: one half, whatever the model says.
_MEANINGLESS = {"pope_yes_ratio"}
_MUST_AGREE = ("versions", "n-shot", "n-samples")
_SUFFIX = "results.json"
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Paired:
    """The mean of the differences, question by question, and half of its 95 % interval."""

    n: int
    changed: int  # questions whose figure differs
    mean: float
    half_width: float


@dataclass(frozen=True)
class Metric:
    """One metric of one task, of both models."""

    task: str
    name: str
    n: int | None  # questions, where the files say
    base: float
    patched: float
    paired: Paired | None = None  # where the samples lie beside both files

    @property
    def difference(self) -> float:
        """How much larger the patched model's figure is than the base model's."""
        return self.patched - self.base


@dataclass(frozen=True)
class Comparison:
    """All figures that both files have."""

    base: str  # what was run, as the files say
    patched: str
    metrics: tuple[Metric, ...]


def compare_both(results: str | Path | None, base_results: str | Path | None) -> Comparison | None:
    """:func:`compare`, where there are results.

    Raises:
        UsageError: there are of one model only; or as :func:`compare`.
    """
    if (results is None) != (base_results is None):
        raise UsageError(
            "an effect is a difference: --results and --base-results go together", fix="run both models"
        )
    return None if results is None or base_results is None else compare(Path(base_results), Path(results))


def compare(base: Path, patched: Path) -> Comparison:
    """Read two ``*_results.json``, and the ``*_samples_<task>.jsonl`` beside them where they are.

    Raises:
        CheckpointError: not results of lmms-eval.
        UsageError: the runs differ in more than the model: other tasks, versions, numbers of questions or prompts.
    """
    a, b = _read(base), _read(patched)
    _check_alike(a, b, base, patched)
    metrics = tuple(
        Metric(
            task, name, _count(a, task), value, b["results"][task][key], _paired(base, patched, task, name)
        )
        for task in sorted(a["results"])
        for key, name, value in _figures(a["results"][task])
        if isinstance(b["results"][task].get(key), int | float)
    )
    if not metrics:
        raise UsageError("they have no figure in common", where=f"{base.name}, {patched.name}")
    return Comparison(_what_ran(a), _what_ran(b), metrics)


def _read(path: Path) -> dict[str, Any]:
    document = load_json(source_file(path, path.name).read(), path.name)
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, dict) or not all(isinstance(figures, dict) for figures in results.values()):
        raise CheckpointError(
            "not the results of a run of lmms-eval: it has no `results` by task",
            where=path.name,
            fix="give the file that lmms-eval wrote to --output_path, *_results.json",
        )
    return dict(document)


def _check_alike(a: Mapping[str, Any], b: Mapping[str, Any], base: Path, patched: Path) -> None:
    differing = []
    if a["results"].keys() != b["results"].keys():
        differing.append("tasks")
    differing += [key for key in _MUST_AGREE if a.get(key) != b.get(key)]
    differing += [
        f"generation of {task}"
        for task in a["results"].keys() & b["results"].keys()
        if _of(a, "configs", task, "generation_kwargs") != _of(b, "configs", task, "generation_kwargs")
    ]
    if differing:
        raise UsageError(
            f"the two runs cannot be compared; they differ in {', '.join(differing)}",
            where=f"{base.name}, {patched.name}",
            fix="run lmms-eval on both models with the same call",
        )


def _of(document: Any, *keys: str) -> Any:
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _count(document: Mapping[str, Any], task: str) -> int | None:
    n = _of(document, "n-samples", task, "effective")
    return n if type(n) is int else None


def _what_ran(document: Mapping[str, Any]) -> str:
    model, arguments = _of(document, "config", "model"), _of(document, "config", "model_args")
    parts = [
        part for part in (model, arguments, document.get("model_name")) if isinstance(part, str) and part
    ]
    # The arguments may have had a token among them.
    return redact(", ".join(dict.fromkeys(parts))) or "not said"


def _figures(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    for key, value in figures.items():
        name, _, filtered = key.partition(",")
        is_figure = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if is_figure and not name.endswith("_stderr") and name not in _MEANINGLESS:
            yield key, name if filtered in ("", "none") else key, float(value)


def _paired(base: Path, patched: Path, task: str, metric: str) -> Paired | None:
    a, b = (_by_question(path, task, metric) for path in (base, patched))
    if not a or a.keys() != b.keys() or len(a) < 2:
        return None
    differences = [b[question] - a[question] for question in a]
    half_width = _NORMAL_95 * stdev(differences) / math.sqrt(len(differences))
    return Paired(len(differences), sum(d != 0 for d in differences), fmean(differences), half_width)


def _by_question(results: Path, task: str, metric: str) -> dict[str, float]:
    """A metric of each question; only of those metrics that are means over questions."""
    if not results.name.endswith(_SUFFIX):
        return {}
    path = results.with_name(results.name.removesuffix(_SUFFIX) + f"samples_{task}.jsonl")
    if not path.is_file():
        return {}
    found: dict[str, float] = {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                sample = json.loads(line)
                value = _value(metric, sample[metric])
                key = str(sample["doc_id"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"not a sample of {task}: {error!r}", where=path.name) from error
            if value is None:
                return {}
            found[key] = value
    return found


def _value(metric: str, said: Any) -> float | None:
    """One question's part in a mean; None for what is none, such as F1."""
    if metric == "pope_accuracy":
        return float(said["score"])
    # A share of captions, in percent: those with an object that is not there.
    if metric == "coco_cap_chair_s":
        return 100.0 * any(thing not in said["answer"] for thing in said["pred"])
    return None
