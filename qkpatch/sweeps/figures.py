"""One read of all heads for all variants: each product is decomposed once per channel, whatever their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qkpatch.common.observer import Observer
from qkpatch.errors import NumericalError
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.device import choose_device, computing, heads_together
from qkpatch.patching.edit_heads import head_generator
from qkpatch.patching.head_products import LayerWeights, open_layer
from qkpatch.patching.threads import Crew
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.settings import EditSettings
from qkpatch.spectral.edit import Decomposed, HeadError
from qkpatch.spectral.foreseen import Foreseen
from qkpatch.spectral.rule import Channel, Select, Sums

Edits = Mapping[str, EditSettings]  # of variants, by name


def figures(
    plan: EditPlan, edits: Edits, device: str, threads: int, observer: Observer
) -> Iterator[dict[str, Sums]]:
    """Of each planned tensor in turn, the sums of the variants that edit it; the same whatever ``threads``.

    Raises:
        NumericalError: NaN or Inf; an edit that cannot be made, or changes nothing.
    """
    where, heads = choose_device(device), plan.settings.heads
    together = heads_together(where, plan.head_memory, threads)

    def of_layer(target: LayerTarget) -> dict[str, Sums]:
        own = {name: edit for name, edit in edits.items() if target.layer in edit.layers}
        found: dict[str, list[Sums]] = {name: [] for name in own}
        opened = open_layer(plan.model.checkpoint.opened, target, where, heads)
        with computing(where), opened as weights:
            for name, sums in _of_heads(weights, heads, together, own):
                crew.check()
                found[name] += sums
            observer.edited(len(heads))
        total = {name: Sums(*map(sum, zip(*each, strict=True))) for name, each in found.items()}
        if idle := [name for name, sums in total.items() if not sums.moved]:
            raise NumericalError(
                f"{idle[0]} leaves every value as it is: there is no such mode, or the product is zero",
                where=f"{target.query.name} in {target.query.shard}",
                fix=f"take it, or layer {target.layer}, out of the grid",
            )
        return total

    with Crew(threads) as crew:
        yield from crew.map(of_layer, plan.edits)


def _of_heads(
    weights: LayerWeights, heads: tuple[int, ...], together: int, edits: Edits
) -> Iterator[tuple[str, list[Sums]]]:
    place = (weights.target.attention, weights.target.layer)
    rules = {name: edit.rule_of(place[1]) for name, edit in edits.items()}
    for batch in weights.batches(heads, together):
        idle = [head_generator(0, *place, head) for head in batch.heads]  # for what draws nothing
        for channel in Channel:
            foreseen = Foreseen(Decomposed(batch.product, channel))  # of which one is in memory at a time
            for name, rule in rules.items():
                if rule.channel is not channel:
                    continue
                drawn = rule.select in (Select.random, Select.subspace)
                generators = [head_generator(edits[name].seed, *place, head) for head in batch.heads if drawn]
                try:
                    yield name, foreseen.sums(rule, generators or idle)
                except HeadError as error:
                    at = f"{name}: head {batch.heads[error.index]} of {weights.target.query.name}"
                    raise NumericalError(error.what, where=at, fix=error.fix) from error
