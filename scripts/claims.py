"""The paper's claims on one model: a setting written down beforehand, beside every control, on the same pictures.

python -m scripts.claims MODEL --layers 11-20 --modes 4 --alpha 0.8 --images FOLDER --objects FILE -o claims
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read by the library when it is imported

import numpy as np
import typer

from qkpatch.cli.command import command
from qkpatch.cli.console import print_text
from qkpatch.cli.flags import EditFlags, ShowFlags, SourceArg
from qkpatch.cli.progress import bars
from qkpatch.common.observer import Observer
from qkpatch.errors import NumericalError, UsageError
from qkpatch.evaluation.bench import Bench, Evaluation, n_layers
from qkpatch.evaluation.comparison import EQUAL_RECALL, columns, compare
from qkpatch.evaluation.measure import Side, Task, told
from qkpatch.evaluation.pope import KINDS
from qkpatch.evaluation.records import Inputs, Protocol, Store
from qkpatch.evaluation.statistics import Interval, holm
from qkpatch.planning.request import Request
from qkpatch.spectral.rule import Channel, Select
from scripts.evidence.statistics import difference
from scripts.markdown import joined, table

PAPER = 0.04  # of CHAIR_s: the drop that the paper reports
BASE, EDIT, SHRINK, SYMMETRIC, ANTISYMMETRIC, RANDOM = (
    "no edit",
    "edit",
    "shrink",
    "symmetric",
    "antisymmetric",
    "random",
)


@dataclass(frozen=True)
class Claim:
    """One question, and what came out: the first side's figure less the second's."""

    question: str
    figure: str
    found: Interval


def measured(
    model: str, inputs: Inputs, protocol: Protocol, edit: Request, draws: int, out: Path, observer: Observer
) -> tuple[Evaluation, list[Claim]]:
    """Ask the model under the edit and under each control everything; goes on where it was stopped."""
    n_layers(model, edit)
    wanted = {BASE: Request(), EDIT: edit, SHRINK: replace(edit, select=Select.shrink)}
    wanted |= {
        channel.value: replace(edit, channel=channel)
        for channel in (Channel.symmetric, Channel.antisymmetric)
    }
    wanted |= {f"{RANDOM} {i}": replace(edit, select=Select.random, seed=i) for i in range(draws)}
    task = Task.of(inputs, protocol)
    bench = Bench(inputs, out, observer, {})
    bench.subject(model, protocol)
    Store(out / "log.jsonl", {"models and edits": [told(request) for request in wanted.values()]})
    sides: dict[str, Side] = {}
    for name, request in wanted.items():
        try:
            sides[name] = bench.side(model, request, task)
        except NumericalError:  # a norm of queries undoes a shrink
            if name != SHRINK:
                raise
    listed = list(sides.values())  # the first two are no edit, and the edit
    compared = compare(task, listed, 1, 0)
    result = bench.write(Evaluation(task, listed, [compared]))
    return result, list(claims(task, sides, compared.figures[EQUAL_RECALL].difference))


def claims(task: Task, sides: dict[str, Side], stopping: Interval) -> Iterator[Claim]:
    """Each claim with its interval over pictures, and over draws where modes are drawn."""
    found = {name: columns(task, side) for name, side in sides.items()}

    def less(figure: str, a: str, *others: str) -> Interval:
        ours, theirs = (np.stack([found[name][figure] for name in names])[None] for names in ([a], others))
        return difference(ours, theirs, seed=task.protocol.sample_seed).crossed

    yield Claim("lower than without an edit?", "chair_s", less("chair_s", EDIT, BASE))
    yield Claim("lower than stopping earlier, at equal recall?", "chair_s", stopping)
    drawn = [name for name in sides if name.startswith(RANDOM)]
    yield Claim("lower than with random modes?", "chair_s", less("chair_s", EDIT, *drawn))
    if SHRINK in sides:
        yield Claim("lower than with a shrink of that size?", "chair_s", less("chair_s", EDIT, SHRINK))
    yield Claim("symmetric lower than antisymmetric?", "chair_s", less("chair_s", SYMMETRIC, ANTISYMMETRIC))
    yield Claim("as much found?", "recall", less("recall", EDIT, BASE))
    for kind in KINDS if task.questions else ():
        yield Claim("answers as right?", f"{kind}_accuracy", less(f"{kind}_accuracy", EDIT, BASE))


def page(result: Evaluation, found: Sequence[Claim]) -> str:
    """What came out, and how many pictures the paper's effect takes on this model."""
    n, base = len(result.task.pictures.present), result.comparisons[0].figures["chair_s"].base
    adjusted = holm([claim.found.p for claim in found])
    rows = []
    for claim, p in zip(found, adjusted, strict=True):
        d = claim.found
        points = (f"{100 * d.estimate:+.1f}", f"{100 * d.low:+.1f} to {100 * d.high:+.1f}")
        rows.append((claim.question, claim.figure, *points, f"{p:.4f}", f"{100 * d.smallest_detectable:.1f}"))
    kept = ", ".join(f"{name} {value:.4f}" for name, value in result.comparisons[0].kept.items())
    wanted, detectable = PAPER * base, found[0].found.smallest_detectable
    needed = "more pictures than these, of which none tells the two apart"
    if wanted and detectable:
        n_needed = math.ceil(n * (detectable / wanted) ** 2)
        needed = f"about {n_needed:,} pictures; against a control, whose difference is smaller, more"
    return joined([
        f"{result.sides[1].label}: {n} pictures, CHAIR_s {base:.1%} before. Differences in points, 95 % intervals over "
        f"pictures and draws; Holm's p over all rows; *detectable* is what would be found four times in five.",
        table(("claim", "figure", "Δ", "95 % interval", "p (Holm)", "detectable"), rows),
        f"Kept: {kept}. To find the paper's {PAPER:.0%} of CHAIR_s, here {100 * wanted:.1f} points, against no edit "
        f"takes {needed}.",
        *(f"Warning: {warning}." for warning in result.warnings),
    ])  # fmt: skip


@command
def run(
    model: SourceArg, inputs: Inputs, protocol: Protocol, edit: EditFlags, show: ShowFlags,
    out: Annotated[Path, typer.Option("--out", "-o", help="The results' folder; runs go on there.")],
    draws: Annotated[int, typer.Option(help="Of random modes.", min=1)] = 10,
) -> None:  # fmt: skip
    """Hold an edit of SOURCE, named by its flags, against all controls on the same pictures."""
    request = edit.request
    if None in (request.layers, request.modes, request.alpha) or request.select or request.channel:
        what = "the setting is to be written down beforehand, and controls are made from it"
        raise UsageError(what, fix="give --layers, --modes and --alpha; no --select, no --channel")
    with bars(quiet=show.is_bare) as observer:
        done: Any = measured(model, inputs, protocol, request, draws, out, observer)
    text = page(*done)
    (out / "claims.md").write_text(text, "utf-8")
    print_text(text)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    app()
