"""Medians, ratios, the targets they are held against, and the page that shows them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from scripts.markdown import joined, table

from .contest import APPLY, COPY, HERE, IMPORT, INSPECT, LOOP, REAL_COPY, Run
from .shapes import ALL, LLAMA_7B

REFLINK = ("btrfs", "xfs")
MAX_OVER_COPY = 1.0
MAX_OVER_LOOP_IN_MEMORY = 0.5
MAX_OVER_LOOP = 1.0
MAX_REFLINK_SECONDS = 3.0
MAX_PEAK = 400e6
MAX_USER_SECONDS = 7.0  # of the 7B, the kernel's apart
MAX_INSPECT_SECONDS = 5.0
MAX_INSPECT_CPU = 9.0
HEAD = (
    "what", "wall s", "min–max (rounds)", "× copy", "× loop", "CPU s", "user s", "RSS", "anonymous",
    "read", "written", "disk",
)  # fmt: skip
LARGE = 1e9  # bytes from which on the targets of time hold; below, a process mostly starts


@dataclass(frozen=True)
class Row:
    """One contestant in one setting, over all rounds."""

    shape: str
    place: str
    cache: str
    contestant: str
    rounds: int
    wall: float
    wall_min: float
    wall_max: float
    cpu: float
    user: float
    over_copy: float | None  # median of the ratios within a round
    over_loop: float | None
    peak_rss: int
    peak_anonymous: int
    asked_read: int
    asked_written: int
    disk_read: int
    disk_written: int


@dataclass(frozen=True)
class Verdict:
    """A target and what was found."""

    what: str
    found: float
    limit: float
    unit: str

    @property
    def is_met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.found <= self.limit


def rows(runs: Iterable[Run]) -> list[Row]:
    """A row for each contestant and setting, in the order of the first run."""
    groups: dict[tuple[str, str, str, str], dict[int, Run]] = {}
    for run in runs:
        groups.setdefault((run.shape, run.place, run.cache, run.contestant), {})[run.round] = run

    def ratio(key: tuple[str, str, str, str], other: str) -> float | None:
        writes = key[3] not in (INSPECT.name, IMPORT.name)
        others = groups.get((*key[:3], other), {}) if writes else {}
        pairs = [(run.usage.wall, others[n].usage.wall) for n, run in groups[key].items() if n in others]
        return median(mine / theirs for mine, theirs in pairs) if pairs else None

    found = []
    for key, by_round in groups.items():
        usages = [run.usage for run in by_round.values()]
        walls = [usage.wall for usage in usages]
        found.append(
            Row(
                *key,
                rounds=len(walls),
                wall=median(walls),
                wall_min=min(walls),
                wall_max=max(walls),
                cpu=median(usage.cpu for usage in usages),
                user=median(usage.user for usage in usages),
                over_copy=ratio(key, REAL_COPY.name if key[1] in REFLINK else COPY.name),
                over_loop=ratio(key, LOOP.name),
                peak_rss=max(usage.peak_rss for usage in usages),
                peak_anonymous=max(usage.peak_anonymous for usage in usages),
                asked_read=max(usage.asked_read for usage in usages),
                asked_written=max(usage.asked_written for usage in usages),
                disk_read=max(usage.disk_read for usage in usages),
                disk_written=max(usage.disk_written for usage in usages),
            )
        )
    return found


def verdicts(table: Iterable[Row]) -> list[Verdict]:
    """All targets that the rows can speak to."""
    found = []
    for row in table:
        at = f"{row.shape}, {row.place}, {row.cache}"
        is_large = ALL[row.shape].n_bytes >= LARGE
        if row.contestant == INSPECT.name:
            found.append(Verdict(f"inspect, {at}", row.wall, MAX_INSPECT_SECONDS, "s"))
            found.append(Verdict(f"CPU time of inspect, {at}", row.cpu, MAX_INSPECT_CPU, "s"))
        if row.contestant in (APPLY.name, INSPECT.name):
            what = row.contestant.split()[-1]
            found.append(Verdict(f"peak memory of {what}, {at}", row.peak_rss / 1e6, MAX_PEAK / 1e6, "MB"))
        if row.contestant != APPLY.name or not is_large:
            continue
        if row.shape == LLAMA_7B.name:
            found.append(Verdict(f"user time of apply, {at}", row.user, MAX_USER_SECONDS, "s"))
        if row.place in REFLINK:
            found.append(Verdict(f"apply, {at}", row.wall, MAX_REFLINK_SECONDS, "s"))
        elif row.over_copy is not None and not ALL[row.shape].is_sparse:  # cp leaves holes out
            found.append(Verdict(f"apply ÷ cp -r + sync, {at}", row.over_copy, MAX_OVER_COPY, "×"))
        if row.over_loop is not None:
            limit = MAX_OVER_LOOP_IN_MEMORY if row.place == "tmpfs" else MAX_OVER_LOOP
            found.append(Verdict(f"apply ÷ load/edit/save loop, {at}", row.over_loop, limit, "×"))
    return found


def machine() -> dict[str, str]:
    """What the figures depend on, without the machine's name or its paths."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.M)
    cp = subprocess.run(["cp", "--version"], capture_output=True, text=True).stdout
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "cpu": cpu[1] if cpu else platform.machine(),
        "memory": f"{int(memory[1]) * 1024 / 1e9:.0f} GB" if memory else "unknown",
        "kernel": re.split(r"[-+]", platform.release())[0],
        "commit": commit or "not in a repository",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("qkpatch", "torch", "safetensors")},
        "cp": cp.split("\n")[0].split()[-1] if cp else "unknown",
    }


