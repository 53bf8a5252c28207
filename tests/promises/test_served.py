"""Served families in the form that the Hub has them: keys of their own, sections of older classes, text-only twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families_served
import pytest
import torch
import transformers
from conftest import REPO
from safetensors.torch import load_file, save_file

from qkpatch.common.strict_yaml import load_yaml
from qkpatch.recipes.catalogue import shipped_recipes
from scripts.coverage import lists, sorted_out

EDIT = ("--modes", 2, "--alpha", 0)


def saved(key: str, path: Path, **config: Any) -> dict[str, Any]:
    """A tiny model of a case, and its config.json."""
    case = families_served.CASES[key]
    torch.manual_seed(0)
    getattr(transformers, case.model_class)(case.config()).to(torch.bfloat16).save_pretrained(path)
    return json.loads((path / "config.json").read_text())


def rewrite(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def edited(run, source: Path, out: Path, layers: str) -> tuple[list[str], str]:
    """The tensors that differ, and what was warned of."""
    result = run("apply", source, "--layers", layers, *EDIT, "-o", out)
    assert result.exit_code == 0, result.output
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    return [name for name in before if not torch.equal(before[name], after[name])], result.stderr


def test_step_3_7_as_the_hub_writes_its_config(run, tmp_path: Path) -> None:
    """Key heads as groups, sliding layers' heads in a mapping of their own, types of prediction layers at the end."""
    config = saved("step3.7:more query heads", tmp_path / "source")
    text = config["text_config"]
    assert text.pop("per_layer_config") == {"2": {"num_attention_heads": 8}}
    text["num_attention_groups"] = text.pop("num_key_value_heads")
    text["attention_other_setting"] = {"attention_type": "sliding_attention", "num_attention_heads": 8}
    text["layer_types"] += ["sliding_attention"]
    source = rewrite(tmp_path / "source", config)
    names, warned = edited(run, source, tmp_path / "out", "0-3")
    assert names == [f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1, 3)]
    assert "layers 2 have another number of query heads than the model and are skipped" in " ".join(
        warned.split()
    )

    text["attention_other_setting"]["num_attention_heads"] = 4
    result = run("plan", rewrite(source, config), "--layers", 2)
    assert result.exit_code == 3
    assert "config.json says [64, 32]" in result.stderr


@pytest.mark.parametrize("section", ["text_config", "llm_config"])
def test_nemotron_as_the_hub_writes_its_config(section: str, run, tmp_path: Path) -> None:
    """Layers as a pattern of letters and their number; the section by either name."""
    config = saved("nemotron-h:omni", tmp_path / "source")
    text = config.pop("text_config")
    kinds = text.pop("layers_block_type")
    text |= {"num_hidden_layers": len(kinds), "hybrid_override_pattern": "M*-*"}
    source = rewrite(tmp_path / "source", {**config, section: text})
    names, _ = edited(run, source, tmp_path / "out", "0-3")
    assert [name.rpartition(".layers.")[2] for name in names] == [f"{n}.mixer.q_proj.weight" for n in (1, 3)]


def test_the_indexer_of_minimax_m3_has_norms_of_its_own_under_both_names(run, tmp_path: Path) -> None:
    saved("minimax-m3", tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    assert any(".index_q_norm." in name or ".indexer.q_norm." in name for name in stored)
    names, _ = edited(run, tmp_path / "source", tmp_path / "out", "0-3")
    assert names == [f"language_model.model.layers.{n}.self_attn.q_proj.weight" for n in range(4)]


def test_a_decoder_whose_weights_lie_the_other_way_round_is_no_ones(run, tmp_path: Path) -> None:
    """GPT-2 in a vision-encoder-decoder: Conv1D stores (in, out)."""
    decoder = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8}
    config = {
        "model_type": "vision-encoder-decoder", "architectures": ["VisionEncoderDecoderModel"], "decoder": decoder
    }  # fmt: skip
    names = [f"decoder.transformer.h.{n}.attn.c_attn.weight" for n in range(2)]
    source = rewrite(tmp_path, config)
    save_file({name: torch.randn(8, 24) for name in names}, source / "model.safetensors", {"format": "pt"})
    result = run("plan", source)
    assert result.exit_code == 3
    assert names[0] in result.stderr


def test_every_new_recipe_says_what_it_was_read_from() -> None:
    """The classes that lists name: repository, and file, class or lines."""
    for name, recipe in shipped_recipes().items():
        said = load_yaml((REPO / "configs" / f"{name}.yaml").read_bytes(), name)
        assert ("source" in said) == bool(recipe.source)
        for source in recipe.source or ():
            assert len(source) > 20, name
    assert sum(bool(recipe.source) for recipe in shipped_recipes().values()) >= 40


def test_the_lists_are_known_but_for_one_class() -> None:
    counts = {name: sorted_out(models) for name, models in lists().items()}
    assert counts["vLLM"].get("unknown", []) == ["MiMoV2OmniForCausalLM"]
    if transformers.__version__.startswith("5.23."):  # later ones have more classes
        assert "unknown" not in counts["transformers"]
