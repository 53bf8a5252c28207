"""What N workers bring where each has a link of so many bytes a second, and the store they share has its own limit.

python -m scripts.bench.parts [--workers 1,2,4,8] [--link 12] [--store 48] [--shape parts] [--dir .cache/bench]

Links and the store are made of delays: a worker waits, by the byte that it carries from SOURCE to OUT, until its link
and the store would have let it through, both ways. Everything else is real: whole processes on this machine, which
share its cores. `start` is until the first byte moves, mostly `import torch`, which workers with cores of their own
would do side by side; `finish` is one process, that reads no more than the edited tensors. The two are not divided.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.markdown import table

from .shapes import ALL, LLAMA_7B, Shape, build

SHAPE = replace(
    LLAMA_7B, name="parts", title="for parts", shards=24, n_layers=24, hidden=1024, heads=16, kv_heads=16, mlp=2048,
    d_head=64, vocab=8000, edited=(8, 15),
)  # fmt: skip


class Limit:
    """So many bytes a second, for all processes that name the same file: each reserves its time, and waits for it."""

    def __init__(self, file: Path, rate: float) -> None:
        self._fd, self._rate = os.open(file, os.O_RDWR | os.O_CREAT), rate

    def wait(self, n_bytes: int) -> None:
        """Until ``n_bytes`` more would be through."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        now, said = time.monotonic(), os.pread(self._fd, 16, 0)
        first, until = struct.unpack("dd", said) if said else (now, now)
        until = max(now, until) + n_bytes / self._rate
        os.pwrite(self._fd, struct.pack("dd", first, until), 0)
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        time.sleep(max(0.0, until - time.monotonic()))


def work(limits: list[Limit], arguments: list[str]) -> None:
    """Be one worker: `qkpatch` with these arguments, whose copies pass the limits."""
    from qkpatch import cli
    from qkpatch.output.passage import Passage

    copy: Callable[..., str] = Passage.copy

    def limited(self: Passage, begin: int, end: int, at: int, progress: Any, digest: Any = None) -> str:
        def slow(n_bytes: int) -> None:
            for limit in limits:
                limit.wait(2 * n_bytes)  # read, and written
            progress(n_bytes)

        return copy(self, begin, end, at, slow, digest)

    Passage.copy = limited  # type: ignore[method-assign]
    sys.argv = ["qkpatch", *arguments]
    cli.main()


def race(
    source: Path, shape: Shape, folder: Path, count: int, link: float, store: float
) -> tuple[float, float, float]:
    """Seconds of ``count`` workers and then ``finish``; of these, until the first byte, and of ``finish``."""
    out = folder / "out"
    edit = ["--layers", shape.layers, "--modes", "4", "--quiet", "--threads", "1"]
    started = time.monotonic()
    workers = [
        subprocess.Popen([
            sys.executable, "-m", "scripts.bench.parts", "--work", f"{folder}/link-{number}:{link}",
            f"{folder}/store:{store}", "--", "apply", str(source), "-o", str(out), *edit, "--part", f"{number}/{count}",
        ])
        for number in range(1, count + 1)
    ]  # fmt: skip
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit("a worker failed")
    first, _ = struct.unpack("dd", (folder / "store").read_bytes())
    written = time.monotonic()
    subprocess.run([sys.executable, "-m", "qkpatch", "finish", str(out), "--quiet"], check=True)
    done = time.monotonic()
    shutil.rmtree(out)
    return done - started, first - started, done - written


def main() -> None:
    """Measure each number of workers."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.parts", description=__doc__)
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--link", type=float, default=12.0, help="MB/s of each worker")
    parser.add_argument("--store", type=float, default=48.0, help="MB/s of all together")
    parser.add_argument("--shape", choices=(SHAPE.name, *ALL), default=SHAPE.name)
    parser.add_argument("--dir", type=Path, default=Path(".cache/bench"))
    if sys.argv[1:2] == ["--work"]:  # one of the workers of such a call
        at = sys.argv.index("--")
        limits = [part.rpartition(":") for part in sys.argv[2:at]]
        work([Limit(Path(file), float(rate)) for file, _, rate in limits], sys.argv[at + 1 :])
        return
    asked = parser.parse_args()
    shape = ({SHAPE.name: SHAPE} | ALL)[asked.shape]
    source, found, single = build(shape, asked.dir), [], 0.0
    for count in map(int, asked.workers.split(",")):
        with tempfile.TemporaryDirectory(dir=asked.dir, prefix="parts-") as folder:
            wall, start, finish = race(
                source, shape, Path(folder), count, asked.link * 1e6, asked.store * 1e6
            )
        single = single or wall
        least = 2 * shape.n_bytes / 1e6 / min(count * asked.link, asked.store)
        row = (
            f"{count}",
            f"{wall:.1f}",
            f"{single / wall:.2f}",
            f"{least:.1f}",
            f"{start:.1f}",
            f"{finish:.1f}",
        )
        found.append(row)
        print(*row, file=sys.stderr, flush=True)
    print(
        f"{shape.n_bytes / 1e9:.2f} GB in {shape.shards} shards; {asked.link:g} MB/s a worker, {asked.store:g} in all"
    )
    print(table(["workers", "wall s", "× one", "bytes alone s", "start s", "finish s"], found))


if __name__ == "__main__":
    main()
