"""What the user asked for: flags over ``--config EDIT.yaml`` over the recipe's defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, TypeVar

from qkpatch.checkpoint.reshard import parse_size
from qkpatch.errors import UsageError
from qkpatch.recipe import Recipe
from qkpatch.selection import MIDDLE_THIRD, middle_third, parse_ranges
from qkpatch.spectral.rule import Channel, EditRule, Select
from qkpatch.strict import Fields, load_yaml

# A default must not cost more than 2 % of perplexity: on SmolLM2-135M, 4 modes in the middle third, 0.8 costs 1.5 %,
# 0.5 costs 8.4 % and removal 29 % (docs/evidence). Ours; what the paper uses is not public.
DEFAULT_ALPHA = 0.8

E = TypeVar("E", bound=Enum)


@dataclass(frozen=True)
class Request:
    """The edit as asked for; None stands for "not said"."""

    recipe: str | None = None
    attention: str | None = None
    layers: str | None = None
    heads: str | None = None
    modes: int | None = None
    alpha: float | None = None
    channel: Channel | None = None
    select: Select | None = None
    seed: int | None = None
    fold_norm: bool | None = None
    max_shard_size: str | None = None

    def over(self, other: Request) -> Request:
        """This request, with what it does not say taken from ``other``."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(other, **said)


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

    def to_json(self) -> dict[str, Any]:
        """The settings as the manifest records them."""
        rule = self.rule
        return {
            "attention": list(self.attention),
            "layers": list(self.layers),
            "skipped_layers": list(self.skipped_layers),
            "heads": list(self.heads),
            "modes": rule.modes,
            "modes_edited": 0 if rule.select is Select.shrink else rule.paired_modes,
            "alpha": rule.alpha,
            "channel": rule.channel.value,
            "select": rule.select.value,
            "seed": self.seed,
            "fold_norm": self.fold_norm,
            "from_recipe": list(self.from_recipe),
        }


def parse_request(text: bytes, where: str) -> Request:
    """Read ``EDIT.yaml``, the flags of ``apply`` as keys; all faults in one :class:`RecipeError`."""
    root = Fields(load_yaml(text, where), where)
    request = Request(
        recipe=root.take_optional("recipe", str),
        attention=root.take_optional("attention", str),
        layers=_range_text(root, "layers"),
        heads=_range_text(root, "heads"),
        modes=root.take_optional("modes", int),
        alpha=root.take_optional("alpha", float),
        channel=_choice(root, "channel", Channel),
        select=_choice(root, "select", Select),
        seed=root.take_optional("seed", int),
        fold_norm=root.take_optional("fold_norm", bool),
        max_shard_size=_range_text(root, "max_shard_size"),
    )
    root.finish()
    return request


def check_request(request: Request) -> None:
    """Refuse what is wrong whatever the model: called before anything is read.

    Raises:
        UsageError: malformed ranges or size, ``alpha`` outside [0, 1], ``modes`` < 1, a useless or absurd seed.
    """
    for what in ("layers", "heads"):
        text = getattr(request, what)
        if text is not None:
            parse_ranges(text, f"--{what}")
    if request.max_shard_size is not None:
        parse_size(request.max_shard_size)
    if request.alpha is not None and not 0.0 <= request.alpha <= 1.0:
        raise UsageError(
            f"{request.alpha} is not between 0 and 1",
            where="--alpha",
            fix="0 removes the modes, 1 changes nothing",
        )
    if request.modes is not None and request.modes < 1:
        raise UsageError(f"{request.modes} is not at least 1", where="--modes")
    if request.seed is not None and not 0 <= request.seed < 2**63:
        raise UsageError(f"{request.seed} is not between 0 and 2^63 - 1", where="--seed")
    if request.select is Select.subspace and request.channel not in (None, Channel.full):
        raise UsageError(
            f"--select subspace draws directions that belong to no channel, not to {request.channel.value}",
            where="--channel",
            fix="drop --channel, or choose another --select",
        )


def check_device_name(name: str) -> None:
    """Refuse a device that no machine has; whether this one has it, torch will say.

    Raises:
        UsageError: not ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name, re.ASCII):
        raise UsageError(f"{name!r} is not a device", where="--device", fix="use auto, cpu, cuda or cuda:0")


def resolve(request: Request, recipe: Recipe, *, n_layers: int, n_heads: int) -> EditSettings:
    """Fill in defaults and check them against the model's size; no weight is read.

    Raises:
        UsageError: a layer or head that the model does not have.
    """
    check_request(request)
    from_recipe = tuple(name for name in ("layers", "modes") if getattr(request, name) is None)
    rule = EditRule(
        channel=request.channel or Channel.full,
        select=request.select or Select.dominant,
        modes=recipe.default_modes if request.modes is None else request.modes,
        alpha=DEFAULT_ALPHA if request.alpha is None else request.alpha,
    )
    layer_text = recipe.default_layers if request.layers is None else request.layers
    return EditSettings(
        layers=middle_third(n_layers)
        if layer_text == MIDDLE_THIRD
        else _within(layer_text, n_layers, "layers"),
        heads=tuple(range(n_heads)) if request.heads is None else _within(request.heads, n_heads, "heads"),
        rule=rule,
        seed=request.seed or 0,
        fold_norm=bool(request.fold_norm),
        from_recipe=from_recipe,
    )


def _within(text: str, count: int, what: str) -> tuple[int, ...]:
    numbers = parse_ranges(text, f"--{what}")
    if numbers[-1] >= count:
        raise UsageError(
            f"{what[:-1]} {numbers[-1]} is out of range: the language model has {count} {what}, 0-{count - 1}",
            where=f"--{what} {text}",
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


def _range_text(root: Fields, key: str) -> str | None:
    if root.is_a(key, int):  # `layers: 10` is a number in YAML
        return str(root.take(key, int, default=0))
    if root.is_a(key, list):  # `layers: [10, 11]`
        return ",".join(str(number) for number in root.take_list(key, int, required=True))
    return root.take_optional(key, str)


def _choice(root: Fields, key: str, kind: type[E]) -> E | None:
    text = root.take_optional(key, str)
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        root.fault(f"{text!r} is not one of {', '.join(str(item.value) for item in kind)}", key)
        return None
