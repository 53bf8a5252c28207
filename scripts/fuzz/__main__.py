"""Fuzz a reader of files that somebody else wrote, guided by coverage. Needs atheris: `make fuzz`.

python -m scripts.fuzz [--target header] [--runs 1000000] [--seconds 0] [--seed 1] [--corpus .cache/fuzz/header]

A finding does not stop the run: the smallest input that shows it is kept in CORPUS/../findings, and the exit
code is 1 at the end. With the same seed and an empty corpus the run is the same again, time limit aside.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "fuzz"
MINIMISING_CHECKS = 3000


class Session:
    """One run on one target: counts, and findings by where they come from."""

    def __init__(self, check: Callable[[bytes], None], folder: Path, runs: int, seconds: float) -> None:
        self.check = check
        self.folder = folder
        self.runs = runs
        self.seconds = seconds
        self.done = 0
        self.start = time.monotonic()
        self.found: dict[str, bytes] = {}

    def one(self, content: bytes) -> None:
        """Check one input and note what is wrong."""
        self.done += 1
        sign = self.sign(content)
        if sign is not None and (sign not in self.found or len(content) < len(self.found[sign])):
            is_new = sign not in self.found
            self.found[sign] = self.minimised(content, sign) if is_new else content
            if is_new:
                print(f"FINDING {sign}\n  {self.found[sign][:400]!r}", flush=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            number = list(self.found).index(sign)
            (self.folder / f"{number}.bin").write_bytes(self.found[sign])
            (self.folder / f"{number}.txt").write_text(sign + "\n")
        if self.done >= self.runs or (self.seconds and time.monotonic() - self.start > self.seconds):
            self.report()
            os._exit(bool(self.found))  # libFuzzer itself would leave without a word

    def sign(self, content: bytes) -> str | None:
        """Kind and place of what is wrong with the answer to ``content``; None where nothing is."""
        try:
            self.check(content)
        except AssertionError as error:
            return f"verdict: {str(error)[:40]}"
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "qkpatch" in Path(f.filename).parts] or [*frames]
            return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].name}"
        return None

    def minimised(self, content: bytes, sign: str) -> bytes:
        """The input with pieces left out, as long as the same is wrong with it."""
        checks, size = 0, max(len(content) // 2, 1)
        while size and checks < MINIMISING_CHECKS:
            at = 0
            while at < len(content) and checks < MINIMISING_CHECKS:
                shorter = content[:at] + content[at + size :]
                checks += 1
                if self.sign(shorter) == sign:
                    content = shorter
                else:
                    at += size
            size //= 2
        return content

    def report(self) -> None:
        """The figures of the run."""
        took = time.monotonic() - self.start
        print(
            f"{self.done} executions in {took:.0f} s ({self.done / took:.0f}/s), {len(self.found)} finding(s)"
        )
        for sign, content in self.found.items():
            print(f"  {sign}: {content[:400]!r}")
        sys.stdout.flush()


def main() -> None:
    """Fuzz until the runs or the seconds are over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", default="header")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-bytes", type=int, default=4096)
    parser.add_argument("--corpus", type=Path, help="kept from run to run; without it, the run starts anew")
    options = parser.parse_args()

    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["qkpatch", "json"]):
        from scripts.fuzz import targets

    target = targets.TARGETS[options.target]
    corpus: Path = options.corpus or CACHE / options.target
    if options.corpus is None and corpus.exists():
        shutil.rmtree(corpus)
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = target.seeds()
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    session = Session(
        target.check, corpus.parent / f"{options.target}-findings", options.runs, options.seconds
    )

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.1:
            return bytes(atheris.Mutate(data, max_size))
        if (
            rng.random() < 0.3
        ):  # most of what is new to the coverage is broken early; changes of it get no further
            data = rng.choice(seeds)
        return bytes(target.mutate(data, rng)[:max_size])

    flags = [
        f"-runs={options.runs}",
        f"-seed={options.seed}",
        f"-max_len={options.max_bytes}",
        "-len_control=0",
    ]
    atheris.Setup([sys.argv[0], *flags, "-timeout=60", str(corpus)], session.one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
