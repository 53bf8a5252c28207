"""The edit with nothing left open: a request over a recipe's defaults, checked against a model."""

from __future__ import annotations

from dataclasses import dataclass

from qkpatch.common.number_ranges import MIDDLE_THIRD, as_numbers, format_ranges, middle_third
from qkpatch.errors import UsageError
from qkpatch.model.model import Model
from qkpatch.planning.blocks import EditBlock, LayersBlock
from qkpatch.planning.request import Request
from qkpatch.spectral.rule import Channel, EditRule, Select

# A default must not cost more than 2 % of perplexity: on SmolLM2-135M, 4 modes in the middle third, 0.8 costs 1.5 %,
# 0.5 costs 8.4 % and removal 29 % (docs/evidence). Ours; what the paper uses is not public.
DEFAULT_ALPHA = 0.8


@dataclass(frozen=True)
class EditSettings:
    """The edit with nothing left open, for a model of known size."""

    edits: tuple[tuple[tuple[int, ...], EditRule], ...]  # layers and what is done to them, each rule once
    heads: tuple[int, ...]
    seed: int
    from_recipe: tuple[str, ...]  # which of layers and modes are the recipe's defaults
    fold_norm: bool = False  # whether the gain of the RMSNorm before attention is part of the product
    skipped_layers: tuple[int, ...] = ()  # asked for, and without a query-key product
    attention: tuple[str, ...] = ()  # the recipe's sets of tensors
    prefix: str | None = None  # of the layers, where it was asked for

    def rule_of(self, layer: int) -> EditRule:
        """What is done to every head of a layer."""
        return next(rule for layers, rule in self.edits if layer in layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that are asked for and have a product."""
        return tuple(sorted(layer for layers, _ in self.edits for layer in layers))

    @property
    def modes(self) -> int | None:
        """How many modes every head has; None where heads differ in that."""
        (_, rule), *others = self.edits
        return None if others or rule.energy is not None else rule.paired_modes

    @property
    def block(self) -> EditBlock:
        """The settings as the manifest records them."""
        own = {**{key: value for key, value in vars(self).items() if key != "edits"}, "layers": self.layers}
        parts = [
            LayersBlock(layers=n, modes_edited=0 if r.select is Select.shrink else r.paired_modes, **vars(r))
            for n, r in self.edits
        ]
        return EditBlock(**(vars(parts[0]) | own if len(parts) == 1 else own | {"edits": tuple(parts)}))


def resolve(request: Request, model: Model) -> EditSettings:
    """``request`` with the recipe's defaults, checked against the model's size; no weight is read.

    Layers that have no query-key product by the family's design are skipped and listed.

    Raises:
        UsageError: a layer, head or mode that the model does not have, or no layer left to edit.
    """
    n_heads = model.tower.layout.n_heads
    rules: dict[EditRule, tuple[int, ...]] = {}
    skipped: tuple[int, ...] = ()
    for i, part in enumerate(request.parts):
        try:
            present, missing, rule = _part(part, model)
        except UsageError as error:
            where = error.where if request.edits is None else f"edits[{i}]: {error.where}"
            raise UsageError(error.what, where=where, fix=error.fix) from error
        rules[rule] = (*rules.get(rule, ()), *present)
        skipped += missing
    said = {"modes" if key == "energy" else key for part in request.parts for key in part.said}
    return EditSettings(
        edits=tuple(sorted((tuple(sorted(layers)), rule) for rule, layers in rules.items())),
        heads=tuple(range(n_heads)) if request.heads is None else _within(request.heads, n_heads, "heads"),
        seed=request.seed or 0,
        from_recipe=tuple(name for name in ("layers", "modes") if name not in said),
        fold_norm=bool(request.fold_norm),
        skipped_layers=tuple(sorted(skipped)),
        attention=tuple(s.names.attention for s in model.sets),
        prefix=request.prefix,
    )


def _part(request: Request, model: Model) -> tuple[tuple[int, ...], tuple[int, ...], EditRule]:
    """The layers of a part that have a product, those that are skipped, and what is done."""
    recipe, tower = model.recipe, model.tower
    default = middle_third(tower.n_layers) if recipe.default_layers == MIDDLE_THIRD else recipe.default_layers
    layers = _within(request.layers or as_numbers(default, "the recipe's layers"), tower.n_layers, "layers")
    present = tuple(layer for layer in layers if any(s.has(layer) for s in model.sets))
    if not present:
        what = f"none of layers {format_ranges(layers)} has a query-key product of its own"
        raise UsageError(what, where="--layers", fix=f"choose from {format_ranges(model.editable_layers)}")
    skipped = tuple(layer for layer in layers if layer not in present)
    model.check_skipped(skipped)
    layouts = {s.tower.layout_of(layer) for s in model.sets for layer in present if s.has(layer)}
    channel, modes = request.channel or Channel.full, request.modes
    if modes is None and request.energy is not None:
        # Half of them, in pairs where they come in pairs: as many are left for the random control.
        pair = 2 if channel is Channel.antisymmetric else 1
        most = min(channel.max_modes(layout.d_head, layout.d_model) for layout in layouts)
        modes = max(1, most // (2 * pair) * pair)
    rule = EditRule(
        channel=channel,
        select=request.select or Select.dominant,
        modes=recipe.default_modes if modes is None else modes,
        alpha=DEFAULT_ALPHA if request.alpha is None else request.alpha,
        energy=request.energy,
        min_modes=request.min_modes if request.energy is None else request.min_modes or 1,
    )
    for layout in layouts:
        _check_modes(rule, layout.d_head, layout.d_model)
    return present, skipped, rule


def _within(numbers: tuple[int, ...], count: int, what: str) -> tuple[int, ...]:
    if numbers[-1] >= count:
        has = f"the language model has {count} {what}, 0-{count - 1}"
        where = f"--{what} {format_ranges(numbers)}"
        raise UsageError(f"{what[:-1]} {numbers[-1]} is out of range: {has}", where=where)
    return numbers


def _check_modes(rule: EditRule, d_head: int, d_model: int) -> None:
    """Refuse more modes than a head of this size has, or than random selection leaves; a floor above the ceiling."""
    if rule.min_modes is not None and (rule.energy is None or rule.min_modes > rule.modes):
        but = "without --energy" if rule.energy is None else f"and at most {rule.modes}"
        raise UsageError(f"at least {rule.min_modes} modes, {but}", where="--min-modes", fix="leave it out")
    most = rule.channel.max_modes(d_head, d_model)
    if rule.paired_modes > most:
        what = f"{rule.modes} modes, but the {rule.channel.value} channel of a head has at most {most}"
        raise UsageError(what, where="--modes", fix=f"choose 1 to {most}")
    if rule.select is Select.random and 2 * rule.paired_modes > most:
        what = f"{rule.modes} random modes are drawn from those the dominant selection does not take"
        left = f"{most} - {rule.paired_modes} = {most - rule.paired_modes} remain"
        raise UsageError(f"{what}, and {left}", where="--modes", fix=f"choose at most {most // 2}")
