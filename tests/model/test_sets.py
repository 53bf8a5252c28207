"""``--attention``: further sets of query and key tensors, one at a time and together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from probe import CROSS, SELF, apply, ask, build, check_edit, document
from safetensors.torch import load_file, save_file

BOTH = ("self", "cross")


def overwrite(source: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def two_sets(folder: Path, layers: tuple[int, ...] = (0, 1, 2), text: str = "", **config: Any) -> Path:
    """Beside the first set, ``cross`` in ``layers``, with the very same weights."""
    every = len(layers) == 3
    source = build(folder, text or document(others={"cross": {**CROSS, "every_layer": every}}), **config)
    stored = load_file(source / "model.safetensors")
    cross = {
        name.replace("self_attn", "cross"): tensor.clone()
        for name, tensor in stored.items()
        if any(f"layers.{layer}.self_attn" in name for layer in layers)
    }
    return overwrite(source, {**stored, **cross})


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (None, ["self"]),
        ("self", ["self"]),
        ("cross", ["cross"]),
        ("self,cross", [*BOTH]),
        ("cross, self", [*BOTH]),
    ],
)
def test_the_sets_that_are_named_are_edited_and_no_other(
    attention: str | None, expected: list[str], run, tmp_path: Path
) -> None:
    source = two_sets(tmp_path)
    flags = () if attention is None else ("--attention", attention)
    manifest = apply(run, source, "--layers", "0-1", *flags)
    assert sorted(manifest["edit"]["attention"], reverse=True) == expected
    assert set(manifest["recipe"]["prefix"]) == set(expected)
    assert sorted((e["layer"], e["attention"]) for e in manifest["edits"]) == sorted(
        (layer, name) for layer in (0, 1) for name in expected
    )
    for edit in manifest["edits"]:
        module = "cross" if edit["attention"] == "cross" else "self_attn"
        assert edit["tensor"] == f"model.layers.{edit['layer']}.{module}.q_proj.weight"
        assert edit["key_tensor"] == f"model.layers.{edit['layer']}.{module}.k_proj.weight"
        check_edit(source, tmp_path / "out", edit)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {edit["tensor"] for edit in manifest["edits"]}
    found = json.loads(ask(run, "inspect", source, "--json", "--layers", 1, *flags).stdout)["layers"]
    assert sorted((layer["attention"] for layer in found), reverse=True) == expected


def test_a_settings_file_may_name_the_sets_and_a_name_twice_is_one(run, tmp_path: Path) -> None:
    source = two_sets(tmp_path)
    (tmp_path / "edit.yaml").write_text("attention: self,cross\nlayers: 1\n")
    assert len(apply(run, source, "--config", tmp_path / "edit.yaml")["edits"]) == 2
    twice = apply(run, source, "--layers", 1, "--attention", "self,self", out="twice")
    assert (twice["edit"]["attention"], len(twice["edits"])) == (["self"], 1)


@pytest.mark.parametrize("attention", ["Self", "none", "", "self,", "self;cross"])
def test_an_unknown_set_is_refused_with_the_known_ones(attention: str, run, tmp_path: Path) -> None:
    result = ask(run, "plan", two_sets(tmp_path), "--attention", attention)
    assert result.exit_code == 2
    assert "choose from: self, cross" in " ".join(result.stderr.split())


@pytest.mark.parametrize("select", ["random", "subspace"])
def test_random_draws_differ_between_sets_of_equal_weights(select: str, run, tmp_path: Path) -> None:
    source = two_sets(tmp_path)
    apply(run, source, "--layers", 1, "--attention", "self,cross", "--select", select)
    after = load_file(tmp_path / "out" / "model.safetensors")
    q, other = (after[f"model.layers.1.{module}.q_proj.weight"] for module in ("self_attn", "cross"))
    assert not torch.equal(q, other)
    apply(run, source, "--layers", 1, "--select", select, out="alone")
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    assert torch.equal(alone["model.layers.1.self_attn.q_proj.weight"], q)


def test_a_layer_is_skipped_where_no_chosen_set_has_it(run, tmp_path: Path) -> None:
    source = two_sets(tmp_path, layers=(1,))
    manifest = apply(run, source, "--layers", "0-1", "--attention", "cross")
    assert (manifest["edit"]["layers"], manifest["edit"]["skipped_layers"]) == ([1], [0])
    assert any("layers 0 have no query-key product of this kind" in w for w in manifest["warnings"])
    both = apply(run, source, "--layers", "0-1", "--attention", "self,cross", out="both")
    assert (both["edit"]["layers"], len(both["edits"])) == ([0, 1], 3)


@pytest.mark.parametrize(
    ("cross", "config", "reason"),
    [
        ({"query": SELF["query"], "key": CROSS["key"]}, {}, "they share a query tensor"),
        ({"key": SELF["query"], "keys": {"num_key_value_heads": "n"}}, {"n": 4}, "cannot be edited together"),
        ({"keys": {"num_attention_heads": "n"}}, {"n": 2}, "they differ in layers or heads"),
        ({"keys": {"num_hidden_layers": "n"}}, {"n": 4}, "they differ in layers or heads"),
    ],
)
def test_sets_that_cannot_go_together_are_refused(
    cross: dict[str, Any], config: dict[str, int], reason: str, run, tmp_path: Path
) -> None:
    text = document(others={"cross": {**CROSS, "every_layer": False, **cross}})
    source = two_sets(tmp_path, text=text, **config)
    result = ask(run, "plan", source, "--layers", 1, "--attention", "self,cross")
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
    assert ask(run, "plan", source, "--layers", 1).exit_code == 0


def test_the_smaller_heads_of_a_second_set_limit_the_modes(run, tmp_path: Path) -> None:
    text = document(others={"cross": {**CROSS, "keys": {"head_dim": "small"}}})
    source = two_sets(tmp_path, text=text, small=4)
    stored = load_file(source / "model.safetensors")
    halved = {n: t[: len(t) // 2].clone() if "cross" in n else t for n, t in stored.items()}
    overwrite(source, halved)
    for attention, code in (("self", 0), ("cross", 2), ("cross,self", 2), ("self,cross", 2)):
        result = ask(run, "plan", source, "--layers", 1, "--modes", 6, "--attention", attention)
        assert result.exit_code == code, attention
