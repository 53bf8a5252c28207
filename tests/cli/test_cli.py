"""The surface: flags and settings file, output for people and programs, exit codes, start-up time."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import warm
from commands import built_once
from conftest import Tiny, build_tiny

from qkpatch.common.json_text import canonical_json
from qkpatch.common.number_ranges import format_ranges, parse_ranges
from qkpatch.errors import UsageError
from qkpatch.model.locate import locate
from qkpatch.planning.manifest import Manifest

SCHEMA = json.loads((resources.files("qkpatch") / "planning" / "manifest.schema.json").read_text())


def valid(document: object) -> dict:
    validator = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
    validator.validate(document)
    return document


def manifest_of(out: Path) -> dict:
    return valid(json.loads((out / "qkpatch.json").read_text()))


class TestRanges:
    @pytest.mark.parametrize(
        ("text", "numbers"),
        [
            ("3", (3,)),
            ("0-2", (0, 1, 2)),
            ("10-12,20", (10, 11, 12, 20)),
            (" 4 , 1 - 2 ", (1, 2, 4)),
            ("5-5", (5,)),
        ],
    )
    def test_inclusive_lists(self, text: str, numbers: tuple[int, ...]) -> None:
        assert parse_ranges(text, "--layers") == numbers
        assert parse_ranges(format_ranges(numbers), "--layers") == numbers

    @pytest.mark.parametrize(
        "text", ["", ",", "1,", "18-10", "a", "-1", "1-", "1.5", "1,1", "0-3,2", "१", "1e3", "9" * 9]
    )
    def test_what_is_not_one_is_a_usage_error(self, text: str, tiny: Tiny, run, tmp_path: Path) -> None:
        result = run("apply", tiny.path, f"--layers={text}", "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--layers", "3"),
        ("--heads", "4"),
        ("--modes", "0"),
        ("--modes", "9"),
        ("--alpha", "-0.1"),
        ("--alpha", "1.01"),
        ("--alpha", "nan"),
        ("--seed", "-1"),
        ("--select", "nonsense"),
        ("--channel", "nonsense"),
        ("--select", "random", "--modes", "5"),
        ("--select", "subspace", "--channel", "symmetric"),
        ("--channel", "antisymmetric", "--modes", "17"),
        ("--recipe", "nonsense"),
        ("--device", "nonsense"),
        ("--device", "cuda:99"),
        ("--config", "/nonexistent"),
    ],
)
def test_a_wrong_request_is_refused_in_words_before_anything_is_written(
    flags: tuple[str, ...], tiny: Tiny, run, tmp_path: Path
) -> None:
    result = run("apply", tiny.path, *flags, "-o", tmp_path / "out")
    assert result.exit_code == (4 if flags[0] == "--config" else 2)
    assert "Error" in result.stderr
    assert "Traceback" not in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_a_malformed_layer_list_is_refused_before_the_source_is_looked_at(run, tmp_path: Path) -> None:
    result = run("apply", "no-such-thing-anywhere", "--layers", "18-10", "-o", tmp_path / "out")
    assert "reversed" in result.stderr


@pytest.mark.parametrize(
    "source", ["no-such-dir", "./a/b", "/nowhere-at-all", "a/b/c", "org/na me", "org/name@"]
)
def test_a_source_that_is_nothing_known_tells_where_recipes_are_listed(
    source: str, run, tmp_path: Path
) -> None:
    result = run("plan", source)
    assert result.exit_code == 2
    assert "`qkpatch recipes` lists the recipes" in result.stderr


def test_a_recipe_name_that_is_nearly_right_is_told() -> None:
    with pytest.raises(UsageError) as error:
        locate("lava-1.5")
    assert "recipes near it: llava-1.5" in str(error.value.fix)


class TestSettings:
    """Flags over EDIT.yaml over the recipe's defaults."""

    def test_without_layers_and_modes_the_recipes_defaults_are_used_and_named(
        self, tiny: Tiny, run, tmp_path: Path
    ) -> None:
        result = run("apply", tiny.path, "-o", tmp_path / "out")
        assert "recipe's default: layers, modes" in result.stdout
        edit = manifest_of(tmp_path / "out")["edit"]
        assert edit["layers"] == [1]  # the middle third of 3
        assert (edit["modes"], edit["alpha"], edit["from_recipe"]) == (4, 0.8, ["layers", "modes"])

    def test_the_file_says_what_the_flags_do_not(self, tiny: Tiny, run, tmp_path: Path) -> None:
        config = tmp_path / "edit.yaml"
        config.write_text(
            "layers: 0-1\nheads: 0,2\nmodes: 2\nalpha: 0.25\nchannel: symmetric\nselect: random\nseed: 7\n"
        )
        result = run(
            "apply", tiny.path, "--config", config, "--modes", 3, "--alpha", 0, "-o", tmp_path / "out"
        )
        assert result.exit_code == 0, result.output
        edit = manifest_of(tmp_path / "out")["edit"]
        assert edit["layers"] == [0, 1]
        assert edit["heads"] == [0, 2]
        assert (edit["modes"], edit["alpha"], edit["channel"], edit["seed"]) == (3, 0.0, "symmetric", 7)
        assert edit["from_recipe"] == []

    def test_a_number_is_a_layer_list_too(self, tiny: Tiny, run, tmp_path: Path) -> None:
        config = tmp_path / "edit.yaml"
        config.write_text("layers: 2\n")
        plan = run("plan", tiny.path, "--config", config, "--json")
        assert json.loads(plan.stdout)["edit"]["layers"] == [2]

    def test_its_faults_are_told_together(self, tiny: Tiny, run, tmp_path: Path) -> None:
        config = tmp_path / "edit.yaml"
        config.write_text("layer: 0-1\nmodes: many\nalpha: 1e-1\nchannel: left\n")
        result = run("plan", tiny.path, "--config", config)
        assert result.exit_code == 2
        for fault in (
            "$.layer: unknown key",
            "$.modes: expected int",
            "$.alpha: expected float",
            "$.channel: 'left'",
        ):
            assert fault in result.stderr

    @pytest.mark.parametrize("text", ["layers: ''", "layers: 5-2", "alpha: 2", "modes: 0", "recipe: ''"])
    def test_its_values_are_checked_as_flags_are(self, text: str, tiny: Tiny, run, tmp_path: Path) -> None:
        config = tmp_path / "edit.yaml"
        config.write_text(text)
        assert run("plan", tiny.path, "--config", config).exit_code == 2

    def test_only_the_named_heads_change(self, tiny: Tiny, run, tmp_path: Path) -> None:
        run("apply", tiny.path, "--layers", 1, "--heads", "1,3", "--modes", 2, "-o", tmp_path / "out")
        edit = manifest_of(tmp_path / "out")["edits"][0]
        assert [head["head"] for head in edit["heads"]] == [1, 3]
        begin, end = edit["byte_range"]
        before = (tiny.path / "model.safetensors").read_bytes()
        after = (tmp_path / "out" / "model.safetensors").read_bytes()
        step = (end - begin) // 4
        changed = [before[i : i + step] != after[i : i + step] for i in range(begin, end, step)]
        assert changed == [False, True, False, True]
        assert before[:begin] + before[end:] == after[:begin] + after[end:]


