"""One read of all heads for all variants: each product is decomposed once per channel, whatever their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter

from qkpatch.common.observer import Observer
from qkpatch.errors import NumericalError
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.device import choose_device, computing, heads_together
from qkpatch.patching.edit_heads import chunks, head_generator
from qkpatch.patching.head_products import HeadWeights, open_layer
from qkpatch.patching.threads import Crew
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.settings import EditSettings
from qkpatch.spectral.edit import Decomposed, HeadError
from qkpatch.spectral.foreseen import Foreseen
from qkpatch.spectral.rule import Channel, Select, Sums

Edits = Mapping[str, EditSettings]
_HEADS_AT_A_TIME = 4


def figures(
    plan: EditPlan, edits: Edits, device: str, threads: int, observer: Observer
) -> Iterator[dict[str, Sums]]:
    """Of each planned tensor in turn, the sums of the variants that edit it; the same whatever ``threads``.

    Raises:
        NumericalError: NaN or Inf; an edit that cannot be made, or changes nothing.
    """
    where, opened = choose_device(device), plan.model.checkpoint.opened
    together = heads_together(where, plan.head_memory, threads)

    def of(chunk: tuple[LayerTarget, tuple[int, ...]]) -> tuple[LayerTarget, list[tuple[str, Sums]]]:
        (target, heads), found = chunk, list[tuple[str, Sums]]()
        with computing(where), open_layer(opened, target, where, heads) as weights:
            for batch in weights.batches(heads, together):
                crew.check()
                found += _of_batch(target, batch, edits)
                observer.edited(len(batch.heads))
        return target, found

    with Crew(threads) as crew:
        results = crew.map(of, chunks(plan, max(together, _HEADS_AT_A_TIME)))
        for target, parts in groupby(results, itemgetter(0)):
            found: dict[str, list[Sums]] = {}
            for name, sums in (one for _, part in parts for one in part):
                found.setdefault(name, []).append(sums)
            total = {name: Sums(*map(sum, zip(*each, strict=True))) for name, each in found.items()}
            if idle := [name for name, sums in total.items() if not sums.moved]:
                raise NumericalError(
                    f"{idle[0]} leaves every value as it is: there is no such mode, or the product is zero",
                    where=f"{target.query.name} in {target.query.shard}",
                    fix=f"take it, or layer {target.layer}, out of the grid",
                )
            yield total


def _of_batch(target: LayerTarget, batch: HeadWeights, edits: Edits) -> Iterator[tuple[str, Sums]]:
    place = (target.attention, target.layer)
    idle = [head_generator(0, *place, head) for head in batch.heads]  # for what draws nothing
    for channel in Channel:
        foreseen = Foreseen(Decomposed(batch.product, channel))  # of which one is in memory at a time
        for name, settings in edits.items():
            if target.layer not in settings.layers or settings.rule_of(target.layer).channel is not channel:
                continue
            rule, generators = settings.rule_of(target.layer), idle
            if rule.select in (Select.random, Select.subspace):
                generators = [head_generator(settings.seed, *place, head) for head in batch.heads]
            try:
                yield from ((name, sums) for sums in foreseen.sums(rule, generators))
            except HeadError as error:
                at = f"{name}: head {batch.heads[error.index]} of {target.query.name}"
                raise NumericalError(error.what, where=at, fix=error.fix) from error
