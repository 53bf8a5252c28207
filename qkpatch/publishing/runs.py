"""One run of lmms-eval, or of VLMEvalKit, on one task: what was asked, how, and what was said, question by question.

Read in their sources: lmms-eval's ``loggers/evaluation_tracker.py``, ``evaluator.py`` and tasks ``pope`` and
``coco_cap_chair``; VLMEvalKit's ``smp/file.py``, ``dataset/image_yorn.py`` and ``dataset/utils/yorn.py``.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.tree import source_file
from qkpatch.common.json_text import load_json
from qkpatch.errors import CheckpointError

SUFFIX, TABLE = "results.json", "_auxmatch"
MOST_BYTES = 256 << 20  # of an evaluation, which has all captions: those of 100,000 pictures
_MUST_AGREE = ("versions", "n-shot", "n-samples")
# What may move a figure, and need not.
_SHOULD_AGREE = ("config.limit", "config.model", "config.gen_kwargs", "config.batch_size", "config.random_seed",
                 "config.numpy_seed", "config.torch_seed", "config.fewshot_seed", "config.model_dtype",
                 "transformers_version", "git_hash")  # fmt: skip
# Of a model's arguments: which model it is; all others are how it is run.
IDENTITY = ("pretrained", "model", "model_version", "model_name", "model_path", "revision")
# What lmms-eval says of a question without its picture, and what differs where they do.
_ASKED = {"doc_hash": "questions or pictures", "prompt_hash": "prompts", "target_hash": "answers"}
_LARGEST = 1e15  # no metric is larger, and digits by the hundred are none


@dataclass(frozen=True)
class Sample:
    """One question: what it was, and what was recorded of the answer."""

    picture: str  # or the question, where the tool does not say which picture
    asked: Mapping[str, str]
    scores: Mapping[str, float]
    answer: tuple[bool, bool] | None = None  # yes was said; and would have been right
    objects: tuple[tuple[str, ...], frozenset[str]] | None = None  # mentions; and what is there


@dataclass(frozen=True)
class Run:
    """One task of a run."""

    file: Path
    task: str
    tool: str
    model: str  # as the tool was told
    reported: Mapping[str, float]
    samples: Mapping[str, Sample]  # by question, sorted
    must: Mapping[str, Any]  # what no two runs that are compared differ in
    may: Mapping[str, Any]

    def same(self, other: Run) -> bool:
        """Whether they are one and the same, be it in two files."""
        return (self.model, self.reported, self.samples) == (other.model, other.reported, other.samples)

    def differing(self, base: Run) -> list[str]:
        """What makes a comparison with another run of the task meaningless."""
        said = [key for key in self.must if self.must[key] != base.must.get(key)]
        if self.samples and base.samples and self.samples.keys() != base.samples.keys():
            return [*said, "questions or pictures"]
        pairs = [
            (self.samples[key].asked, base.samples[key].asked)
            for key in self.samples.keys() & base.samples.keys()
        ]
        return [*said, *dict.fromkeys(key for a, b in pairs for key in a if a[key] != b.get(key))]

    def doubts(self, base: Run) -> list[str]:
        """What else may be behind a difference."""
        said = [key for key in {**self.may, **base.may} if self.may.get(key) != base.may.get(key)]
        return [*said, *["nothing in the model's name"] * (self.model == base.model)]


def read_results(path: Path) -> dict[str, Any]:
    """``*_results.json`` of lmms-eval, or :class:`CheckpointError`."""
    document = load_json(source_file(path, path.name).read(), path.name)
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, dict) or not all(isinstance(figures, dict) for figures in results.values()):
        what = "not the results of a run of lmms-eval: it has no `results` by task"
        fix = "give the file that lmms-eval wrote to --output_path, *_results.json"
        raise CheckpointError(what, where=path.name, fix=fix)
    return dict(document)


def must_agree(document: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What no two runs that are compared differ in."""
    said = {key: take(document, key, task) for key in _MUST_AGREE}
    return {**said, f"generation of {task}": take(document, "configs", task, "generation_kwargs")}


def may_differ(document: Mapping[str, Any]) -> dict[str, Any]:
    """What may move a figure, and need not; the model itself aside."""
    named = {key: value for key, value in arguments(document).items() if key not in IDENTITY}
    # What is no name may be a path, or a token.
    said: dict[str, Any] = {key: take(document, *key.split(".")) for key in _SHOULD_AGREE}
    for key, value in sorted(named.items()):
        name = f"{key} of model_args" if key.isidentifier() else "model_args"
        said[name] = (*said.get(name, ()), key, value)
    return said


