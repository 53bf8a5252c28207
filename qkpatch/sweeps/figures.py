"""One read of all heads for all variants: each product is decomposed once per channel, whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from qkpatch.adapters.factors import head_factors
from qkpatch.common.observer import Observer
from qkpatch.errors import NumericalError
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.device import choose_device, computing, heads_together
from qkpatch.patching.edit_heads import Write, head_generator, written
from qkpatch.patching.head_products import LayerWeights, Opened, open_layer
from qkpatch.patching.threads import Crew
from qkpatch.planning.blocks import ToolBlock
from qkpatch.planning.manifest import HeadRecord
from qkpatch.planning.plan import EditPlan
from qkpatch.spectral.edit import Decomposed, HeadError, edit_query
from qkpatch.spectral.foreseen import Foreseen
from qkpatch.spectral.rule import Channel, Select, Sums
from qkpatch.sweeps.grid import Form
from qkpatch.sweeps.parts import Found, Parts

Keep = Callable[[LayerTarget, str, bytes | bytearray], None]  # takes what a form is made of, head by head


def figures(
    plan: EditPlan,
    edits: Mapping[str, EditPlan],
    form: Form,
    keep: Keep,
    device: str,
    threads: int,
    observer: Observer,
) -> Iterator[dict[str, Found]]:
    """Of each planned tensor in turn, what the variants do that edit it; the same whatever ``threads``.

    Raises:
        NumericalError: NaN or Inf; an edit that cannot be made, or changes nothing.
    """
    where, heads = choose_device(device), plan.settings.heads
    together = heads_together(where, plan.head_memory, threads)

    def of_layer(target: LayerTarget) -> dict[str, Found]:
        own = {name: edit for name, edit in edits.items() if target in edit.edits}
        sums: dict[str, list[Sums]] = {name: [] for name in own}
        records: dict[str, list[HeadRecord]] = {name: [] for name in own}
        opened = open_layer(plan.model.checkpoint.opened, target, where, heads)
        with computing(where), opened as weights:
            for name, more, rounded in _of_heads(weights, heads, together, own, form, keep):
                crew.check()
                sums[name] += more
                records[name] += rounded
            observer.edited(len(heads))
        total = {name: Sums(*map(sum, zip(*each, strict=True))) for name, each in sums.items()}
        for name, each in total.items():
            if not each.moved or (records[name] and not any(head.relative_change for head in records[name])):
                what = "leaves every value as it is: it rounds away, has no such mode, or the product is zero"
                at, fix = f"{target.query.name} in {target.query.shard}", f"take it, or layer {target.layer},"
                raise NumericalError(f"{name} {what}", where=at, fix=f"{fix} out of the grid")
        return {name: (each, tuple(records[name])) for name, each in total.items()}

    with Crew(threads) as crew:
        yield from crew.map(of_layer, plan.edits)


def _of_heads(
    weights: LayerWeights,
    heads: tuple[int, ...],
    together: int,
    edits: Mapping[str, EditPlan],
    form: Form,
    keep: Keep,
) -> Iterator[tuple[str, list[Sums], list[HeadRecord]]]:
    target = weights.target
    for batch in weights.batches(heads, together):
        idle = [head_generator(0, "", 0, 0)] * len(batch.heads)  # for what draws nothing
        for channel in Channel:
            product = Decomposed(batch.product, channel)  # of which one is in memory at a time
            foreseen = Foreseen(product)
            for name, plan in edits.items():
                if (rule := plan.settings.rule_of(target.layer)).channel is not channel:
                    continue
                drawn = rule.select in (Select.random, Select.subspace)
                own = [(plan.settings.seed, target.attention, target.layer, head) for head in batch.heads]
                records: list[HeadRecord] = []
                try:
                    sums = foreseen.sums(rule, [head_generator(*each) for each in own if drawn] or idle)
                    if form is Form.lora and rule.select is not Select.shrink:
                        generators = [head_generator(*each) for each in own if drawn] or idle
                        derived = edit_query(batch.product, rule, generators, product)
                        for factors in head_factors(weights, batch, derived):
                            keep(target, name, factors.packed)
                except HeadError as error:
                    at = f"{name}: head {batch.heads[error.index]} of {target.query.name}"
                    raise NumericalError(error.what, where=at, fix=error.fix) from error
                if form is Form.patch:

                    def rows(_: str, data: bytes | bytearray, at: int, name: str = name) -> None:
                        keep(target, name, data)

                    records = [record for record, _ in written(plan, weights, batch, rows, product)]
                    both = zip(sums, records, strict=True)
                    sums = [s._replace(noise=r.rounding_error**2 * s.moved) for s, r in both]
                yield name, sums, records


@dataclass(frozen=True)
class Kept:
    """New rows of a variant as they were kept, and what made them; to be asked as an editor is."""

    parts: Parts
    name: str
    tool: ToolBlock
    stack: Mapping[str, str]
    device: str

    def edited(
        self, plan: EditPlan, opened: Opened, crew: Crew, write: Write, observer: Observer
    ) -> Iterator[tuple[LayerTarget, tuple[HeadRecord, ...]]]:
        """As an editor's."""
        for target in plan.edits:
            rows, at = self.parts.kept(self.name, target), 0
            for head in plan.settings.heads:
                for ref, begin, end, place in plan.head_ranges(target, head):
                    write(plan.output.place(ref).shard, rows[at : at + end - begin], place)
                    at += end - begin
            yield target, self.parts.records(self.name, target)
