"""What lmms-eval and VLMEvalKit found of a sweep's variants, each against the base on the same pictures. Torch-free.

Figures are redone from the answers; one that a tool reports and that does not come out as reported is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.tree import source_file
from qkpatch.common.number_ranges import some
from qkpatch.common.text import Warned, meant, warned
from qkpatch.errors import UsageError
from qkpatch.publishing.runs import SUFFIX, TABLE, Run, lmms_runs, table_run
from qkpatch.sweeps.record import SWEEP_NAME, Sweep

if TYPE_CHECKING:
    from qkpatch.evaluation.statistics import Array, Figure, McNemar

BASE = "base"
_SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class Found:
    """One task of a variant, beside the same of what it is held against."""

    variant: str
    task: str
    tool: str
    n: int  # pictures; or questions, where the tool does not say which picture
    figures: Mapping[str, Figure]
    mcnemar: Mapping[str, McNemar]
    holm: Mapping[str, float]  # p of each figure, adjusted for all variants


@dataclass(frozen=True)
class Collected:
    """All that was found, and what a reader should know before the figures."""

    sweep: str
    against: str
    found: tuple[Found, ...]
    warnings: tuple[str, ...]


def collect(sweep: str | Path, *results: str | Path, against: str = BASE) -> Collected:
    """Hold what was evaluated of a sweep's variants against the base: paired bootstrap, McNemar's test, Holm's p.

    Args:
        sweep: the directory that :func:`qkpatch.sweep` wrote.
        *results: folders of what lmms-eval or VLMEvalKit wrote, in which folders or models are called after variants,
            or ``NAME=FOLDER``; by default ``SWEEP/results``, as ``evaluate.sh`` fills it.
        against: ``base``, or another variant, such as a control.

    Raises:
        UsageError: there is no run of a variant, or of ``against`` none.
        CheckpointError: a file is not what its name says.
    """
    folder = Path(sweep)
    if not (folder / SWEEP_NAME).exists():
        raise UsageError(
            f"there is no {SWEEP_NAME}", where=str(folder), fix="name what qkpatch sweep wrote with -o"
        )
    record = Sweep.loads(source_file(folder / SWEEP_NAME, SWEEP_NAME).read(), str(folder / SWEEP_NAME))
    names = [BASE, *(variant.name for variant in record.variants)]
    if against not in names:
        raise _no_variant(against, names, f"--against {against}")
    runs, warnings = _by_name(names, _files(folder, names, results), against)
    missing = [name for name in names if not any(name == of for of, _ in runs)]
    if against in missing:
        what = f"there is no run of {against}, so nothing can be compared"
        raise UsageError(what, where=str(folder), fix=f"evaluate it too: bash evaluate.sh {against}")
    if missing:
        warnings.append(warned(f"not evaluated: {some(missing, 5)}"))
    comparable: dict[str, dict[str, Run]] = {}
    for (name, task), run in runs.items():
        if name == against:
            continue
        base = runs.get((against, task))
        if base is None:
            warnings.append(warned(f"{name}, {task}: {against} was not evaluated on it"))
        elif not _doubtful(name, run, base, against, warnings):
            comparable.setdefault(task, {})[name] = run
    found = [
        one for task, mine in comparable.items() for one in _compared(mine, runs[against, task], warnings)
    ]
    found.sort(key=lambda one: (names.index(one.variant), one.task))
    if not found:
        fix = "evaluate all with the same call, and with --log_samples"
        if all(name == against for name, _ in runs):
            fix = f"evaluate variants, too: bash {folder / 'evaluate.sh'} goes on"
        raise UsageError("no two runs can be compared: " + "; ".join(warnings), where=str(folder), fix=fix)
    return Collected(record.source.name, against, tuple(_adjusted(found)), tuple(warnings))


def _no_variant(name: str, names: Sequence[str], where: str) -> UsageError:
    fix = f"{meant([name], names)}there are {some(names, 5)}"
    return UsageError(f"{name!r} is no variant of this sweep", where=where, fix=fix)


def _files(
    sweep: Path, names: Sequence[str], results: Sequence[str | Path]
) -> Iterator[tuple[str, Path, Path]]:
    """What may be a run: whose it is said to be, or nothing, the folder that it was looked for in, and the file."""
    for given in results or (sweep / "results",):
        name, equals, rest = str(given).partition("=")
        said, place = (name, Path(rest)) if equals and not Path(given).exists() else ("", Path(given))
        if said and said not in names:
            raise _no_variant(said, names, str(given))
        if not results and not place.exists():
            fix = f"bash {sweep / 'evaluate.sh'}"
            raise UsageError("nothing of this sweep was evaluated yet", where=str(place), fix=fix)
        with os_errors("list", place):
            place.stat()
        every = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        runs = [path for path in every if path.name.endswith(SUFFIX) or path.stem.endswith(TABLE)]
        if not runs:
            fix = f"give what lmms-eval wrote to --output_path, with *_{SUFFIX}, or VLMEvalKit's --work-dir"
            raise UsageError("no results are in it", where=str(place), fix=fix)
        yield from ((said, place, path) for path in runs)


def _by_name(
    names: Sequence[str], files: Iterable[tuple[str, Path, Path]], first: str
) -> tuple[dict[tuple[str, str], Run], list[Warned]]:
    """The newest run of each variant and task, by its file's name, and what is to be said about others."""
    every: dict[tuple[str, str], list[Run]] = {}
    strangers, warnings = list[str](), list[Warned]()
    for said, place, file in files:
        parts = [place.name, *file.relative_to(place).parts[:-1]] if place.is_dir() else [place.parent.name]
        is_table = file.stem.endswith(TABLE)
        for run in [table_run(file, parts)] if is_table else lmms_runs(file):
            name = said or _called(names, [*parts, *run.model.split(",")])
            if name:
                every.setdefault((name, run.task), []).append(run)
            else:
                strangers.append(str(file))
    if strangers:
        what = f"of no variant by their names: {some(list(dict.fromkeys(strangers)), 3)}"
        if not every:
            raise UsageError(what, fix="say which: NAME=FOLDER")
        warnings.append(warned(f"left out, {what}; NAME=FOLDER says which"))
    newest: dict[tuple[str, str], Run] = {}
    for key in sorted(every, key=lambda key: (key[0] != first, names.index(key[0]), key[1])):
        run = max(every[key], key=lambda run: run.file.name)
        if len({one.file for one in every[key]}) > 1:
            warnings.append(
                warned(f"{', '.join(key)}: {len(every[key])} runs, of which {run.file.name} counts")
            )
        if twin := next((of for (of, _), one in newest.items() if one.same(run)), None):
            warnings.append(warned(f"{', '.join(key)}: the same run as {twin}'s, left out"))
            continue
        newest[key] = run
    return newest, warnings


