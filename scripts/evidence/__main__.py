"""Measure everything and write the report: ``python -m scripts.evidence``; goes on where it was stopped."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries when they are imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process per core; and sums come out the same everywhere

from qkpatch.evaluation.statistics import REPLICATES
from scripts.evidence import language, toy
from scripts.evidence.edits import Edit
from scripts.evidence.findings import Findings
from scripts.evidence.jobs import Job, run_all, tell, timings
from scripts.evidence.report import write_report

REPO = Path(__file__).resolve().parent.parent.parent
TINY = (
    toy.Budget(
        validation_scenes=8,
        test_scenes=12,
        asked_scenes=6,
        draws=2,
        draws_of_others=1,
        modes=(1,),
        modes_of_drawn=(1,),
        alphas=(0.5,),
        ranges=("middle",),
        stop_biases=(1.0,),
    ),
    language.Budget(
        windows=2,
        few_windows=1,
        draws=2,
        draws_of_others=1,
        modes=(4,),
        alphas=(0.5,),
        candidates=((4, 0.5),),
        other_ranges=(),
    ),
)
FULL = (toy.Budget(), language.Budget())


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", type=Path, default=REPO / "demo", help="directory of trained toys; default: demo"
    )
    parser.add_argument("--language", type=Path, default=REPO / ".cache" / "fixtures" / "smollm2-135m")
    parser.add_argument("--no-language", action="store_true", help="leave SmolLM2 out")
    parser.add_argument(
        "--results", type=Path, help="default: .cache/evidence; with --tiny .cache/evidence-tiny"
    )
    parser.add_argument("--out", type=Path, help="default: docs/evidence; with --tiny the same as --results")
    parser.add_argument("--jobs", type=int, default=2, help="processes, a core each; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a few scenes, to see that everything runs")
    arguments = parser.parse_args()
    toy_budget, language_budget = TINY if arguments.tiny else FULL
    paths = sorted(path.parent for path in arguments.models.glob("*/model.safetensors"))
    if len(paths) < 2:
        sys.exit(
            f"error: {arguments.models} holds {len(paths)} trained toys; evidence over models takes several"
        )

    # A tiny run shares neither the report nor the account of time with a real one.
    results: Path = arguments.results or REPO / ".cache" / ("evidence-tiny" if arguments.tiny else "evidence")
    out: Path = arguments.out or (results if arguments.tiny else REPO / "docs" / "evidence")
    jobs: list[Job] = []
    if not arguments.no_language:  # the longest, so it goes first
        jobs.append(Job.reading(arguments.language, results, language_budget))
    jobs += [Job.validation(path, results, toy_budget) for path in paths]
    run_all(jobs, arguments.jobs)
    chosen = choices([toy.Subject(path, results, toy_budget) for path in paths], toy_budget)
    for name, edit in chosen.items():
        tell(f"{name}: {edit.key}")
    on_test = [
        e
        for name, edit in chosen.items()
        for e in toy.companions(edit, toy_budget, in_full=name == toy.CHOSEN)
    ]
    run_all([Job.test(path, results, toy_budget, on_test) for path in paths], arguments.jobs)

    subjects = [toy.Subject(path, results, toy_budget) for path in paths]  # with what the jobs have stored
    replicates = 20 if arguments.tiny else REPLICATES
    reader = None if arguments.no_language else language.Reader(arguments.language, results, language_budget)
    tell("bootstrap and report")
    changes = write_report(
        Findings(subjects, chosen, toy_budget, replicates),
        reader,
        language_budget,
        out,
        timings(results),
    )
    tell(
        f"written: {out / 'report.md'}; {len(changes)} conclusions differ from those of the report that was there"
    )
    for line in changes:
        tell(line)


def choices(subjects: list[toy.Subject], budget: toy.Budget) -> dict[str, Edit]:
    """The settings that are looked at on test scenes: what validation chooses, and the candidates for a default."""
    n_layers = subjects[0].editor.n_layers
    dominant = [e for e in toy.grid(budget, n_layers) if e.kind == "dominant"]
    chosen = toy.choose(subjects, dominant)
    others = {name: edit for name, edit in toy.candidates(n_layers).items() if edit != chosen}
    return {toy.CHOSEN: chosen, **others}


if __name__ == "__main__":
    main()
