"""Edits the planned heads, a few at a time by each thread, and writes their rows. Where torch is imported."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from qkpatch.canonical import measured
from qkpatch.copier import Copier, Observer
from qkpatch.crew import Crew
from qkpatch.device import choose_device, computing, heads_together
from qkpatch.errors import NumericalError
from qkpatch.manifest import HeadRecord
from qkpatch.plan import EditPlan
from qkpatch.sources import Sources
from qkpatch.spectral.edit import Folding, HeadError, edit_and_round
from qkpatch.targets import LayerTarget
from qkpatch.weights import LayerWeights, open_layer

_HEADS_AT_A_TIME = 4  # of one tensor, by one thread: enough to share keys and open files


@dataclass(frozen=True)
class _Chunk:
    """A few heads of one tensor, edited by one thread."""

    target: LayerTarget
    heads: tuple[int, ...]


def _chunks(plan: EditPlan, at_least: int) -> Iterator[_Chunk]:
    """All heads to edit; those that share a key head stay together."""
    for target in plan.edits:
        chunk: list[int] = []
        for _, group in groupby(plan.settings.heads, target.layout.kv_head):
            chunk += group
            if len(chunk) >= at_least:
                yield _Chunk(target, tuple(chunk))
                chunk = []
        if chunk:
            yield _Chunk(target, tuple(chunk))


@dataclass(frozen=True)
class Editor:
    """The edit on one device."""

    device: torch.device

    @classmethod
    def on(cls, device: str) -> Editor:
        """As :func:`choose_device`."""
        return cls(choose_device(device))

    @property
    def torch_version(self) -> str:
        """With its build, such as ``2.13.0+cpu``."""
        return str(torch.__version__)

    def edited(
        self, plan: EditPlan, sources: Sources, crew: Crew, copier: Copier, observer: Observer
    ) -> Iterator[tuple[LayerTarget, tuple[HeadRecord, ...]]]:
        """Edit all planned heads; each target with its heads' records when it is done.

        Raises:
            NumericalError: NaN or Inf, or a tensor that the edit would leave as it was.
        """
        together = heads_together(self.device, plan.head_memory, crew.threads)

        def edit(chunk: _Chunk) -> tuple[LayerTarget, list[tuple[HeadRecord, bool]]]:
            with (
                computing(self.device),
                open_layer(sources.open, chunk.target, self.device, chunk.heads) as weights,
            ):
                done = []
                for record in _edit_heads(plan, chunk, together, weights, copier):
                    crew.check()
                    observer.edited(1)
                    done.append(record)
            return chunk.target, done

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
    plan: EditPlan, chunk: _Chunk, together: int, weights: LayerWeights, copier: Copier
) -> Iterator[tuple[HeadRecord, bool]]:
    """Edit and write a few heads; each one's record, and whether any value changed."""
    target, settings, gain = chunk.target, plan.settings, weights.invertible_gain()
    for of in weights.batches(chunk.heads, together):
        generators = [head_generator(settings.seed, target, head) for head in of.heads]
        folding = None if gain is None else Folding(of.W_Q, gain)
        try:
            store = functools.partial(weights.store, of.heads)
            stored, reports = edit_and_round(of.product, settings.rule, store, generators, folding)
        except HeadError as error:
            where = f"head {of.heads[error.index]} of {target.query.name}, {target.query.dtype}"
            raise NumericalError(error.what, where=where, fix=error.fix) from error
        for i, head in enumerate(of.heads):
            # By value: a −0.0 that became 0.0 is no edit, and stays.
            is_changed = not torch.equal(stored.values[i], of.W_Q[i])
            for ref, begin, end, at in plan.head_ranges(target, head):
                data = stored.pieces[i][ref] if is_changed else weights.raw(ref, begin, end)
                copier.write(plan.output.place(ref).shard, data, at)
            figures = {name: measured(figure) for name, figure in vars(reports[i]).items()}
            record = HeadRecord(head=head, kv_head=target.layout.kv_head(head), **figures)
            yield record, is_changed
        del of, stored, store, folding  # before the next heads are read


def head_generator(seed: int, target: LayerTarget, head: int) -> torch.Generator:
    """Random numbers of one head: the same whichever other heads and layers are edited, in whatever order."""
    name = f"qkpatch:{seed}:{target.attention}:{target.layer}:{head}"
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
