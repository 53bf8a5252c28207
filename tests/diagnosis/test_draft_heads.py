"""Numbers of heads and orders of rows that a draft guesses, and what it says of each guess."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from test_diagnose import NUMBERS, apply_draft, checked, layers, write
from test_drafts import SEPARATE, drafted, findings
from typer.testing import Result

from qkpatch.recipes.reading import UNTESTED
from qkpatch.recipes.rows import RowLayout

Run = Callable[..., Result]


class TestNumbers:
    """Numbers of heads that config.json does not hold."""

    BARE = {"model_type": "bare", "num_hidden_layers": 3, "hidden_size": 32}  # noqa: RUF012

    def bare(self, path: Path, extra: dict[str, tuple[int, ...]] | None = None, rows: int = 32) -> Path:
        shapes = {"attn.q_proj.weight": (rows, 32), "attn.k_proj.weight": (rows, 32), **(extra or {})}
        return write(path, self.BARE, layers(shapes))

    def test_a_head_dim_that_nothing_tells_is_said_to_be_assumed(self, run: Run, tmp_path: Path) -> None:
        source = self.bare(tmp_path / "b")
        fits, found = findings(run, source)["counts and shapes"]
        assert fits is None
        assert "head_dim 32 assumed; shapes cannot tell" in found
        draft = checked(run, source)["draft"]
        assert "num_attention_heads: 1   # guess: head_dim 32 assumed; shapes cannot tell" in draft
        assert "above all the numbers of heads" in draft
        assert "tested: untested " in draft
        assert drafted(run, source).tested == UNTESTED
        assert " ?  counts and shapes:" in run("recipes", "check", source).stderr

    def test_heads_that_are_not_as_wide_as_the_model_are_flagged(self, run: Run, tmp_path: Path) -> None:
        fits, found = findings(run, self.bare(tmp_path / "b", rows=64))["counts and shapes"]
        assert fits is None
        assert "1 × 64 = 64 is not hidden_size 32" in found
        numbers = {"model_type": "n", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 24}
        fits, found = findings(run, write(tmp_path / "c", numbers, layers(SEPARATE)))["counts and shapes"]
        assert fits is None
        assert "4 × 8 = 32 is not hidden_size 24" in found

    @pytest.mark.parametrize(
        ("extra", "n_heads", "is_known"),
        [
            ({"attn.sinks": (4,)}, 4, True),
            ({"attn.q_norm.weight": (16,), "attn.k_norm.weight": (16,)}, 2, True),
            ({"attn.rotary_emb.inv_freq": (4,)}, 4, None),  # part of a head may be rotated
        ],
    )
    def test_what_is_stored_beside_the_weights_tells(
        self, extra: dict[str, tuple[int, ...]], n_heads: int, is_known: bool | None, run: Run, tmp_path: Path
    ) -> None:
        source = self.bare(tmp_path / "b", extra)
        assert findings(run, source)["counts and shapes"][0] is is_known
        assert apply_draft(run, source)["model"]["num_attention_heads"] == n_heads

    @pytest.mark.parametrize(
        ("name", "length", "about"),
        [
            ("attn.sinks", 8, "attention sinks"),
            ("attn.rotary_emb.inv_freq", 8, "rotary dims"),
        ],
    )
    def test_it_contradicts_wrong_numbers(
        self, name: str, length: int, about: str, run: Run, tmp_path: Path
    ) -> None:
        extra = {f"model.layers.{n}.self_{name}": torch.ones(length) for n in range(3)}
        tiny = build_tiny(tmp_path / "t", extra=extra)
        report = checked(run, tiny.path)
        found = {f["about"]: f for f in report["candidates"][0]["findings"]}
        assert report["recipe"] is None
        assert found[about]["fits"] is False
        assert "config.json: " in found[about]["reason"]["where"]

    def test_it_agrees_with_right_ones(self, run: Run, tmp_path: Path) -> None:
        extra = {f"model.layers.{n}.self_attn.sinks": torch.ones(4) for n in range(3)}
        extra |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}
        result = run("recipes", "check", build_tiny(tmp_path / "t", extra=extra).path)
        assert result.exit_code == 0
        assert "yes attention sinks:   a sink for each of 4 query heads" in result.stdout
        assert "yes rotary dims:       8 of head_dim 8" in result.stdout

    def test_heads_rotated_in_part_are_in_doubt_unless_config_json_says_so(
        self, run: Run, tmp_path: Path
    ) -> None:
        shapes = layers({**SEPARATE, "attn.rotary_emb.inv_freq": (2,)})
        doubted = write(tmp_path / "a", {"model_type": "n", **NUMBERS}, shapes)
        fits, found = findings(run, doubted)["counts and shapes"]
        assert fits is None
        assert "rotates 4 of head_dim 8" in found
        known = write(tmp_path / "b", {"model_type": "n", **NUMBERS, "rotary_pct": 0.5}, shapes)
        assert findings(run, known)["counts and shapes"][0] is True


class TestOrders:
    """The order of fused rows, by names and config.json."""

    @pytest.mark.parametrize(
        ("word", "keys", "n_kv", "rows", "is_guess"),
        [
            ("query_key_value", {}, 2, RowLayout.grouped_qkv, True),
            ("query_key_value", {"new_decoder_architecture": True}, 2, RowLayout.grouped_qkv, False),
            ("query_key_value", {"multi_query_group_num": 2}, 2, RowLayout.qkv, True),
            ("query_key_value", {"model_type": "bailing_moe"}, 2, RowLayout.qkv, True),
            ("query_key_value", {"model_type": "gpt_neox"}, 4, RowLayout.per_head_qkv, False),
            ("query_key_value", {"model_type": "bloom"}, 4, RowLayout.per_head_qkv, False),
            ("query_key_value", {}, 4, RowLayout.per_head_qkv, True),
            ("language_expert_query_key_value", {}, 4, RowLayout.qkv, True),
            ("c_attn", {"model_type": "gpt_bigcode", "multi_query": False}, 4, RowLayout.per_head_qkv, False),
            ("c_attn", {"model_type": "gpt_bigcode", "multi_query": True}, 1, RowLayout.qkv, False),
            ("Wqkv", {"model_type": "mpt"}, 4, RowLayout.qkv, False),
            ("qkv_proj", {}, 4, RowLayout.qkv, True),
        ],
    )
    def test_by_name_and_config(
        self,
        word: str,
        keys: dict[str, object],
        n_kv: int,
        rows: RowLayout,
        is_guess: bool,
        run: Run,
        tmp_path: Path,
    ) -> None:
        numbers = {key: value for key, value in NUMBERS.items() if key != "num_key_value_heads"}
        if "multi_query_group_num" not in keys and n_kv != 1:
            keys = {**keys, "num_kv_heads": n_kv}
        source = write(
            tmp_path / "f",
            {"model_type": "newlm", **numbers, **keys},
            layers({f"attn.{word}.weight": ((4 + 2 * n_kv) * 8, 24)}),
        )
        draft = checked(run, source)["draft"]
        assert drafted(run, source).tensors.rows is rows
        assert (f"rows: {rows.value}   # guess: " in draft) is is_guess
        assert ("CodeGen's order fits none of them" in draft) is (word == "qkv_proj")

    def test_falcon_7b_has_one_key_head_whatever_num_kv_heads_says(self, run: Run, tmp_path: Path) -> None:
        numbers = {"n_layer": 3, "hidden_size": 32, "n_head": 4, "num_kv_heads": 4, "multi_query": True}
        source = write(
            tmp_path / "f",
            {"model_type": "fal", **numbers},
            layers({"attn.query_key_value.weight": (48, 32)}),
        )
        assert apply_draft(run, source)["model"]["num_key_value_heads"] == 1

    def test_codegen_is_refused(self, run: Run, tmp_path: Path) -> None:
        config = {"model_type": "codegen", "n_layer": 3, "n_embd": 32, "n_head": 4}
        source = write(tmp_path / "f", config, layers({"attn.qkv_proj.weight": (96, 32)}))
        report = checked(run, source)
        assert report["draft"] is None
        assert "an order that no recipe can declare" in report["no_draft"]["what"]
