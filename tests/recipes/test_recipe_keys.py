"""Every key of a recipe is documented, used by a shipped recipe, and read by code that acts on it."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from functools import cache
from typing import Any

import pytest
import yaml
from conftest import REPO

from qkpatch.common.strict_yaml import Fields
from qkpatch.recipes import reading as recipe_file
from qkpatch.recipes import recipe
from qkpatch.recipes.backbones import Backbone
from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.heads import RowLayout
from qkpatch.recipes.recipe import COUNT_KEYS, LOGIT_KEYS, NormKind, NormSpan

PACKAGE = REPO / "qkpatch"
CLASSES = (
    recipe.Recipe, recipe.TensorNames, recipe.NormNames, recipe.InputNorm, recipe.ConfigReading, recipe.LayerType,
    recipe.KeyOverride,
)  # fmt: skip
FIELDS = [(cls.__name__, f.name) for cls in CLASSES for f in dataclasses.fields(cls)]

# These define recipes, read them, or put them in words for people: no reading there acts on a key.
NO_ACTORS = {
    "recipes.recipe",
    "recipes.reading",
    "recipes.descriptions",
    *(f"diagnosis.{path.stem}" for path in (PACKAGE / "diagnosis").glob("*.py")),
}
# What does not change an edit, with the modules that read it all the same.
# Only one value is accepted; verify and readers must not have to assume it.
RECORDED = {"orientation": {"planning.manifest"}}
FOR_PEOPLE = {key: {"recipes.descriptions"} for key in ("title", "tested", "gated")}
# Read by a method of the recipe's own, which others call.
THROUGH = {
    ("Recipe", "model_types"): "matches",
    ("Recipe", "architectures"): "matches",
    ("TensorNames", "attention"): "set_named",
    ("TensorNames", "query"): "query_module",
}


def reads(tree: ast.AST) -> set[str]:
    """Names of the attributes that are read, not written, anywhere in ``tree``."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@cache