def _called(names: Sequence[str], parts: Sequence[str]) -> str:
    """The variant that a part is, else the longest that one ends with."""
    if exact := next((part for part in parts if part in names), None):
        return exact
    ends = [name for part in parts for name in names if part.endswith((f"-{name}", f"_{name}", f"/{name}"))]
    return max(ends, key=len, default="")


def _doubtful(name: str, run: Run, base: Run, against: str, warnings: list[Warned]) -> bool:
    """Whether a comparison would mean nothing; that, and what else may be behind a difference, is told."""
    where = f"{name}, {run.task}"
    if differing := run.differing(base):
        warnings.append(
            warned(f"{where}: not compared, as it differs from {against} in {', '.join(differing)}")
        )
    elif doubts := run.doubts(base):
        warnings.append(warned(f"{where}: it differs from {against} in {', '.join(doubts)} too"))
    return bool(differing)


def _compared(runs: Mapping[str, Run], base: Run, warnings: list[Warned]) -> Iterator[Found]:
    """Runs of one task by variant, all of them over the same draws of its pictures."""
    from qkpatch.evaluation.statistics import figures_beside, grouped, is_yes_or_no, mcnemar

    sides: dict[str, Mapping[str, Array]] = {}
    theirs: Mapping[str, Array] = _columns(base)
    for name, run in runs.items():
        if shared := {figure: column for figure, column in _columns(run).items() if figure in theirs}:
            sides[name] = shared
        else:
            what = f"{name}, {run.task}: no answers lie beside the results that give its figures"
            warnings.append(warned(what))
    if not sides:
        return
    pictures = [sample.picture for sample in base.samples.values()]
    by_picture = [{f: grouped(x, pictures) for f, x in side.items()} for side in (theirs, *sides.values())]
    all_figures = figures_beside(by_picture[1:], by_picture[0], _SEED)
    for (name, ours), figures in zip(sides.items(), all_figures, strict=True):
        pairs = {figure: (theirs[figure], column) for figure, column in ours.items()}
        tests = {
            f: mcnemar(*(side[:, 0] for side in pair))
            for f, pair in pairs.items()
            if all(map(is_yes_or_no, pair))
        }
        yield Found(name, base.task, base.tool, len(set(pictures)), figures, tests, {})


def _columns(run: Run) -> dict[str, Array]:
    """Numerators and denominators by question, of the figures that come out as they were reported."""
    from qkpatch.evaluation.chair import CaptionScore, chair_columns, figures
    from qkpatch.evaluation.pope import yes_no_columns
    from qkpatch.evaluation.statistics import as_pairs

    every = run.samples.values()
    found: dict[str, Array] = {}
    if every and all(one.objects is not None for one in every):
        found |= chair_columns([CaptionScore.of(*one.objects) for one in every if one.objects is not None])
    if every and all(one.answer is not None for one in every):
        said = yes_no_columns(
            [[(float(one.answer[0]), one.answer[1])] for one in every if one.answer is not None]
        )
        found |= {"f1": said["f1"], "said_yes": said["yes"]}
    for name in sorted(set.intersection(*(set(one.scores) for one in every))) if every else ():
        if name in run.reported or not run.reported:
            found[name] = as_pairs([one.scores[name] for one in every])

    def is_as_told(name: str, value: float) -> bool:
        told = [x for key, x in run.reported.items() if name in key]
        return not told or any(math.isclose(unit * value, x, abs_tol=1e-6) for unit in (1, 100) for x in told)

    return {name: found[name] for name, value in figures(found).items() if is_as_told(name, value)}


def _adjusted(found: Sequence[Found]) -> Iterator[Found]:
    """With Holm's p of each figure over all variants of a task."""
    from qkpatch.evaluation.statistics import holm

    p: dict[tuple[str, str], dict[str, float]] = {}
    for one in found:
        for name, figure in one.figures.items():
            p.setdefault((one.task, name), {})[one.variant] = figure.difference.p
    adjusted = {key: dict(zip(of, holm(list(of.values())), strict=True)) for key, of in p.items()}
    for one in found:
        yield replace(one, holm={name: adjusted[one.task, name][one.variant] for name in one.figures})
