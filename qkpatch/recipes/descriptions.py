"""A recipe in words, for ``docs/models.md`` and ``qkpatch recipes``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from qkpatch.recipes.recipe import NormKind, NormSpan, Recipe
from qkpatch.recipes.rows import RowLayout

_HEADER = ("recipe", "rows, attention", "default repo, layers, modes", "tested on")
_TITLE = 36  # columns of titles, which are wrapped
_LEAST = 24  # columns for the facts that are wrapped, lest a table be unreadable
_OVER = {
    NormSpan.head: "",
    NormSpan.projection: " over all heads",
    NormSpan.stored: " over one or all heads",
}


def layout(recipe: Recipe) -> str:
    """How queries and keys lie in the stored tensors."""
    rows = recipe.tensors.rows
    return f"fused, {rows.value}" if rows.is_fused else ", ".join(dict.fromkeys(("separate", rows.value)))


def attention(recipe: Recipe) -> str:
    """What is special about the family's attention, as far as the edit is concerned; empty where nothing is."""
    names, facts = recipe.tensors, []
    if names.norms is not None:
        kind = " (LayerNorm)" if names.norms.kind is NormKind.layer else ""
        facts.append(
            f"{'some: ' if names.norms.optional else ''}query-key norm{kind}{_OVER[names.norms.over]}"
        )
    if not names.every_layer:
        facts.append("some layers only")
    if recipe.others:
        facts.append(f"{names.attention} or {' or '.join(other.attention for other in recipe.others)}")
    if recipe.config.shared_kv is not None:
        facts.append("last layers share keys")
    if recipe.config.layer_types:
        facts.append("heads differ by layer")
    if names.mtp_layers:
        facts.append("prediction layers ignored")
    if names.input_norm is None:
        facts.append("no RMSNorm before attention")
    return "; ".join(facts)


def assumed(recipe: Recipe, *, with_norms: bool) -> str:
    """What naming this recipe for another model takes for granted; ``with_norms``: of queries and keys, too."""
    names, facts = recipe.tensors, []
    if with_norms and names.norms is not None:
        gain = "stored gain + 1" if names.norms.plus_one else "plain gain"
        facts.append("LayerNorm" if names.norms.kind is NormKind.layer else gain)
        facts[-1] += _OVER[names.norms.over]
    if names.rows is not RowLayout.separate:
        facts.append(f"rows {names.rows.value}")
    if names.input_norm is None:
        facts.append("no RMSNorm before attention")
    elif names.input_norm.plus_one:
        facts.append("stored gain + 1 before attention")
    else:
        facts.append("RMSNorm before attention")
    if recipe.config.shared_kv is not None:
        facts.append("last layers share keys")
    return "; ".join(facts)


def specialities(recipe: Recipe) -> int:
    """How many things are special about a recipe: each is one more that an unknown model would have to share."""
    names, config = recipe.tensors, recipe.config
    norms = names.norms
    return sum(
        (
            names.rows is not RowLayout.separate,
            norms is not None and norms.kind is not NormKind.rms,
            norms is not None and norms.over is not NormSpan.head,
            norms is not None and norms.plus_one,
            norms is not None and norms.optional,
            names.input_norm is None or names.input_norm.plus_one,
            not names.every_layer,
            names.mtp_layers,
            bool(recipe.others),
            bool(config.layer_types),
            config.shared_kv is not None,
        )
    )


def near_names(word: str, known: Iterable[str]) -> str:
    """The recipes that may have been meant, for an error's cure; there are too many to list them all."""
    found = get_close_matches(word[:80], list(known), 5, 0.5)
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
    names, repos, tests = (
        max(len(line) for recipe in recipes for line in cell(recipe)) for cell in (_name, _defaults, _tested)
    )
    columns = (names, width - names - repos - tests - 3 * 2, repos, tests)
    if columns[1] < _LEAST:
        return "".join(_block(recipe, width) for recipe in recipes)
    lines = [_line(_HEADER, columns), "─" * width]
    for recipe in recipes:
        facts = [layout(recipe), *textwrap.wrap(attention(recipe), columns[1])]
        cells = [_name(recipe), facts, _defaults(recipe), _tested(recipe)]
        height = max(map(len, cells))
        lines += [
            _line([*row], columns) for row in zip(*(c + [""] * (height - len(c)) for c in cells), strict=True)
        ]
    return "\n".join(lines) + "\n"


def _name(recipe: Recipe) -> list[str]:
    return [
        recipe.name,
        *textwrap.wrap(recipe.title, _TITLE, initial_indent="  ", subsequent_indent="  "),
    ]


def _defaults(recipe: Recipe) -> list[str]:
    return [repository(recipe), defaults(recipe)]


def _tested(recipe: Recipe) -> list[str]:
    return [recipe.tested]


def _line(cells: Sequence[str], columns: Sequence[int]) -> str:
    return "  ".join(cell.ljust(column) for cell, column in zip(cells, columns, strict=True)).rstrip()


def _block(recipe: Recipe, width: int) -> str:
    kind, cost = "; ".join(filter(None, (layout(recipe), attention(recipe)))), "; ".join(_defaults(recipe))
    lines = [
        recipe.name,
        *(f"  {text}" for text in (recipe.title, kind, cost, f"tested on: {recipe.tested}")),
    ]
    return "".join(textwrap.fill(line, width, subsequent_indent="    ") + "\n" for line in lines)