def reads_by_module() -> dict[str, set[str]]:
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): reads(
            ast.parse(path.read_text())
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def readers(name: str) -> set[str]:
    return {module for module, names in reads_by_module().items() if name in names}


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls}.{name}" for cls, name in FIELDS])
def test_a_field_is_read_by_code_that_acts_on_it(cls: str, name: str) -> None:
    if name in FOR_PEOPLE:
        assert readers(name) & FOR_PEOPLE[name], f"{cls}.{name} is shown nowhere"
        return
    if name in RECORDED:
        assert readers(name) - NO_ACTORS == RECORDED[name], f"{cls}.{name} is said to be recorded only"
        return
    method = THROUGH.get((cls, name))
    if method is None:
        assert readers(name) - NO_ACTORS, f"no code reads {cls}.{name}"
        return
    methods = {
        node.name: node
        for node in ast.walk(ast.parse((PACKAGE / "recipes" / "recipe.py").read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert name in reads(methods[method])
    assert readers(method) - NO_ACTORS, f"{cls}.{method}, which reads {name}, is not used"


def test_the_lists_of_exceptions_name_fields_that_exist() -> None:
    names = {name for _, name in FIELDS}
    assert set(RECORDED) | set(FOR_PEOPLE) <= names
    assert set(THROUGH) <= set(FIELDS)
    assert set(reads_by_module()) >= NO_ACTORS


def test_a_field_that_nothing_reads_would_be_noticed() -> None:
    assert readers("no_such_field_of_a_recipe") == set()
    assert reads(ast.parse("a.b = 1\nc.d\nx(e.f).g")) == {"d", "f", "g"}


# Every mapping that the parser knows, so that it asks for every key.
OVERRIDE = {"key": "a", "default": 1, "if": "b"}
FULL: dict[str, Any] = {
    "name": "full", "title": "Full", "default_repo": "a/b", "gated": True, "tested": "documented layout",
    "match": {"model_types": ["m"], "architectures": ["A"]},
    "config": {
        "sections": ["."],
        "keys": {key: f"my_{key}" for key in COUNT_KEYS},
        "class_defaults": {"m": {**dict.fromkeys(COUNT_KEYS, 1), **dict.fromkeys(LOGIT_KEYS, 1.0)}},
        "layer_types": {"full_attention": {**dict.fromkeys(COUNT_KEYS, OVERRIDE), "every": 2}},
        "shared_kv": {"key": "a", "default": 1},
    },
    "tensors": {
        "prefixes": ["layers.{layer}."], "query": "q.weight", "key": "k.weight", "orientation": "out_in",
        "rows": "separate", "attention": "self", "every_layer": True, "mtp_layers": False,
        "norms": {
            "query": "q_norm", "key": "k_norm", "kind": "rms", "over": "head", "plus_one": True, "optional": True,
        },
        "input_norm": {"weight": "norm", "plus_one": False, "unless": "after"},
        "others": {"cross": {"query": "c.weight", "key": "d.weight", "keys": {"hidden_size": "d"}}},
    },
    "defaults": {"layers": "middle-third", "modes": 4},
}  # fmt: skip
FAMILY: dict[str, Any] = {
    **{key: FULL[key] for key in ("name", "title", "default_repo", "gated", "tested", "match")},
    "backbones": ["m"],
    "config": {"sections": ["text_config"]},
    "tensors": {"prefixes": ["text.{layer}."]},
}
# Shipped recipes agree in these, and leave them out.
FOR_OWN_RECIPES = {"defaults", "defaults.layers", "defaults.modes"}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The path of every key that the parser asks for, names that a family chooses left out."""
    paths: set[str] = set()

    def recording(method: str) -> Any:
        original = getattr(Fields, method)

        def call(self: Fields, key: str, *arguments: Any, **options: Any) -> Any:
            paths.add(generic(f"{self.path}.{key}".removeprefix("$.")))
            return original(self, key, *arguments, **options)

        return call

    for method in ("take", "take_optional", "take_list", "take_mapping"):
        monkeypatch.setattr(Fields, method, recording(method))
    recipe_file.parse_recipe(json.dumps(FULL).encode(), "full.yaml")
    recipe_file.parse_recipe(json.dumps(FAMILY).encode(), "family.yaml", {"m": Backbone("m", FULL, b"")}.get)
    return paths - {""}


def generic(path: str) -> str:
    """A key's path as the table of configs/README.md has it."""
    path = re.sub(r"^config\.class_defaults\..*", "config.class_defaults", path)
    path = re.sub(r"^config\.keys\..*", "config.keys", path)
    counts = "|".join(COUNT_KEYS)
    path = re.sub(rf"^config\.layer_types\.[^.]+(?:\.(?:{counts}))?(?=\.|$)", "config.layer_types", path)
    if re.match(r"tensors\.others\.[^.]+\.keys(?:\.|$)", path):
        return "tensors.others.keys"
    path = re.sub(r"^tensors\.others\.[^.]+$", "tensors.others", path)
    return re.sub(r"^tensors\.others\.[^.]+\.", "tensors.", path)


@cache
def table() -> dict[str, str]:
    """The list's keys, each with its entry."""
    text = (REPO / "configs" / "README.md").read_text(encoding="utf-8")
    entries = [" ".join(entry.split()) for entry in re.findall(r"^\* (`.*(?:\n  .*)*)$", text, re.MULTILINE)]
    return {key: entry for entry in entries for key in re.findall(r"`([^`]+)`", entry.split(": ")[0])}


def documented() -> set[str]:
    """The table's keys, and those that a row tells of below its own: `key` in the row of `config.shared_kv`."""
    inner = {
        "config.layer_types": ("key", "default", "if", "every"),
        "config.shared_kv": ("key", "default", "if"),
        "tensors.norms": ("query", "key"),
        "tensors.input_norm": ("weight", "plus_one"),
        "tensors.others": ("keys",),
    }
    told = {
        f"{key}.{word}"
        for key, words in inner.items()
        for word in words
        if re.search(rf"`{word}(?:: n)?`", table()[key])
    }
    groups = {key.rpartition(".")[0] for key in table()} - {""}
    return set(table()) | told | groups


def test_every_key_the_parser_takes_is_in_the_table(taken: set[str]) -> None:
    assert taken - documented() == set()


def test_every_key_of_the_table_is_taken_by_the_parser(taken: set[str]) -> None:
    assert documented() - taken == set()


@pytest.mark.parametrize("key", [*COUNT_KEYS, *LOGIT_KEYS])
def test_every_number_that_is_read_is_named_in_the_table(key: str) -> None:
    assert f"`{key}`" in table()["config.keys"] + table()["config.class_defaults"]


@cache
def used() -> set[str]:
    """The paths of every key in every shipped YAML file."""
    found: set[str] = set()

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                found.add(generic(f"{path}.{key}".lstrip(".")))
                walk(inner, f"{path}.{key}")

    for file in sorted((REPO / "configs").glob("*.yaml")):
        walk(yaml.safe_load(file.read_text(encoding="utf-8")), "")
    return found


@pytest.mark.parametrize("key", sorted(documented() - FOR_OWN_RECIPES))
def test_every_key_of_the_table_is_used_by_a_shipped_recipe(key: str) -> None:
    assert key in used()


@pytest.mark.parametrize("choice", [*RowLayout, *NormKind, *NormSpan], ids=str)
def test_every_choice_of_a_key_is_used_by_a_shipped_recipe_and_told(
    choice: RowLayout | NormKind | NormSpan,
) -> None:
    sets = [names for known in shipped_recipes().values() for names in (known.tensors, *known.others)]
    norms = [names.norms for names in sets if names.norms is not None]
    chosen = [names.rows for names in sets] + [n.kind for n in norms] + [n.over for n in norms]
    assert any(one is choice for one in chosen)
    key = {RowLayout: "tensors.rows", NormKind: "tensors.norms.kind", NormSpan: "tensors.norms.over"}[
        type(choice)
    ]
    assert f"`{choice.value}`" in table()[key]