def document(
    table: Sequence[Row],
    runs: Sequence[Run],
    facts: dict[str, str],
    dense: float | None,
    notes: Sequence[str],
) -> dict[str, object]:
    """Everything as JSON."""
    return {
        "machine": facts,
        "dense_svd_seconds": dense,
        "rows": [asdict(row) for row in table],
        "verdicts": [{**asdict(verdict), "is_met": verdict.is_met} for verdict in verdicts(table)],
        "runs": [asdict(run) for run in runs],
        "notes": list(notes),
    }


def markdown(found: Sequence[Row], facts: dict[str, str], dense: float | None, notes: Sequence[str]) -> str:
    """The page for people."""
    blocks = [
        "# Benchmarks",
        "Written by `make bench`, which anybody can run: see `python -m scripts.bench --help`. Every figure is of a "
        "whole process, its start included. Contestants take turns within a round; × are medians of the ratios within "
        "a round, because a round shares what else runs on the machine. Wall and CPU time are medians (of the latter, "
        "`user` is what the kernel did not take), all else is the largest of the rounds. Memory (RSS, and what of it "
        "is anonymous) is in MB. What was read and written, and what of it reached the disk, is in GB.",
        table(("machine", ""), facts.items()),
        "![Wall time against bytes: a copy, qkpatch apply, the load/edit/save loop](bench.svg)",
    ]
    for shape in dict.fromkeys(row.shape for row in found):
        size = ALL[shape].n_bytes / 1e9
        blocks += [
            f"## {shape}",
            f"{ALL[shape].title}; {size:.1f} GB; layers {ALL[shape].layers} are edited.",
        ]
        rows_of: dict[tuple[str, str], list[Row]] = {}
        for row in found:
            if row.shape == shape:
                rows_of.setdefault((row.place, row.cache), []).append(row)
        for (place, cache), some in rows_of.items():
            blocks += [f"### {shape}, {place}, {cache}", table(HEAD, map(_cells, some))]
    if dense is not None:
        heads = 9 * 32
        blocks += [
            "## A dense SVD",
            f"One head's 4096 × 4096 product, formed and decomposed in float32: {dense:.1f} s measured. "
            f"**Extrapolated**, not measured: {dense * heads / 60:.0f} minutes for the {heads} heads of nine layers.",
        ]
    judged = (
        (v.what, _figure(v.found, v.unit), _figure(v.limit, v.unit), "met" if v.is_met else "**missed**")
        for v in verdicts(found)
    )
    blocks += ["## Targets", table(("target", "found", "limit", ""), judged)]
    if notes:
        blocks += ["## Notes", "\n".join(f"* {note}" for note in notes)]
    return joined(blocks)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.contestant,
        f"{row.wall:.2f}",
        f"{row.wall_min:.2f}–{row.wall_max:.2f} ({row.rounds})",
        _figure(row.over_copy, ""),
        _figure(row.over_loop, ""),
        f"{row.cpu:.1f}",
        f"{row.user:.1f}",
        f"{row.peak_rss / 1e6:.0f}",
        f"{row.peak_anonymous / 1e6:.0f}",
        f"{row.asked_read / 1e9:.2f}",
        f"{row.asked_written / 1e9:.2f}",
        f"{row.disk_read / 1e9:.2f} / {row.disk_written / 1e9:.2f}",
    )


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = f"{value:.0f}" if unit == "MB" else f"{value:.3g}" if value < 1 else f"{value:.2f}"
    return f"{digits} {unit}".strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
