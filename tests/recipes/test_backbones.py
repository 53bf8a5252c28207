"""A family around described language models: each key that it does not say is theirs, one reference deep."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_recipe_keys import FAMILY, FULL

from qkpatch.common.strict_yaml import load_yaml
from qkpatch.common.typed_json import as_json
from qkpatch.errors import RecipeError
from qkpatch.recipes.backbones import Backbone, is_family
from qkpatch.recipes.catalogue import backbone, get_recipe, load_recipe, recipe_text, shipped_recipes
from qkpatch.recipes.reading import parse_recipe

# A full recipe in the form of before there were backbones, as users have them in files of their own.
OLD = """\
# LLaVA-NeXT with Vicuna, Llama 3, Yi (llama), Mistral or Qwen language models.
name: llava-next
title: LLaVA-NeXT (LLaVA-1.6)
default_repo: llava-hf/llava-v1.6-mistral-7b-hf
tested: transformers class

match:
  model_types: [llava_next]
  architectures: [LlavaNextForConditionalGeneration]

config:
  sections: [text_config]
  class_defaults:   # of the transformers classes: Hub configs leave out what equals these
    llama: {num_hidden_layers: 32, hidden_size: 4096, num_attention_heads: 32}
    mistral: {num_hidden_layers: 32, hidden_size: 4096, num_attention_heads: 32, num_key_value_heads: 8}
    qwen2: {num_hidden_layers: 32, hidden_size: 4096, num_attention_heads: 32, num_key_value_heads: 32}

tensors:
  prefixes:
    - language_model.model.layers.{layer}.   # on the Hub, and as transformers 5 saves it
    - model.language_model.layers.{layer}.   # in-memory names; written by some 4.52 versions
  query: self_attn.q_proj.weight
  key: self_attn.k_proj.weight
  orientation: out_in
  input_norm: {weight: input_layernorm.weight}

defaults:
  layers: middle-third
  modes: 4
