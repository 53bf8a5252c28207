"""The choice of the one shipped recipe that fits a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qkpatch.errors import AmbiguousError
from qkpatch.model.refusals import refuse_known
from qkpatch.recipes.catalogue import recipes_naming
from qkpatch.recipes.recipe import Recipe


def choose_recipe(config: Mapping[str, Any], tensor_names: Iterable[str]) -> Recipe:
    """The one shipped recipe whose model type, architectures and tensor names fit.

    Raises:
        AmbiguousError: none fits, or more than one; the candidates and what they lack are listed.
    """
    names = list(tensor_names)
    kin = recipes_naming(str(config.get("model_type") or ""))
    claimed = [recipe for recipe in kin if recipe.matches(config)]
    fitting = [recipe for recipe in claimed if recipe.tensors.matching_prefixes(names)]
    if len(fitting) == 1:
        return fitting[0]
    identity = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    if fitting:
        raise AmbiguousError(
            f"{len(fitting)} recipes fit {identity}: {', '.join(r.name for r in fitting)}",
            where="config.json",
            fix="choose one with --recipe",
        )
    refuse_known(names)
    if claimed:
        expected = "; ".join(
            f"{r.name} expects {p}{r.tensors.query}" for r in claimed for p in r.tensors.prefixes
        )
        raise AmbiguousError(
            f"{identity} is known, but no query tensor has the expected name: {expected}",
            where="tensor names",
            fix=f"the checkpoint holds, for example: {', '.join(query_like(names)) or 'no q_proj at all'}",
        )
    raise AmbiguousError(
        f"no recipe is made for {identity}",
        where="config.json",
        fix="`qkpatch recipes check SOURCE` tells what comes near; if the layout is a known one, name it with --recipe",
    )


def query_like(names: Iterable[str], limit: int = 3) -> list[str]:
    """A few names that look like query projections, one per spelling, for error messages."""
    found: dict[str, str] = {}
    for name in names:
        if "q_proj" in name or "qkv" in name or "query" in name:
            found.setdefault("".join(c for c in name if not c.isdigit()), name)
    return list(found.values())[:limit]
