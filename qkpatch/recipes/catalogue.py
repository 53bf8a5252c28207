"""The recipes that ship with qkpatch, and those in files of a user's own, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from qkpatch.checkpoint.tree import source_file
from qkpatch.common.strict_yaml import load_yaml
from qkpatch.errors import RecipeError, UsageError
from qkpatch.recipes.backbones import Backbone, backbones_of
from qkpatch.recipes.descriptions import near_names
from qkpatch.recipes.reading import parse_recipe
from qkpatch.recipes.recipe import Recipe

CHECK = "check"  # `qkpatch recipes check SOURCE`; no recipe can be called so


class _Shipped(Mapping[str, Recipe]):
    """Recipes by name, sorted; each is parsed when it is asked for, which takes milliseconds."""

    def __init__(self) -> None:
        self._paths = {path.stem: path for path in sorted(_config_dir().glob("*.yaml"))}
        self._parsed: dict[str, Recipe] = {}

    def __getitem__(self, name: str) -> Recipe:
        if name not in self._parsed:
            self._parsed[name] = load_recipe(self._paths[name])
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


@cache
def shipped_recipes() -> Mapping[str, Recipe]:
    """All shipped recipes by name, sorted."""
    return _Shipped()


def recipes_naming(word: str) -> Iterator[Recipe]:
    """The shipped recipes whose text holds ``word``."""
    return (shipped_recipes()[name] for name in shipped_recipes() if word in recipe_text(name))


class _Backbones(Mapping[str, Backbone]):
    """The language models that shipped recipes describe; a file is parsed when it may be the one asked for."""

    def __init__(self) -> None:
        files = (source_file(path, path.name) for path in sorted(_config_dir().glob("*.yaml")))
        self._texts = [text for text in (file.read() for file in files) if b"\nbackbones:" not in text]
        self._of = cache(
            lambda text: {b.model_type: b for b in backbones_of(load_yaml(text, "configs"), text)}
        )

    def __getitem__(self, model_type: str) -> Backbone:
        for text in self._texts:
            if model_type.encode() in text and model_type in self._of(text):
                return self._of(text)[model_type]
        raise KeyError(model_type)

    def __iter__(self) -> Iterator[str]:
        return (model_type for text in self._texts for model_type in self._of(text))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def shipped_backbones() -> Mapping[str, Backbone]:
    """The language models that shipped recipes describe, by text ``model_type``."""
    return _Backbones()


@cache
def language_models() -> tuple[Recipe, ...]:
    """The shipped recipes that describe a language model, such as a family may wrap."""
    names = {str(backbone.said["name"]) for backbone in shipped_backbones().values()}
    return tuple(shipped_recipes()[name] for name in sorted(names))


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file; its name must be the file's."""
    recipe = parse_recipe(source_file(path, path.name).read(), str(path), shipped_backbones())
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
    """The YAML of a recipe, as it stands; ``name`` as of :func:`get_recipe`."""
    path = Path(name) if is_recipe_file(name) else _config_dir() / f"{name}.yaml"
    return source_file(path, path.name).read().decode("utf-8")


def _config_dir() -> Path:
    package = Path(__file__).parent.parent
    installed = package / "configs"  # where the wheel puts them
    return installed if installed.is_dir() else package.parent / "configs"
