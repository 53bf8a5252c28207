"""A setting for a model: searched for on one half of the pictures, looked at once on the other, beside its controls."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.tree import source_file
from qkpatch.common.observer import Observer
from qkpatch.common.typed_json import as_json
from qkpatch.errors import NumericalError, QKPatchError, UsageError
from qkpatch.evaluation.bench import LOG, Bench, Evaluation, n_layers
from qkpatch.evaluation.chair import figures
from qkpatch.evaluation.comparison import EQUAL_RECALL, columns, compare, kept
from qkpatch.evaluation.measure import Side, Task, told
from qkpatch.evaluation.records import Inputs, Limits, Number, Protocol, Store
from qkpatch.planning.plan import make_plan
from qkpatch.planning.request import Request
from qkpatch.spectral.rule import Channel, Select

MODES, ALPHAS = (1, 2, 4, 8, 16), (0.0, 0.25, 0.5, 0.65, 0.8, 0.9)
RUNGS = (4, 2, 1)  # of so many parts of the pictures one; after each the better half goes on
HALVING = 0.5  # of the cost of every setting on all pictures
MOST = 1000  # settings, however many minutes there are
HEAD = "# Found by qkpatch tune"


@dataclass(frozen=True)
class Trial:
    """What a setting came to, as the log has it; the last are of a text."""

    chair_s: Number
    chair_i: Number
    recall: Number
    length: Number
    words: Number
    kl_prompts: Number
    recall_lost: Number
    seconds: Number
    kl_text: Number = 0.0
    perplexity: Number = 0.0
    perplexity_base: Number = 0.0
    perplexity_ratio: Number = 0.0


LOGGED: dict[str, Any] = {"trial ": Trial, "look ": str, "settings in ": int}  # by how keys begin


def candidates(n: int, layers: int, fixed: Request, seed: int, *, channels: bool) -> list[Request]:
    """Settings to try, the default first; what ``fixed`` says is not searched, and may leave fewer."""
    rng, drawn = random.Random(f"trials {seed}"), {fixed.over(Request(alpha=0.8)): None}
    for _ in range(100 * n):
        width = rng.randint(1, layers)
        first = rng.randrange(layers - width + 1)
        window, modes, alpha = tuple(range(first, first + width)), rng.choice(MODES), rng.choice(ALPHAS)
        channel = rng.choice(list(Channel)) if channels else Channel.full
        drawn[fixed.over(Request(layers=window, modes=modes, alpha=alpha, channel=channel))] = None
        if len(drawn) >= n:
            break
    return list(drawn)[:n]


def run(
    model: str, inputs: Inputs, protocol: Protocol, fixed: Request, limits: Limits, out: Path, observer: Observer
) -> Evaluation:  # fmt: skip
    """As :func:`qkpatch.evaluation.tune`."""
    task = Task.of(inputs, protocol)
    _check(out, task, limits)
    layers, seed = n_layers(model, fixed), protocol.sample_seed
    bench = Bench(inputs, out.with_suffix(".tune"), observer, {model: ""})
    bench.subject(model, protocol)
    which = {"pictures": task.pictures.digest, "model": bench.files(model)}
    log = Store(out.with_suffix(".tune") / LOG, {**task.settings, **which}, LOGGED)
    names = list(task.pictures.present)
    random.Random(f"halves {seed}").shuffle(names)
    middle = len(names) // 2
    started = time.monotonic()
    bench.side(model, Request(), task.at(names[:middle], asks=False))
    n = limits.trials
    if limits.minutes is not None:
        affordable = 60 * limits.minutes / (HALVING * (time.monotonic() - started))
        n = log.once(f"settings in {limits.minutes} minutes", lambda: min(int(affordable), MOST))
        n = min(max(RUNGS[0], n), MOST)
    drawn = candidates(n, layers, fixed, seed, channels=limits.channels)
    tried = going_on = list(dict.fromkeys(full for request in drawn for full in _full(model, request)))
    found: dict[Request, Mapping[str, Any]] = {}
    for rung in RUNGS:
        part = task.at(names[: middle // rung], asks=False)
        found = {request: _trial(bench, model, request, part, log) for request in going_on}
        rank = {r: (len(limits.broken(x)), x["chair_s"], -x["recall"]) for r, x in found.items()}
        going_on = sorted(going_on, key=rank.__getitem__)[: (len(going_on) + 1) // 2]
    chosen = going_on[0]
    result = _look(bench, model, chosen, task.at(names[middle:]), log, limits)
    tuned = {**(result.tuned or {}), "searched": found[chosen], "trials": len(tried)}
    result = bench.write(replace(result, tuned=tuned))
    if tuned["is_found"] or limits.anyway:
        said = [HEAD, *(f"# {line}" for line in result.verdict)]
        said += [f"{key}: {value}" for key, value in tuned["edit"].items()]
        with os_errors("write", out):
            out.write_text("\n".join([*said, ""]), "utf-8")
    return result


def _full(model: str, request: Request) -> list[Request]:
    """The request with its main settings spelled out; none where the model has fewer modes, or no such layers."""
    try:
        block = make_plan(model, request).settings.block
    except QKPatchError:
        return []
    said = {key: block.items[0][key] for key in ("layers", "modes", "alpha", "channel")}
    return [request if request.edits else Request.of(**said).over(request)]


def _trial(bench: Bench, model: str, request: Request, task: Task, log: Store) -> Mapping[str, Any]:
    def make() -> dict[str, Any]:
        started = time.monotonic()
        side, base = (bench.side(model, edit, task) for edit in (request, Request()))
        return {**_kept(task, side, base), "seconds": time.monotonic() - started}

    trial: Mapping[str, Any] = log.once(f"trial {told(request)} on {task.pictures.digest[:12]}", make)
    return trial


def _kept(task: Task, side: Side, base: Side) -> dict[str, float]:
    found, before = figures(columns(task, side)), figures(columns(task, base))["recall"]
    lost = 1 - found["recall"] / before if before else 0.0
    return {**found, **kept(side, base)[0], "recall_lost": lost}


def _look(bench: Bench, model: str, chosen: Request, task: Task, log: Store, limits: Limits) -> Evaluation:
    """The held-out half under the setting and its controls; looks are counted in the log."""
    log.once(f"look {told(chosen)}", lambda: time.strftime("%Y-%m-%d"))
    sides = [bench.side(model, Request(), task), bench.side(model, chosen, task)]
    compared = [compare(task, sides, 1, 0)]
    beaten = {"no edit": compared[0].is_better(), "stopping earlier": compared[0].is_better(EQUAL_RECALL)}
    for name, select, seed in (("random modes", Select.random, 0), ("shrink", Select.shrink, None)):
        try:
            sides.append(bench.side(model, replace(chosen, select=select, seed=seed), task))
        except NumericalError:  # it changes nothing, as a shrink does under a norm of queries
            continue
        compared.append(compare(task, sides, 1, len(sides) - 1))
        beaten[name] = compared[-1].is_better()
    broken = limits.broken(_kept(task, sides[1], sides[0]))
    looked = sum(key.startswith("look ") for key in log)
    is_found = all(beaten.values()) and not broken
    found = {"beaten": beaten, "broken": broken, "is_found": is_found, "looked": looked}
    return Evaluation(task, sides, compared, {"edit": told(chosen), "limits": as_json(limits), **found})


def _check(out: Path, task: Task, limits: Limits) -> None:
    """Raise :class:`UsageError` where there can be no search, or something else would be written over."""
    if limits.max_perplexity is not None and task.text is None:
        raise UsageError("there is no text to measure it on", where="--max-perplexity", fix="add --text FILE")
    if (n := len(task.pictures.present)) < 2 * RUNGS[0]:
        raise UsageError(f"{n} pictures are too few to search on half of them", fix="give hundreds")
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError("a setting is a YAML file", where=f"-o {out}", fix="name it edit.yaml")
    if out.exists() and not (out.is_file() and source_file(out, out.name).read().startswith(HEAD.encode())):
        raise UsageError("it is there, and not of qkpatch tune", where=f"-o {out}", fix="name another -o")
