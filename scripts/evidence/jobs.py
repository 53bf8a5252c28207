"""What the worker processes do. They are spawned, and a spawned process imports no package's ``__main__``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from scripts.evidence import language, toy
from scripts.evidence.edits import Edit
from scripts.evidence.report import Timing

SPENT = "cpu-seconds.tsv"


@dataclass(frozen=True)
class Job:
    """A piece of work for one core, which puts what it finds into ``results``."""

    name: str
    results: Path
    work: Callable[[], None]

    @classmethod
    def reading(cls, path: Path, results: Path, budget: language.Budget) -> Job:
        """What edits cost SmolLM2."""
        return cls("language", results, partial(_read, path, results, budget))

    @classmethod
    def validation(cls, path: Path, results: Path, budget: toy.Budget) -> Job:
        """A toy's grid."""
        return cls(f"validation {path.name}", results, partial(_validate, path, results, budget))

    @classmethod
    def test(cls, path: Path, results: Path, budget: toy.Budget, edits: list[Edit]) -> Job:
        """The one look at a toy's test scenes."""
        return cls(f"test {path.name}", results, partial(_test, path, results, budget, edits))

    def __call__(self) -> None:
        """Do it, and note the CPU seconds that it took."""
        torch.set_num_threads(1)
        self.results.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        self.work()
        with (self.results / SPENT).open("a") as file:
            file.write(f"{self.name}\t{time.process_time() - started:.1f}\n")


def run_all(jobs: Sequence[Job], processes: int) -> None:
    """Do all jobs, so many at a time; the first that fails ends it."""
    if processes == 1:
        for job in jobs:
            job()
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(job) for job in jobs]):
            done.result()


def timings(results: Path) -> Timing:
    """CPU seconds by job, added up over all runs that it took."""
    seconds: Timing = {}
    for line in (results / SPENT).read_text().splitlines():
        name, _, spent = line.partition("\t")
        seconds[name] = seconds.get(name, 0.0) + float(spent)
    return seconds


def tell(line: str) -> None:
    """Say what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _read(path: Path, results: Path, budget: language.Budget) -> None:
    language.run(language.Reader(path, results, budget), budget, tell)


def _validate(path: Path, results: Path, budget: toy.Budget) -> None:
    toy.run_validation(toy.Subject(path, results, budget), budget, tell)


def _test(path: Path, results: Path, budget: toy.Budget, edits: list[Edit]) -> None:
    toy.run_test(toy.Subject(path, results, budget), edits, budget, tell)