def take(document: Any, *keys: str) -> Any:
    """What lies under keys, or None."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def arguments(document: Mapping[str, Any]) -> dict[str, str]:
    """The arguments of the model by name, in each of the forms that lmms-eval writes."""
    said = take(document, "config", "model_args")
    if isinstance(said, str) and said.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            said = json.loads(said)
    if isinstance(said, str):
        parts = (part.partition("=") for part in said.split(",") if part.strip())
        said = {key.strip() if equals else f"{key},": value for key, equals, value in parts}
    named = said.items() if isinstance(said, dict) else ()
    return {key: os.path.normpath(str(value).strip()) for key, value in named}


def number(value: Any) -> float | None:
    """A metric; None where it is no finite number."""
    # Compared before it is made a float, which an integer may be too large for.
    return float(value) if -_LARGEST <= value <= _LARGEST else None


def raw_samples(results: Path, task: str) -> Iterator[dict[str, Any]]:
    """``*_samples_<task>.jsonl`` beside results, line by line; nothing where there is none.

    Raises:
        CheckpointError: a line is no sample.
    """
    name, folder = results.name.removesuffix(SUFFIX) + f"samples_{task}.jsonl", results.absolute().parent
    with os_errors("list", folder):
        # A task may be called what no file can be.
        is_there = results.name.endswith(SUFFIX) and name in os.listdir(folder)
    for line in source_file(folder / name, name).read(MOST_BYTES).splitlines() if is_there else ():
        try:
            sample = json.loads(line)
            sample["doc_id"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise not_a_sample(task, name, error) from error
        yield sample


def not_a_sample(task: str, name: str, error: Exception) -> CheckpointError:
    """What a broken line is told by."""
    fix = "run lmms-eval on it again, with --log_samples"
    return CheckpointError(f"not a sample of {task}: {error!r}", where=name, fix=fix)


def lmms_runs(path: Path) -> list[Run]:
    """All tasks of a run of lmms-eval."""
    document, found = read_results(path), list[Run]()
    given = arguments(document)
    for task, figures in document["results"].items():
        samples: dict[str, Sample] = {}
        for raw in raw_samples(path, task):
            try:
                samples[str(raw["doc_id"])] = _sample(raw)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise not_a_sample(task, path.name, error) from error
        reported = {
            key.partition(",")[0]: x for key, value in figures.items() if (x := _score(value)) is not None
        }
        settled = must_agree(document, task), may_differ(document)
        model = ",".join(given[key] for key in IDENTITY if key in given)
        ordered = dict(sorted(samples.items()))
        found.append(Run(path, task, "lmms-eval", model, reported, ordered, *settled))
    return found


def _score(value: Any) -> float | None:
    return number(value) if type(value) in (int, float, bool) else None


def _sample(raw: Mapping[str, Any]) -> Sample:
    asked = {what: str(raw[key]) for key, what in _ASKED.items() if key in raw}
    scores, answer, objects, picture = {}, None, None, f"question {raw['doc_id']}"
    for name, value in raw.items():
        x = _score(value.get("score") if isinstance(value, dict) else value)
        if x is not None and name != "doc_id":
            scores[name] = x
        if not isinstance(value, dict):
            continue
        if "prediction" in value and "ground_truth" in value:
            answer = value["prediction"] == "yes", value["ground_truth"] == "yes"
        if "answer" in value and "pred" in value:
            objects = tuple(map(str, value["pred"])), frozenset(map(str, value["answer"]))
            picture = str(value.get("image_id", picture))
    return Sample(picture, asked, scores, answer, objects)


def table_run(path: Path, models: Sequence[str]) -> Run:
    """A task of VLMEvalKit that is answered by yes or no, from what it scored: ``MODEL_TASK_auxmatch.tsv``.

    ``models`` are what the model may be called.

    Raises:
        CheckpointError: another format, or no such table.
    """
    name = path.name.removesuffix(path.suffix).removesuffix(TABLE)
    task = next((name.removeprefix(f"{m}_") for m in models if name.startswith(f"{m}_")), name)
    if path.suffix != ".tsv":
        fix = "set PRED_FORMAT=tsv and run VLMEvalKit again with --reuse, which asks the model nothing anew"
        raise CheckpointError(f"a table in {path.suffix}, which is not read", where=path.name, fix=fix)
    raw = source_file(path, path.name).read(MOST_BYTES)
    csv.field_size_limit(MOST_BYTES)
    try:
        rows = csv.DictReader(io.StringIO(raw.decode("utf-8"), newline=""), delimiter="\t")
        samples = dict(sorted((row["index"], _row(row)) for row in rows))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        fix = "give a task that is answered by yes or no, such as POPE or AMBER, once it is scored"
        raise CheckpointError(
            f"no answers that VLMEvalKit scored: {error!r}", where=path.name, fix=fix
        ) from error
    # The rest of how a model is asked is in its code.
    commit = next(
        (part.partition("_G")[2] for part in path.parts[::-1] if part.startswith("T") and "_G" in part), None
    )
    return Run(path, task, "VLMEvalKit", name.removesuffix(f"_{task}"), {}, samples, {}, {"commit": commit})


def _row(row: Mapping[str, Any]) -> Sample:
    right, said = (str(row[key]).lower() for key in ("answer", "extracted"))
    asked = {"questions or pictures": str(row["question"]), "answers": right}
    picture = str(row.get("image_path") or f"question {row['index']}")
    return Sample(picture, asked, {"accuracy": float(said == right)}, (said == "yes", right == "yes"))
