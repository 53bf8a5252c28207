"""config.json's numbers under every kind of recipe, and layers of two geometries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from probe import CROSS, D_MODEL, NUMBERS, H, K, apply, ask, build, check_edit, document

from qkpatch.errors import CheckpointError, QKPatchError, RecipeError, UnsupportedError
from qkpatch.model.tower import LanguageTower, read_tower
from qkpatch.recipes.heads import HeadLayout
from qkpatch.recipes.reading import parse_recipe
from qkpatch.recipes.recipe import Recipe

WIDE = {"head_dim": {"key": "wide_dim", "default": 16}, "num_key_value_heads": {"key": "wide_kv"}}


def recipe(config: dict[str, Any] | None = None, **tensors: Any) -> Recipe:
    return parse_recipe(document(config, **tensors).encode(), "probe.yaml")


def tower(reading: dict[str, Any], **config: Any) -> LanguageTower:
    """The tower of a flat config with :data:`NUMBERS`, where ``config`` says nothing else."""
    return read_tower(recipe(reading), {**NUMBERS, **config})


def widths(of: LanguageTower) -> list[int]:
    return [of.layout_of(layer).d_head for layer in range(of.n_layers)]


class TestSections:
    """Where the language model's numbers are."""

    sections: ClassVar = ["thinker.text", "text_config", "."]

    @pytest.mark.parametrize(
        ("config", "heads"),
        [
            ({"thinker": {"text": {**NUMBERS, "num_attention_heads": 8}}, "text_config": NUMBERS}, 8),
            ({"thinker": {"other": {}}, "text_config": {**NUMBERS, "num_attention_heads": 2}, **NUMBERS}, 2),
            ({"thinker": "text", "text_config": None, **NUMBERS}, 4),
            ({"thinker": {"text": ["text"]}, "thinker.text": NUMBERS, **NUMBERS}, 4),
        ],
    )
    def test_the_first_that_is_a_mapping_is_read_and_dots_descend(
        self, config: dict[str, Any], heads: int
    ) -> None:
        assert read_tower(recipe({"sections": self.sections}), config).layout.n_heads == heads

    def test_none_of_them_is_an_error_that_names_them_all(self) -> None:
        with pytest.raises(CheckpointError, match=r"no section thinker\.text or text_config"):
            read_tower(recipe({"sections": self.sections[:2]}), {"thinker": {"text": 1}, **NUMBERS})

    def test_errors_name_the_place_with_its_section(self) -> None:
        config = {"thinker": {"text": {**NUMBERS, "hidden_size": "24"}}}
        with pytest.raises(CheckpointError) as error:
            read_tower(recipe({"sections": self.sections}), config)
        assert error.value.where == "config.json: thinker.text.hidden_size"


