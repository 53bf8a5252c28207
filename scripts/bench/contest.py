"""Who is measured, on what, and how often: rounds in which all take turns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .measure import BenchError, PageCache, Usage, measure
from .shapes import Shape

HERE = Path(__file__).resolve().parent
MODES = 4
ALPHA = 0.5  # as in loop.py
MERGEKIT = "mergekit==0.1.5"

Command = list[str | Path]


@dataclass(frozen=True)
class Contestant:
    """Processes that, one after the other, make ``out`` of ``source``."""

    name: str
    commands: Callable[[Shape, Path, Path], list[Command]]
    is_in: Callable[[Shape], bool] = lambda _: True


@dataclass(frozen=True)
class Run:
    """One contestant's turn."""

    shape: str
    place: str  # the file system
    cache: str  # "cold", "warm" or "memory"
    contestant: str
    round: int
    usage: Usage


@dataclass(frozen=True)
class Place:
    """A folder on a file system, and which states of its page cache there are."""

    name: str
    folder: Path
    caches: tuple[str, ...]


def copying(*flags: str) -> Callable[[Shape, Path, Path], list[Command]]:
    """``cp -r`` and the wait for the disk."""
    return lambda _, source, out: [["cp", "-r", *flags, source, out], ["sync", "-f", out]]


def _apply(shape: Shape, source: Path, out: Path) -> list[Command]:
    command: Command = [sys.executable, "-m", "qkpatch", "apply", source, "-o", out, "--quiet"]
    return [[*command, "--layers", shape.layers, "--modes", str(MODES), "--alpha", str(ALPHA)]]


def _loop(shape: Shape, source: Path, out: Path) -> list[Command]:
    return [[sys.executable, HERE / "loop.py", source, out, shape.layers, str(MODES)]]


def _inspect(_: Shape, source: Path, out: Path) -> list[Command]:
    return [[sys.executable, "-m", "qkpatch", "inspect", source, "--csv"]]


APPLY = Contestant("qkpatch apply", _apply)
LOOP = Contestant("load/edit/save loop", _loop)
IMPORT = Contestant("import torch", lambda *_: [[sys.executable, "-c", "import torch"]])
COPY = Contestant("cp -r + sync", copying())
REAL_COPY = Contestant("cp -r --reflink=never + sync", copying("--reflink=never"))
INSPECT = Contestant("qkpatch inspect", _inspect, lambda shape: not shape.is_sparse)


def mergekit(folder: Path, constraints: Path) -> Contestant:
    """The passthrough of mergekit, in an environment of its own with the same torch.

    Raises:
        BenchError: it cannot be installed.
    """
    venv = folder / "mergekit-venv"
    tool = venv / "bin" / "mergekit-yaml"
    if not tool.exists():
        pins = folder / "mergekit-constraints.txt"
        folder.mkdir(parents=True, exist_ok=True)
        pins.write_text(
            "".join(line for line in constraints.read_text().splitlines(True) if line.startswith("torch"))
        )
        pip: Command = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", pins]
        make: Command = [sys.executable, "-m", "venv", venv]
        for command in (make, [*pip, MERGEKIT]):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                raise BenchError(f"{MERGEKIT} cannot be installed: {done.stderr.strip()[-300:]}")

    def commands(shape: Shape, source: Path, out: Path) -> list[Command]:
        recipe = folder / f"mergekit-{shape.name}.yaml"
        slices = f"[{{sources: [{{model: {source.resolve()}, layer_range: [0, {shape.n_layers}]}}]}}]"
        recipe.write_text(f"merge_method: passthrough\ndtype: float16\nslices: {slices}\n")
        flags = ["--no-copy-tokenizer", "--no-write-model-card"]
        return [[tool, recipe, out, *flags], ["sync", "-f", out]]

    # A table of architectures names all tensors of a llama, no more and no less.
    return Contestant("mergekit copy + sync", commands, lambda s: bool(s.mlp and not s.ballast))


def contest(
    shape: Shape,
    source: Path,
    place: Place,
    contestants: Sequence[Contestant],
    rounds: int,
    page_cache: PageCache,
    tell: Callable[[str], None],
) -> Iterator[Run | str]:
    """Each run, and a note on each that had to leave. Each round begins with the next contestant.

    Raises:
        BenchError: qkpatch fails, or its first output does not verify.
    """
    out, is_verified = place.folder / "out", False
    racing = [contestant for contestant in contestants if contestant.is_in(shape)]
    for cache in place.caches:
        for number in range(rounds):
            turn = number % max(1, len(racing))
            for contestant in [*racing[turn:], *racing[:turn]]:
                if contestant not in racing:
                    continue
                _prepare(cache, source, out, page_cache)
                try:
                    usage = _total(contestant.commands(shape, source, out))
                except BenchError as error:
                    if contestant is APPLY:
                        raise
                    left = f"{contestant.name} left out on {shape.name}, {place.name}: {error}"
                    tell(left)
                    yield left
                    racing.remove(contestant)
                    continue
                yield Run(shape.name, place.name, cache, contestant.name, number, usage)
                if contestant is APPLY and not is_verified:
                    verify(shape, source, out)
                    is_verified = True
                    tell(f"{shape.name}, {place.name}: the output verifies")
                tell(
                    f"{shape.name}, {place.name}, {cache}, round {number + 1}: {contestant.name} {usage.wall:.1f} s, "
                    f"peak {usage.peak_rss / 1e6:.0f} MB"
                )
    _remove(out)


def verify(shape: Shape, source: Path, out: Path) -> None:
    """Prove an output of :data:`APPLY`.

    Raises:
        BenchError: it does not verify, or another edit was made than asked for.
    """
    measure([sys.executable, "-m", "qkpatch", "verify", out, "--source", source])
    manifest = json.loads((out / "qkpatch.json").read_text())
    if [edit["layer"] for edit in manifest["edits"]] != list(shape.edited_layers):
        raise BenchError(f"{shape.name}: not the layers {shape.layers} were edited")


def _total(commands: Iterable[Command]) -> Usage:
    total: Usage | None = None
    for command in commands:
        usage, _ = measure(command)
        total = usage if total is None else total.then(usage)
    if total is None:
        raise BenchError("nothing to run")
    return total


def _prepare(cache: str, source: Path, out: Path, page_cache: PageCache) -> None:
    _remove(out)
    os.sync()
    if cache == "cold":
        page_cache.empty(source)
    elif cache == "warm":
        page_cache.fill(source)


def _remove(out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
