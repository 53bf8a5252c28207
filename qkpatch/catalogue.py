"""The recipes that ship with qkpatch, and the choice of the one that fits a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.tree import source_file
from qkpatch.describe import near_names
from qkpatch.errors import AmbiguousError, RecipeError, UsageError
from qkpatch.recipe import Recipe
from qkpatch.recipe_file import parse_recipe
from qkpatch.refusals import refuse_known

CHECK = "check"  # `qkpatch recipes check SOURCE`; no recipe can be called so


@cache
def shipped_recipes() -> Mapping[str, Recipe]:
    """All shipped recipes by name, sorted."""
    recipes = [load_recipe(path) for path in sorted(_config_dir().glob("*.yaml"))]
    return {recipe.name: recipe for recipe in recipes}


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file; its name must be the file's."""
    recipe = parse_recipe(source_file(path, path.name).read(), str(path))
    if recipe.name != path.stem:
        raise RecipeError(f"$.name: {recipe.name!r} is not the file's name", where=str(path))
    if recipe.name == CHECK:
        raise RecipeError(f"$.name: {CHECK!r} is a word of `qkpatch recipes`", where=str(path))
    return recipe


def get_recipe(name: str) -> Recipe:
    """The shipped recipe called ``name``, or the one in a file of the user's, ``PATH.yaml``.

    Raises:
        UsageError: no shipped recipe is called so.
        FileSystemError: the file cannot be read.
        RecipeError: the file is no recipe.
    """
    if is_recipe_file(name):
        return load_recipe(Path(name))
    try:
        return shipped_recipes()[name]
    except KeyError:
        raise UsageError(
            f"no recipe is called {name!r}",
            fix=f"{near_names(name, shipped_recipes())}; a recipe of yours is named by its file, ./NAME.yaml",
        ) from None


def is_recipe_file(name: str) -> bool:
    """Whether a recipe is named by its file, not by its name."""
    return name.endswith((".yaml", ".yml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, as it stands."""
    return (_config_dir() / f"{get_recipe(name).name}.yaml").read_text(encoding="utf-8")


def choose_recipe(config: Mapping[str, Any], tensor_names: Iterable[str]) -> Recipe:
    """The one shipped recipe whose model type, architectures and tensor names fit.

    Raises:
        AmbiguousError: none fits, or more than one; the candidates and what they lack are listed.
    """
    names = list(tensor_names)
    claimed = [recipe for recipe in shipped_recipes().values() if recipe.matches(config)]
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


def _config_dir() -> Path:
    package = Path(__file__).parent
    installed = package / "configs"  # where the wheel puts them
    return installed if installed.is_dir() else package.parent / "configs"