class TestKeys:
    """Other names of the five numbers, class defaults, null."""

    keys: ClassVar = {
        "num_hidden_layers": "layers",
        "hidden_size": "embed_dim",
        "num_attention_heads": "heads",
    }
    defaults: ClassVar = {
        "probe": {"num_hidden_layers": 24, "hidden_size": 64, "num_attention_heads": 8, "head_dim": 4}
    }

    def test_the_familys_names_are_read_and_transformers_own_are_not(self) -> None:
        reading = {"keys": self.keys, "class_defaults": self.defaults}
        found = read_tower(recipe(reading), {"layers": 3, "embed_dim": 32, "hidden_size": 99, "heads": 2})
        assert (found.n_layers, found.layout) == (3, HeadLayout(2, 2, 4, 32))
        silent = read_tower(recipe(reading), {"num_hidden_layers": 99, "hidden_size": 99})
        assert (silent.n_layers, silent.layout) == (24, HeadLayout(8, 8, 4, 64))

    def test_null_is_derived_where_it_can_be_and_else_refused_by_the_familys_name(self) -> None:
        reading = {"keys": self.keys, "class_defaults": self.defaults}
        assert read_tower(recipe(reading), {"head_dim": None}).layout == HeadLayout(8, 8, 8, 64)
        with pytest.raises(CheckpointError) as error:
            read_tower(recipe(reading), {"embed_dim": None})
        assert error.value.where == "config.json: embed_dim"

    def test_a_further_set_takes_the_firsts_names_and_may_have_its_own(self) -> None:
        cross = {**CROSS, "keys": {"num_key_value_heads": "cross_kv", "hidden_size": "cross_width"}}
        both = recipe({"keys": self.keys, "class_defaults": self.defaults}, others={"cross": cross})
        config = {"layers": 6, "heads": 4, "embed_dim": 32, "cross_width": 48, "cross_kv": 1}
        first, second = (read_tower(both, config, both.set_named(name)) for name in ("self", "cross"))
        assert (first.n_layers, first.layout) == (6, HeadLayout(4, 4, 4, 32))
        assert (second.n_layers, second.layout) == (6, HeadLayout(4, 1, 4, 48))

    @pytest.mark.parametrize("key", NUMBERS)
    @pytest.mark.parametrize(
        "value", [True, False, 0, -1, 1 << 21, 10**400, 2.0, float("nan"), "3", [3], {}], ids=repr
    )
    def test_what_is_no_count_is_refused_by_name(self, key: str, value: object) -> None:
        with pytest.raises(CheckpointError) as error:
            tower({}, **{key: value})
        assert str(error.value.where).endswith(key)

    def test_an_unlisted_text_model_is_taken_only_when_the_recipe_is_insisted_on(self) -> None:
        config = {**NUMBERS, "model_type": "other", "head_dim": None}
        listed = recipe({"class_defaults": self.defaults})
        with pytest.raises(UnsupportedError, match="not 'other'"):
            read_tower(listed, config)
        assert read_tower(listed, config, insist=True).layout.d_head == D_MODEL // H
        del config["num_key_value_heads"]
        assert read_tower(listed, config, insist=True).layout.n_kv_heads == H


