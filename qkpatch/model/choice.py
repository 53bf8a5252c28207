"""The choice of the one shipped recipe that fits a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qkpatch.errors import AmbiguousError
from qkpatch.model.refusals import (
    refuse_class,
    refuse_known,
    refuse_quantised,
    refuse_wrapped,
    suffixes_by_module,
)
from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.recipe import TOP_LEVEL, Recipe

ANOTHER = "choose another recipe with --recipe"
_MOST = 3  # commands; classes that a recipe is looked up by
_OF_MLX = "language_model.model.layers."
_QUERY = re.compile(r"q_proj|qkv|query|c_attn|(?:^|[._])(?:w_?q|to_q|q)\.", re.IGNORECASE)


def choose_recipe(
    config: Mapping[str, Any], tensor_names: Iterable[str], commands: Callable[[], list[str]] = list
) -> Recipe:
    """The one shipped recipe whose model type, architectures and tensor names fit; else ``commands`` are what would do.

    Raises:
        AmbiguousError: none fits, or more than one; the candidates and what they lack are listed.
        UnsupportedError: attention of a kind that cannot be edited.
        CheckpointError: training left its prefix in the names.
    """
    names = list(tensor_names)
    claimed = claiming(config)
    fits = [recipe for recipe in claimed if recipe.tensors.matching_prefixes(names)]
    if len(fits) == 1:
        return fits[0]
    identity = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    if fits:
        what = f"{len(fits)} recipes fit {identity}: {', '.join(r.name for r in fits)}"
        raise AmbiguousError(what, where="config.json", fix="choose one with --recipe")
    refuse_unknown(names, config)
    known = " or ".join(commands()[:_MOST])
    looks = f"if its language model is what its tensors look like: {known}"
    if not config.get("model_type") and not config.get("architectures"):
        what = "config.json says neither model_type nor architectures: is it the model's?"
        fix = "restore the model's own" + (f"; {looks}" if known else "")
        raise AmbiguousError(what, where="config.json", fix=fix)
    is_text = all(recipe.config.sections == (TOP_LEVEL,) for recipe in claimed)
    if claimed and not (known and is_text):
        places = [(r, prefix) for r in claimed for prefix in r.tensors.prefixes]
        expected = "; ".join(f"{r.name} expects {prefix}{r.tensors.query}" for r, prefix in places)
        found = f"the checkpoint holds, for example: {', '.join(query_like(names)) or 'no q_proj at all'}"
        if any(name.startswith(_OF_MLX) for name in names):
            found += "; MLX saves such names, and other gains of norms: patch the original checkpoint"
            if is_text and any(not name.startswith("language_model.") for name in names):
                found = (
                    "config.json is the text model's alone, and the weights are a whole model's: restore its"
                )
        what = f"{identity} is known, but no query tensor has the expected name: {expected}"
        raise AmbiguousError(what, where="tensor names", fix=found)
    what, fix = f"no recipe is made for {identity}", looks
    if claimed:
        what = f"{identity} names a language model, whose layers lie here as in a larger model"
        fix = f"config.json is the text model's alone, as it seems: restore the whole model's; or: {known}"
    elif not known:
        fix = "`qkpatch recipes check SOURCE` tells what comes near, and drafts a recipe"
    raise AmbiguousError(what, where="config.json", fix=fix)


def claiming(config: Mapping[str, Any]) -> list[Recipe]:
    """The shipped recipes that config.json names, sorted by name; only those whose text holds a name are parsed."""
    named = config.get("architectures")
    classes = [name for name in named[:_MOST] if isinstance(name, str)] if isinstance(named, list) else []
    words = dict.fromkeys([str(config.get("model_type") or ""), *classes])
    kin = {name: recipe for word in words for name, recipe in shipped_recipes(word).items()}
    return [recipe for _, recipe in sorted(kin.items()) if recipe.matches(config)]


def refuse_unknown(names: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise where no recipe whatever would help.

    Raises:
        UnsupportedError: attention of a kind that cannot be edited, or quantised queries.
        CheckpointError: training left its prefix in the names.
    """
    names = list(names)
    refuse_known(names, config)
    refuse_class(config)
    refuse_wrapped(names)
    parents = {name.rpartition(".")[0] for name in query_like(names, len(names))}
    modules = {*parents, *(parent.rpartition(".")[0] for parent in parents)}
    for module, suffixes in suffixes_by_module(names, modules).items():
        refuse_quantised(module, None, suffixes)


def query_like(names: Iterable[str], limit: int = 3) -> list[str]:
    """A few names that look like query projections, one per spelling, for error messages."""
    found: dict[str, str] = {}
    for name in names:
        if _QUERY.search(name):
            found.setdefault("".join(c for c in name if not c.isdigit()), name)
    return list(found.values())[:limit]
