"""`qkpatch recipes check`: what fits, what does not and why, what would do instead, and drafts with open places."""

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

from qkpatch.common.strict_yaml import load_yaml
from qkpatch.diagnosis import diagnose
from qkpatch.diagnosis.draft import draft_text
from qkpatch.errors import RecipeError
from qkpatch.recipes import catalogue
from qkpatch.recipes.catalogue import load_recipe, shipped_recipes
from qkpatch.recipes.reading import parse_recipe

NUMBERS = {
    "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **NUMBERS}
SEPARATE = {"attn.q_proj.weight": (32, 24), "attn.k_proj.weight": (16, 24)}
Run = Callable[..., Result]


def write(
    path: Path,
    config: dict[str, object],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
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
            "yes numbers:       3 layers, 4 query / 2 key heads of 8, hidden 24, llama",
            "yes layers:        0-2",
            "Recipe llama fits; next: qkpatch plan SOURCE",
        ):
            assert line in result.stdout
        assert "draft" not in result.stdout
        assert "does not fit" not in result.stdout
        assert not result.stderr

    def test_json_says_the_same(self, run: Run, tmp_path: Path) -> None:
        report = checked(run, build_tiny(tmp_path / "tiny").path)
        assert set(report) == {
            "source", "model_type", "architectures", "tensors", "shards", "recipe", "candidates", "query_like",
            "offers", "near", "draft", "no_draft",
        }  # fmt: skip
        assert report["recipe"] == "llama"
        assert (report["offers"], report["near"], report["draft"], report["no_draft"]) == ([], [], None, None)
        first = report["candidates"][0]
        assert first["fits"]
        assert first["editable_layers"] == [0, 1, 2]
        assert first["refused_layers"] == []
        assert [finding["about"] for finding in first["findings"]] == [
            "model_type", "architectures", "tensor names", "numbers", "layers",
        ]  # fmt: skip
        assert report["query_like"] == ["model.layers.0.self_attn.q_proj.weight"]

    def test_a_wrong_number_of_layers_is_told_with_both_numbers_and_no_draft(
        self, run: Run, tmp_path: Path
    ) -> None:
        tiny = build_tiny(tmp_path / "tiny", config={**LLAMA, "num_hidden_layers": 5})
        result = run("recipes", "check", tiny.path)
        assert result.exit_code == 3
        assert "no  numbers" in result.stdout
        assert "5 layers, but queries are stored for 3 (0-2)" in result.stdout
        assert "config.json: num_hidden_layers" in result.stdout
        assert "no draft of one would help" in result.stdout
        assert "gemma3n" not in result.stdout  # shares tensor names, and is of no use here
        assert checked(run, tiny.path)["draft"] is None

    def test_a_wrong_number_of_heads_is_told_with_both_shapes_once_for_all_layers(
        self, run: Run, tmp_path: Path
    ) -> None:
        tiny = build_tiny(tmp_path / "tiny", config={**LLAMA, "num_attention_heads": 8})
        result = run("recipes", "check", tiny.path)
        assert result.exit_code == 3
        assert result.stdout.count("stored as [32, 24], but config.json says [64, 24]") == 1
        assert "where: model.layers.0.self_attn.q_proj.weight in model.safetensors" in result.stdout
        assert "layers 0-2" in result.stdout

    def test_some_quantised_layers_are_listed_and_the_others_stay_editable(
        self, run: Run, tmp_path: Path
    ) -> None:
        extra = {
            f"model.layers.{n}.self_attn.q_proj.{name}": torch.ones(2, 2)
            for n in (0, 1)
            for name in ("qweight", "qzeros", "scales")
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
        assert "where: model.layers.0.self_attn.q_proj" in text

    def test_a_norm_that_the_recipe_does_not_declare_is_the_reason(self, run: Run, tmp_path: Path) -> None:
        extra = {f"model.layers.{n}.self_attn.{w}_norm.weight": torch.ones(8) for n in range(3) for w in "qk"}
        report = checked(run, build_tiny(tmp_path / "tiny", extra=extra).path)
        assert report["recipe"] is None
        (llama,) = report["candidates"]
        told = {finding["about"]: finding for finding in llama["findings"]}
        assert told["numbers"]["fits"]
        assert not told["layers"]["fits"]
        assert "queries or keys are normalised" in told["layers"]["reason"]["what"]

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
        shapes = {"q_proj": (64, 24), "k_proj": (16, 24), "q_norm": (8,), "k_norm": (8,)}
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
                for name, shape in shapes.items()
            },
        )
        report = checked(run, source)
        assert report["recipe"] == "qwen3.5"
        assert report["candidates"][0]["skipped_layers"] == [0, 2]
        assert "Skipped, without a product of their own: 0,2" in run("recipes", "check", source).stdout

    @pytest.mark.parametrize(("gone", "told"), [({1}, "layer 1 has"), ({0, 2}, "layer 0 has")])
    def test_layers_with_the_same_fault_are_told_once(
        self, gone: set[int], told: str, run: Run, tmp_path: Path
    ) -> None:
        shapes = layers(SEPARATE, prefix="model.layers.{}.self_")
        kept = {name: s for name, s in shapes.items() if not ("k_proj" in name and int(name[13]) in gone)}
        text = run("recipes", "check", write(tmp_path / "x", LLAMA, kept)).stdout
        assert text.count(f"{told} a query weight") == 1
        assert f"Refused: layers {','.join(map(str, sorted(gone)))}\n" in text


