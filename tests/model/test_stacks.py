"""A known language model in a wrapper that no recipe knows: found where it surely is, refused where it need not be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import Result

from qkpatch import api
from qkpatch.errors import QKPatchError, UsageError

Run = Callable[..., Result]
VOCABULARY = 11
NUMBERS = {
    "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": VOCABULARY, "model_type": "qwen3",
}  # fmt: skip
LAYER = {"self_attn.q_proj": (32, 24), "self_attn.k_proj": (16, 24), "input_layernorm": (24,)}
NORMS = {"self_attn.q_norm": (8,), "self_attn.k_norm": (8,)}
PREFIX = "vlm.model.layers.{layer}."
Shapes = dict[str, tuple[int, ...]]


def stack(
    head: str = "vlm.model.",
    n: int = 3,
    *,
    rows: int | None = VOCABULARY,
    layer: Shapes | None = None,
    inner: str = "",
) -> Shapes:
    """A stack of layers of Qwen3's names, and its token embedding of ``rows`` rows."""
    of_layer = LAYER | NORMS if layer is None else layer
    shapes = {name if "bias" in name else f"{name}.weight": shape for name, shape in of_layer.items()}
    found = {f"{head}layers.{i}.{inner}{name}": shape for i in range(n) for name, shape in shapes.items()}
    return found | ({} if rows is None else {f"{head}embed_tokens.weight": (rows, 24)})


# A vision tower with the language model's names, and wide as it; it has no token embedding.
VISION = stack("vision.", 5, rows=None, layer=LAYER | NORMS)


