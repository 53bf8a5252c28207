"""One read of all heads for all variants: each product is decomposed once per channel, whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from qkpatch.adapters.factors import head_factors
from qkpatch.common.observer import Observer
from qkpatch.errors import NumericalError
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.device import choose_device, computing, heads_together
from qkpatch.patching.edit_heads import head_generator
from qkpatch.patching.head_products import LayerWeights, open_layer
from qkpatch.patching.threads import Crew
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.settings import EditSettings
from qkpatch.spectral.edit import Decomposed, HeadError, edit_query
from qkpatch.spectral.foreseen import Foreseen
from qkpatch.spectral.rule import Channel, Select, Sums

Edits = Mapping[str, EditSettings]  # of variants, by name
Keep = Callable[[LayerTarget, str, bytes], None]  # takes factors of a variant, head by head


def figures(
    plan: EditPlan, edits: Edits, keep: Keep | None, device: str, threads: int, observer: Observer
) -> Iterator[dict[str, Sums]]:
    """Of each planned tensor in turn, the sums of the variants that edit it; the same whatever ``threads``.

    Args:
        plan: which tensors are read.
        edits: of all variants.
        keep: takes the factors of edits that have some.
        device: where heads are computed.
        threads: how many layers are computed side by side.
        observer: hears of heads.

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
            for name, sums in _of_heads(weights, heads, together, own, keep):
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
    weights: LayerWeights, heads: tuple[int, ...], together: int, edits: Edits, keep: Keep | None
) -> Iterator[tuple[str, list[Sums]]]:
    target = weights.target
    for batch in weights.batches(heads, together):
        idle = [head_generator(0, "", 0, 0)] * len(batch.heads)  # for what draws nothing
        for channel in Channel:
            known = Decomposed(batch.product, channel)  # of which one is in memory at a time
            foreseen = Foreseen(known)
            for name, edit in edits.items():
                if (rule := edit.rule_of(target.layer)).channel is not channel:
                    continue
                drawn = rule.select in (Select.random, Select.subspace)
                own = [(edit.seed, target.attention, target.layer, head) for head in batch.heads]
                try:
                    generators = [head_generator(*each) for each in own if drawn] or idle
                    yield name, foreseen.sums(rule, generators)
                    if keep is not None and rule.select is not Select.shrink:
                        generators = [head_generator(*each) for each in own if drawn] or idle
                        derived = edit_query(batch.product, rule, generators, known)
                        keep(
                            target,
                            name,
                            b"".join(one.packed for one in head_factors(weights, batch, derived)),
                        )
                except HeadError as error:
                    at = f"{name}: head {batch.heads[error.index]} of {target.query.name}"
                    raise NumericalError(error.what, where=at, fix=error.fix) from error