class TestUnknown:
    """A family that no recipe is made for."""

    def test_a_known_language_model_in_it_is_a_command_line_that_works(
        self, run: Run, tmp_path: Path
    ) -> None:
        tiny = build_tiny(tmp_path / "t", config={**LLAMA, "model_type": "n", "architectures": ["N"]})
        result = run("recipes", "check", tiny.path)
        assert result.exit_code == 3
        assert "  qkpatch plan SOURCE --recipe llama\n" in result.stdout
        report = checked(run, tiny.path)
        assert (report["offers"], report["draft"]) == (["--recipe llama"], None)
        assert run("plan", tiny.path, "--recipe", "llama").exit_code == 0

    def test_numbers_that_contradict_such_a_model_are_told_beside_the_draft(
        self, run: Run, tmp_path: Path
    ) -> None:
        wrong = {**LLAMA, "model_type": "n", "architectures": ["N"], "num_attention_heads": 8}
        result = run("recipes", "check", build_tiny(tmp_path / "t", config=wrong).path)
        assert "As a language model of recipe" in result.stderr
        assert "stored as [32, 24], but config.json says [64, 24]" in " ".join(result.stderr.split())
        assert result.stdout.startswith("# A draft")

    @pytest.mark.parametrize(
        ("shapes", "told"),
        [
            (
                {"attn.q_proj.weight": (32, 24), "attn.kv_b_proj.weight": (16, 24)},
                "multi-head latent attention",
            ),
            ({**SEPARATE, "attn.q_conv1d.weight": (32, 4)}, "delta attention (KDA)"),
            (
                {"attn.c_attn.qweight": (4, 4), "attn.c_attn.qzeros": (1, 1), "attn.c_attn.scales": (1, 4)},
                "AWQ",
            ),
            ({"attn.q_proj.weight": (4, 4), "attn.q_proj.weight.absmax": (4,)}, "bitsandbytes 4-bit"),
        ],
    )
    def test_what_no_recipe_can_edit_is_named_and_gets_no_draft_here_and_in_plan(
        self, shapes: dict[str, tuple[int, ...]], told: str, run: Run, tmp_path: Path
    ) -> None:
        source = write(
            tmp_path / "x", {"model_type": "new", "architectures": ["New"], **NUMBERS}, layers(shapes)
        )
        report = checked(run, source)
        assert (report["draft"], report["offers"]) == (None, [])
        assert told in report["no_draft"]["what"]
        assert "no draft of one would help" in run("recipes", "check", source).stdout
        refused = run("plan", source)
        assert refused.exit_code == 3
        assert told in refused.stderr

    @pytest.mark.parametrize("section", [{"model_type": "hunyuan_vl_text"}, {}])
    def test_queries_normalised_after_rope_are_refused_by_name(
        self, section: dict[str, str], run: Run, tmp_path: Path
    ) -> None:
        names = {f"self_attn.{name}": shape for name, shape in layers_of_hunyuan().items()}
        config = {"model_type": "hunyuan_vl" if not section else "w", "text_config": {**section, **NUMBERS}}
        source = write(tmp_path / "x", config, layers(names, prefix="model.layers.{}."))
        for arguments in (("plan", source), ("plan", source, "--recipe", "qwen3")):
            result = run(*arguments)
            assert result.exit_code == 3
            assert "normalised after RoPE (HunYuan)" in result.stderr
        assert "normalised after RoPE (HunYuan)" in checked(run, source)["no_draft"]["what"]

    def test_a_recipe_of_ones_own_cannot_declare_them_either(self, run: Run, tmp_path: Path) -> None:
        names = {f"self_attn.{name}": shape for name, shape in layers_of_hunyuan().items()}
        config = {"model_type": "hunyuan_vl", "architectures": ["H"], **NUMBERS}
        source = write(tmp_path / "x", config, layers(names, prefix="model.layers.{}."))
        text = catalogue.recipe_text("qwen3").replace("_norm.weight", "_layernorm.weight")
        text = text.replace("self_attn.q_layer", "self_attn.query_layer").replace(
            "self_attn.k_lay", "self_attn.key_lay"
        )
        (tmp_path / "mine.yaml").write_text(text.replace("name: qwen3", "name: mine"))
        result = run("plan", source, "--recipe", tmp_path / "mine.yaml")
        assert result.exit_code == 3
        assert "normalised after RoPE (HunYuan)" in result.stderr