def write(path: Path, shapes: Shapes, **config: Any) -> Path:
    """A checkpoint of an unknown class; its numbers are in ``vlm_config.text_config`` where nothing else is said."""
    generator = torch.Generator().manual_seed(0)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.rand(*shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = config or {"vlm_config": {"text_config": NUMBERS}}
    said = {"model_type": "wrapper", "architectures": ["WrapperForConditionalGeneration"], **config}
    (path / "config.json").write_text(json.dumps(said))
    return path


def refused(source: Path, **edit: Any) -> QKPatchError:
    with pytest.raises(QKPatchError) as raised:
        api.plan(source, **edit)
    assert raised.value.exit_code in (2, 3)
    return raised.value


class TestFound:
    """Exactly one stack has names, norms, shapes and a token embedding: it is taken, and said to be."""

    @pytest.mark.parametrize(
        "config",
        [
            NUMBERS,
            {"language": NUMBERS},
            {"llm_config": NUMBERS},
            {"phi_config": NUMBERS},
            {"vocab_size": VOCABULARY, "lm": {k: v for k, v in NUMBERS.items() if k != "vocab_size"}},
            {"vlm_config": {"text_config": NUMBERS}},
            {"a": {"b": {"c": NUMBERS}}},
            {"vision_config": {**NUMBERS, "num_hidden_layers": 5}, "language": NUMBERS},
        ],
        ids=[
            "top",
            "language",
            "llm_config",
            "phi_config",
            "tokens above",
            "two deep",
            "three deep",
            "beside vision",
        ],
    )
    def test_its_numbers_may_be_anywhere(self, config: dict[str, Any], tmp_path: Path) -> None:
        known = {key: value for key, value in config.items() if key != "model_type"}
        plan = api.plan(write(tmp_path / "m", stack() | VISION, **known), recipe="qwen3")
        assert plan.edits[0].query.name == "vlm.model.layers.1.self_attn.q_proj.weight"
        assert [ref.name for ref in (plan.edits[0].query_norm, plan.edits[0].key_norm) if ref] == [
            f"vlm.model.layers.1.self_attn.{which}_norm.weight" for which in "qk"
        ]
        assert plan.model.tower.layout.n_kv_heads == 2

    @pytest.mark.parametrize("inner", ["", "decoder_layer.", "block.inner."])
    @pytest.mark.parametrize("head", ["", "model.", "a.b.c.", "thinker.2.model."])
    def test_it_may_sit_anywhere(self, head: str, inner: str, tmp_path: Path) -> None:
        source = write(tmp_path / "m", stack(head, inner=inner) | VISION)
        plan = api.plan(source, recipe="qwen3")
        assert plan.edits[0].query.name == f"{head}layers.1.{inner}self_attn.q_proj.weight"
        assert plan.warnings[0] == (
            f"as a qwen3 model were taken the layers {head}layers.{{layer}}.{inner} "
            "(3 layers, 4 query / 2 key heads of 8, hidden 24), which agree with config.json's "
            "vlm_config.text_config: a token embedding of 11 rows stands beside them"
        )

    @pytest.mark.parametrize(
        "name", ["embed_tokens", "wte", "tok_embeddings", "embeddings", "embedding.word_embeddings"]
    )
    def test_its_embedding_has_any_usual_name(self, name: str, tmp_path: Path) -> None:
        source = write(tmp_path / "m", stack(rows=None) | {f"vlm.model.{name}.weight": (VOCABULARY, 24)})
        assert api.plan(source, recipe="qwen3").edits

    def test_class_defaults_hold_for_the_section_that_names_the_model_and_no_other(
        self, tmp_path: Path
    ) -> None:
        wide = {"self_attn.q_proj": (4096, 24), "self_attn.k_proj": (4096, 24), "input_layernorm": (24,)}
        shapes = stack(layer={**wide, "self_attn.q_norm": (128,), "self_attn.k_norm": (128,)})
        said = {"num_hidden_layers": 3, "hidden_size": 24, "vocab_size": VOCABULARY}
        for kind, fits in (("qwen3", True), ("other", False), ("", False)):
            source = write(tmp_path / f"m{kind}", shapes, text_config={**said, "model_type": kind})
            if fits:
                assert api.plan(source, recipe="qwen3").model.tower.layout.n_heads == 32
            else:
                error = refused(source, recipe="qwen3")
                assert "num_attention_heads: expected a positive integer, got None" in error.what

    def test_an_edit_is_verified_by_its_own_manifest(self, run: Run, tmp_path: Path) -> None:
        source, out = write(tmp_path / "m", stack() | VISION), tmp_path / "out"
        done = run("apply", source, "--recipe", "qwen3", "--modes", 2, "-o", out)
        assert done.exit_code == 0, done.output
        assert run("verify", out, "--source", source).exit_code == 0
        manifest = json.loads((out / "qkpatch.json").read_text())
        assert manifest["recipe"]["prefix"] == {"self": PREFIX}
        assert manifest["recipe"]["config"]["sections"] == ["vlm_config.text_config"]
        assert "prefix" not in manifest["edit"]
        changed = [
            name
            for name, tensor in load_file(source / "model.safetensors").items()
            if not torch.equal(tensor, load_file(out / "model.safetensors")[name])
        ]
        assert changed == ["vlm.model.layers.1.self_attn.q_proj.weight"]

    def test_without_a_recipe_the_error_has_the_command_that_works(self, run: Run, tmp_path: Path) -> None:
        source = write(tmp_path / "a b", stack() | VISION)
        error = refused(source)
        assert error.fix is not None
        assert error.fix.endswith(f"qkpatch plan '{source}' --recipe qwen3")
        assert run("plan", source, "--recipe", "qwen3").exit_code == 0


class TestNotSure:
    """Stacks that need not be the language model are never taken without --prefix."""

    @pytest.mark.parametrize(
        ("shapes", "told"),
        [
            (stack(rows=None), "no token embedding of vocab_size 11 rows stands beside them (there is none)"),
            (stack(rows=8), "vlm.model.embed_tokens.weight is [8, 24]"),
            (stack(rows=None) | {"embed_tokens.weight": (11, 24)}, "there is none"),
            (stack(rows=None) | {"vlm.lm_head.weight": (11, 24)}, "there is none"),
            (stack(rows=None) | {"vlm.model.embed_positions.weight": (512, 24)}, "is [512, 24]"),
        ],
        ids=["none", "too few rows", "another's", "a head's", "of positions"],
    )
    def test_without_its_own_token_embedding(self, shapes: Shapes, told: str, tmp_path: Path) -> None:
        source = write(tmp_path / "m", shapes)
        error = refused(source, recipe="qwen3")
        assert PREFIX in error.what
        assert told in error.what
        assert error.fix == f"say which: --recipe qwen3 --prefix '{PREFIX}'"
        plan = api.plan(source, recipe="qwen3", prefix=PREFIX)
        assert told in plan.warnings[0]
        assert f"--recipe qwen3 --prefix '{PREFIX}'" in (refused(source).fix or "")

    def test_a_talker_knows_fewer_tokens(self, tmp_path: Path) -> None:
        talker = {
            "talker_config": {**NUMBERS, "vocab_size": 5},
            "text_config": {**NUMBERS, "hidden_size": 48},
        }
        error = refused(write(tmp_path / "m", stack("talker.", rows=5), **talker), recipe="qwen3")
        assert "they know 5 tokens, and config.json's text_config says 11" in error.what

    def test_two_language_models_are_both_named_and_prefix_chooses(self, tmp_path: Path) -> None:
        source = write(tmp_path / "m", stack() | stack("draft."))
        for edit in ({"recipe": "qwen3"}, {}):
            error = refused(source, **edit)
            told = f"{error.what} {error.fix}"
            assert PREFIX in told
            assert "draft.layers.{layer}." in told
        plan = api.plan(source, recipe="qwen3", prefix="draft.layers.{layer}.")
        assert plan.edits[0].query.name.startswith("draft.layers.1.")

    def test_an_encoder_of_the_same_kind_leaves_the_decoder(self, tmp_path: Path) -> None:
        shapes = stack("model.encoder.model.", 4, rows=None) | stack("model.")
        plan = api.plan(write(tmp_path / "m", shapes, language_config=NUMBERS), recipe="qwen3")
        assert plan.edits[0].query.name.startswith("model.layers.1.")

    def test_the_recipe_s_own_place_needs_no_embedding_unless_another_has_one(self, tmp_path: Path) -> None:
        own = stack("model.", rows=None)
        known = {key: value for key, value in NUMBERS.items() if key != "model_type"}
        assert api.plan(write(tmp_path / "a", own, **known), recipe="qwen3").edits
        plan = api.plan(write(tmp_path / "b", own | stack("llm."), **known), recipe="qwen3")
        assert plan.edits[0].query.name.startswith("llm.layers.")


class TestAnotherPart:
    """Layers of vision, audio or a resampler, whole and with a language model's names, are never taken unasked."""

    FUSED: ClassVar[Shapes] = {f"model.layers.{i}.self_attn.qkv_fused.weight": (72, 24) for i in range(3)} | {
        "model.embed_tokens.weight": (VOCABULARY, 24)
    }
    SECTION: ClassVar[dict[str, Any]] = {
        k: v for k, v in NUMBERS.items() if k not in ("vocab_size", "model_type")
    }

    @staticmethod
    def other(blocks: str) -> Shapes:
        return {n.replace("layers.", blocks, 1): s for n, s in stack("", rows=None, layer=LAYER).items()}

    @pytest.mark.parametrize(
        ("blocks", "section", "more", "told"),
        [
            ("model.vision_layers.", "vision_config", {}, "'vision' in model.vision_layers."),
            ("model.resampler.", "qformer_config", {}, "'resampler' in model.resampler."),
            ("model.parts.", "vision_config", {}, "'vision' in config.json's vision_config"),
            ("model.parts.", "a.visual.x", {}, "'visual' in config.json's a.visual.x"),
            ("model.parts.", "text_config", {}, "model.embed_tokens.weight stands beside model.layers., too"),
            ("vit.layers.", "text_config", {"vit.embed_tokens.weight": (11, 24)}, "'vit' in vit.layers."),
            (
                "vision_tower.layers.",
                "vision_config",
                {"vision_tower.position_embedding.weight": (11, 24)},
                "vision_tower.position_embedding.weight is [11, 24]",
            ),
            (
                "tower.layers.",
                "part",
                {"tower.patch_embedding.weight": (11, 24)},
                "tower.patch_embedding.weight is [11, 24]",
            ),
            (
                "part.layers.",
                "part",
                {"part.wte.weight": (11, 24), "model.embed_tokens.weight": (12, 24)},
                "they know 11 tokens, and model.embed_tokens.weight has 12 rows",
            ),
            (
                "part.layers.",
                "part",
                {"part.wte.weight": (11, 24)},
                "model.embed_tokens.weight stands beside model.layers., which may be",
            ),
        ],
    )  # fmt: skip
    def test_is_refused_and_offered_by_no_command(
        self, blocks: str, section: str, more: Shapes, told: str, run: Run, tmp_path: Path
    ) -> None:
        config: dict[str, Any] = self.SECTION
        for key in reversed(section.split(".")):
            config = {key: config}
        source = write(
            tmp_path / "m", self.FUSED | self.other(blocks) | more, vocab_size=VOCABULARY, **config
        )
        prefix = f"{blocks}{{layer}}."
        error = refused(source, recipe="llama")
        assert told in error.what
        assert f"--recipe llama --prefix '{prefix}'" in (error.fix or "")
        offered = refused(source).fix or ""
        assert offered.startswith("`qkpatch recipes check SOURCE`")
        assert told in api.plan(source, recipe="llama", prefix=prefix).warnings[0]
        assert "}. None" not in run("recipes", "check", source).output

    @pytest.mark.parametrize("missing", [0, 1, 2])
    @pytest.mark.parametrize("blocks", ["model.vision_layers.", "model.parts.", "part.layers."])
    def test_a_language_model_that_lacks_a_layer_does_not_leave_the_field_to_another(
        self, blocks: str, missing: int, tmp_path: Path
    ) -> None:
        whole = self.other(blocks) | {"part.embed_tokens.weight": (VOCABULARY, 24)}
        cut = {n: s for n, s in stack("model.", layer=LAYER).items() if f".{missing}." not in n}
        config = {"text_config": self.SECTION, "vision_config": self.SECTION, "vocab_size": VOCABULARY}
        error = refused(write(tmp_path / "m", cut | whole, **config), recipe="llama")
        assert "model.layers." in error.what
        assert blocks in error.what

    def test_a_gap_without_an_embedding_is_a_doubt_too(self, tmp_path: Path) -> None:
        cut = {n: s for n, s in stack("model.", rows=None).items() if ".1." not in n}
        error = refused(write(tmp_path / "m", stack() | cut), recipe="qwen3")
        assert "model.layers.{layer}. lacks layers, and may be the language model" in error.what

    def test_beside_layers_of_vision_the_language_model_is_offered_by_its_prefix(
        self, tmp_path: Path
    ) -> None:
        shapes = stack("model.", layer=LAYER) | self.other("model.vision_layers.")
        config = {"text_config": self.SECTION, "vision_config": self.SECTION, "vocab_size": VOCABULARY}
        source = write(tmp_path / "m", shapes, **config)
        for error in (refused(source), refused(source, recipe="llama")):
            assert (error.fix or "").endswith("--recipe llama --prefix 'model.layers.{layer}.'")

    def test_an_encoder_of_language_is_none_of_them(self, tmp_path: Path) -> None:
        shapes = stack("model.lang_encoder.model.", inner="decoder_layer.")
        assert api.plan(write(tmp_path / "m", shapes), recipe="qwen3").edits


class TestContradictions:
    """Each with both numbers, or both names, and the cure."""

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            (
                {"num_hidden_layers": 5},
                "vlm_config.text_config.num_hidden_layers: 5 layers, and 3 are stored",
            ),
            ({"num_hidden_layers": 2}, "2 layers, and 3 are stored"),
            ({"num_attention_heads": 8}, "stored as [32, 24], but config.json says [64, 24]"),
            ({"num_key_value_heads": 4}, "stored as [16, 24], but config.json says [32, 24]"),
            ({"hidden_size": 48}, "hidden_size 48"),
            ({"num_attention_heads": None}, "num_attention_heads: expected a positive integer, got None"),
        ],
    )
    def test_counts(self, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
        config = {"vlm_config": {"text_config": {**NUMBERS, **changes}}}
        error = refused(write(tmp_path / "m", stack(), **config), recipe="qwen3")
        assert told in error.what
        assert f"3 layers {PREFIX}" in error.what

    def test_a_head_dim_that_was_dropped_on_save_is_asked_for(self, tmp_path: Path) -> None:
        without = {key: value for key, value in NUMBERS.items() if key not in ("head_dim", "model_type")}
        error = refused(write(tmp_path / "m", stack(), text_config=without), recipe="qwen3")
        assert "32 rows / 4 heads = 8: is head_dim missing in config.json?" in (error.fix or "")

    def test_empty_tensors_are_those_of_zero_3(self, tmp_path: Path) -> None:
        empty = dict.fromkeys(LAYER | NORMS, (0,))
        error = refused(write(tmp_path / "m", stack(layer=empty)), recipe="qwen3")
        assert "ZeRO-3" in (error.fix or "")

    @pytest.mark.parametrize("part", ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm"])
    def test_norms_in_some_layers_only(self, part: str, tmp_path: Path) -> None:
        shapes = stack()
        del shapes[f"vlm.model.layers.1.{part}.weight"]
        error = refused(write(tmp_path / "m", shapes), recipe="qwen3")
        assert f"{part}.weight is stored in 2 of 3 layers" in error.what
        assert error.where == f"vlm.model.layers.1.{part}.weight"

    @pytest.mark.parametrize(
        ("layer", "recipe", "told"),
        [
            (LAYER | NORMS, "llama", "_norm.weight, unlike llama"),
            (LAYER | {"input_layernorm.bias": (24,)}, "llama", "have input_layernorm.bias, unlike llama"),
            (LAYER, "qwen3", "have no self_attn.q_norm.weight, unlike qwen3"),
            (
                LAYER | NORMS | {"self_attn.qk_norm": (8,)},
                "qwen3",
                "have self_attn.qk_norm.weight, unlike qwen3",
            ),
            (
                {k: v for k, v in (LAYER | NORMS).items() if "input" not in k},
                "qwen3",
                "have no input_layernorm.weight",
            ),
        ],
    )
    def test_another_language_model(self, layer: Shapes, recipe: str, told: str, tmp_path: Path) -> None:
        config = {"text_config": {**NUMBERS, "model_type": "unheard"}}
        assert told in refused(write(tmp_path / "m", stack(layer=layer), **config), recipe=recipe).what

    def test_a_section_that_names_another_whose_gains_mean_another_thing(self, tmp_path: Path) -> None:
        source = write(tmp_path / "m", stack(), text_config={**NUMBERS, "model_type": "gemma3_text"})
        error = refused(source, recipe="qwen3")
        assert "text_config names 'gemma3_text'" in error.what
        assert error.fix == "choose it: --recipe gemma3-text"
        assert api.plan(source, recipe="gemma3-text").edits

    def test_two_sections_that_agree_and_contradict_each_other(self, tmp_path: Path) -> None:
        other = {**NUMBERS, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
        error = refused(write(tmp_path / "m", stack(), text_config=NUMBERS, llm_config=other), recipe="qwen3")
        assert "text_config: 4 heads × 8; llm_config: 8 heads × 4" in error.what

    def test_config_json_is_the_text_model_s_alone(self, tmp_path: Path) -> None:
        alone = {**NUMBERS, "architectures": ["Qwen3ForCausalLM"]}
        source = write(tmp_path / "m", stack() | VISION, **alone)
        error = refused(source)
        assert "config.json is the text model's alone, as it seems: restore the whole model's" in (
            error.fix or ""
        )

    def test_the_class_s_own_model_under_other_names_may_store_plain_gains(self, tmp_path: Path) -> None:
        kind = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        source = write(tmp_path / "m", stack(), **{**NUMBERS, **kind})
        assert "MLX" in refused(source, recipe="gemma3-text", prefix=PREFIX).what


class TestTrainingPrefixes:
    @pytest.mark.parametrize(
        ("head", "prefix", "cure"),
        [
            ("_orig_mod.model.", "_orig_mod.", "model._orig_mod"),
            ("model._orig_mod.", "_orig_mod.", "model._orig_mod"),
            ("module.model.", "module.", "model.module"),
            ("base_model.model.model.", "base_model.model.", "merge_and_unload"),
            ("model._fsdp_wrapped_module.", "_fsdp_wrapped_module.", "full state dict"),
            ("model._orig_module.", "_orig_module.", "save what it wraps"),
        ],
    )
    @pytest.mark.parametrize("is_known", [True, False])
    def test_they_are_named_with_the_cure(
        self, head: str, prefix: str, cure: str, is_known: bool, tmp_path: Path
    ) -> None:
        names = ("qwen3", "Qwen3ForCausalLM") if is_known else ("n", "N")
        config = {**NUMBERS, "model_type": names[0], "architectures": [names[1]]}
        source = write(tmp_path / "m", stack(head), **config)
        for edit in ({}, {"recipe": "qwen3"}):
            error = refused(source, **edit)
            assert f"names hold {prefix!r}" in error.what
            assert cure in (error.fix or "")


class TestPrefix:
    """--prefix, in every place where an edit is asked for."""

    def test_the_manifest_records_it_and_verify_plans_with_it(self, run: Run, tmp_path: Path) -> None:
        source, out = write(tmp_path / "m", stack() | stack("draft.")), tmp_path / "out"
        (tmp_path / "edit.yaml").write_text("recipe: qwen3\nprefix: 'draft.layers.{layer}.'\nmodes: 2\n")
        done = run("apply", source, "--config", tmp_path / "edit.yaml", "-o", out)
        assert done.exit_code == 0, done.output
        manifest = json.loads((out / "qkpatch.json").read_text())
        assert manifest["edit"]["prefix"] == "draft.layers.{layer}."
        assert manifest["edits"][0]["tensor"] == "draft.layers.1.self_attn.q_proj.weight"
        assert run("verify", out, "--source", source).exit_code == 0
        assert "--prefix 'draft.layers.{layer}.'" in run("card", out).stdout
        manifest["edit"]["prefix"] = PREFIX
        (out / "qkpatch.json").write_text(json.dumps(manifest))
        assert run("verify", out, "--source", source).exit_code == 1

    def test_inspect_takes_it(self, run: Run, tmp_path: Path) -> None:
        source = write(tmp_path / "m", stack() | stack("draft."))
        shown = run("inspect", source, "--recipe", "qwen3", "--prefix", PREFIX, "--modes", 2)
        assert shown.exit_code == 0, shown.output
        assert f"Tensors: {PREFIX}self_attn.q_proj.weight" in shown.stdout

    @pytest.mark.parametrize("prefix", ["", "model.layers.", "a.{layer}.{layer}.", "a.{layer}.{x}.", 7])
    def test_one_that_can_be_none_is_refused_at_once(self, prefix: Any, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--prefix"):
            api.plan(tmp_path / "nothing", recipe="qwen3", prefix=prefix)

    def test_one_without_such_layers_is_told_where_they_are(self, tmp_path: Path) -> None:
        source = write(tmp_path / "m", stack())
        error = refused(source, recipe="qwen3", prefix="model.layers.{layer}.")
        assert f"{PREFIX} a token embedding of 11 rows stands beside them" in error.what
        assert "None" not in str(error)

    def test_two_of_a_recipe_s_own_prefixes_are_told_apart_by_it(self, tmp_path: Path) -> None:
        kind = {"model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"]}
        heads = ("language_model.model.", "model.language_model.")
        source = write(tmp_path / "m", stack(heads[0]) | stack(heads[1]), **kind, text_config=NUMBERS)
        fix = refused(source).fix or ""
        assert fix == f"choose one: --recipe internvl --prefix '{heads[0]}layers.{{layer}}.'"
        plan = api.plan(source, recipe="internvl", prefix=f"{heads[1]}layers.{{layer}}.")
        assert plan.edits[0].query.name.startswith(heads[1])

    def test_it_goes_with_a_recipe(self, tmp_path: Path) -> None:
        error = refused(write(tmp_path / "m", stack()), prefix=PREFIX)
        assert error.where == "--prefix"
        assert "--recipe" in error.what

    def test_a_known_family_s_own_layers_by_prefix_are_the_same_edit(
        self, run: Run, tiny, tmp_path: Path
    ) -> None:
        plain, chosen = (
            api.plan(tiny.path, recipe="llama", prefix=p) for p in (None, "model.layers.{layer}.")
        )
        assert plain.edits == chosen.edits


def test_a_loaded_model_of_an_unknown_class_is_edited_as_its_checkpoint_would_be() -> None:
    transformers = pytest.importorskip("transformers")
    numbers = {key: value for key, value in NUMBERS.items() if key != "model_type"}
    config = transformers.Qwen3Config(**numbers, intermediate_size=16)

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llm = transformers.Qwen3Model(config)
            self.draft = transformers.Qwen3Model(config)
            self.config = transformers.PretrainedConfig(text_config=config.to_dict())

    model = Wrapper()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(QKPatchError, match="2 stacks"):
        api.patch_model(model, recipe="qwen3", modes=2)
    with api.patched(model, recipe="qwen3", prefix="llm.layers.{layer}.", modes=2):
        changed = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])]
    assert changed == ["llm.layers.1.self_attn.q_proj.weight"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.long
def test_a_mixture_of_a_hundred_thousand_tensors_takes_seconds(tmp_path: Path) -> None:
    experts = {
        f"vlm.model.layers.{n}.mlp.experts.{e}.up.weight": (1,) for n in range(3) for e in range(10_000)
    }
    source = write(tmp_path / "m", stack() | experts)
    began = process_time()
    assert "--recipe qwen3" in (refused(source).fix or "")
    assert process_time() - began < 20


@pytest.mark.parametrize(
    "shapes",
    [
        {"1." * 500_000 + "self_attn.q_proj.weight": (1, 1)},
        {name: shape for n in range(200) for name, shape in stack(f"m{n}.", 3, layer=LAYER).items()},
    ],
    ids=["a name without end", "two hundred stacks"],
)
def test_what_no_checkpoint_has_takes_no_time(shapes: Shapes, tmp_path: Path) -> None:
    source = write(tmp_path / "m", shapes)
    for edit in ({}, {"recipe": "llama"}):
        began = process_time()
        refused(source, **edit)
        assert process_time() - began < 5