def test_alpha_one_is_a_declared_noop_and_a_byte_identical_copy(tiny: Tiny, run, tmp_path: Path) -> None:
    result = run("apply", tiny.path, "--alpha", 1, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "no-op" in result.stderr
    assert "nothing is edited" in result.stdout
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny.path / name).read_bytes()
    assert manifest_of(tmp_path / "out")["edits"] == []
    assert run("verify", tmp_path / "out", "--source", tiny.path).exit_code == 0


@pytest.mark.parametrize("select", ["dominant", "random", "bottom", "subspace", "shrink"])
@pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])
def test_every_selection_in_every_channel_writes_a_valid_manifest(
    select: str, channel: str, tiny: Tiny, run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--channel", channel, "--select", select, "--modes", 2, "--layers", "0,2")
    result = run("apply", tiny.path, *flags, "-o", out)
    if select == "subspace" and channel != "full":
        assert result.exit_code == 2
        return
    assert result.exit_code == 0, result.output
    assert [edit["layer"] for edit in manifest_of(out)["edits"]] == [0, 2]
    assert run("verify", out, "--source", tiny.path).exit_code == 0


class TestManifest:
    def test_the_same_edit_gives_the_same_bytes_but_for_the_run_block(
        self, tiny: Tiny, run, tmp_path: Path
    ) -> None:
        texts = []
        for name in ("a", "b"):
            run("apply", tiny.path, "--select", "random", "--modes", 2, "-o", tmp_path / name)
            document = manifest_of(tmp_path / name)
            assert set(document.pop("run")) == {"started", "finished", "copied_by", "stack"}
            texts.append(canonical_json(document))
        assert texts[0] == texts[1]
        assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
            tmp_path / "b" / "model.safetensors"
        ).read_bytes()

    def test_reading_and_writing_it_again_changes_nothing(self, tiny: Tiny, run, tmp_path: Path) -> None:
        run("apply", tiny.path, "-o", tmp_path / "out")
        raw = (tmp_path / "out" / "qkpatch.json").read_bytes()
        manifest = Manifest.loads(raw, "qkpatch.json")
        assert manifest.dumps().encode() == raw
        assert Manifest.loads(manifest.dumps().encode(), "again") == manifest

    def test_it_holds_no_absolute_path(self, tiny: Tiny, run, tmp_path: Path) -> None:
        run("apply", tiny.path, "-o", tmp_path / "out")
        text = (tmp_path / "out" / "qkpatch.json").read_text()
        assert str(tmp_path) not in text
        assert "/home" not in text
        assert json.loads(text)["source"]["name"] == "tiny"

    def test_keys_are_sorted_and_numbers_exact_and_finite(self) -> None:
        text = canonical_json({"b": 1 / 3, "a": [1.0, 2], "c": [{"x": None}]})
        assert text == (
            '{\n  "a": [1.0, 2],\n  "b": 0.3333333333333333,\n  "c": [\n    {\n      "x": null\n    }\n  ]\n}\n'
        )
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match="not JSON compliant"):
                canonical_json([value])

    def test_an_edit_on_top_of_an_edit_is_said_and_recorded(self, tiny: Tiny, run, tmp_path: Path) -> None:
        run("apply", tiny.path, "--layers", 0, "-o", tmp_path / "once")
        result = run("apply", tmp_path / "once", "--layers", 1, "-o", tmp_path / "twice")
        assert "on top of that one" in result.stderr
        assert manifest_of(tmp_path / "twice")["source"]["previous_edit"]["layers"] == [0]
        assert run("verify", tmp_path / "twice", "--source", tmp_path / "once").exit_code == 0


