"""Recipes of the user's own (`--recipe FILE.yaml`), and what no recipe may do in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, Tiny, build_tiny
from safetensors.torch import load_file, save_file

from qkpatch.recipes.catalogue import load_recipe

LLAMA = (REPO / "configs" / "llama.yaml").read_text()
Run = Callable[..., Any]


def add(tiny: Tiny, **tensors: torch.Tensor | None) -> None:
    """Store tensors of layer 1 besides those that are there, or remove them; ``__`` stands for a dot."""
    path = tiny.path / "model.safetensors"
    held = load_file(path)
    for key, value in tensors.items():
        name = "model.layers.1." + key.replace("__", ".")
        held.pop(name, None)
        if value is not None:
            held[name] = value
    save_file(held, path, {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "self_attn__query_layernorm__weight",
        "self_attn__q_layernorm__norms__0__weight",
        "self_attn__qk_norm__weight",
        "self_attn__norm_k__weight",
        "self_attn__q_norm__scale",
        "self_attn__qnorm__weight",
        "self_attn__attn__k_ln__weight",
        "k_norm__weight",
    ],
)
def test_a_norm_of_queries_or_keys_by_any_name_is_refused_where_it_is_not_declared(
    name: str, tiny: Tiny, run: Run
) -> None:
    add(tiny, **{name: torch.ones(8)})
    result = run("plan", tiny.path, "--layers", 1)
    assert result.exit_code == 3
    assert "queries or keys are normalised, which recipe llama does not declare" in result.stderr
    assert name.replace("__", ".") in result.stderr
    assert run("plan", tiny.path, "--layers", 0).exit_code == 0


@pytest.mark.parametrize(
    "name",
    ["input_layernorm", "self_attn__qkv_bias", "self_attn__v_norm", "post_attention_norm", "mlp__linknorm"],
)
def test_other_norms_are_no_matter(name: str, tiny: Tiny, run: Run) -> None:
    add(tiny, **{f"{name}__weight": torch.ones(24)})
    assert run("plan", tiny.path, "--layers", 1).exit_code == 0


def test_a_weight_in_a_form_that_has_no_name_here_is_said_to_be_one(tiny: Tiny, run: Run) -> None:
    add(
        tiny,
        self_attn__q_proj__weight=None,
        self_attn__q_proj__W_q=torch.ones(8, dtype=torch.uint8),
        self_attn__q_proj__meta=torch.ones(2),
    )
    result = run("plan", tiny.path, "--layers", 1)
    assert result.exit_code == 3
    assert "stored as W_q, meta, a form that qkpatch does not know" in result.stderr


def test_a_layer_of_which_nothing_is_stored_is_not_skipped_as_being_of_another_kind(
    tmp_path: Path, run: Run
) -> None:
    tiny = build_tiny(tmp_path / "source", n_layers=3)
    recipe = tmp_path / "llama.yaml"
    recipe.write_text(LLAMA.replace("  input_norm", "  every_layer: false\n  input_norm"))
    path = tiny.path / "model.safetensors"
    held = load_file(path)
    lost = [name for name in held if ".layers.1." in name]
    others = {**{n: t for n, t in held.items() if n not in lost}, "model.layers.1.conv.weight": torch.ones(1)}
    save_file(others, path, {"format": "pt"})
    arguments = ("plan", tiny.path, "--layers", "0-2", "--recipe", recipe)
    result = run(*arguments)
    assert result.exit_code == 0
    assert "layers 1 have no query-key product of this kind" in result.stderr
    del others["model.layers.1.conv.weight"]
    save_file(others, path, {"format": "pt"})
    result = run(*arguments)
    assert result.exit_code == 3
    assert "nothing is stored of layer 1" in result.stderr


def test_an_untested_recipe_is_a_warning(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "llama.yaml"
    recipe.write_text(LLAMA.replace("tested: real weights", "tested: untested"))
    assert "recipe llama says that it is untested" in run("plan", tiny.path, "--recipe", recipe).stderr
    assert "untested" not in run("plan", tiny.path).stderr


OWN = """\
name: own
title: A wrapper of one's own around Llama
tested: untested
match: {model_types: [own], architectures: [OwnModel]}
backbones: [llama]
config: {sections: [llm]}
tensors:
  prefixes:
    - wrapped.layers.{layer}.