"""
OTHER = {  # another value of each key that a backbone's description has
    "config": {
        "keys": {"hidden_size": "width"},
        "class_defaults": {"m": {"hidden_size": 7}},
        "layer_types": {"sliding": {"every": 3}},
        "shared_kv": {"key": "b", "default": 2},
    },
    "tensors": {
        "query": "other_q.weight", "key": "other_k.weight", "orientation": "out_in", "rows": "gated",
        "attention": "language", "every_layer": False, "mtp_layers": True,
        "norms": {"query": "a", "key": "b", "kind": "layer"}, "input_norm": {"weight": "n", "plus_one": True},
        "others": {"vision": {"query": "v.weight", "key": "w.weight"}},
    },
}  # fmt: skip
KEYS = [(part, key) for part, keys in OTHER.items() for key in keys]


def known(**changes: dict[str, Any]) -> dict[str, Backbone]:
    """Backbones by text model type, each described as ``FULL`` is but for the changes; None takes a key away."""
    found: dict[str, Backbone] = {}
    for name, change in changes.items():
        own = {"config": {"class_defaults": {name: {"hidden_size": len(name)}}}, "tensors": {}}
        said = {part: {**FULL[part], **own[part], **change.get(part, {})} for part in own}
        said = {part: {k: v for k, v in keys.items() if v is not None} for part, keys in said.items()}
        found[name] = Backbone(name, said, json.dumps(said).encode())
    return found


def read(family: dict[str, Any], backbones: dict[str, Backbone]) -> dict[str, Any]:
    """All of the recipe but its digest."""
    recipe = parse_recipe(json.dumps(family).encode(), "family.yaml", backbones.get).to_json()
    del recipe["sha256"]
    return recipe


def with_own(part: str, key: str, value: Any, **others: Any) -> dict[str, Any]:
    return {**FAMILY, part: {**FAMILY[part], key: value}, **others}


def faults(family: dict[str, Any], backbones: dict[str, Backbone]) -> str:
    with pytest.raises(RecipeError) as error:
        read(family, backbones)
    return error.value.what


def test_the_keys_tried_here_are_all_that_a_description_has() -> None:
    where = {("config", "sections"), ("tensors", "prefixes")}
    assert set(KEYS) == {(part, key) for part in OTHER for key in FULL[part]} - where


@pytest.mark.parametrize(("part", "key"), KEYS)
def test_a_key_that_a_family_does_not_say_is_its_backbones_and_one_it_says_its_own(
    part: str, key: str
) -> None:
    value = OTHER[part][key]
    theirs = read(FAMILY, known(m={part: {key: value}}))
    assert theirs == read(with_own(part, key, value), known(m={}))
    written_out = {**FULL, **{p: {**known(m={})["m"].said[p], **FAMILY[p]} for p in OTHER}}
    written_out[part][key] = value
    assert theirs == read(written_out, {})
    assert key == "orientation" or theirs != read(FAMILY, known(m={}))


@pytest.mark.parametrize(("part", "key"), KEYS)
def test_where_backbones_differ_the_family_must_say_it(part: str, key: str) -> None:
    family = {**FAMILY, "backbones": ["m", "other"]}
    backbones = known(m={}, other={part: {key: OTHER[part][key]}})
    if key in ("class_defaults", "orientation"):  # of each its own; only one value is accepted
        return
    assert f"$.{part}.{key}: the backbones m, other differ here" in faults(family, backbones)
    said = with_own(part, key, OTHER[part][key], backbones=["m", "other"])
    assert read(said, backbones)["name"] == "full"


@pytest.mark.parametrize("key", ["norms", "input_norm", "others", "rows", "mtp_layers"])
def test_null_takes_a_key_of_the_backbones_away(key: str) -> None:
    assert read(with_own("tensors", key, None), known(m={})) == read(
        FAMILY, known(m={"tensors": {key: None}})
    )


def test_norms_that_some_backbones_have_are_optional_and_never_others_than_theirs() -> None:
    family = {**FAMILY, "backbones": ["a", "b", "c"]}
    plain = {"query": "q_norm", "key": "k_norm"}
    backbones = known(
        a={"tensors": {"norms": None}}, b={"tensors": {"norms": plain}}, c={"tensors": {"norms": None}}
    )
    norms = read(family, backbones)["tensors"]["norms"]
    assert (norms["query"], norms["optional"]) == ("q_norm", True)
    assert read(family, known(a={}, b={}, c={}))["tensors"]["norms"]["optional"] is True  # as FULL says
    backbones = known(
        a={"tensors": {"norms": plain}}, b={"tensors": {"norms": plain}}, c={"tensors": {"norms": plain}}
    )
    assert read(family, backbones)["tensors"]["norms"]["optional"] is False
    backbones = known(a={"tensors": {"norms": None}}, b={"tensors": {"norms": plain}}, c={})
    assert "$.tensors.norms: the backbones a, b, c differ here" in faults(family, backbones)


def test_class_defaults_are_the_backbones_in_their_order_and_an_entry_may_name_one() -> None:
    backbones = known(m={}, other={})
    family = {**FAMILY, "backbones": ["other", "m"]}
    assert list(read(family, backbones)["config"]["class_defaults"].items()) == [
        ("other", {"hidden_size": 5}), ("m", {"hidden_size": 1}),
    ]  # fmt: skip
    own = {"mine": "other", "x": {"hidden_size": 3}}
    defaults = read(with_own("config", "class_defaults", own, backbones=["m", "other"]), backbones)["config"][
        "class_defaults"
    ]
    assert defaults == {"mine": {"hidden_size": 5}, "x": {"hidden_size": 3}}
    for own in ({"mine": "third"}, {"mine": "m "}, {"mine": None}, {"mine": 4}):
        assert "$.config.class_defaults.mine: expected a mapping" in faults(
            with_own("config", "class_defaults", own), backbones
        )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"backbones": []}, "$.backbones: must not be empty"),
        ({"backbones": "m"}, "$.backbones: expected list, got str 'm'"),
        ({"backbones": None}, "$.backbones: expected list"),
        ({"backbones": ["m", 7, ["m"], {}]}, "$.backbones[1]: expected str"),
        ({"backbones": ["m", "n"]}, "$.backbones: no recipe without backbones describes a language model 'n'"),
        ({"config": {}}, "$.config.sections: missing"),
        ({"tensors": {}}, "$.tensors.prefixes: missing"),
        ({"tensors": None}, "$.tensors: expected a mapping"),
        ({"config": [1]}, "$.config: expected a mapping"),
        ({"config": {"sections": ["."], "class_defaults": 3}}, "$.config.class_defaults: expected a mapping"),
        ({"config": {"sections": None}}, "$.config.sections: missing"),
        ({"tensors": {"prefixes": ["{layer}"], "qeury": "x"}}, "$.tensors.qeury: unknown key"),
        ({"tensors": {"prefixes": ["{layer}"], 3: "x"}}, "$.tensors.3: unknown key"),
        ({"tensors": {"prefixes": ["{layer}"], "norms": {"query": "a"}}}, "$.tensors.norms.key: missing"),
        ({"tensors": {"prefixes": ["{layer}"], "rows": "qkv"}}, "$.tensors.rows: rows qkv need query = key"),
    ],
)  # fmt: skip
def test_faults_of_a_family_have_their_places(changes: dict[str, Any], fault: str) -> None:
    assert fault in faults({**FAMILY, **changes}, known(m={}))


def test_a_recipe_without_backbones_is_read_as_ever_and_may_not_leave_out_what_they_would_say(
    tmp_path: Path,
) -> None:
    path = tmp_path / "llava-next.yaml"
    path.write_text(OLD)
    shipped, own = get_recipe("llava-next"), load_recipe(path)
    assert own == replace(shipped, sha256=own.sha256)
    path.write_text(OLD.replace("  orientation: out_in\n", ""))
    with pytest.raises(RecipeError, match="orientation: missing"):
        load_recipe(path)
    path.write_text(OLD.replace("{weight: input_layernorm.weight}", "null"))
    with pytest.raises(RecipeError, match="input_norm: expected a mapping"):
        load_recipe(path)


def test_a_recipe_of_ones_own_may_name_shipped_backbones_and_none_other(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    shipped = recipe_text("llava-next").replace("name: llava-next", "name: mine")
    path.write_text(shipped)
    assert load_recipe(path).tensors == get_recipe("llava-next").tensors
    path.write_text(shipped.replace("[llama, mistral, qwen2]", "[llava_next]"))
    with pytest.raises(RecipeError, match="describes a language model 'llava_next'"):
        load_recipe(path)


def test_the_digest_of_a_family_changes_with_its_backbones() -> None:
    text = json.dumps(FAMILY).encode()
    first, same, other = (
        parse_recipe(text, "x", known(m=change).get).sha256
        for change in ({}, {}, {"tensors": {"every_layer": False}})
    )
    assert first == same != other
    assert parse_recipe(OLD.encode(), "x").sha256 == hashlib.sha256(OLD.encode()).hexdigest()


def test_every_language_model_is_described_once() -> None:
    described: list[str] = []
    for name in shipped_recipes():
        said = load_yaml(recipe_text(name).encode(), name)
        assert is_family(recipe_text(name).encode()) == ("backbones" in said)
        described += [] if "backbones" in said else [t for t in said["config"]["class_defaults"] if t != "*"]
    assert len(described) == len(set(described))
    for model_type in described:
        found = backbone(model_type)
        assert found is not None
        assert model_type in found.said["config"]["class_defaults"]
    assert backbone("no such type") is backbone("") is backbone("name") is None


def test_no_family_repeats_what_its_backbones_say() -> None:
    """A fact about a backbone is changed in one place."""
    for name in shipped_recipes():
        said = load_yaml(recipe_text(name).encode(), name)
        if "backbones" not in said:
            continue
        for part in OTHER:
            for key in said[part].keys() - {"sections", "prefixes"}:
                less = {**said, part: {k: v for k, v in said[part].items() if k != key}}
                try:
                    recipe = parse_recipe(json.dumps(less).encode(), name, backbone)
                except RecipeError:
                    continue
                whole = get_recipe(name)
                kept = as_json((recipe.tensors, recipe.others, recipe.config.class_defaults))
                told = as_json((whole.tensors, whole.others, whole.config.class_defaults))
                assert kept != told, f"{name}: {part}.{key} says nothing new"
