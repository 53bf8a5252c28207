"""What one head costs: CPU time on one thread, and peak memory in arrays of its size.

python -m scripts.bench.heads [--hidden 4096] [--d-head 128] [--heads 32] [--kv-heads 32]
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qkpatch.crew import Crew
from qkpatch.editing import head_generator
from qkpatch.model import open_model
from qkpatch.settings import Request
from qkpatch.spectral.edit import edit_and_round
from qkpatch.spectral.rule import Channel, EditRule, Select
from qkpatch.weights import open_layer, use_one_blas_thread

from .shapes import LLAMA_7B, TINY, Shape, build


def main(shape: Shape, channel: Channel) -> None:
    """Edit every head of one layer, write nothing, and print what it took."""
    with tempfile.TemporaryDirectory(prefix="qkpatch-bench-") as folder, Crew(1):
        use_one_blas_thread()
        edit_layer(TINY, channel, Path(folder))  # loads code
        build(shape, Path(folder))
        before, wall, cpu = _reset_peak(), time.perf_counter(), time.process_time()
        edit_layer(shape, channel, Path(folder))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        arrays = (_memory("VmHWM") - before) / (8 * shape.d_head * shape.hidden)
    print(
        f"{channel.value:14} {cpu / shape.heads * 1e3:6.1f} ms of CPU and {wall / shape.heads * 1e3:6.1f} ms a head; "
        f"{arrays:.1f} float64 arrays at the peak"
    )


def edit_layer(shape: Shape, channel: Channel, folder: Path) -> None:
    """Edit the first layer."""
    model = open_model(str(build(shape, folder)))
    target, *_ = model.targets(model.settings(Request(layers="0")))
    rule = EditRule(channel, Select.dominant, 4, 0.5)
    heads = tuple(range(shape.heads))
    with open_layer(model, target, torch.device("cpu"), heads) as weights:
        for of in weights.heads(heads):
            generator = head_generator(0, target, of.head)
            stored = edit_and_round(of.product, rule, partial(weights.store, of.head), generator)
            del of, stored


def _reset_peak() -> int:
    """Give back what is free, and begin VmHWM anew, at what is returned."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def parse(arguments: Sequence[str]) -> tuple[Shape, Channel | None]:
    """The layer to build, and the channel, or None for all."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.heads", description=__doc__)
    parser.add_argument("--hidden", type=int, default=LLAMA_7B.hidden)
    parser.add_argument("--d-head", type=int, default=LLAMA_7B.d_head)
    parser.add_argument("--heads", type=int, default=LLAMA_7B.heads)
    parser.add_argument("--kv-heads", type=int, default=LLAMA_7B.kv_heads)
    parser.add_argument("--channel", type=Channel, choices=list(Channel))
    asked = parser.parse_args(arguments)
    shape = replace(
        LLAMA_7B, name="one-layer", n_layers=1, shards=1, mlp=0, vocab=8, edited=(0, 0),
        hidden=asked.hidden, d_head=asked.d_head, heads=asked.heads, kv_heads=asked.kv_heads,
    )  # fmt: skip
    return shape, asked.channel


if __name__ == "__main__":
    one, chosen = parse(sys.argv[1:])
    if chosen is not None:
        main(one, chosen)
    else:  # in processes of their own, because memory that was used is kept
        for each in Channel:
            again = [sys.executable, "-m", "scripts.bench.heads", *sys.argv[1:], "--channel", each.value]
            subprocess.run(again, check=True)
