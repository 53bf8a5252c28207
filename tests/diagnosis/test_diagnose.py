"""`qkpatch recipes check`: what fits and what does not, and drafts that work where the guesses are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import Result

from qkpatch.checkpoint.header import TensorRef
from qkpatch.diagnosis import diagnose
from qkpatch.diagnosis.diagnose import Diagnosis
from qkpatch.diagnosis.draft import draft_recipe
from qkpatch.diagnosis.survey import query_groups, text_numbers
from qkpatch.errors import RecipeError, UnsupportedError
from qkpatch.recipes import catalogue
from qkpatch.recipes.catalogue import load_recipe, shipped_recipes
from qkpatch.recipes.reading import parse_recipe

NUMBERS = {
    "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **NUMBERS}
Run = Callable[..., Result]


def write(
    path: Path, config: dict[str, object], shapes: dict[str, tuple[int, ...]], dtype=torch.float32
) -> Path:
    """A checkpoint of random weights with these names and shapes."""
    generator = torch.Generator().manual_seed(0)
    path.mkdir(parents=True)
    tensors = {name: torch.rand(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def layers(
    shapes: dict[str, tuple[int, ...]], n: int = 3, prefix: str = "net.h.{}."
) -> dict[str, tuple[int, ...]]:
    return {prefix.format(i) + name: shape for i in range(n) for name, shape in shapes.items()}


def checked(run: Run, source: Path) -> dict[str, object]:
    result = run("recipes", "check", source, "--json")
    assert result.exit_code in (0, 3), result.output
    return json.loads(result.stdout)


def apply_draft(run: Run, source: Path, *options: object) -> dict[str, object]:
    """The draft as it is printed, saved, and used; returns the manifest."""
    draft = checked(run, source)["draft"]
    assert isinstance(draft, str)
    file, out = source.parent / "draft.yaml", source.parent / "out"
    file.write_text(run("recipes", "check", source).stdout)  # as `> draft.yaml` does
    assert file.read_text() == draft
    done = run("apply", source, "--recipe", file, "--layers", 1, "--modes", 2, *options, "-o", out)
    assert done.exit_code == 0, done.output
    proven = run("verify", out, "--source", source, "--recipe", file)
    assert proven.exit_code == 0, proven.output
    return json.loads((out / "qkpatch.json").read_text())


class TestKnown:
    """A family that qkpatch ships a recipe for."""

    def test_the_recipe_that_fits_is_named_with_what_the_plan_would_say(
        self, run: Run, tmp_path: Path
    ) -> None:
        tiny = build_tiny(tmp_path / "tiny")
        result = run("recipes", "check", tiny.path)
        assert result.exit_code == 0
        for line in (
            "tiny: 10 tensors in 1 file(s)",
            "Recipe llama, Llama (text only): fits",
            "yes counts and shapes: 3 layers, 4 query / 2 key heads of 8, hidden 24",
            "Layers that can be edited: 0-2",
            "Recipe llama fits; next: qkpatch plan SOURCE",
        ):
            assert line in result.stdout
        assert "draft" not in result.stdout
        assert "does not fit" not in result.stdout

    def test_json_says_the_same(self, run: Run, tmp_path: Path) -> None:
        report = checked(run, build_tiny(tmp_path / "tiny").path)
        assert set(report) == {
            "source", "model_type", "architectures", "text_model_type", "tensors", "shards", "recipe", "candidates",
            "more_candidates", "query_like", "draft", "draft_check", "no_draft",
        }  # fmt: skip
        assert report["recipe"] == "llama"
        assert (report["draft"], report["draft_check"], report["no_draft"]) == (None, None, None)
        first = report["candidates"][0]
        assert first["fits"]
        assert first["editable_layers"] == [0, 1, 2]
        assert first["refused_layers"] == []
        assert [finding["about"] for finding in first["findings"]] == [
            "model_type", "architectures", "text model type", "tensor names", "counts and shapes", "norms",
        ]  # fmt: skip
        assert len(report["candidates"]) <= diagnose.MOST_CANDIDATES
        assert report["query_like"] == [
            {
                "name": "model.layers.{layer}.self_attn.q_proj", "layers": [0, 1, 2], "shapes": [[32, 24]],
                "dtypes": ["BF16"], "stored": ["weight"], "role": "language tower",
            }
        ]  # fmt: skip

    def test_a_wrong_number_of_layers_is_told_with_both_numbers_and_no_draft(
        self, run: Run, tmp_path: Path
    ) -> None:
        tiny = build_tiny(tmp_path / "tiny", config={**LLAMA, "num_hidden_layers": 5})
        result = run("recipes", "check", tiny.path)
        assert result.exit_code == 3
        assert "no  counts and shapes" in result.stdout
        assert "5 layers, but queries are stored for 3 (0-2)" in result.stdout
        assert "config.json: num_hidden_layers" in result.stdout
        assert "recipe llama is made for this model" in result.stdout
        assert "gemma3n" not in result.stdout  # shares tensor names, and is of no use here
        assert checked(run, tiny.path)["draft"] is None

    def test_a_wrong_number_of_heads_is_told_with_both_shapes_once_for_all_layers(
        self, run: Run, tmp_path: Path
    ) -> None:
        tiny = build_tiny(tmp_path / "tiny", config={**LLAMA, "num_attention_heads": 8})
        result = run("recipes", "check", tiny.path)
        assert result.exit_code == 3
        assert result.stdout.count("stored as [32, 24], but config.json says [64, 24]") == 1
        assert "where: model.layers.{layer}.self_attn.q_proj.weight in model.safetensors" in result.stdout
        assert "layers 0-2" in result.stdout

    def test_some_quantised_layers_are_listed_and_the_others_stay_editable(
        self, run: Run, tmp_path: Path
    ) -> None:
        names = layers({"q_proj.qweight": (2, 2), "q_proj.qzeros": (2, 2), "q_proj.scales": (2, 2)}, 1, "{}.")
        extra = {
            f"model.layers.{n}.self_attn.{name.removeprefix('0.')}": torch.ones(shape)
            for n in (0, 1)
            for name, shape in names.items()
        }
        tiny = build_tiny(tmp_path / "tiny", extra=extra)
        report = checked(run, tiny.path)
        assert report["recipe"] == "llama"
        assert report["candidates"][0]["editable_layers"] == [2]
        (refused,) = report["candidates"][0]["refused_layers"]
        assert refused["layers"] == [0, 1]
        assert "quantised with AWQ" in refused["reason"]["what"]
        text = run("recipes", "check", tiny.path).stdout
        assert "Refused: layers 0-1" in text
        assert "where: model.layers.{layer}.self_attn.q_proj" in text

    def test_a_quantised_checkpoint_is_refused_with_the_reason_and_gets_no_draft(
        self, run: Run, tmp_path: Path
    ) -> None:
        shapes = {"qweight": (4, 4), "qzeros": (1, 1), "scales": (1, 4), "g_idx": (4,)}
        source = write(
            tmp_path / "gptq",
            {**LLAMA, "model_type": "newlm", "architectures": ["NewLM"]},
            layers({f"attn.{p}.{key}": shape for p in ("q_proj", "k_proj") for key, shape in shapes.items()}),
        )
        report = checked(run, source)
        assert report["draft"] is None
        assert "quantised with GPTQ" in report["no_draft"]["what"]
        assert "net.h.{layer}.attn.q_proj" in report["no_draft"]["where"]

    def test_a_norm_that_the_recipe_does_not_declare_is_told_apart_from_shapes(
        self, run: Run, tmp_path: Path
    ) -> None:
        extra = {f"model.layers.{n}.self_attn.{w}_norm.weight": torch.ones(8) for n in range(3) for w in "qk"}
        tiny = build_tiny(tmp_path / "tiny", extra=extra)
        report = checked(run, tiny.path)
        assert report["recipe"] is None
        llama = next(c for c in report["candidates"] if c["recipe"] == "llama")
        fits = {finding["about"]: finding["fits"] for finding in llama["findings"]}
        assert fits["counts and shapes"] is True
        assert fits["norms"] is False
        assert report["draft_check"]["fits"]
        assert parse_recipe(report["draft"].encode(), "draft").tensors.norms is not None

    def test_two_recipes_that_fit_are_both_named_and_none_is_chosen(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = shipped_recipes()
        twin = replace(known["llama"], name="twin")
        monkeypatch.setattr(diagnose, "shipped_recipes", lambda: {**known, "twin": twin})
        result = run("recipes", "check", build_tiny(tmp_path / "tiny").path)
        assert result.exit_code == 3
        assert "2 recipes fit: choose one with --recipe: llama, twin" in result.stdout
        assert "Recipe twin, Llama (text only): fits" in result.stdout

    def test_one_shard_by_itself_is_held_against_the_layers_it_has(self, run: Run, tmp_path: Path) -> None:
        tiny = build_tiny(tmp_path / "tiny", config={**LLAMA, "num_hidden_layers": 6})
        report = checked(run, tiny.path / "model.safetensors")
        assert report["recipe"] == "llama"
        assert report["candidates"][0]["editable_layers"] == [0, 1, 2]

    def test_layers_of_another_kind_are_skipped_and_listed(self, run: Run, tmp_path: Path) -> None:
        numbers = {**NUMBERS, "model_type": "qwen3_5_text", "num_hidden_layers": 4}
        source = write(
            tmp_path / "qwen",
            {
                "model_type": "qwen3_5",
                "architectures": ["Qwen3_5ForConditionalGeneration"],
                "text_config": numbers,
            },
            {
                f"model.language_model.layers.{n}.self_attn.{name}.weight": shape
                for n in (1, 3)
                for name, shape in {
                    "q_proj": (64, 24),
                    "k_proj": (16, 24),
                    "q_norm": (8,),
                    "k_norm": (8,),
                }.items()
            },
        )
        report = checked(run, source)
        assert report["recipe"] == "qwen3.5"
        assert report["candidates"][0]["skipped_layers"] == [0, 2]
        assert "Skipped, without a product of their own: 0,2" in run("recipes", "check", source).stdout


class TestHostile:
    """Names and values out of files neither break the draft nor act in the terminal."""

    @pytest.mark.parametrize(
        "word", ["\x1b[31mred", "a: b # c", "- [x]", '"\\', "null", "\u202e日本", "a\nb", "é" * 300]
    )
    def test_names_and_values_stay_text(self, word: str, run: Run, tmp_path: Path) -> None:
        source = write(
            tmp_path / "hostile",
            {"model_type": word, "architectures": [word], **NUMBERS},
            layers({"q_proj.weight": (32, 24), "k_proj.weight": (16, 24)}, prefix=f"{word}.{{}}."),
        )
        result = run("recipes", "check", source)
        assert result.exit_code == 3
        assert all(c.isprintable() or c == "\n" for c in result.stdout + result.stderr)
        draft = parse_recipe(checked(run, source)["draft"].encode(), "draft")
        assert draft.tensors.prefixes == (f"{word}.{{layer}}.",)
        assert draft.architectures == ((word,) if len(word) < 200 else ("Unknown",))
        manifest = apply_draft(run, source)
        assert manifest["edits"][0]["tensor"] == f"{word}.1.q_proj.weight"

    @settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(
        config=st.dictionaries(
            st.sampled_from(
                ["model_type", "architectures", "text_config", "n_layer", "num_heads", *NUMBERS, "llm_config"]
            ),
            st.recursive(
                st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | st.text(max_size=6),
                lambda inner: (
                    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NUMBERS]), inner)
                ),
                max_leaves=8,
            ),
        ),
        words=st.lists(
            st.text(max_size=8) | st.sampled_from(["layers.0", "h.1", "attn", "{layer}"]), max_size=3
        ),
        query=st.sampled_from(["q_proj", "wqkv", "query", "c_attn", "query_key_value"]),
        shape=st.lists(st.integers(0, 48), max_size=3),
    )
    def test_a_draft_always_parses(
        self, config: dict[str, object], words: list[str], query: str, shape: list[int]
    ) -> None:
        stem = ".".join([*words, "2"])
        named = (f"{stem}.{word}.weight" for word in (query, "k_proj", "q_norm", "k_norm", "key"))
        tensors = {name: TensorRef(name, "s", "F32", tuple(shape), 0, 0) for name in named}
        numbers = text_numbers(config)
        try:
            text = draft_recipe(config, tensors, numbers, query_groups(tensors, numbers), None).text
        except UnsupportedError:
            return
        parse_recipe(text.encode(), "draft.yaml")

    def test_config_values_of_any_type_are_told_not_raised(self, run: Run, tmp_path: Path) -> None:
        for number, config in enumerate(
            [
                {"model_type": ["a"], "architectures": {"b": 1}},
                {"model_type": {"a": "x" * 9999}, "architectures": [["b"], None, 7]},
                {"text_config": "nothing", "model_type": "llama", "num_hidden_layers": "3"},
                {"text_config": {"num_hidden_layers": -1, "num_attention_heads": 10**30}},
            ]
        ):
            source = write(
                tmp_path / str(number), config, layers({"q_proj.weight": (32, 24), "k_proj.weight": (16, 24)})
            )
            result = run("recipes", "check", source)
            assert result.exit_code == 3, result.output
            assert len(result.stdout + result.stderr) < 20_000


class TestCommand:
    def test_check_needs_a_source_and_a_source_needs_check(self, run: Run, tiny) -> None:
        for arguments in (("check",), ("llama", tiny.path)):
            result = run("recipes", *arguments)
            assert result.exit_code == 2
            assert "qkpatch recipes check SOURCE" in result.stderr

    def test_no_recipe_can_be_called_check(self, tmp_path: Path) -> None:
        assert catalogue.CHECK not in shipped_recipes()
        text = catalogue.recipe_text("llama").replace("name: llama", "name: check")
        (tmp_path / "check.yaml").write_text(text)
        with pytest.raises(RecipeError, match="is a word of"):
            load_recipe(tmp_path / "check.yaml")

    def test_what_cannot_be_opened_is_the_same_error_as_elsewhere(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "pickled").mkdir()
        (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
        result = run("recipes", "check", tmp_path / "pickled")
        assert result.exit_code == 3
        assert "never unpickles" in result.stderr
        assert (
            json.loads(run("recipes", "check", tmp_path / "pickled", "--json").stdout)["error"]["exit_code"]
            == 3
        )

    def test_a_narrow_terminal_gets_no_line_longer_than_it_but_names(self, tmp_path: Path) -> None:
        from qkpatch.diagnosis.explain import explanation

        tiny = build_tiny(tmp_path / "tiny", config={**LLAMA, "num_attention_heads": 8})
        diagnosis = diagnose.diagnose(str(tiny.path))
        assert isinstance(diagnosis, Diagnosis)
        lines = explanation(diagnosis, 80).splitlines()
        assert all(len(line) <= 80 or " " not in line.strip() for line in lines)


@pytest.mark.parametrize("width", [60, 80, 140, 200])
def test_the_table_of_recipes_keeps_its_width_and_tells_every_fact(width: int) -> None:
    from qkpatch.recipes.descriptions import attention, defaults, layout, recipe_table, repository

    recipes = list(shipped_recipes().values())
    text = recipe_table(recipes, width)
    lines = text.splitlines()
    assert all(len(line) <= width or " " not in line.strip() for line in lines)
    told = " ".join(text.split())
    for recipe in recipes:
        assert (
            recipe.name in lines if width < 100 else any(line.startswith(f"{recipe.name} ") for line in lines)
        )
        assert repository(recipe) in told
        assert all(
            word in told
            for fact in (layout(recipe), attention(recipe), defaults(recipe))
            for word in fact.split()
        )