class TestLayerTypes:
    """Layers whose heads have another geometry."""

    reading: ClassVar = {"layer_types": {"wide": {"every": 2, **WIDE}}}

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"layer_types": ["wide", "narrow", "narrow"]}, [16, 8, 8]),
            ({"layer_types": ["wide", "narrow", "wide"], "wide_dim": 12}, [12, 8, 12]),
            ({"layer_types": ["narrow"] * 3}, [8, 8, 8]),
            ({"num_hidden_layers": 5}, [8, 16, 8, 16, 16]),  # each second, and the last
            ({"num_hidden_layers": 4, "layer_types": None}, [8, 16, 8, 16]),
            ({"num_hidden_layers": 1}, [16]),
        ],
    )
    def test_a_layers_type_decides_its_width(self, config: dict[str, Any], expected: list[int]) -> None:
        assert widths(tower(self.reading, **config)) == expected

    def test_a_count_that_neither_config_nor_recipe_gives_is_as_in_other_layers(self) -> None:
        of = [tower(self.reading, **extra).layout_of(2) for extra in ({}, {"wide_kv": 1}, {"wide_kv": None})]
        assert [layout.n_kv_heads for layout in of] == [K, 1, K]

    @pytest.mark.parametrize(
        ("value", "expected"),
        [(True, 16), (False, 8), (None, 8), (0, 8), ("false", 8), ("absent", 8)],
        ids=repr,
    )
    def test_a_condition_must_be_true(self, value: object, expected: int) -> None:
        reading = {"layer_types": {"wide": {"every": 3, "head_dim": {**WIDE["head_dim"], "if": "is_wide"}}}}
        config = {} if value == "absent" else {"is_wide": value}
        assert widths(tower(reading, **config)) == [8, 8, expected]

    @pytest.mark.parametrize("types", [["wide"], ["wide"] * 4, [], "wide", 3, {"0": "wide"}], ids=repr)
    def test_types_that_do_not_fit_the_layers_are_refused(self, types: object) -> None:
        with pytest.raises(CheckpointError, match="for 3 layers"):
            tower(self.reading, layer_types=types)
        assert widths(tower({}, layer_types=types)) == [8, 8, 8]  # no concern of a recipe without types

    @pytest.mark.parametrize("value", [0, -16, True, "16", [16], 1 << 30, 2.5], ids=repr)
    def test_an_odd_width_is_refused(self, value: object) -> None:
        with pytest.raises(CheckpointError, match="positive integer"):
            tower(self.reading, wide_dim=value)

    @pytest.mark.parametrize(
        "fields", [{"every": 0}, {"every": -2}, {"head_dim": {"key": "wide_dim", "default": 0}}], ids=str
    )
    def test_a_recipe_whose_own_numbers_are_none_is_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match=r"layer_types\.wide"):
            recipe({"layer_types": {"wide": {**WIDE, **fields}}})

    def test_layers_with_other_numbers_of_query_heads_have_no_product_to_edit(self) -> None:
        reading = {"layer_types": {"wide": {"every": 3, "num_attention_heads": {"key": "other.heads"}}}}
        found = tower(reading, other={"heads": 2 * H})
        assert [found.has_product(layer) for layer in range(3)] == [True, True, False]
        assert found.layout_of(2).n_heads == 2 * H
        found = tower({}, per_layer_config={"1": {"num_attention_heads": 2 * H}})
        assert [found.has_product(layer) for layer in range(3)] == [True, False, True]
        for other in ({}, {"heads": H}, "heads", None, [H]):
            assert all(tower(reading, other=other).has_product(layer) for layer in range(3))

    def test_per_layer_config_takes_the_place_of_types(self) -> None:
        per_layer = {"01": {"head_dim": 32, "num_key_value_heads": 1, "sliding_window": 7}, "2": {"x": 1}}
        found = tower(self.reading, per_layer_config=per_layer, layer_types=["wide"] * 3)
        assert widths(found) == [8, 32, 8]
        assert found.layout_of(1) == HeadLayout(H, 1, 32, D_MODEL)
        assert widths(tower(self.reading, per_layer_config={"7": {"head_dim": 32}})) == [8, 8, 8]

    def test_an_empty_per_layer_config_says_that_all_layers_are_alike(self) -> None:
        assert widths(tower(self.reading, per_layer_config={})) == [8, 8, 8]
        assert widths(tower(self.reading, per_layer_config=None)) == [8, 16, 16]

    @pytest.mark.parametrize(
        "value",
        [
            {"one": {}}, {"-1": {"head_dim": 4}}, {"1.0": {}}, {"1": [4]}, {"1": None}, {"": {}},
            {"1": {"head_dim": "4"}}, {"1": {"head_dim": True}}, {"1": {"num_key_value_heads": 3}},
            {"9" * 5000: {"head_dim": 4}}, [{"head_dim": 4}], "1", 1,
        ],
        ids=lambda value: repr(value)[:40],
    )  # fmt: skip
    def test_a_malformed_per_layer_config_is_refused(self, value: object) -> None:
        with pytest.raises(CheckpointError):
            tower({}, per_layer_config=value)


class TestSharedKeys:
    """The last layers may use an earlier layer's keys."""

    @staticmethod
    def own(default: int | None, **config: Any) -> list[bool]:
        shared = {"key": "n_shared", **({} if default is None else {"default": default})}
        found = tower({"shared_kv": shared}, **config)
        return [found.has_own_keys(layer) for layer in range(3)]

    def test_they_are_counted_from_the_last(self) -> None:
        assert self.own(None) == self.own(0) == self.own(2, n_shared=0) == [True, True, True]
        assert self.own(2) == self.own(0, n_shared=2) == [True, False, False]
        assert self.own(2, n_shared=1) == [True, True, False]

    @pytest.mark.parametrize("value", [3, 4, -1, True, False, "1", "", 1.5, float("nan"), [], [1]], ids=repr)
    def test_what_is_no_such_count_is_refused(self, value: object) -> None:
        with pytest.raises(CheckpointError) as error:
            self.own(0, n_shared=value)
        assert error.value.where == "config.json: n_shared"


