"""Models one after the other on the same pictures, and the result that anyone can redo the statistics from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from qkpatch.checkpoint.files import os_errors
from qkpatch.common.json_text import canonical_json
from qkpatch.common.observer import Observer
from qkpatch.common.part import Part
from qkpatch.common.text import warned
from qkpatch.common.typed_json import as_json
from qkpatch.errors import UsageError
from qkpatch.evaluation.chair import figures
from qkpatch.evaluation.comparison import Comparison, columns, compare
from qkpatch.evaluation.measure import KINDS_KEPT, Side, Task, measure, told
from qkpatch.evaluation.records import Inputs, Protocol, Store, digest, of_parts
from qkpatch.evaluation.subject import Subject, base_of, files_of, find_place, machine, recorded_in
from qkpatch.patching.in_memory import check_loadable
from qkpatch.planning.plan import make_plan
from qkpatch.planning.request import Request

RESULT, LOG = "evaluation.json", "log.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """What was asked, what each model said, and how they compare."""

    task: Task
    sides: Sequence[Side]
    comparisons: Sequence[Comparison]
    tuned: Mapping[str, Any] | None = None  # what a search was for, and what came of it

    @property
    def warnings(self) -> list[str]:
        """What a reader should know before the figures."""
        n = self.task.pictures.left_out
        left_out = [warned(f"{n} annotated picture(s) are not in --images")] * bool(n)
        return [*left_out, *dict.fromkeys(text for one in self.comparisons for text in one.warnings)]

    @property
    def verdict(self) -> list[str]:
        """What came of a search, in lines for people."""
        if self.tuned is None:
            return []
        advice = "" if self.tuned["limits"]["anyway"] else ": edit nothing"
        tuned, n, figure = self.tuned, len(self.task.pictures.present), self.comparisons[0].figures["chair_s"]
        return [
            f"Best of {tuned['trials']} settings, by {n} held-out pictures, looked at {tuned['looked']} time(s):",
            f"CHAIR_s {figure.base:.4f} before, {figure.model:.4f} after",
            *(f"{'' if yes else 'NOT found '}better than {name}" for name, yes in tuned["beaten"].items()),
            *(f"NOT within the limits: {limit}" for limit in tuned["broken"]),
            *([] if tuned["is_found"] else [f"nothing is found that beats all controls{advice}"]),
        ]

    def to_json(self) -> dict[str, Any]:
        """As ``evaluation.schema.json`` has it."""
        pictures = self.task.pictures
        return {
            "schema": 1, "version": version("qkpatch"), "protocol": self.task.protocol.to_json(),
            "pictures": {"n": len(pictures.present), "sha256": pictures.digest, "left_out": pictures.left_out},
            "sides": [self._said(side) for side in self.sides], "warnings": self.warnings,
            "comparisons": as_json(self.comparisons), "questions": as_json(self.task.questions), "tuned": self.tuned,
        }  # fmt: skip

    def _said(self, side: Side) -> dict[str, Any]:
        rows = []
        for (name, there), record in zip(self.task.pictures.present.items(), side.records, strict=True):
            mentions = self.task.vocabulary.mentions(record.caption)
            rows.append({"picture": name, "objects": sorted(there), "mentions": mentions, **as_json(record)})
            del rows[-1]["next_tokens"]
        said = {"model": side.model, "edit": side.edit, "said": rows, "text": list(side.losses)}
        said["settings"] = side.settings
        read = {"perplexity": math.exp(fmean(side.losses))} if side.losses else {}
        return {**said, "figures": {**figures(columns(self.task, side)), **read}}


class Bench:
    """Where models are asked: one is loaded at a time, and what each says grows in a file of the folder."""

    def __init__(
        self, inputs: Inputs, out: Path | None, observer: Observer, bases: dict[str, str], part: Part | None = None
    ) -> None:  # fmt: skip
        if out is not None:
            _check_out(out, filter(None, (*bases, *bases.values())))  # an adapter's, too
        self._inputs, self.out, self._observer, self._bases = inputs, out, observer, bases
        self._subject: Subject | None = None
        self._part, self.machine = part, None if part is None else machine(inputs.device)
        self.files = cache(lambda name: files_of(name, bases.get(name, "")))

    def subject(self, name: str, protocol: Protocol) -> Subject:
        """A model that can be asked so."""
        if self._subject is None or self._subject.name != name:
            self._subject, trusted = None, self._inputs.trust_remote_code  # None: there may be room for one
            base, device = self._bases.get(name, ""), self._inputs.device
            self._subject = Subject.load(name, device, base, trusts=trusted)
            self._subject.check(protocol)
        return self._subject

    def side(self, name: str, request: Request, task: Task) -> Side:
        """What a model says under an edit; of a part, its share."""
        which = {"model": self.files(name), "edit": told(request), "asked": bool(task.questions)}
        settings = _settings(name, request)
        path = None if self.out is None else self.out / f"{digest(which)[:12]}.jsonl"
        store = Store(path, {**task.settings, **which}, KINDS_KEPT, machine=self.machine)

        def load() -> Subject:
            store.check_machine(machine(self._inputs.device))
            return self.subject(name, task.protocol)

        if self._part is not None:
            task = task.share(self._part)
        try:
            return replace(measure(name, load, request, task, store, self._observer), settings=settings)
        except BaseException as end:
            if path is not None:
                end.kept = f"what was said so far is kept in {self.out}"  # type: ignore[attr-defined]
            raise

    def write(self, result: Evaluation) -> Evaluation:
        """Put the result beside the records, which are whole without those of parts."""
        if self.out is not None:
            with os_errors("write", self.out):
                (self.out / RESULT).write_text(canonical_json(result.to_json()), "utf-8")
                for place in of_parts(self.out):
                    place.unlink(missing_ok=True)
        return result


def _check_out(out: Path, models: Iterable[str]) -> None:
    """Raise :class:`UsageError` where a result would lie in a model, or be written over one of something else."""
    real = Path(os.path.realpath(out))
    if {Path(os.path.realpath(find_place(name))) for name in models} & {real, *real.parents}:
        what = "OUT lies in SOURCE, which is never written to"
        raise UsageError(what, where=str(out), fix="choose an OUT beside SOURCE")
    if os.path.lexists(out / RESULT) and not (out / LOG).exists():
        what, fix = f"there is no {LOG} that it would be of", "move it away, or name another -o"
        raise UsageError(what, where=str(out / RESULT), fix=fix)


def _settings(model: str, request: Request) -> dict[str, Any] | None:
    """An edit with nothing left open; of a model as it is, the edit that its manifest records, if it has one."""
    if request != Request():
        said = as_json(make_plan(model, request).settings.block)
    else:
        said = {} if (made := recorded_in(find_place(model))) is None else as_json(made.edit)
    return {key: value for key, value in said.items() if key != "from_recipe"} or None


def n_layers(model: str, request: Request) -> int:
    """The model's layers, where it can be edited so; else that is refused before anything is measured."""
    check_loadable(request)
    request.check_seed()
    return make_plan(model, request).model.tower.n_layers