"""


def test_ten_lines_around_a_described_language_model_are_a_recipe(run: Run, tmp_path: Path) -> None:
    counts = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "own", "architectures": ["OwnModel"], "llm": {**counts, "head_dim": 8}}
    tiny = build_tiny(tmp_path / "source", prefix="wrapped.layers.{layer}.self_attn.", config=config)
    recipe, out = tmp_path / "own.yaml", tmp_path / "out"
    recipe.write_text(OWN)
    chosen = ("--recipe", recipe)
    assert run("apply", tiny.path, *chosen, "--layers", 1, "--modes", 2, "-o", out).exit_code == 0
    assert run("verify", out, "--source", tiny.path, *chosen).exit_code == 0
    record = json.loads((out / "qkpatch.json").read_text())["recipe"]
    assert record["default_repo"] is None
    assert record["config"]["class_defaults"].keys() == {"llama"}
    shown = json.loads(run("recipes", recipe, "--json").stdout)[0]
    assert shown["tensors"]["query"] == "self_attn.q_proj.weight"
    assert run("recipes", recipe).stdout == OWN
    recipe.write_text(OWN.replace("[llama]", "[lama]"))
    result = run("plan", tiny.path, *chosen)
    assert result.exit_code == 2
    assert "describes a language model 'lama'" in result.stderr


class TestVerify:
    """An output made by a recipe of one's own is verified with it, and with no other."""

    def made(self, tiny: Tiny, run: Run, tmp_path: Path, name: str) -> tuple[Path, Path]:
        recipe, out = tmp_path / f"{name}.yaml", tmp_path / "out"
        text = LLAMA.replace("name: llama", f"name: {name}").replace("every_layer", "every_layer")
        recipe.write_text(text.replace("  input_norm", "  mtp_layers: true\n  input_norm"))
        result = run("apply", tiny.path, "--recipe", recipe, "--layers", 1, "--modes", 2, "-o", out)
        assert result.exit_code == 0, result.output
        assert f"recipe {name} ({recipe})" in " ".join(result.stdout.split())
        assert f"--recipe {recipe}" in " ".join(result.stdout.split())
        return recipe, out

    def test_with_the_recipe(self, tiny: Tiny, run: Run, tmp_path: Path) -> None:
        recipe, out = self.made(tiny, run, tmp_path, "mine")
        assert run("verify", out, "--source", tiny.path, "--recipe", recipe).exit_code == 0
        result = run("verify", out, "--source", tiny.path)
        assert result.exit_code == 3
        assert "say where that is: --recipe FILE.yaml" in result.stderr

    def test_a_shipped_recipe_of_the_same_name_is_another(self, tiny: Tiny, run: Run, tmp_path: Path) -> None:
        recipe, out = self.made(tiny, run, tmp_path, "llama")
        assert run("verify", out, "--source", tiny.path, "--recipe", recipe).exit_code == 0
        result = run("verify", out, "--source", tiny.path)
        assert result.exit_code == 1
        assert "made with another recipe called llama (tensors differ)" in " ".join(result.stdout.split())

    def test_a_recipe_that_changed_meanwhile(self, tiny: Tiny, run: Run, tmp_path: Path) -> None:
        recipe, out = self.made(tiny, run, tmp_path, "mine")
        recipe.write_text(recipe.read_text().replace("mtp_layers: true", "mtp_layers: false"))
        assert run("verify", out, "--source", tiny.path, "--recipe", recipe).exit_code == 1

    def test_a_recipe_that_knows_more_models_by_now(self, tiny: Tiny, run: Run, tmp_path: Path) -> None:
        recipe, out = self.made(tiny, run, tmp_path, "mine")
        text = recipe.read_text().replace("sections: [.]", "sections: [text_config, .]")
        text = text.replace("    llama: {", "    llama: {num_key_value_heads: 1, ")
        text = text.replace("  query:", "    - language_model.layers.{layer}.\n  query:")
        recipe.write_text(text.replace("tensors:", "    mistral: {head_dim: 8}\ntensors:"))
        assert len(load_recipe(recipe).config.class_defaults) == 2
        assert run("verify", out, "--source", tiny.path, "--recipe", recipe).exit_code == 0
        # What of it decides the edit is compared all the same.
        record = json.loads((out / "qkpatch.json").read_text())
        record["recipe"]["tensors"]["every_layer"] = False
        (out / "qkpatch.json").write_text(json.dumps(record))
        result = run("verify", out, "--source", tiny.path, "--recipe", recipe)
        assert result.exit_code == 1
        assert "made with another recipe called mine (tensors differ)" in " ".join(result.stdout.split())


@pytest.mark.parametrize("what", ["directory", "missing", "pipe"])
def test_a_recipe_that_is_no_file_says_so(what: str, tiny: Tiny, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "x.yaml"
    if what == "directory":
        recipe.mkdir()
    elif what == "pipe":
        recipe = Path("/dev/null")
        recipe = tmp_path / "null.yaml"
        recipe.symlink_to("/dev/null")
    result = run("plan", tiny.path, "--recipe", recipe)
    assert result.exit_code == 4
    assert "SOURCE" not in result.stderr


def test_control_characters_of_a_recipe_do_not_reach_the_terminal(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    path = tiny.path / "model.safetensors"
    save_file({n.replace("model.", "mo\x1b[31mdel."): t for n, t in load_file(path).items()}, path)
    recipe = tmp_path / "x.yaml"
    recipe.write_text(
        LLAMA.replace("name: llama", "name: x")
        .replace("- model.layers", '- "mo\\e[31mdel.layers')
        .replace("{layer}.   #", '{layer}."   #')
    )
    if '{layer}."' not in recipe.read_text():
        recipe.write_text(recipe.read_text().replace("{layer}.\n", '{layer}."\n', 1))
    result = run("plan", tiny.path, "--recipe", recipe, "--layers", 1)
    assert result.exit_code == 0, result.output
    assert "\x1b[31m" not in result.output


def test_a_block_size_that_config_json_states_otherwise_is_refused(tmp_path: Path, run: Run) -> None:
    from test_fp8 import build

    source = tmp_path / "source"
    build(source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (source / "config.json").write_text(json.dumps(config))
    result = run("plan", source, "--layers", 1)
    assert result.exit_code == 3
    assert "quantised with FP8" in result.stderr


def test_a_link_that_leads_out_of_the_source_is_followed_and_told(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("mine")
    (tiny.path / "extra.json").symlink_to(tmp_path / "secret.txt")
    (tiny.path / "inside.json").symlink_to("config.json")
    result = run("plan", tiny.path)
    assert "1 file(s) are links that lead out of SOURCE" in result.stderr
    assert "extra.json" in result.stderr
