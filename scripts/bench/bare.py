"""One head against its matrix calls alone: what an edit with its report, and a spectrum, cost over what they must.

python -m scripts.bench.bare [--hidden 4096] [--d-head 128] [--heads 32] [--kv-heads 32] [--rounds 3]

Processor time, one thread; the two take turns head by head, and × is the median of the ratios of a head.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from qkpatch.common.system import share_free_memory
from qkpatch.model.model import Model, open_model
from qkpatch.patching.edit_heads import edit_batch
from qkpatch.patching.head_products import HeadWeights, LayerWeights, open_layer
from qkpatch.patching.spectra import _head_spectra
from qkpatch.spectral.rule import Channel, EditRule, Select

from .heads import parse
from .shapes import Shape, build

RULE = EditRule(Channel.full, Select.dominant, 4, 0.5)
BLOCK = 32
Calls = list[Callable[[], Tensor]]


def gram(W: Tensor) -> Tensor:
    """``W Wᵀ``; of what is above the diagonal, only blocks."""
    G = W.new_zeros(len(W), len(W))
    for i in range(0, len(W), BLOCK):
        G[i:, i : i + BLOCK] = W[i:] @ W[i : i + BLOCK].mT
    return G


def edit_calls(W_Q: Tensor, W_K: Tensor, has_new_keys: bool) -> Calls:
    """The matrix calls of one edit in the full channel, with its report."""
    L_q, L_k = (torch.linalg.cholesky(gram(W)) for W in (W_Q, W_K))
    core = L_q.mT @ L_k
    U = torch.linalg.svd(core).U[:, : RULE.modes].contiguous()
    mixed = torch.linalg.solve_triangular(L_q.mT, U, upper=True)
    rows = mixed.mT @ W_Q
    A = W_Q @ rows.mT
    factored: Calls = [lambda: torch.linalg.cholesky(gram(W_K))] if has_new_keys else []
    return [
        *factored,
        *[lambda: torch.linalg.cholesky(gram(W_Q)) for _ in ("before", "after")],
        *[lambda: L_q.mT @ L_k for _ in ("before", "after")],
        lambda: torch.linalg.svd(core)[0],
        lambda: torch.linalg.solve_triangular(L_q.mT, U, upper=True),
        lambda: mixed.mT @ W_Q,
        lambda: torch.addmm(W_Q, A, rows),
        lambda: torch.linalg.svdvals(core),
        lambda: W_Q @ rows.mT,
    ]


def spectrum_calls(W_Q: Tensor, W_K: Tensor, has_new_keys: bool) -> Calls:
    """The matrix calls of one spectrum with its symmetric share."""
    L_q, L_k = (torch.linalg.cholesky(gram(W)) for W in (W_Q, W_K))
    core = L_q.mT @ L_k
    factored: Calls = [lambda: torch.linalg.cholesky(gram(W_K))] if has_new_keys else []
    return [
        *factored,
        lambda: torch.linalg.cholesky(gram(W_Q)),
        lambda: L_q.mT @ L_k,
        lambda: torch.linalg.svdvals(core),
        lambda: W_K @ W_Q.mT,
    ]


def timed(call: Callable[[], object]) -> float:
    """Seconds of the processor."""
    started = time.process_time()
    call()
    return time.process_time() - started


def compare(
    weights: LayerWeights,
    heads: tuple[int, ...],
    work: Callable[[LayerWeights, HeadWeights], object],
    calls: Callable[[Tensor, Tensor, bool], Calls],
) -> Iterator[tuple[float, float]]:
    """Seconds of each head, its reading and conversion included, and of its matrix calls alone."""
    batches, layout, known = weights.batches(heads, 1), weights.target.layout, -1
    for head in heads:
        started = time.process_time()
        batch = next(batches)
        work(weights, batch)
        whole = time.process_time() - started
        pair = batch.product.query.W[0], batch.product.key.W[0]
        kv_head = layout.kv_head(head)
        yield whole, sum(map(timed, calls(*pair, kv_head != known)))
        known = kv_head
        del batch


def measure(model: Model, rounds: int) -> None:
    """Print both comparisons."""
    target, *_ = model.targets([0], fold_norm=False)
    heads = tuple(range(target.layout.n_heads))
    works: dict[str, tuple[Callable[..., object], Callable[..., Calls]]] = {
        "edit with report": (lambda weights, batch: edit_batch(weights, batch, RULE, 0), edit_calls),
        "spectrum with share": (
            lambda weights, batch: list(_head_spectra(weights.target, batch, RULE)),
            spectrum_calls,
        ),
    }
    with open_layer(model.checkpoint.opened, target, torch.device("cpu"), heads) as weights:
        for name, (work, calls) in works.items():
            list(compare(weights, heads[:2], work, calls))  # loads code
            found = [pair for _ in range(rounds) for pair in compare(weights, heads, work, calls)]
            ours, bare = (median(side) * 1e3 for side in zip(*found, strict=True))
            ratio = median(whole / alone for whole, alone in found)
            print(
                f"{name:20}{ours:6.1f} ms of CPU a head; its matrix calls {bare:5.1f} ms; × {ratio:.2f}",
                flush=True,
            )


def main(shape: Shape, rounds: int) -> None:
    """Build one layer and measure."""
    share_free_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="qkpatch-bench-") as folder:
        measure(open_model(str(build(replace(shape, name="bare"), Path(folder)))), rounds)


if __name__ == "__main__":
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--rounds", type=int, default=3)
    asked, rest = own.parse_known_args(sys.argv[1:])
    main(parse(rest)[0], asked.rounds)