def run(
    model: str, inputs: Inputs, protocol: Protocol, request: Request, against: list[str], out: Path | None,
    part: Part | None, observer: Observer,
) -> Evaluation:  # fmt: skip
    """As :func:`qkpatch.evaluation.evaluate`."""
    if part is not None and out is None:
        raise UsageError("parts meet in a folder", where="--part", fix="name it: -o RESULT")
    task, wanted = Task.of(inputs, protocol), [(name, Request()) for name in against]
    if request != Request():
        n_layers(model, request)
        wanted = wanted or [(model, Request())]
    wanted.append((model, request))
    names = [model, *against]
    bench = Bench(inputs, out, observer, {name: base_of(name, names) for name in names}, part)
    if out is None or not any(out.glob("*.jsonl")):  # else it was looked at before anything was written
        bench.subject(wanted[0][0], protocol)
    if out is not None:  # refused where it is another run's
        agreed = {**task.settings, "pictures": task.pictures.digest, "batch size": inputs.batch_size}
        agreed["files of models"] = [bench.files(name) for name in names]
        said = {"models and edits": [[name, told(edit)] for name, edit in wanted]}
        Store(out / LOG, said, agreed=agreed, machine=bench.machine)
    sides = [bench.side(*each, task) for each in wanted]
    if part is not None:
        return Evaluation(task.share(part), [], [])
    last = len(sides) - 1
    return bench.write(Evaluation(task, sides, [compare(task, sides, last, base) for base in range(last)]))
