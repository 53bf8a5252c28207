"""Recipes: each shipped YAML is a case, strict reading tells all faults at once, the choice is never a guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import REPO, build_tiny

from qkpatch.common.strict_yaml import load_yaml
from qkpatch.errors import AmbiguousError, CheckpointError, RecipeError, UnsupportedError, UsageError
from qkpatch.model.choice import choose_recipe
from qkpatch.model.tower import read_tower
from qkpatch.recipes.catalogue import get_recipe, load_recipe, shipped_recipes
from qkpatch.recipes.heads import HeadLayout
from qkpatch.recipes.reading import parse_recipe

DEFAULTS = "defaults:\n  layers: middle-third\n  modes: 4\n"
GOOD = (REPO / "configs" / "llama.yaml").read_text() + DEFAULTS


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_reads_and_finds_its_own_tensors_under_each_prefix(path: Path) -> None:
    recipe = load_recipe(path)
    config = {"model_type": [*recipe.model_types, "any"][0], "architectures": [recipe.architectures[0]]}
    for prefix in recipe.tensors.prefixes:
        names = [
            prefix.format(layer=0) + recipe.tensors.query,
            "vision_tower.layers.0.self_attn.q_proj.weight",
        ]
        assert choose_recipe(config, names) is shipped_recipes()[recipe.name]


def test_no_two_shipped_recipes_claim_the_same_model() -> None:
    claims = [
        (model_type, architecture, prefix + recipe.tensors.query)
        for recipe in shipped_recipes().values()
        for model_type in recipe.model_types or ("any",)
        for architecture in recipe.architectures
        for prefix in recipe.tensors.prefixes
    ]
    assert len(claims) == len(set(claims))


def test_all_faults_of_a_recipe_are_told_together_with_their_paths() -> None:
    text = GOOD.replace("modes: 4", "modes: four\n  colour: red").replace("out_in", "in_out")
    text = text.replace("name: llama", "nmae: llama")
    with pytest.raises(RecipeError) as error:
        parse_recipe(text.encode(), "bad.yaml")
    for fault in (
        "5 fault(s)",
        "$.name: missing",
        "$.nmae: unknown key",
        "$.defaults.modes: expected int, got str 'four'",
        "$.defaults.colour: unknown key",
        "$.tensors.orientation: only out_in is supported, got 'in_out'",
    ):
        assert fault in error.value.what
    assert error.value.where == "bad.yaml"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("model_types: [llama]", "model_types: llama"), "$.match.model_types: expected list, got str"),
        (("model_types: [llama]", "model_types: []"), "$.match.model_types: must not be empty"),
        (("model_types: [llama]", "model_types: [7]"), "$.match.model_types[0]: expected str, got int 7"),
        (
            ("hidden_size: 4096", "hidden_size: 4e3"),
            "$.config.class_defaults.llama.hidden_size: expected int",
        ),
        (("hidden_size: 4096", "hidden_size: true"), "expected int, got bool True"),
        (("hidden_size: 4096", "hidden_size: 0"), "must be at least 1"),
        (("hidden_size: 4096", "hiden_size: 4096"), "$.config.class_defaults.llama.hiden_size: unknown key"),
        (("layers.{layer}.", "layers."), "must hold {layer} exactly once"),
        (("layers.{layer}.", "layers{0}.{layer}."), "and no other brace"),
        (("middle-third", "18-10"), "$.defaults.layers: range 18-10 is reversed"),
        (("modes: 4", "modes: 0"), "$.defaults.modes: must be at least 1"),
    ],
)
def test_each_kind_of_fault_has_its_place(change: tuple[str, str], fault: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(RecipeError) as error:
        parse_recipe(GOOD.replace(*change).encode(), "bad.yaml")
    assert fault in error.value.what


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: a\nname: b\n", "duplicate key 'name'"),
        (b"a: {x: 1, x: 2}", "duplicate key 'x'"),
        (b"a: &x [1]\nb: *x\n", "aliases"),
        (b"a: !!python/object/apply:os.system [ls]", "is tagged as"),
        (b"a: [1, 2", "not valid YAML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"? [a]\n: 1", "not valid YAML"),
        (b"[" * 5000, "nested too deeply"),
        (b"a: b\n---\nc: d", "found another document"),
        (b" " * (1 << 20) + b"a: 1", "bytes of YAML"),
    ],
)
def test_hostile_and_careless_yaml_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_yaml(text, "x.yaml")
    assert message in error.value.what


def test_a_recipe_file_must_bear_its_recipes_name(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(GOOD)
    with pytest.raises(RecipeError, match="is not the file's name"):
        load_recipe(path)


def test_an_unknown_recipe_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as error:
        get_recipe("lava")
    assert "llava-1.5" in str(error.value.fix)


def test_a_known_model_type_with_strange_tensor_names_is_ambiguous_and_shows_candidates() -> None:
    names = ["transformer.blocks.0.q_proj.weight"]
    with pytest.raises(AmbiguousError) as error:
        choose_recipe({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, names)
    assert "model.layers.{layer}.self_attn.q_proj.weight" in error.value.what
    assert names[0] in str(error.value.fix)


def test_an_architecture_decides_where_the_model_type_is_shared() -> None:
    names = ["model.layers.0.self_attn.q_proj.weight"]
    original = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    assert choose_recipe(original, names).name == "llava-original"
    with pytest.raises(AmbiguousError, match="is known, but no query tensor has the expected name"):
        choose_recipe({**original, "architectures": ["LlavaForConditionalGeneration"]}, names)
    with pytest.raises(AmbiguousError, match="no recipe is made for model_type 'llava'"):
        choose_recipe({**original, "architectures": ["LlavaMptForCausalLM"]}, names)


def test_pixtral_may_bear_its_vision_towers_name_and_no_other_class_does() -> None:
    names = ["language_model.model.layers.0.self_attn.q_proj.weight"]
    config = {"model_type": "pixtral", "architectures": ["LlavaForConditionalGeneration"]}
    assert choose_recipe(config, names).name == "llava-1.5"
    with pytest.raises(AmbiguousError, match="no recipe is made for model_type 'pixtral'"):
        choose_recipe({**config, "architectures": ["PixtralVisionModel"]}, names)


def test_a_decoy_whose_name_only_contains_the_prefix_does_not_match() -> None:
    names = ["vision.model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight.bak"]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(AmbiguousError):
        choose_recipe(config, names[:1])


class TestTower:
    """config.json's numbers, with the class defaults that Hub configs leave out."""

    llava = get_recipe("llava-1.5")

    def test_an_empty_text_config_takes_the_class_defaults_of_llava_7b(self) -> None:
        tower = read_tower(self.llava, {"model_type": "llava", "text_config": {"vocab_size": 32064}})
        assert tower.n_layers == 32
        assert tower.layout == HeadLayout(32, 32, 128, 4096)

    def test_key_heads_default_to_the_class_and_null_means_as_many_as_query_heads(self) -> None:
        recipe = get_recipe("llava-next")
        text = {"model_type": "mistral"}
        assert read_tower(recipe, {"text_config": text}).layout.n_kv_heads == 8
        assert (
            read_tower(recipe, {"text_config": {**text, "num_key_value_heads": None}}).layout.n_kv_heads == 32
        )

    def test_head_dim_comes_from_the_config_and_not_from_hidden_size(self) -> None:
        text = {"model_type": "llama", "head_dim": 160}
        assert read_tower(self.llava, {"text_config": text}).layout.d_head == 160

    def test_a_flat_qwen2_vl_config_and_a_nested_one_read_alike(self) -> None:
        recipe = get_recipe("qwen2-vl")
        numbers = {
            "num_hidden_layers": 28,
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        }
        flat = read_tower(recipe, {"model_type": "qwen2_vl", **numbers})
        nested = read_tower(
            recipe, {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text", **numbers}}
        )
        assert flat.layout == nested.layout == HeadLayout(28, 4, 128, 3584)

    def test_a_text_model_the_recipe_does_not_know_is_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="not 'qwen3'"):
            read_tower(self.llava, {"text_config": {"model_type": "qwen3"}})

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ({"num_attention_heads": 32, "num_key_value_heads": 5}, "cannot share 5 key heads"),
            ({"num_attention_heads": "32"}, "expected a positive integer, got '32'"),
            ({"num_attention_heads": True}, "expected a positive integer, got True"),
            ({"hidden_size": -1}, "expected a positive integer"),
            ({"hidden_size": 10**30}, "expected a positive integer"),
            (
                {"hidden_size": 100, "num_attention_heads": 3, "num_key_value_heads": 3},
                "not a multiple of 3 heads",
            ),
        ],
    )
    def test_absurd_numbers_are_refused(self, text: dict[str, object], message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            read_tower(self.llava, {"text_config": {"model_type": "llama", **text}})

    def test_a_config_without_the_section_is_refused(self) -> None:
        with pytest.raises(CheckpointError, match="no section text_config"):
            read_tower(self.llava, {"model_type": "llava"})


@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_query_heads_share_key_heads_as_repeat_kv_does(n_kv: int) -> None:
    import torch
    from transformers.models.llama.modeling_llama import repeat_kv

    layout = HeadLayout(n_heads=4, n_kv_heads=n_kv, d_head=2, d_model=8)
    keys = torch.arange(n_kv).view(1, n_kv, 1, 1).float()
    assert [layout.kv_head(h) for h in range(4)] == repeat_kv(keys, 4 // n_kv).flatten().int().tolist()


@pytest.mark.parametrize("recipe", ["llava-1.5", "qwen3-vl", "internlm2", "deepseek-vl"])
def test_a_recipe_for_other_names_says_which_one_fits(recipe: str, tmp_path: Path, run) -> None:
    tiny = build_tiny(tmp_path / "source")
    result = run("plan", tiny.path, "--recipe", recipe)
    assert result.exit_code == 3
    assert "recipe llama fits: name that one, or none" in result.stderr
    assert run("plan", tiny.path, "--recipe", "llama").exit_code == 0
    config = json.loads((tiny.path / "config.json").read_text())
    (tiny.path / "config.json").write_text(json.dumps({**config, "model_type": "newlm"}))
    assert "choose another recipe with --recipe" in run("plan", tiny.path, "--recipe", recipe).stderr


def test_recipes_command_lists_shows_and_speaks_json(run) -> None:
    assert all(name in run("recipes").stdout for name in shipped_recipes())
    assert run("recipes", "llava-1.5").stdout == (REPO / "configs" / "llava-1.5.yaml").read_text()
    assert '"default_repo": "llava-hf/llava-1.5-7b-hf"' in run("recipes", "llava-1.5", "--json").stdout
    assert run("recipes", "nope").exit_code == 2


@pytest.mark.parametrize(
    ("word", "found", "others"),
    [
        (
            "llava",
            {"llava-1.5", "llava-next", "llava-original", "vipllava", "video-llava"},
            {"llama", "qwen3"},
        ),
        ("LLaVA", {"llava-1.5", "vipllava"}, {"llama"}),
        ("gemma2", {"gemma2-text", "paligemma", "ovis"}, {"gemma3"}),  # a language model
        ("MllamaForCausalLM", {"mllama"}, {"llama"}),  # a class
        ("Command", {"cohere", "cohere2-vision"}, {"aya-vision"}),  # a model's own name
        ("[", set(), {"llama"}),
    ],
)
def test_recipes_are_filtered_by_a_word(word: str, found: set[str], others: set[str], run) -> None:
    result = run("recipes", word, "--json")
    if not found:
        assert result.exit_code == 2
        assert f"no recipe is called {word!r}" in result.stderr
        return
    names = {recipe["name"] for recipe in json.loads(result.stdout)}
    assert found <= names
    assert not names & others
    table = run("recipes", word).stdout
    assert all(name in table for name in names)
    assert "tested on" in table


def test_a_word_that_is_near_a_name_is_told_what_may_be_meant(run) -> None:
    assert "llava-next" in run("recipes", "lava-nexxt").stderr
    assert "llava-1.5, llava-next" in str(run("plan", "x", "--recipe", "llava").stderr)
    assert "lists the recipes" in run("recipes", "zzzzzzzz").stderr


def test_a_recipe_in_a_file_is_shown_as_it_stands_there(run, tmp_path: Path) -> None:
    shipped = (REPO / "configs" / "llama.yaml").read_text()
    for name in ("mine", "llama"):  # the second bears the name of a shipped one
        text = "# of my own\n" + shipped.replace("name: llama", f"name: {name}")
        (tmp_path / f"{name}.yaml").write_text(text)
        assert run("recipes", tmp_path / f"{name}.yaml").stdout == text
    assert run("recipes", tmp_path / "none.yaml").exit_code == 4


@pytest.mark.parametrize(("counted", "stored"), [(2, 3), (5, 3)])
def test_a_layer_count_that_the_stored_tensors_contradict_is_refused_with_both_numbers(
    counted: int, stored: int, tmp_path: Path, run
) -> None:
    tiny = build_tiny(tmp_path / "source", n_layers=stored)
    config = json.loads((tiny.path / "config.json").read_text())
    (tiny.path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": counted}))
    result = run("plan", tiny.path, "--layers", 0)
    assert result.exit_code == 3
    assert f"{counted} layers, but queries are stored for {stored} (0-{stored - 1})" in result.stderr
    assert "config.json: num_hidden_layers" in result.stderr


def test_a_count_that_a_class_default_gets_wrong_is_refused_too(tmp_path: Path, run) -> None:
    tiny = build_tiny(tmp_path / "source", n_layers=3)
    config = json.loads((tiny.path / "config.json").read_text())
    del config["num_hidden_layers"]
    (tiny.path / "config.json").write_text(json.dumps(config))
    assert "32 layers, but queries are stored for 3 (0-2)" in run("plan", tiny.path).stderr


def test_one_shard_by_itself_may_hold_any_of_the_layers(tmp_path: Path, run) -> None:
    tiny = build_tiny(tmp_path / "source", n_layers=3)
    config = json.loads((tiny.path / "config.json").read_text())
    (tiny.path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    assert run("plan", tiny.path / "model.safetensors", "--layers", 0).exit_code == 0
