"""Benchmark qkpatch against a copy, the load/edit/save loop and mergekit, on checkpoints of real size.

python -m scripts.bench [--quick] [--scale small|full] [--dir .cache/bench] [--rounds 3] [--write]

Builds what is missing in DIR (--dry-run says how much that is), lets all take turns, and prints medians, ratios and
whether the targets are met. --quick takes about two minutes and 3 GB. Exit code 1: an output does not verify, or
something cannot run. Missed targets are figures, not failures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .chart import draw
from .contest import (
    APPLY,
    COPY,
    IMPORT,
    INSPECT,
    LOOP,
    REAL_COPY,
    Contestant,
    Place,
    Run,
    contest,
    mergekit,
)
from .measure import BenchError, PageCache, Usage, measure
from .places import check_free, free_memory, image_place, kind_of
from .report import REFLINK, document, machine, markdown, rows, verdicts
from .shapes import ALL, LLAMA_7B, ONE_5G, QUICK, SCALES, TINY, Shape, build, is_built

REPO = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
PAGE = REPO / "docs" / "bench.md"
MEMORY = Path("/dev/shm")
PARTS = ("disk", "tmpfs", "nvme", "btrfs", "xfs", "inspect", "dense", "mergekit")


@dataclass
class Session:
    """What a call asks for, and what it has found."""

    folder: Path
    shapes: tuple[Shape, ...]
    parts: tuple[str, ...]
    caches: tuple[str, ...]
    rounds: int
    page_cache: PageCache = field(default_factory=PageCache)
    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dense: float | None = None  # seconds of one dense SVD

    def tell(self, line: str) -> None:
        """Progress, on stderr."""
        print(line, file=sys.stderr, flush=True)

    def join(self, files: Sequence[Path]) -> None:
        """Take over what earlier calls have found."""
        for file in files:
            found = json.loads(file.read_text())
            first = 1 + max((run.round for run in self.runs), default=-1)
            self.runs += [
                Run(**{**run, "round": first + run["round"], "usage": Usage(**run["usage"])})
                for run in found["runs"]
            ]
            self.notes += [note for note in found["notes"] if note not in self.notes]
            self.dense = self.dense or found["dense_svd_seconds"]

    @contextmanager
    def optional(self) -> Iterator[None]:
        """A part that not every machine can run."""
        try:
            yield
        except BenchError as error:
            self.notes.append(f"skipped: {error}")
            self.tell(self.notes[-1])

    def race(self, shape: Shape, source: Path, place: Place, *contestants: Contestant) -> None:
        """Measure; the first output is proven, too."""
        # As they come: what is measured before an interrupt is not lost.
        for found in contest(shape, source, place, contestants, self.rounds, self.page_cache, self.tell):
            if isinstance(found, Run):
                self.runs.append(found)
            else:
                self.notes.append(found)

    def on_disk(self) -> None:
        """All shapes, in the folder itself."""
        with self._mergekit() as extra:
            for shape in self.shapes:
                missing = 0 if is_built(shape, self.folder) else shape.disk_bytes
                check_free(self.folder, missing + shape.n_bytes)
                source = self._built(shape)
                if "warm" in self.caches and 2 * shape.n_bytes > free_memory():
                    self.notes.append(
                        f"{shape.name}: source and output do not fit in memory, so warm is partly cold"
                    )
                place = Place(kind_of(self.folder), self.folder, self.caches)
                inspect = [INSPECT] if "inspect" in self.parts and shape in (LLAMA_7B, QUICK, TINY) else []
                self.race(shape, source, place, COPY, APPLY, LOOP, *extra, *inspect)

    def in_memory(self) -> None:
        """The shape of 5 GB on tmpfs, where a disk cannot hide the work."""
        shape = self._movable()
        needed = 2 * shape.n_bytes + 1.2 * shape.n_bytes  # source, output, and what the loop holds
        if needed > free_memory():
            raise BenchError(
                f"tmpfs: {needed / 1e9:.1f} GB of memory are needed, {free_memory() / 1e9:.1f} are free"
            )
        if not MEMORY.is_dir():
            raise BenchError(f"tmpfs: there is no {MEMORY}")
        check_free(MEMORY, 2 * shape.n_bytes)
        with tempfile.TemporaryDirectory(dir=MEMORY, prefix="qkpatch-bench-") as temporary:
            source = build(shape, Path(temporary))
            self.race(shape, source, Place("tmpfs", Path(temporary), ("memory",)), COPY, APPLY, LOOP)

    def on_fast_disk(self) -> None:
        """The shape of 5 GB on a loop device whose image is in memory, which stands in for NVMe."""
        shape = self._movable()
        size = max(int(2.3 * shape.n_bytes), 600 << 20)
        if size + 1.2 * shape.n_bytes > free_memory():
            raise BenchError(f"nvme: {(size + 1.2 * shape.n_bytes) / 1e9:.1f} GB of memory are needed")
        check_free(MEMORY, size)
        with (
            tempfile.TemporaryDirectory(dir=MEMORY, prefix="qkpatch-bench-") as temporary,
            image_place(Path(temporary), size, "ext4") as mount,
        ):
            source = build(shape, mount)
            self.race(shape, source, Place("loop on tmpfs", mount, ("cold", "warm")), COPY, APPLY, LOOP)

    def with_reflinks(self, kind: str) -> None:
        """The shape of 5 GB in an image whose file system shares blocks."""
        shape = self._movable()
        size = max(int(2.3 * shape.n_bytes), 600 << 20)
        check_free(self.folder, size)
        with image_place(self.folder, size, kind) as mount:
            source = build(shape, mount)
            self.race(shape, source, Place(kind, mount, ("cold", "warm")), COPY, REAL_COPY, APPLY, IMPORT)

    def measure_dense(self) -> None:
        """Seconds of one dense SVD."""
        hidden = 64 if self.shapes == (TINY,) else 4096
        self.dense = float(measure([sys.executable, HERE / "dense.py", str(hidden), "128"])[1])

    def _movable(self) -> Shape:
        return TINY if self.shapes == (TINY,) else ONE_5G

    def _built(self, shape: Shape) -> Path:
        if not is_built(shape, self.folder):
            self.tell(f"building {shape.name}, {shape.n_bytes / 1e9:.1f} GB ...")
        return build(shape, self.folder)

    @contextmanager
    def _mergekit(self) -> Iterator[list[Contestant]]:
        extra: list[Contestant] = []
        if "mergekit" in self.parts:
            with self.optional():
                extra.append(mergekit(self.folder, REPO / "constraints.txt"))
        yield extra


def main() -> int:
    """Run the benchmarks that were asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=REPO / ".cache" / "bench", help="default: .cache/bench")
    parser.add_argument("--scale", choices=SCALES, default="small", help="default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="as --scale quick --parts disk,inspect --cache warm --clean"
    )
    parser.add_argument("--shapes", metavar="A,B", help=f"of {', '.join(ALL)} instead of a scale's")
    parser.add_argument("--parts", metavar="A,B", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--cache", metavar="A,B", default="cold,warm", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: DIR/bench.json")
    parser.add_argument(
        "--join", type=Path, nargs="+", default=[], metavar="FILE", help="show these calls' runs, too"
    )
    parser.add_argument("--write", action="store_true", help="write docs/bench.md")
    parser.add_argument("--clean", action="store_true", help="remove the checkpoints in the end")
    parser.add_argument("--dry-run", action="store_true", help="only say what is needed")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.scale, arguments.parts, arguments.cache, arguments.clean = (
            "quick",
            "disk,inspect",
            "warm",
            True,
        )
    signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )  # so that mounts and memory are given back
    shapes = (
        tuple(ALL[name] for name in arguments.shapes.split(","))
        if arguments.shapes
        else SCALES[arguments.scale]
    )
    folder: Path = arguments.dir
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(
        folder, shapes, tuple(arguments.parts.split(",")), tuple(arguments.cache.split(",")), arguments.rounds
    )
    missing = sum(shape.disk_bytes for shape in shapes if not is_built(shape, folder))
    needed = missing + max(shape.n_bytes for shape in shapes)
    free = shutil.disk_usage(folder).free
    session.tell(
        f"checkpoints {missing / 1e9:.1f} GB and one output: {needed / 1e9:.1f} GB; free {free / 1e9:.1f} GB"
    )
    if arguments.dry_run:
        return 0
    target: Path = arguments.json or folder / "bench.json"
    failure: BenchError | None = None
    try:
        _run(session)
    except BenchError as error:
        failure = error
    finally:  # what was found until then is not lost
        session.join(arguments.join)
        _show(session, target, write=arguments.write)
        if arguments.clean:
            for shape in shapes:
                shutil.rmtree(folder / shape.name, ignore_errors=True)
                (folder / f"{shape.name}.stamp").unlink(missing_ok=True)
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failure else 0


def _run(session: Session) -> None:
    if "dense" in session.parts:
        session.measure_dense()
    if "tmpfs" in session.parts:
        with session.optional():
            session.in_memory()
    if "nvme" in session.parts:
        with session.optional():
            session.on_fast_disk()
    for kind in REFLINK:
        if kind in session.parts:
            with session.optional():
                session.with_reflinks(kind)
    if "disk" in session.parts:
        session.on_disk()


def _show(session: Session, target: Path, *, write: bool) -> None:
    table = rows(session.runs)
    facts = {**machine(), "file system": kind_of(session.folder), "cold means": session.page_cache.means}
    target.write_text(
        json.dumps(document(table, session.runs, facts, session.dense, session.notes), indent=1)
    )
    page = markdown(table, facts, session.dense, session.notes)
    print(page)
    missed = [verdict.what for verdict in verdicts(table) if not verdict.is_met]
    session.tell(f"{len(missed)} target(s) missed; all runs are in {target}")
    if write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page)
        PAGE.with_suffix(".svg").write_text(draw(table))


if __name__ == "__main__":
    sys.exit(main())
