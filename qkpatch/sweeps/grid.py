"""The edits of a sweep: axes in a YAML file, and every combination of them as a named request. Torch-free."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.tree import source_file
from qkpatch.common.json_text import exact
from qkpatch.common.number_ranges import format_ranges
from qkpatch.common.strict_yaml import Fields, load_yaml
from qkpatch.errors import UsageError
from qkpatch.planning.request import Request
from qkpatch.spectral.rule import Channel, Select

AXES = ("layers", "modes", "min_modes", "energy", "alpha", "channel", "select", "seed")
MOST, MOST_EVER = 1_000, 20_000  # variants: without being asked twice, and at all
_DRAWING = (Select.random, Select.subspace)
_LONGEST = 40  # characters of a list of layers in a name


class Form(str, Enum):
    """What is made of each variant besides its figures."""

    lora = "lora"
    patch = "patch"
    none = "none"


def read_grid(grid: str | Path | Mapping[str, Any], *, many: bool = False) -> dict[str, Request]:
    """All variants by name, in the order of the axes, controls after what they are matched with.

    Args:
        grid: a YAML file, or a mapping that says what one would.
        many: whether there may be more than :data:`MOST`.

    Raises:
        RecipeError: unknown keys, values of another type, an empty axis, or none.
        UsageError: too many variants, or one that contradicts itself, changes nothing, or is there twice.
    """
    where, document = "the grid", grid
    if not isinstance(grid, Mapping):
        where, document = str(grid), load_yaml(source_file(Path(grid), str(grid)).read(), str(grid))
    root = Fields(document, where)
    axes = {key: values for key in AXES if (values := root.take_optional(key, list)) is not None}
    for key, values in axes.items():
        if (not values or None in values) and root.is_a(key, list):
            root.fault("must not be empty, nor hold an empty value", key)
    if not axes:
        root.fault(f"it has no axis; there are {', '.join(AXES)}")
    kinds: dict[str, Any] = {"recipe": str, "prefix": str, "attention": str, "fold_norm": bool}
    kinds["heads"] = next((kind for kind in (int, list) if root.is_a("heads", kind)), str)
    fixed = {key: root.take_optional(key, kind) for key, kind in kinds.items()}
    if root.take_optional("edits", list) is not None:
        root.fault("a variant edits all its layers alike; --config of apply takes edits", "edits")
    matched = root.take("matched", bool, default=False)
    root.finish()

    n, most = math.prod(map(len, axes.values())) * (3 if matched else 1), MOST_EVER if many else MOST
    if n > most:
        fix = f"{'' if many else 'add --yes, or '}shorten an axis"
        raise UsageError(f"up to {n:,} variants, more than {most:,}", where=where, fix=fix)
    found: dict[str, Request] = {}
    for said in _combined(axes, matched=matched):
        told = ", ".join(f"{key} {getattr(value, 'value', value)!s:.80}" for key, value in said.items())
        try:
            request = Request.of(**fixed, **said)
        except UsageError as error:
            raise UsageError(f"{told}: {error.what}", where=where, fix=error.fix) from error
        if request.alpha == 1:
            what, fix = "alpha 1 changes nothing", "take it out: the base is evaluated anyway"
            raise UsageError(f"{told}: {what}", where=where, fix=fix)
        if found.setdefault(name_of(request), request) is not request:
            fix = "take one out; matched: true adds controls by itself"
            raise UsageError(f"{told}: it is there twice", where=where, fix=fix)
    if "seed" in axes and not any(request.draws for request in found.values()):
        fix = "leave it out, or add random or subspace to select"
        raise UsageError("nothing is drawn, so seeds would do nothing", where=where, fix=fix)
    if matched and all(request.select not in (None, Select.dominant) for request in found.values()):
        fix = "leave it out, or add dominant to select"
        raise UsageError("no variant is dominant, so matched would do nothing", where=where, fix=fix)
    return found


def _combined(axes: Mapping[str, list[Any]], *, matched: bool) -> Iterator[dict[str, Any]]:
    keys = [key for key in axes if key != "seed"]
    for values in product(*(axes[key] for key in keys)):
        said = dict(zip(keys, values, strict=True))
        is_matched = matched and said.get("select", Select.dominant) == Select.dominant
        for control in ({}, {"select": Select.random}, {"select": Select.shrink})[: 3 if is_matched else 1]:
            one = said | control
            seeds = axes.get("seed") if one.get("select") in _DRAWING else None
            yield from (one | {"seed": seed} for seed in seeds) if seeds else [one]


def name_of(request: Request) -> str:
    """What a variant's folder or file is called: ``L10-18-m4-a0.5``, less what is usual or left to the recipe."""
    layers, parts = format_ranges(request.layers or ()).replace(",", "+"), []
    if len(layers) > _LONGEST:
        layers = f"{len(request.layers or ())}of-{hashlib.sha256(layers.encode()).hexdigest()[:8]}"
    parts += [f"L{layers}"] if layers else []
    numbers = (("m", request.modes), ("n", request.min_modes), ("e", request.energy), ("a", request.alpha))
    parts += [f"{letter}{exact(number or 0)}" for letter, number in numbers if number is not None]
    parts += [request.channel.value] if request.channel not in (None, Channel.full) else []
    parts += [request.select.value] if request.select not in (None, Select.dominant) else []
    parts += [f"s{request.seed or 0}"] if request.draws else []
    return "-".join(parts) or Select.dominant.value
