"""The edit with nothing left open: a request over a recipe's defaults, checked against a model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from qkpatch.common.number_ranges import MIDDLE_THIRD, format_ranges, middle_third, parse_ranges
from qkpatch.errors import UsageError
from qkpatch.model.model import Model
from qkpatch.planning.blocks import EditBlock
from qkpatch.planning.request import Request
from qkpatch.spectral.rule import Channel, EditRule, Select

# A default must not cost more than 2 % of perplexity: on SmolLM2-135M, 4 modes in the middle third, 0.8 costs 1.5 %,
# 0.5 costs 8.4 % and removal 29 % (docs/evidence). Ours; what the paper uses is not public.
DEFAULT_ALPHA = 0.8


@dataclass(frozen=True)
class EditSettings:
    """The edit with nothing left open, for a model of known size."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    rule: EditRule
    seed: int
    from_recipe: tuple[str, ...]  # which of layers and modes are the recipe's defaults
    fold_norm: bool = False  # whether the gain of the RMSNorm before attention is part of the product
    skipped_layers: tuple[int, ...] = ()  # asked for, and without a query-key product
    attention: tuple[str, ...] = ()  # the recipe's sets of tensors
    prefix: str | None = None  # of the layers, where it was asked for

    def rule_of(self, layer: int) -> EditRule:
        """What is done to every head of a layer."""
        return self.rule

    @property
    def block(self) -> EditBlock:
        """The settings as the manifest records them."""
        rule = self.rule
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rule"}
        modes_edited = 0 if rule.select is Select.shrink else rule.paired_modes
        return EditBlock(**own, **vars(rule), modes_edited=modes_edited)


def resolve(request: Request, model: Model) -> EditSettings:
    """``request`` with the recipe's defaults, checked against the model's size; no weight is read.

    Layers that have no query-key product by the family's design are skipped and listed.

    Raises:
        UsageError: a layer, head or mode that the model does not have, or no layer left to edit.
    """
    recipe, tower = model.recipe, model.tower
    n_heads = tower.layout.n_heads
    layers = _within(_layers(request, recipe.default_layers, tower.n_layers), tower.n_layers, "layers")
    present = tuple(layer for layer in layers if any(s.has(layer) for s in model.sets))
    if not present:
        raise UsageError(
            f"none of layers {format_ranges(layers)} has a query-key product of its own",
            where="--layers",
            fix=f"choose from {format_ranges(model.editable_layers)}",
        )
    skipped = tuple(layer for layer in layers if layer not in present)
    model.check_skipped(skipped)
    rule = EditRule(
        channel=request.channel or Channel.full,
        select=request.select or Select.dominant,
        modes=recipe.default_modes if request.modes is None else request.modes,
        alpha=DEFAULT_ALPHA if request.alpha is None else request.alpha,
    )
    for layout in {s.tower.layout_of(layer) for s in model.sets for layer in present if s.has(layer)}:
        check_modes(rule, layout.d_head, layout.d_model)
    return EditSettings(
        layers=present,
        heads=tuple(range(n_heads)) if request.heads is None else _within(request.heads, n_heads, "heads"),
        rule=rule,
        seed=request.seed or 0,
        from_recipe=tuple(name for name in ("layers", "modes") if getattr(request, name) is None),
        fold_norm=bool(request.fold_norm),
        skipped_layers=skipped,
        attention=tuple(s.names.attention for s in model.sets),
        prefix=request.prefix,
    )


def _layers(request: Request, default: str, n_layers: int) -> tuple[int, ...]:
    if request.layers is not None:
        return request.layers
    return middle_third(n_layers) if default == MIDDLE_THIRD else parse_ranges(default, "the recipe's layers")


def _within(numbers: tuple[int, ...], count: int, what: str) -> tuple[int, ...]:
    if numbers[-1] >= count:
        raise UsageError(
            f"{what[:-1]} {numbers[-1]} is out of range: the language model has {count} {what}, 0-{count - 1}",
            where=f"--{what} {format_ranges(numbers)}",
        )
    return numbers


def check_modes(rule: EditRule, d_head: int, d_model: int) -> None:
    """Refuse more modes than a head of this size has.

    Raises:
        UsageError: more modes than the channel has, or than random selection leaves.
    """
    most = rule.channel.max_modes(d_head, d_model)
    if rule.paired_modes > most:
        raise UsageError(
            f"{rule.modes} modes, but the {rule.channel.value} channel of a head has at most {most}",
            where="--modes",
            fix=f"choose 1 to {most}",
        )
    if rule.select is Select.random and 2 * rule.paired_modes > most:
        raise UsageError(
            f"{rule.modes} random modes are drawn from those the dominant selection does not take, "
            f"and {most} - {rule.paired_modes} = {most - rule.paired_modes} remain",
            where="--modes",
            fix=f"choose at most {most // 2}",
        )
