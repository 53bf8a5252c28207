"""What one head costs: time, and peak memory in arrays of its size; on a GPU also whether it stores what a CPU does.

python -m scripts.bench.heads [--device cuda] [--threads 4] [--channel full] [--hidden 4096] [--d-head 128]
    [--heads 32] [--kv-heads 32]

Heads of one layer are read, edited and rounded as `qkpatch apply` does, and written nowhere.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qkpatch.model.model import Model, open_model
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.device import choose_device, computing, heads_together
from qkpatch.patching.edit_heads import edit_batch
from qkpatch.patching.head_products import open_layer
from qkpatch.patching.threads import Crew
from qkpatch.planning.memory import head_memory
from qkpatch.spectral.rule import Channel, EditRule, Select

from .shapes import LLAMA_7B, TINY, Shape, build

Heads = Mapping[int, bytearray]  # what each is stored as


def main(shape: Shape, channel: Channel, device: torch.device, threads: int) -> None:
    """Edit every head of one layer and print what it took."""
    with tempfile.TemporaryDirectory(prefix="qkpatch-bench-") as folder, Crew(threads) as crew:
        tiny, whole = (open_model(str(build(each, Path(folder)))) for each in (TINY, shape))
        started = time.perf_counter()
        edit_layer(tiny, channel, device, crew)  # loads code
        first = time.perf_counter() - started
        before, wall, cpu = _reset_peak(device), time.perf_counter(), time.process_time()
        stored = edit_layer(whole, channel, device, crew)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        size = 8 * shape.d_head * shape.hidden
        text = f"{channel.value:14}{cpu / shape.heads * 1e3:7.1f} ms of CPU, {wall / shape.heads * 1e3:6.1f} ms a head"
        text += f"; {(_memory('VmHWM') - before) / size:.1f} float64 arrays at the peak"
        if device.type == "cuda":
            text += f", on the card {torch.cuda.max_memory_allocated(device) / size:.1f}"
            text += f"; start {first:.1f} s; {_differing(stored, whole, channel, crew)}"
    print(text, flush=True)


def edit_layer(model: Model, channel: Channel, device: torch.device, crew: Crew) -> Heads:
    """Edit the first layer, as ``patch`` does."""
    target, *_ = model.targets([0], fold_norm=False)
    rule = EditRule(channel, Select.dominant, 4, 0.5)
    together = heads_together(device, head_memory([target.layout]), crew.threads)

    def edit(heads: tuple[int, ...]) -> dict[int, bytearray]:
        return dict(_edit(model, target, rule, heads, together, device))

    n_heads, chunk = target.layout.n_heads, max(together, 4)
    chunks = [tuple(range(i, min(i + chunk, n_heads))) for i in range(0, n_heads, chunk)]
    return {head: data for part in crew.map(edit, chunks) for head, data in part.items()}


def _edit(
    model: Model,
    target: LayerTarget,
    rule: EditRule,
    heads: tuple[int, ...],
    together: int,
    device: torch.device,
) -> Heads:
    found: dict[int, bytearray] = {}
    with computing(device), open_layer(model.checkpoint.opened, target, device, heads) as weights:
        for batch in weights.batches(heads, together):
            stored, _ = edit_batch(weights, batch, rule, 0)
            if device.type == "cuda":  # to be compared; on a CPU they would count as memory
                found |= {head: stored.pieces[i][target.query] for i, head in enumerate(batch.heads)}
            del batch, stored
    return found


def _differing(stored: Heads, model: Model, channel: Channel, crew: Crew) -> str:
    """How many numbers are not those that a CPU stores, and by how many units in the last place."""
    target, *_ = model.targets([0], fold_norm=False)
    rule, cpu = EditRule(channel, Select.dominant, 4, 0.5), torch.device("cpu")
    count, most = 0, 0
    some = tuple(range(0, target.layout.n_heads, 4))
    with open_layer(model.checkpoint.opened, target, cpu, some) as weights:
        for batch in weights.batches(some, 1):
            (head,) = batch.heads
            expected, _ = edit_batch(weights, batch, rule, 0)
            ours, theirs = (_ordinals(data) for data in (stored[head], expected.pieces[0][target.query]))
            apart = (ours - theirs).abs()
            count, most = count + int((apart > 0).sum()), max(most, int(apart.max()))
    return f"{count} numbers of every 4th head differ from a CPU's, by at most {most} ULP"


def _ordinals(data: bytearray) -> torch.Tensor:
    """Places of float16 numbers among all of them; ±0 share one."""
    bits = torch.frombuffer(data, dtype=torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _reset_peak(device: torch.device) -> int:
    """Give back what is free, and begin the peaks anew; VmHWM at what is returned."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return _memory("VmRSS")


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def parse(arguments: Sequence[str]) -> tuple[Shape, argparse.Namespace]:
    """The layer to build, and the flags."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.heads", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:i")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channel", type=Channel, choices=list(Channel))
    parser.add_argument("--hidden", type=int, default=LLAMA_7B.hidden)
    parser.add_argument("--d-head", type=int, default=LLAMA_7B.d_head)
    parser.add_argument("--heads", type=int, default=LLAMA_7B.heads)
    parser.add_argument("--kv-heads", type=int, default=LLAMA_7B.kv_heads)
    asked = parser.parse_args(arguments)
    shape = replace(
        LLAMA_7B, name="one-layer", n_layers=1, shards=1, mlp=0, vocab=8, edited=(0, 0),
        hidden=asked.hidden, d_head=asked.d_head, heads=asked.heads, kv_heads=asked.kv_heads,
    )  # fmt: skip
    return shape, asked


if __name__ == "__main__":
    one, flags = parse(sys.argv[1:])
    if flags.channel is not None:
        main(one, flags.channel, choose_device(flags.device), flags.threads)
    else:  # in processes of their own, because memory that was used is kept
        for each in Channel:
            again = [sys.executable, "-m", "scripts.bench.heads", *sys.argv[1:], "--channel", each.value]
            subprocess.run(again, check=True)