def layers_of_hunyuan() -> dict[str, tuple[int, ...]]:
    norms = {"query_layernorm.weight": (8,), "key_layernorm.weight": (8,)}
    return {"q_proj.weight": (32, 24), "k_proj.weight": (16, 24), **norms}


class TestDraft:
    """What a draft cannot know is empty, and the strict reader refuses it until a person has filled it in."""

    OPEN = ("sections", "head_dim", "prefixes", "query", "key", "rows", "norms", "input_norm")

    def drafted(self, run: Run, tmp_path: Path) -> tuple[Path, str]:
        vision = layers({"attn.q_proj.weight": (24, 24)}, 5, "vision.blocks.{}.")
        config = {"model_type": "newlm", "architectures": ["NewLM"], "llm_config": {**NUMBERS}}
        source = write(tmp_path / "new", config, {**layers(SEPARATE), **vision})
        return source, run("recipes", "check", source).stdout

    def test_every_open_place_is_refused_by_its_path(self, run: Run, tmp_path: Path) -> None:
        source, text = self.drafted(run, tmp_path)
        (tmp_path / "draft.yaml").write_text(text)
        result = run("plan", source, "--recipe", tmp_path / "draft.yaml")
        assert result.exit_code == 2
        assert all(f".{key}:" in result.stderr for key in self.OPEN)

    @pytest.mark.parametrize("key", OPEN)
    def test_one_that_is_left_is_enough(self, key: str, run: Run, tmp_path: Path) -> None:
        source, text = self.drafted(run, tmp_path)
        file = tmp_path / "draft.yaml"
        file.write_text(self.filled(text, but=key))
        assert run("plan", source, "--recipe", file).exit_code == 2

    def test_filled_in_it_works_with_a_warning(self, run: Run, tmp_path: Path) -> None:
        source, text = self.drafted(run, tmp_path)
        file, out = tmp_path / "draft.yaml", tmp_path / "out"
        file.write_text(self.filled(text, but=""))
        done = run("apply", source, "--recipe", file, "--layers", 1, "--modes", 2, "-o", out)
        assert done.exit_code == 0, done.output
        assert "says that it is untested" in done.stderr
        assert run("verify", out, "--source", source, "--recipe", file).exit_code == 0
        edits = json.loads((out / "qkpatch.json").read_text())["edits"]
        assert [edit["tensor"] for edit in edits] == ["net.h.1.attn.q_proj.weight"]

    def filled(self, text: str, *, but: str) -> str:
        """The draft as a person fills it in, one place left out."""
        said = {
            "sections": "[llm_config]", "prefixes": "[net.h.{layer}.]", "query": "attn.q_proj.weight",
            "key": "attn.k_proj.weight", "rows": "separate", "head_dim": "8",
        }  # fmt: skip
        lines = []
        for line in text.splitlines():
            key = line.split(":")[0].strip()
            if key in said and key != but:
                line = f"{line.split(':')[0]}: {said[key]}"
            if key not in ("norms", "input_norm") or key == but:
                lines.append(line.replace("[net", '["net').replace(".]", '."]'))
        return "\n".join(lines)

    def test_nothing_is_guessed(self, run: Run, tmp_path: Path) -> None:
        _, text = self.drafted(run, tmp_path)
        said = load_yaml(text.encode(), "draft")
        assert said["match"] == {"model_types": ["newlm"], "architectures": ["NewLM"]}
        assert set(said["tensors"].values()) == {None, "out_in"}
        for name in ("net.h.0.attn.q_proj.weight", "vision.blocks.0.attn.q_proj.weight", "llm_config"):
            assert f'    # "{name}"\n' in text

    def test_where_nothing_is_named_like_queries_there_is_none(self, run: Run, tmp_path: Path) -> None:
        source = write(tmp_path / "none", {"model_type": "n"}, layers({"mixer.weight": (4, 4)}))
        result = run("recipes", "check", source)
        assert result.exit_code == 3
        assert "nothing to draft one from" in result.stdout