class TestLogits:
    """What rescales or clips logits is recorded as it is."""

    defaults: ClassVar = {"class_defaults": {"probe": {"attn_logit_softcapping": 50.0, "use_qk_norm": True}}}

    def test_the_config_wins_over_the_class_and_null_is_nothing(self) -> None:
        assert tower(self.defaults).logits == {"attn_logit_softcapping": 50.0, "use_qk_norm": True}
        said = {"attn_logit_softcapping": None, "use_qk_norm": False, "query_pre_attn_scalar": 256}
        assert tower(self.defaults, **said).logits == {"use_qk_norm": False, "query_pre_attn_scalar": 256}
        assert (
            tower(self.defaults, clip_qkv="8", attention_multiplier=[1]).logits == tower(self.defaults).logits
        )

    def test_they_are_in_the_manifest(self, run, tmp_path: Path) -> None:
        source = build(tmp_path, document(self.defaults), attention_multiplier=0.125)
        expected = {"attention_multiplier": 0.125, "attn_logit_softcapping": 50.0, "use_qk_norm": True}
        assert apply(run, source)["model"]["logits"] == expected

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + 400 * "0"])
    def test_a_number_that_no_manifest_can_hold_is_no_crash(self, value: str, run, tmp_path: Path) -> None:
        source = build(tmp_path, document(), query_pre_attn_scalar="@")
        config = source / "config.json"
        config.write_text(config.read_text().replace('"@"', value))
        result = ask(run, "plan", source, "--json")
        assert result.exception is None or isinstance(result.exception, SystemExit | QKPatchError)
        assert result.exit_code in (0, 3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2).to(torch.bfloat16)


@pytest.mark.parametrize("by", ["layer_types", "per_layer_config"])
def test_layers_of_two_geometries_are_each_edited_in_their_own(by: str, run, tmp_path: Path) -> None:
    text = document({"layer_types": {"wide": {"every": 6, **WIDE}}})
    stem = "model.layers.1.self_attn."
    wide = {f"{stem}q_proj.weight": random(H * 16, D_MODEL), f"{stem}k_proj.weight": random(16, D_MODEL)}
    config = {
        "layer_types": {"layer_types": ["narrow", "wide", "narrow"], "wide_kv": 1},
        "per_layer_config": {"per_layer_config": {"1": {"head_dim": 16, "num_key_value_heads": 1}}},
    }[by]
    source = build(tmp_path, text, wide, **config)
    manifest = apply(run, source, "--layers", "0-2")
    geometry = [(edit["head_dim"], edit["num_key_value_heads"]) for edit in manifest["edits"]]
    assert geometry == [(8, 2), (16, 1), (8, 2)]
    assert (manifest["model"]["head_dim"], manifest["model"]["num_key_value_heads"]) == (8, 2)
    for edit in manifest["edits"]:
        check_edit(source, tmp_path / "out", edit)
    found = json.loads(ask(run, "inspect", source, "--json").stdout)["layers"]
    assert [len(layer["heads"][0]["singular_values"]) for layer in found] == [8, 16, 8]
    plan = json.loads(ask(run, "plan", source, "--layers", "0-2", "--json").stdout)
    assert plan["costs"]["edited_bytes"] == 2 * D_MODEL * H * (8 + 16 + 8)


def test_layers_that_share_keys_are_skipped_and_listed(run, tmp_path: Path) -> None:
    source = build(tmp_path, document({"shared_kv": {"key": "n_shared", "default": 1}}))
    manifest = apply(run, source, "--layers", "1-2")
    assert [edit["layer"] for edit in manifest["edits"]] == [1]
    assert (manifest["edit"]["layers"], manifest["edit"]["skipped_layers"]) == ([1], [2])
    assert any("layers 2 use an earlier layer's keys and are skipped" in w for w in manifest["warnings"])
    result = ask(run, "plan", source, "--layers", 2)
    assert result.exit_code == 2
    assert "choose from 0-1" in " ".join(result.stderr.split())


def test_a_contradicted_layer_count_is_named_with_its_section(run, tmp_path: Path) -> None:
    text = document({"sections": ["text"], "keys": {"num_hidden_layers": "depth"}})
    source = build(tmp_path, text, text={**NUMBERS, "depth": 2})
    result = ask(run, "plan", source, "--layers", 0)
    assert result.exit_code == 3
    assert "config.json: text.depth" in result.stderr
