"""The recipes that ship with qkpatch, and those in files of a user's own, by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from qkpatch.checkpoint.tree import source_file
from qkpatch.common.strict_yaml import load_yaml
from qkpatch.errors import RecipeError, UsageError
from qkpatch.recipes.backbones import Backbone, is_family
from qkpatch.recipes.descriptions import near_names
from qkpatch.recipes.reading import parse_recipe
from qkpatch.recipes.recipe import Recipe

CHECK = "check"  # `qkpatch recipes check SOURCE`; no recipe can be called so


@cache
def shipped_recipes(word: str = "") -> Mapping[str, Recipe]:
    """All shipped recipes by name, sorted, or those whose text holds ``word``: the others need not be parsed."""
    return {path.stem: _shipped(path) for path, text in _texts().items() if word.encode() in text}


@cache
def _texts() -> Mapping[Path, bytes]:
    """The files of all shipped recipes, sorted."""
    return {path: source_file(path, path.name).read() for path in sorted(config_dir().glob("*.yaml"))}


@cache
def _shipped(path: Path) -> Recipe:
    return load_recipe(path)


@cache
def backbone(model_type: str) -> Backbone | None:
    """The language model of a text ``model_type``, as a shipped recipe without backbones describes it, if one does."""
    for path, text in _texts().items():
        if model_type.encode() in text and not is_family(text):
            said = load_yaml(text, path.name)
            if model_type in said["config"]["class_defaults"]:
                return Backbone(model_type, said, text)
    return None


@cache
def language_models() -> tuple[Recipe, ...]:
    """The shipped recipes that describe a language model, such as a family may wrap."""
    return tuple(_shipped(path) for path, text in _texts().items() if not is_family(text))


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file; its name must be the file's."""
    recipe = parse_recipe(source_file(path, path.name).read(), str(path), backbone)
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
        return shipped_recipes(name)[name]
    except KeyError:
        fix = f"{near_names(name, shipped_recipes())}; a recipe of yours is named by its file, ./NAME.yaml"
        raise UsageError(f"no recipe is called {name!r}", fix=fix) from None


def is_recipe_file(name: str) -> bool:
    """Whether a recipe is named by its file, not by its name."""
    return name.endswith((".yaml", ".yml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe, as it stands; ``name`` as of :func:`get_recipe`."""
    path = Path(name) if is_recipe_file(name) else config_dir() / f"{name}.yaml"
    return source_file(path, path.name).read().decode("utf-8")


def config_dir() -> Path:
    """Where the recipes' files are."""
    package = Path(__file__).parent.parent
    installed = package / "configs"  # where the wheel puts them
    return installed if installed.is_dir() else package.parent / "configs"