class TestHostile:
    """Names and values out of files neither break the draft nor act in the terminal."""

    @pytest.mark.parametrize(
        "word",
        ["\x1b[31mred", "a: b # c", "- [x]", '"\\', "null", "\u202e日本", "a\nb", "é" * 300, "{layer}"],
    )
    def test_names_and_values_stay_text(self, word: str, run: Run, tmp_path: Path) -> None:
        source = write(
            tmp_path / "hostile",
            {"model_type": word, "architectures": [word], **NUMBERS, word: NUMBERS},
            layers(SEPARATE, prefix=f"{word}.{{}}." if "{" not in word else "{{layer}}.{}."),
        )
        result = run("recipes", "check", source)
        assert result.exit_code == 3
        assert all(c.isprintable() or c == "\n" for c in result.stdout + result.stderr)
        said = load_yaml(result.stdout.encode(), "draft")
        assert said["match"]["architectures"] == ([word] if len(word) < 200 else ["Unknown"])

    @pytest.mark.long
    @settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(
        model_type=st.none() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=3)),
        classes=st.none() | st.text(max_size=6) | st.lists(st.text(max_size=8) | st.integers(), max_size=3),
        names=st.lists(st.text(max_size=12), max_size=3),
    )
    def test_a_draft_is_always_yaml_and_never_a_recipe(
        self, model_type: object, classes: object, names: list[str]
    ) -> None:
        text = draft_text({"model_type": model_type, "architectures": classes}, names, "org/name").encode()
        assert load_yaml(text, "draft")["name"] == "draft"
        with pytest.raises(RecipeError, match="rows"):
            parse_recipe(text, "draft.yaml")

    def test_config_values_of_any_type_are_told_not_raised(self, run: Run, tmp_path: Path) -> None:
        for number, config in enumerate(
            [
                {"model_type": ["a"], "architectures": {"b": 1}},
                {"model_type": {"a": "x" * 9999}, "architectures": [["b"], None, 7]},
                {"text_config": "nothing", "model_type": "llama", "num_hidden_layers": "3"},
                {"text_config": {"num_hidden_layers": -1, "num_attention_heads": 10**30, "vocab_size": []}},
            ]
        ):
            names = {f"self_{name}": shape for name, shape in SEPARATE.items()}
            source = write(tmp_path / str(number), config, layers(names))
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

    def test_errors_list_recipes_near_by_and_not_all(self, run: Run) -> None:
        for arguments in (("lamma",), ("check", "lama")):
            error = run("recipes", *arguments).stderr
            assert "near it: llama" in error
            assert len(error) < 400

    def test_a_narrow_terminal_gets_no_line_longer_than_it_but_names(self, tmp_path: Path) -> None:
        from qkpatch.diagnosis.explain import explanation

        tiny = build_tiny(tmp_path / "tiny", config={**LLAMA, "num_attention_heads": 8})
        lines = explanation(diagnose.diagnose(str(tiny.path)), 80).splitlines()
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
