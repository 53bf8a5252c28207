"""Measure everything and write the report: ``python -m scripts.evidence``; goes on where it was stopped."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries when they are imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process per core; and sums come out the same everywhere

import torch

from scripts.evidence import language, toy
from scripts.evidence.edits import Edit
from scripts.evidence.findings import Findings
from scripts.evidence.report import Timing, write_report
from scripts.evidence.statistics import REPLICATES

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

Job = tuple[str, Callable[[], None]]


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", type=Path, default=REPO / "demo", help="directory of trained toys; default: demo"
    )
    parser.add_argument("--language", type=Path, default=REPO / ".cache" / "fixtures" / "smollm2-135m")
    parser.add_argument("--no-language", action="store_true", help="leave SmolLM2 out")
    parser.add_argument("--results", type=Path, default=REPO / ".cache" / "evidence")
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "evidence")
    parser.add_argument("--jobs", type=int, default=2, help="processes, a core each; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a few scenes, to see that everything runs")
    arguments = parser.parse_args()
    toy_budget, language_budget = TINY if arguments.tiny else FULL
    paths = sorted(path.parent for path in arguments.models.glob("*/model.safetensors"))
    if len(paths) < 2:
        sys.exit(
            f"error: {arguments.models} holds {len(paths)} trained toys; evidence over models takes several"
        )

    results: Path = arguments.results
    jobs: list[Job] = []
    if not arguments.no_language:  # the longest, so it goes first
        jobs.append(("language", partial(_read, arguments.language, results, language_budget)))
    jobs += [(f"validation {path.name}", partial(_validate, path, results, toy_budget)) for path in paths]
    _run_all(jobs, arguments.jobs)
    chosen = choices([toy.Subject(path, results, toy_budget) for path in paths], toy_budget)
    for name, edit in chosen.items():
        _tell(f"{name}: {edit.key}")
    on_test = [
        e
        for name, edit in chosen.items()
        for e in toy.companions(edit, toy_budget, in_full=name == toy.CHOSEN)
    ]
    jobs = [(f"test {path.name}", partial(_test, path, results, on_test, toy_budget)) for path in paths]
    _run_all(jobs, arguments.jobs)

    subjects = [toy.Subject(path, results, toy_budget) for path in paths]  # with what the jobs have stored
    replicates = 20 if arguments.tiny else REPLICATES
    reader = None if arguments.no_language else language.Reader(arguments.language, results, language_budget)
    _tell("bootstrap and report")
    write_report(
        Findings(subjects, chosen, toy_budget, replicates),
        reader,
        language_budget,
        arguments.out,
        _timings(results),
    )
    _tell(f"written: {arguments.out / 'report.md'}")


def choices(subjects: list[toy.Subject], budget: toy.Budget) -> dict[str, Edit]:
    """The settings that are looked at on test scenes: what validation chooses, and the candidates for a default."""
    n_layers = subjects[0].editor.n_layers
    dominant = [e for e in toy.grid(budget, n_layers) if e.kind == "dominant"]
    chosen = toy.choose(subjects, dominant)
    others = {name: edit for name, edit in toy.candidates(n_layers).items() if edit != chosen}
    return {toy.CHOSEN: chosen, **others}


def _validate(path: Path, results: Path, budget: toy.Budget) -> None:
    toy.run_validation(toy.Subject(path, results, budget), budget, _tell)


def _test(path: Path, results: Path, edits: list[Edit], budget: toy.Budget) -> None:
    toy.run_test(toy.Subject(path, results, budget), edits, budget, _tell)


def _read(path: Path, results: Path, budget: language.Budget) -> None:
    language.run(language.Reader(path, results, budget), budget, _tell)


def _timed(results: Path, name: str, job: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    results.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    job()
    with (results / "cpu-seconds.tsv").open("a") as file:
        file.write(f"{name}\t{time.process_time() - started:.1f}\n")


def _timings(results: Path) -> Timing:
    """CPU seconds by job, added up over all runs that it took."""
    seconds: Timing = {}
    for line in (results / "cpu-seconds.tsv").read_text().splitlines():
        name, _, spent = line.partition("\t")
        seconds[name] = seconds.get(name, 0.0) + float(spent)
    return seconds


def _run_all(jobs: Sequence[Job], processes: int) -> None:
    results_of = [partial(_timed, job.args[1], name, job) for name, job in jobs if isinstance(job, partial)]
    if processes == 1:
        for job in results_of:
            job()
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(job) for job in results_of]):
            done.result()


def _tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