class TestPlan:
    def test_it_is_the_manifest_before_the_fact_and_equals_a_dry_run(
        self, tiny: Tiny, run, tmp_path: Path
    ) -> None:
        plan = run("plan", tiny.path, "--layers", "0-1", "--json")
        dry = run("apply", tiny.path, "--layers", "0-1", "--json", "--dry-run", "-o", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        document, again = json.loads(plan.stdout), json.loads(dry.stdout)
        assert document["costs"].pop("free_disk_bytes") > 0
        again["costs"].pop("free_disk_bytes")
        assert document == again
        run("apply", tiny.path, "--layers", "0-1", "-o", tmp_path / "out")
        done = manifest_of(tmp_path / "out")
        figures = ("sha256_before", "sha256_after", "heads")
        for planned, edit in zip(valid(document)["edits"], done["edits"], strict=True):
            assert {k: v for k, v in planned.items() if k not in figures} == {
                k: v for k, v in edit.items() if k not in figures
            }
        assert document["costs"]["output_bytes"] == sum(file["size"] for file in done["files"])
        assert document["edit"] == done["edit"]

    def test_it_imports_no_torch_and_hears_no_log_before_a_command_runs(self, tiny: Tiny) -> None:
        code = (
            "import logging, sys\nfrom qkpatch.cli import app\n"
            "assert not logging.getLogger('qkpatch').handlers\n"
            f"try:\n    app(['plan', {str(tiny.path)!r}])\nexcept SystemExit as e:\n    assert not e.code\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    def test_it_tells_people_tensors_shards_bytes_and_costs(self, tmp_path: Path, run) -> None:
        tiny = build_tiny(tmp_path / "split", shards=[("q_proj",), ("",)])
        text = run("plan", tiny.path, "--layers", "1").stdout
        assert tiny.name("{layer}", "q") in text
        assert "model-00001-of-00002.safetensors" in text
        assert "model-00002-of-00002.safetensors" in text  # where the key is
        assert re.search(r"1 tensor\(s\) in BF16, 4 head\(s\), 1.5 kB rewritten in 1 of 5 file\(s\)", text)
        assert "expected peak memory" in text

    def test_twins_of_the_weights_are_reported(self, tiny: Tiny, run) -> None:
        (tiny.path / "pytorch_model.bin").write_bytes(b"x")
        (tiny.path / "consolidated.safetensors").write_bytes(b"x")
        result = run("plan", tiny.path)
        assert (
            "2 other weight file(s), 2 B, stay unpatched (--exclude leaves them out): consolidated.safetensors (1 B), "
            "pytorch_model.bin (1 B)" in result.stderr
        )


class TestInspect:
    def test_json_holds_all_layers_and_all_singular_values(self, tiny: Tiny, run) -> None:
        import numpy as np
        from safetensors.torch import load_file

        document = json.loads(run("inspect", tiny.path, "--json", "--modes", 2).stdout)
        assert [layer["layer"] for layer in document["layers"]] == [0, 1, 2]
        tensors = {n: t.double().numpy() for n, t in load_file(tiny.path / "model.safetensors").items()}
        for layer in document["layers"]:
            assert [head["kv_head"] for head in layer["heads"]] == [0, 0, 1, 1]
            for head in layer["heads"]:
                rows = slice(head["head"] * 8, head["head"] * 8 + 8)
                kv_rows = slice(head["kv_head"] * 8, head["kv_head"] * 8 + 8)
                W_Q = tensors[tiny.name(layer["layer"], "q")][rows]
                W_K = tensors[tiny.name(layer["layer"], "k")][kv_rows]
                M = W_Q.T @ W_K
                S = np.linalg.svd(M, compute_uv=False)[:8]
                p = S / S.sum()
                np.testing.assert_allclose(head["singular_values"], S, rtol=1e-9)
                assert head["frobenius"] == pytest.approx(np.linalg.norm(M), rel=1e-12)
                share = np.linalg.norm((M + M.T) / 2) ** 2 / np.linalg.norm(M) ** 2
                assert head["symmetric_share"] == pytest.approx(share, rel=1e-9)
                assert head["energy_share"] == pytest.approx((S[:2] ** 2).sum() / (S**2).sum(), rel=1e-9)
                assert head["gap"] == pytest.approx((S[1] - S[2]) / S[1], rel=1e-6)
                assert head["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)

    def test_csv_has_a_line_per_singular_value(self, tiny: Tiny, run) -> None:
        rows = list(csv.DictReader(io.StringIO(run("inspect", tiny.path, "--csv", "--layers", 1).stdout)))
        assert len(rows) == 4 * 8
        assert rows[9] == {**rows[9], "layer": "1", "head": "1", "kv_head": "0", "mode": "1"}
        assert float(rows[0]["singular_value"]) > float(rows[1]["singular_value"]) > 0

    def test_the_table_has_a_row_per_layer(self, tiny: Tiny, run) -> None:
        text = run("inspect", tiny.path, "--modes", 2).stdout
        assert "energy in top 2" in text
        assert len(re.findall(r"^ +[012] ", text, re.MULTILINE)) == 3

    def test_a_dead_head_has_a_spectrum_of_zeros_and_not_an_error(self, tiny: Tiny, run) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        path = tiny.path / "model.safetensors"
        tensors = load_file(path)
        tensors[tiny.name(1, "q")][:8] = torch.zeros(8, 24)
        save_file(tensors, path, {"format": "pt"})
        head = json.loads(run("inspect", tiny.path, "--layers", 1, "--json").stdout)["layers"][0]["heads"][0]
        assert head["frobenius"] == 0
        assert head["effective_rank"] == 0
        assert head["gap"] is None
        assert "1.0" not in run("inspect", tiny.path, "--layers", 1, "--heads", 0).stdout

    def test_json_and_csv_exclude_each_other(self, tiny: Tiny, run) -> None:
        assert run("inspect", tiny.path, "--json", "--csv").exit_code == 2


class TestOutput:
    def test_json_on_stdout_is_the_manifest_and_nothing_else(self, tiny: Tiny, run, tmp_path: Path) -> None:
        result = run("apply", tiny.path, "--json", "-o", tmp_path / "out")
        assert Manifest.loads(result.stdout.encode(), "stdout") == Manifest.loads(
            (tmp_path / "out" / "qkpatch.json").read_bytes(), "file"
        )

    def test_a_failure_is_json_too_where_json_was_asked_for(self, tiny: Tiny, run, tmp_path: Path) -> None:
        result = run("apply", tiny.path, "--json", "--layers", "99", "-o", tmp_path / "out")
        error = json.loads(result.stdout)["error"]
        assert result.exit_code == error["exit_code"] == 2
        assert error["kind"] == "usage"
        assert "layer 99 is out of range" in error["what"]

    def test_quiet_says_nothing_but_errors(self, tiny: Tiny, run, tmp_path: Path) -> None:
        result = run("apply", tiny.path, "--quiet", "--alpha", 1, "-o", tmp_path / "out")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
        assert run("verify", tmp_path / "out", "--source", tiny.path, "-q").output == ""
        assert run("apply", tiny.path, "--quiet", "-o", tmp_path / "out").stderr != ""

    def test_piped_output_has_no_escape_codes_and_no_bars(self, tiny: Tiny, run, tmp_path: Path) -> None:
        result = run("apply", tiny.path, "-o", tmp_path / "out")
        assert "\x1b" not in result.output
        assert "%" not in result.stderr

    def test_debug_shows_the_traceback(self, tiny: Tiny, run, tmp_path: Path) -> None:
        result = run("apply", tiny.path, "--layers", "99", "--debug", "-o", tmp_path / "out")
        assert type(result.exception).__name__ == "UsageError"

    def test_an_unknown_exception_keeps_its_traceback(self, tiny: Tiny, run, monkeypatch) -> None:
        monkeypatch.setattr("qkpatch.planning.plan.open_model", lambda *_: 1 / 0)
        assert isinstance(run("plan", tiny.path).exception, ZeroDivisionError)

    @pytest.mark.long
    def test_a_reader_that_leaves_early_is_no_traceback(self, tiny: Tiny) -> None:
        command = f"{warm.shell('inspect', tiny.path, '--csv')} | head -n 1"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout == "layer,attention,head,kv_head,mode,singular_value\n"
        assert done.stderr == ""


@pytest.mark.long
def test_help_takes_little_more_than_its_libraries() -> None:
    """Of processor time, which a slow or busy machine gives to both alike."""

    def least(*arguments: str) -> float:
        def once() -> float:
            before = os.times()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            after = os.times()
            spent = after.children_user + after.children_system
            return spent - (before.children_user + before.children_system)

        return min(once() for _ in range(3))

    libraries = least("-c", "import typer, typer.rich_utils, rich.markdown, yaml")
    assert least("-m", "qkpatch", "--help") < 5 * libraries


def test_every_command_and_option_has_help_and_every_command_is_in_the_guide(run) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    for command in built_once().commands:
        assert f"qkpatch {command}" in guide
        text = run(command, "--help").stdout
        options = re.findall(r"^│\s+\*?\s*(--[a-z-]+)\s.*?<?\w*>?\s{2,}(\S?)", text, re.MULTILINE)
        assert options
        assert all(described for _, described in options), f"{command}: {options}"
        # In a terminal of ASCII alone Typer spells everything else out, and its frames break.
        assert re.sub("[╭─╮│╰╯…]", "", text).isascii()
