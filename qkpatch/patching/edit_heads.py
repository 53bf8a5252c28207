"""Edits the planned heads, a few at a time by each thread, and writes their rows. Where torch is imported."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby

import torch

from qkpatch.common import system
from qkpatch.common.json_text import measured
from qkpatch.common.observer import Observer
from qkpatch.errors import NumericalError
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.device import choose_device, computing, heads_together
from qkpatch.patching.head_bytes import StoredHeads
from qkpatch.patching.head_products import HeadWeights, LayerWeights, Opened, open_layer
from qkpatch.patching.threads import Crew
from qkpatch.planning.blocks import ToolBlock
from qkpatch.planning.manifest import HeadRecord
from qkpatch.planning.plan import EditPlan
from qkpatch.spectral.edit import Decomposed, HeadError, HeadReport, edit_query, measure
from qkpatch.spectral.rule import EditRule

Write = Callable[[str, bytes | bytearray, int], None]  # takes a shard of OUT, rows, and where they begin
_Chunk = tuple[LayerTarget, tuple[int, ...]]  # a few heads of one tensor, edited by one thread

_HEADS_AT_A_TIME = 4  # of one tensor, by one thread: enough to share keys and open files


def _chunks(plan: EditPlan, at_least: int) -> Iterator[_Chunk]:
    """All heads to edit; those that share a key head stay together."""
    for target in plan.edits:
        chunk: list[int] = []
        for _, group in groupby(plan.settings.heads, target.layout.kv_head):
            chunk += group
            if len(chunk) >= at_least:
                yield target, tuple(chunk)
                chunk = []
        if chunk:
            yield target, tuple(chunk)


@dataclass(frozen=True)
class Editor:
    """Computes edits on one device."""

    device: torch.device

    @classmethod
    def on(cls, device: str) -> Editor:
        """The editor on the device called ``device``, as :func:`choose_device`."""
        return cls(choose_device(device))

    @property
    def tool(self) -> ToolBlock:
        """This qkpatch, torch with its build, such as ``2.13.0+cpu``, and Python."""
        return ToolBlock("qkpatch", version("qkpatch"), str(torch.__version__), platform.python_version())

    @property
    def stack(self) -> dict[str, str]:
        """What bits depend on besides inputs: torch, BLAS, the kernels that the CPU takes, and the card, if it is one.

        What several machines make together, all of them make by one of these.
        """
        shown = torch.__config__.show()
        blas = re.search(r"(?<=oneAPI )Math Kernel Library Version \S+|(?<=BLAS_INFO=)\w+", shown)
        cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {system.processor()}".strip()
        stack = {"torch": str(torch.__version__), "blas": blas[0] if blas else "unknown", "cpu": cpu}
        card = {"card": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}
        return stack | card

    def edited(
        self, plan: EditPlan, opened: Opened, crew: Crew, write: Write, observer: Observer
    ) -> Iterator[tuple[LayerTarget, tuple[HeadRecord, ...]]]:
        """Edit all planned heads; each target with its heads' records when it is done.

        Raises:
            NumericalError: NaN or Inf, or a tensor that the edit would leave as it was.
        """
        together = heads_together(self.device, plan.head_memory, crew.threads)

        def edit(chunk: _Chunk) -> tuple[LayerTarget, list[tuple[HeadRecord, bool]]]:
            target, heads = chunk
            with computing(self.device), open_layer(opened, target, self.device, heads) as weights:
                done = []
                for record in _edit_heads(plan, heads, together, weights, write):
                    crew.check()
                    observer.edited(1)
                    done.append(record)
            return target, done

        results = crew.map(edit, _chunks(plan, max(together, _HEADS_AT_A_TIME)))
        for target, parts in groupby(results, lambda result: result[0]):
            heads = [head for _, part in parts for head in part]
            if not any(is_changed for _, is_changed in heads):
                query = target.query
                raise NumericalError(
                    f"the edit leaves every value as it is: it rounds away in {query.dtype}, or the product is zero",
                    where=f"{query.name} in {query.shard}",
                    fix=f"use a smaller --alpha, or leave layer {target.layer} out; --alpha 1 is the declared no-op",
                )
            yield target, tuple(record for record, _ in heads)


def _edit_heads(
    plan: EditPlan, heads: tuple[int, ...], together: int, weights: LayerWeights, write: Write
) -> Iterator[tuple[HeadRecord, bool]]:
    """Edit and write a few heads; each one's record, and whether any value changed."""
    for batch in weights.batches(heads, together):
        yield from written(plan, weights, batch, write)
        del batch  # before the next heads are read


def written(
    plan: EditPlan, weights: LayerWeights, batch: HeadWeights, write: Write, product: Decomposed | None = None
) -> Iterator[tuple[HeadRecord, bool]]:
    """Edit and write some heads, whose ``product`` may be decomposed already."""
    target = weights.target
    rule, seed = plan.settings.rule_of(target.layer), plan.settings.seed
    stored, reports = edit_batch(weights, batch, rule, seed, product=product)
    for i, head in enumerate(batch.heads):
        # By value: a −0.0 that became 0.0 is no edit, and stays.
        is_changed = not torch.equal(stored.values[i], batch.W_Q[i])
        for ref, begin, end, at in plan.head_ranges(target, head):
            data = stored.pieces[i][ref] if is_changed else weights.stored.raw(ref, begin, end)
            write(plan.output.place(ref).shard, data, at)
        figures = {name: measured(figure) for name, figure in vars(reports[i]).items()}
        yield HeadRecord(head=head, kv_head=target.layout.kv_head(head), **figures), is_changed


def edit_batch(
    weights: LayerWeights,
    batch: HeadWeights,
    rule: EditRule,
    seed: int,
    known: StoredHeads | None = None,
    product: Decomposed | None = None,
) -> tuple[StoredHeads, tuple[HeadReport, ...]]:
    """Some heads edited and rounded once: what is stored of them, and what that does to their products.

    What is ``known`` to be stored is measured in place of what would be; ``product`` may be decomposed already.

    Raises:
        NumericalError: NaN or Inf, or an edit that cannot be made.
    """
    target = weights.target
    generators = [head_generator(seed, target.attention, target.layer, head) for head in batch.heads]
    try:
        edit = edit_query(batch.product, rule, generators, product)
        stored = known or weights.stored.store(batch.heads, weights.unfolded(batch, edit.W_Q))
        return stored, measure(batch.product, edit, weights.folded(stored.values))
    except HeadError as error:
        where = f"head {batch.heads[error.index]} of {target.query.name}, {target.query.dtype}"
        raise NumericalError(error.what, where=where, fix=error.fix) from error


def head_generator(seed: int, attention: str, layer: int, head: int) -> torch.Generator:
    """Random numbers of one head: the same whichever other heads and layers are edited, in whatever order."""
    name = f"qkpatch:{seed}:{attention}:{layer}:{head}"
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
