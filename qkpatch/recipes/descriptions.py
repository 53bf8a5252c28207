"""A recipe in words, for ``docs/models.md`` and ``qkpatch recipes``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import zip_longest

from qkpatch.recipes.recipe import NormKind, NormSpan, Recipe

_HEADER = ("recipe", "rows, attention", "default repo, layers, modes", "tested on")
_TITLE = 36  # columns of titles, which are wrapped
_LEAST = 24  # columns for the facts that are wrapped, lest a table be unreadable
_OVER = {NormSpan.projection: " over all heads", NormSpan.stored: " over one or all heads"}


def layout(recipe: Recipe) -> str:
    """How queries and keys lie in the stored tensors."""
    rows = recipe.tensors.rows
    return f"fused, {rows.value}" if rows.is_fused else ", ".join(dict.fromkeys(("separate", rows.value)))


def attention(recipe: Recipe) -> str:
    """What is special about the family's attention, as far as the edit is concerned; empty where nothing is."""
    names, config, norms = recipe.tensors, recipe.config, recipe.tensors.norms
    some = "some: " if norms is not None and norms.optional else ""
    kind = " (LayerNorm)" if norms is not None and norms.kind is NormKind.layer else ""
    facts = (
        norms is not None and f"{some}query-key norm{kind}{_OVER.get(norms.over, '')}",
        any(numbers.get("use_qk_norm") for numbers in config.class_defaults.values())
        and "query-key norm without gains: it rescales logits token by token",
        not names.every_layer and "some layers only",
        bool(recipe.others) and " or ".join(each.attention for each in (names, *recipe.others)),
        config.shared_kv is not None and "last layers share keys",
        bool(config.layer_types) and "heads differ by layer",
        names.mtp_layers and "prediction layers ignored",
        names.input_norm is None and "no RMSNorm before attention",
    )
    return "; ".join(fact for fact in facts if fact)


def is_about(recipe: Recipe, word: str) -> bool:
    """Whether ``word`` is in the names of the recipe, its models, their classes and their language models."""
    names = (recipe.name, recipe.title, *recipe.model_types, *recipe.architectures)
    return word.lower() in "\n".join((*names, *recipe.config.class_defaults)).lower()


def near_names(word: str, known: Iterable[str]) -> str:
    """The recipes that may have been meant, for an error's cure; there are too many to list them all."""
    names = list(known)
    found = [name for name in names if word in name][:5] or get_close_matches(word[:80], names, 5, 0.5)
    return f"recipes near it: {', '.join(found)}" if found else "`qkpatch recipes` lists the recipes"


def repository(recipe: Recipe) -> str:
    """The repository that the recipe's name stands for."""
    return f"{recipe.default_repo or 'none'}{' (gated)' if recipe.gated else ''}"


def defaults(recipe: Recipe) -> str:
    """The layers and modes that are edited where the user names none."""
    modes = recipe.default_modes
    return f"{recipe.default_layers}, {modes} mode{'' if modes == 1 else 's'}"


def recipe_table(recipes: Sequence[Recipe], width: int) -> str:
    """All recipes as a table of ``width`` columns, or as a block of lines for each where that is too narrow."""
    rows = [[[head] for head in _HEADER], *map(_cells, recipes)]
    columns = [max(len(line) for row in rows for line in row[i]) for i in range(len(_HEADER))]
    columns[1] = width - columns[0] - columns[2] - columns[3] - 3 * 2
    if columns[1] < _LEAST:
        return "".join(_block(recipe, width) for recipe in recipes)
    for recipe, row in zip(recipes, rows[1:], strict=True):
        row[1] += textwrap.wrap(attention(recipe), columns[1])
    cells = (line for row in rows for line in zip_longest(*row, fillvalue=""))
    lines = ["  ".join(map(str.ljust, line, columns)).rstrip() for line in cells]
    return "\n".join([lines[0], "─" * width, *lines[1:]]) + "\n"


def _cells(recipe: Recipe) -> list[list[str]]:
    """Lines by column, the facts that are wrapped left out."""
    title = textwrap.wrap(recipe.title, _TITLE, initial_indent="  ", subsequent_indent="  ")
    return [[recipe.name, *title], [layout(recipe)], [repository(recipe), defaults(recipe)], [recipe.tested]]


def _block(recipe: Recipe, width: int) -> str:
    kind = "; ".join(filter(None, (layout(recipe), attention(recipe))))
    cost = f"{repository(recipe)}; {defaults(recipe)}"
    lines = [recipe.name, *(f"  {t}" for t in (recipe.title, kind, cost, f"tested on: {recipe.tested}"))]
    return "".join(textwrap.fill(line, width, subsequent_indent="    ") + "\n" for line in lines)
