"""Results of lmms-eval for the base and the patched model, side by side: on the same questions, or not at all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qkpatch.checkpoint.tree import source_file
from qkpatch.common.json_text import canonical_json, load_json
from qkpatch.common.typed_json import as_json
from qkpatch.errors import CheckpointError, UsageError, redact
from qkpatch.planning.blocks import EditBlock
from qkpatch.publishing.runs import (
    IDENTITY,
    MOST_BYTES,
    arguments,
    may_differ,
    must_agree,
    not_a_sample,
    number,
    raw_samples,
    read_results,
    take,
)  # fmt: skip

# pope_yes_ratio counts the right answers, not the model's: one half, whatever the model says.
_MEANINGLESS = {"pope_yes_ratio"}
# One question's part in a metric that is a mean over questions, which F1 for one is not.
_OF_A_QUESTION: dict[str, Callable[[Any], Any]] = {
    "pope_accuracy": lambda said: said["score"],
    # A share of captions, in percent: those with an object that is not there.
    "coco_cap_chair_s": lambda said: 100.0 * (not {*said["pred"]} <= {*said["answer"]}),
}
_PART = re.compile(r"[^,;=\"']+")  # of a model's arguments
_LOCAL = re.compile(r"\s*(?:file:)?(?:/|~|[A-Za-z]:[\\/]|\\\\)")
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Paired:
    """The mean of the differences, question by question, with its 95 % interval as people read it."""

    n: int
    changed: int | None  # questions whose figure differs, where that is known
    interval: str


@dataclass(frozen=True)
class Metric:
    """One metric of one task, of both models."""

    task: str
    name: str
    n: int | None  # questions, where the files say
    base: float | None  # None where a run has none, or NaN
    patched: float | None
    paired: Paired | None = None  # where the samples lie beside both files

    @property
    def difference(self) -> float | None:
        """How much larger the patched model's figure is than the base model's; None where one has none."""
        return None if self.base is None or self.patched is None else self.patched - self.base


@dataclass(frozen=True)
class Comparison:
    """All figures of two files."""

    base: str  # what was run, as the files say
    patched: str
    metrics: tuple[Metric, ...]
    doubts: tuple[str, ...] = ()  # what else may be behind a difference
    tool: str = "lmms-eval"
    edit: Mapping[str, Any] | None = None  # what was evaluated, as a manifest has it, where that is known

    def check_is_of(self, edit: EditBlock) -> None:
        """Raise :class:`UsageError` where another edit was evaluated."""
        said = json.loads(canonical_json(as_json(edit)))
        if differing := [key for key, value in (self.edit or {}).items() if said.get(key) != value]:
            what = f"another edit was evaluated than that of qkpatch.json: {', '.join(differing)} differ"
            raise UsageError(what, where="--results", fix="run qkpatch evaluate OUT --against SOURCE")


def compare_both(results: str | Path | None, base_results: str | Path | None) -> Comparison | None:
    """Two ``*_results.json``, and the ``*_samples_<task>.jsonl`` beside them where they are; None without results.

    Raises:
        CheckpointError: not results of lmms-eval.
        UsageError: of one model only; one run twice; or runs that differ in tasks, their versions, numbers of
            questions or prompts.
    """
    if results is None and base_results is None:
        return None
    if results is not None and base_results is None and (found := _evaluated(Path(results))) is not None:
        return found
    if results is None or base_results is None:
        what = "an effect is a difference: --results and --base-results go together"
        raise UsageError(what, fix="run both models")
    base, patched = Path(base_results), Path(results)
    a, b = read_results(base), read_results(patched)
    _check_alike(a, b, base, patched)
    metrics = tuple(
        Metric(task, name, _count(a, task), left.get(key), right.get(key), _paired(base, patched, task, name))
        for task in sorted(a["results"])
        for left, right in [(_figures(a["results"][task]), _figures(b["results"][task]))]
        for key in left | right
        for name in [key.removesuffix(",none")]
    )
    if all(metric.difference is None for metric in metrics):
        raise UsageError("they have no figure in common", where=f"{base.name}, {patched.name}")
    left, right = arguments(a), arguments(b)
    ours, theirs = may_differ(a), may_differ(b)
    differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    doubts = [f"the runs differ in {', '.join(differing)}"] if differing else []
    models = [[said.get(key) for key in IDENTITY] for said in (left, right)]
    if models[0] == models[1] and left and (any(models[0]) or left == right):
        doubts.append("both name the same model")
    return Comparison(_what_ran(a), _what_ran(b), metrics, tuple(doubts))


def _evaluated(path: Path) -> Comparison | None:
    """What ``qkpatch evaluate`` or ``tune`` wrote, which holds both models; None where it is something else."""
    document = load_json(source_file(path, path.name).read(MOST_BYTES), path.name)
    if not isinstance(document, dict) or "comparisons" not in document:
        return None
    try:
        one, n = document["comparisons"][0], int(document["pictures"]["n"])
        metrics = []
        for name, figure in one["figures"].items():
            low, high = (_finite(figure["difference"][key]) for key in ("low", "high"))
            paired = Paired(n, None, f"{low:+.4f} to {high:+.4f}, 95 % bootstrap")
            both = _finite(figure["base"]), _finite(figure["model"])
            metrics.append(Metric("pictures", str(name), n, *both, paired))
        doubts = [str(warning) for warning in document["warnings"]]
        tuned = document["tuned"] or {"beaten": {}}
        doubts += [f"not found better than {name}" for name, beaten in tuned["beaten"].items() if not beaten]
        if "looked" in tuned:
            doubts.append(f"the held-out half was looked at {int(tuned['looked'])} time(s) in all")
        sides = [document["sides"][one[which]] for which in ("base", "model")]
        base, model = (str(side["model"]) for side in sides)
        edit = dict(sides[1].get("settings") or sides[1]["edit"] or {})
        doubts += [] if edit else ["nothing records which edit the evaluated model has"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"no comparison of qkpatch evaluate: {error!r}", where=path.name) from error
    base, model = (_PART.sub(_without_folder, name) for name in (base, model))
    return Comparison(base, model, tuple(metrics), tuple(doubts), "qkpatch evaluate", edit)


def _check_alike(a: Mapping[str, Any], b: Mapping[str, Any], base: Path, patched: Path) -> None:
    if json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True):
        fix = "give the run on OUT to --results, that on SOURCE to --base-results"
        raise UsageError("they are the same run, and no comparison", where=f"{base}, {patched}", fix=fix)
    tasks_a, tasks_b = a["results"].keys(), b["results"].keys()
    differing = [] if tasks_a == tasks_b else ["tasks"]
    for task in sorted(tasks_a & tasks_b):
        one, other = must_agree(a, task), must_agree(b, task)
        differing += [key for key in one if one[key] != other[key] and key not in differing]
    if differing:
        what = f"the two runs cannot be compared; they differ in {', '.join(differing)}"
        fix = "run lmms-eval on both models with the same call"
        raise UsageError(what, where=f"{base.name}, {patched.name}", fix=fix)


def _count(document: Mapping[str, Any], task: str) -> int | None:
    n = take(document, "n-samples", task, "effective")
    return n if type(n) is int else None


def _what_ran(document: Mapping[str, Any]) -> str:
    model, given = take(document, "config", "model"), take(document, "config", "model_args")
    if isinstance(given, dict):
        given = ",".join(f"{key}={value}" for key, value in given.items())
    said = model, given, document.get("model_name")
    parts = [part for part in said if isinstance(part, str) and part]
    # The arguments may have had a token among them; and where models lie on a machine is nobody's business.
    told = (_PART.sub(_without_folder, part) for part in parts)
    return redact(", ".join(dict.fromkeys(told))) or "not said"


def _without_folder(found: re.Match[str]) -> str:
    return re.split(r"[\\/]", found[0].rstrip("\\/ "))[-1] if _LOCAL.match(found[0]) else found[0]


def _figures(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """All metrics by key; None for what is no finite number."""
    names = {key: key.partition(",")[0] for key, value in figures.items() if type(value) in (int, float)}
    meant = (key for key, name in names.items() if name not in _MEANINGLESS and not name.endswith("_stderr"))
    return {key: number(figures[key]) for key in meant}


def _finite(value: Any) -> float:
    """The same of a figure that must be there."""
    if (found := number(value)) is None:
        raise ValueError(f"{value!r:.80} is no figure")
    return found


def _paired(base: Path, patched: Path, task: str, metric: str) -> Paired | None:
    a, b = (_by_question(path, task, metric) for path in (base, patched))
    if not a or a.keys() != b.keys() or len(a) < 2:
        return None
    differences = [b[question] - a[question] for question in a]
    half_width = _NORMAL_95 * stdev(differences) / math.sqrt(len(differences))
    interval = f"{fmean(differences):+.4f} ± {half_width:.4f}"
    return Paired(len(differences), sum(d != 0 for d in differences), interval)


def _by_question(results: Path, task: str, metric: str) -> dict[str, float]:
    """A metric of each question; only of those metrics that are means over questions."""
    part, found = _OF_A_QUESTION.get(metric), dict[str, float]()
    if part is None:
        return found
    for sample in raw_samples(results, task):
        try:
            value = number(part(sample[metric]))
        except (KeyError, TypeError) as error:
            raise not_a_sample(task, results.name, error) from error
        if value is None:
            return {}
        found[str(sample["doc_id"])] = value
    return found
