"""Drafts of recipes for unknown families: they work where the guesses are right, and say what is only guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from safetensors.torch import load_file, save_file
from test_diagnose import NUMBERS, apply_draft, checked, layers, write
from typer.testing import Result

from qkpatch.checkpoint.source import open_checkpoint
from qkpatch.diagnosis import slim
from qkpatch.diagnosis.candidate import examine
from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.reading import parse_recipe
from qkpatch.recipes.recipe import NormKind, NormSpan, Recipe
from qkpatch.recipes.rows import RowLayout

Run = Callable[..., Result]
SEPARATE = {"attn.q_proj.weight": (32, 24), "attn.k_proj.weight": (16, 24)}


def drafted(run: Run, source: Path) -> Recipe:
    """The recipe that is drafted."""
    return parse_recipe(checked(run, source)["draft"].encode(), "draft")


def findings(run: Run, source: Path) -> dict[str, tuple[bool | None, str]]:
    """What the draft's check says, by what it is about."""
    return {f["about"]: (f["fits"], f["found"]) for f in checked(run, source)["draft_check"]["findings"]}


def fill(source: Path, word: str, value: float) -> None:
    """Set the tensors whose names hold ``word``."""
    path = source / "model.safetensors"
    tensors = {n: torch.full_like(t, value) if word in n else t for n, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


class TestUnknown:
    """A family that no recipe fits: the draft works at once where its guesses are right."""

    def test_other_names_and_other_config_keys_beside_a_larger_vision_tower(
        self, run: Run, tmp_path: Path
    ) -> None:
        text = {
            "model_type": "nt",
            "n_layer": 3,
            "d_model": 24,
            "n_heads": 4,
            "n_kv_heads": 2,
            "kv_channels": 8,
        }
        vision = {
            f"vision.blocks.{i}.attn.{w}_proj.weight": torch.ones(24, 24) for i in range(5) for w in "qk"
        }
        tiny = build_tiny(
            tmp_path / "tiny",
            prefix="decoder.blocks.{layer}.self_attn.",
            config={"model_type": "newlm", "architectures": ["NewLM"], "llm_config": text},
            extra=vision,
        )
        report = checked(run, tiny.path)
        assert {group["name"]: group["role"] for group in report["query_like"]} == {
            "vision.blocks.{layer}.attn.q_proj": "vision or audio",
            "decoder.blocks.{layer}.self_attn.q_proj": "language tower",
        }
        manifest = apply_draft(run, tiny.path)
        assert [edit["tensor"] for edit in manifest["edits"]] == ["decoder.blocks.1.self_attn.q_proj.weight"]
        assert manifest["model"]["num_key_value_heads"] == 2

    @pytest.mark.parametrize(
        ("word", "n_kv_heads", "rows"),
        [
            ("mix.wqkv", 2, RowLayout.grouped_qkv),
            ("mix.Wqkv", 2, RowLayout.qkv),
            ("mix.c_attn", 2, RowLayout.qkv),
            ("attention.query_key_value", 4, RowLayout.per_head_qkv),
        ],
    )
    def test_fused_rows_under_unknown_names(
        self, word: str, n_kv_heads: int, rows: RowLayout, run: Run, tmp_path: Path
    ) -> None:
        numbers = {"n_layer": 3, "n_embd": 24, "n_head": 4, "multi_query_group_num": n_kv_heads}
        source = write(
            tmp_path / "fused",
            {"model_type": "fusedlm", **numbers},
            layers({f"{word}.weight": ((4 + 2 * n_kv_heads) * 8, 24), "ln_1.weight": (24,)}),
        )
        manifest = apply_draft(run, source, "--fold-norm")
        assert manifest["model"]["rows"] == rows.value
        assert manifest["model"]["head_dim"] == 8  # nowhere in config.json

    def test_gated_queries_are_told_by_twice_the_rows(self, run: Run, tmp_path: Path) -> None:
        source = write(
            tmp_path / "gated",
            {"model_type": "gatedlm", **NUMBERS},
            layers({"attn.wq.weight": (64, 24), "attn.wk.weight": (16, 24)}),
        )
        assert apply_draft(run, source)["model"]["rows"] == "gated"

    @pytest.mark.parametrize(
        ("shapes", "kind", "over"),
        [
            ({"attn.q_norm.weight": (8,), "attn.k_norm.weight": (8,)}, NormKind.rms, NormSpan.head),
            (
                {
                    "attn.q_layernorm.weight": (8,),
                    "attn.q_layernorm.bias": (8,),
                    "attn.k_layernorm.weight": (8,),
                },
                NormKind.layer,
                NormSpan.head,
            ),
            (
                {"attn.query_norm.weight": (32,), "attn.key_norm.weight": (16,)},
                NormKind.rms,
                NormSpan.projection,
            ),
        ],
    )
    def test_norms_of_queries_and_keys(
        self, shapes: dict[str, tuple[int, ...]], kind: NormKind, over: NormSpan, run: Run, tmp_path: Path
    ) -> None:
        source = write(
            tmp_path / "normed",
            {"model_type": "normlm", "architectures": ["N"], **NUMBERS},
            layers({"attn.q_proj.weight": (32, 24), "attn.k_proj.weight": (16, 24), **shapes}),
        )
        manifest = apply_draft(run, source)
        assert [Path(name).name for name in manifest["edits"][0]["norms"]] == [
            f"net.h.1.{name}" for name in shapes if name.endswith("weight")
        ]
        names = parse_recipe(checked(run, source)["draft"].encode(), "draft").tensors
        assert names.norms is not None
        assert (names.norms.kind, names.norms.over, names.norms.plus_one) == (kind, over, False)

    def test_numbers_that_config_lacks_come_from_the_shapes(self, run: Run, tmp_path: Path) -> None:
        source = write(
            tmp_path / "bare",
            {"num_attention_heads": 4},
            layers({"attn.to_q.weight": (32, 24), "attn.to_k.weight": (32, 24)}),
        )
        manifest = apply_draft(run, source)
        assert manifest["model"]["num_hidden_layers"] == 3
        assert manifest["model"]["head_dim"] == 8

    def test_some_layers_only_and_layers_that_predict_further_tokens(self, run: Run, tmp_path: Path) -> None:
        shapes = {"q_proj.weight": (32, 24), "k_proj.weight": (16, 24)}
        source = write(
            tmp_path / "some",
            {"model_type": "somelm", **NUMBERS, "num_hidden_layers": 4, "num_nextn_predict_layers": 1},
            {f"h.{n}.{name}": shape for n in (1, 3, 4) for name, shape in shapes.items()},
        )
        draft = parse_recipe(checked(run, source)["draft"].encode(), "draft")
        assert (draft.tensors.every_layer, draft.tensors.mtp_layers) == (False, True)
        assert apply_draft(run, source)["edits"][0]["layer"] == 1

    def test_a_recipe_for_another_model_with_the_same_layout_is_offered(
        self, run: Run, tmp_path: Path
    ) -> None:
        tiny = build_tiny(
            tmp_path / "tiny", config={"model_type": "newlm", "architectures": ["NewLM"], **NUMBERS}
        )
        result = run("recipes", "check", tiny.path)
        assert result.exit_code == 3
        text = " ".join(result.stderr.split())
        assert "name it, the likeliest first: --recipe llama (RMSNorm before attention)" in text
        assert "no  model_type:        'newlm' is not llama" in result.stderr
        assert run("plan", tiny.path, "--recipe", "llama", "--layers", 1).exit_code == 0

    def test_latent_attention_gets_no_draft_but_the_reason(self, run: Run, tmp_path: Path) -> None:
        source = write(
            tmp_path / "mla",
            {"model_type": "mla", **NUMBERS},
            layers({"attn.q_proj.weight": (32, 24), "attn.kv_b_proj.weight": (16, 24)}),
        )
        result = run("recipes", "check", source)
        assert result.exit_code == 3
        assert "No draft of a recipe" in result.stdout
        assert "multi-head latent attention" in result.stdout

    @pytest.mark.parametrize(
        ("shapes", "told"),
        [
            ({"mixer.weight": (4, 4)}, "no tensor looks like a query projection"),
            ({"attn.q_proj.weight": (32, 24)}, "there is no net.h.0.attn.k_proj beside it"),
            ({"attn.c_attn.weight": (24, 64)}, "rows seem to be inputs"),
            ({"{x}.q_proj.weight": (32, 24)}, "names with braces"),
            ({f"x\0.{w}_proj.weight": (32, 24) for w in "qk"}, "a character that no recipe can"),
        ],
    )
    def test_where_nothing_can_be_guessed_the_reason_is_told(
        self, shapes: dict[str, tuple[int, ...]], told: str, run: Run, tmp_path: Path
    ) -> None:
        source = write(tmp_path / "none", {"model_type": "nonelm", **NUMBERS}, layers(shapes))
        report = checked(run, source)
        assert report["draft"] is None
        assert told in report["no_draft"]["what"]


class TestNorms:
    """Whatever is named like a norm of queries or keys is declared, refused, or told."""

    @pytest.mark.parametrize(
        ("query", "key"),
        [
            ("attn.q_norm.scale", "attn.k_norm.scale"),
            ("attn.query_layernorm.gamma", "attn.key_layernorm.gamma"),
            ("attn.norm_q.weight", "attn.norm_k.weight"),
            ("attn.q_ln.weight", "attn.k_ln.weight"),
            ("q_norm.weight", "k_norm.weight"),  # of the layer, not beside the queries
            ("attn.q_norm", "attn.k_norm"),
            ("attn.qk_layernorm.weight", "attn.qk_layernorm.weight"),
        ],
    )
    def test_by_any_name_they_are_declared(self, query: str, key: str, run: Run, tmp_path: Path) -> None:
        config = {"model_type": "normlm", **NUMBERS, "rms_norm_eps": 1e-6}
        source = write(tmp_path / "n", config, layers({**SEPARATE, query: (8,), key: (8,)}))
        manifest = apply_draft(run, source)
        assert manifest["edits"][0]["norms"] == [f"net.h.1.{query}", f"net.h.1.{key}"]
        assert findings(run, source)["norms"] == (True, f"{query}, {key}")

    @pytest.mark.parametrize(
        "extra",
        [
            {"attn.q_layernorm.norms.0.weight": (8,), "attn.k_layernorm.norms.0.weight": (8,)},  # StableLM 2
            {"attn.q_norm.weight": (8,)},
            {"q_norm.weight": (8,)},
        ],
    )
    def test_what_cannot_be_declared_is_refused(
        self, extra: dict[str, tuple[int, ...]], run: Run, tmp_path: Path
    ) -> None:
        source = write(tmp_path / "n", {"model_type": "n", **NUMBERS}, layers({**SEPARATE, **extra}))
        report = checked(run, source)
        assert report["draft"] is None
        assert "in a form that a recipe cannot declare" in report["no_draft"]["what"]
        assert report["no_draft"]["where"] in extra

    @pytest.mark.parametrize("sign", ["bias", "config"])
    def test_layer_norms_over_all_heads_are_refused(self, sign: str, run: Run, tmp_path: Path) -> None:
        shapes = {**SEPARATE, "attn.q_ln.weight": (32,), "attn.k_ln.weight": (16,)}
        config = {"model_type": "n", **NUMBERS}
        if sign == "bias":
            shapes["attn.q_ln.bias"] = (32,)
        else:
            config["layer_norm_epsilon"] = 1e-5
        report = checked(run, write(tmp_path / "n", config, layers(shapes)))
        assert report["draft"] is None
        assert "LayerNorms over all heads" in report["no_draft"]["what"]

    @pytest.mark.parametrize("name", ["net.h.1.cross.q_norm.weight", "net.q_norm.weight"])
    def test_those_of_others_are_told_and_not_called_none(self, name: str, run: Run, tmp_path: Path) -> None:
        source = write(tmp_path / "n", {"model_type": "n", **NUMBERS}, {**layers(SEPARATE), name: (8,)})
        short = name.removeprefix("net.h.1.")
        fits, found = findings(run, source)["norms"]
        assert fits is None
        assert f"{short} is stored and not declared" in found
        assert f" ?  norms:             {found}" in run("recipes", "check", source).stderr
        assert f"  # Stored and not declared: {short}\n" in checked(run, source)["draft"]

    def test_a_vision_tower_s_are_not_the_draft_s(self, run: Run, tmp_path: Path) -> None:
        vision = layers({"attn.q_norm.weight": (8,), "attn.q_proj.weight": (24, 24)}, 2, "visual.blocks.{}.")
        source = write(tmp_path / "n", {"model_type": "n", **NUMBERS}, {**layers(SEPARATE), **vision})
        assert findings(run, source)["norms"] == (True, "none of queries and keys")

    @pytest.mark.parametrize(("value", "plus_one", "speaks"), [(0.05, True, "true"), (1.1, False, "false")])
    def test_stored_gains_are_evidence(
        self, value: float, plus_one: bool, speaks: str, run: Run, tmp_path: Path
    ) -> None:
        shapes = {**SEPARATE, "attn.q_norm.weight": (8,), "attn.k_norm.weight": (8,)}
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            source = write(tmp_path / str(dtype), {"model_type": "n", **NUMBERS}, layers(shapes), dtype)
            fill(source, "norm", value)
            norms = drafted(run, source).tensors.norms
            assert norms is not None
            assert norms.plus_one is plus_one
            told = f"the median of what is stored is {value:.2g}, which speaks for {speaks}"
            assert told in checked(run, source)["draft"]

    @pytest.mark.parametrize(
        ("keys", "is_declared", "told"),
        [
            ({"rms_norm_eps": 1e-6}, True, ""),
            ({"norm_eps": 1e-6}, True, ""),
            ({"layer_norm_epsilon": 1e-5}, False, "may be a LayerNorm without bias, since config.json has\n"),
            ({"norm_type": "low_precision_layernorm"}, False, "# norm_type and nothing of RMSNorm"),
            ({"layernorm_epsilon": 1e-5, "rmsnorm": True}, True, ""),
        ],
    )
    def test_a_norm_before_attention_that_may_be_a_layer_norm_is_left_out(
        self, keys: dict[str, object], is_declared: bool, told: str, run: Run, tmp_path: Path
    ) -> None:
        shapes = {**SEPARATE, "norm_1.weight": (24,)}
        source = write(tmp_path / "mpt", {"model_type": "n", **NUMBERS, **keys}, layers(shapes))
        assert (drafted(run, source).tensors.input_norm is not None) is is_declared
        assert told in checked(run, source)["draft"]


class TestNearRecipes:
    """Which recipes for other models are named, and in what order."""

    @pytest.mark.parametrize(
        ("value", "first", "against"), [(1.0, "qwen3", "gemma3"), (0.0, "gemma3", "qwen3")]
    )
    def test_the_likeliest_comes_first_with_what_each_assumes(
        self, value: float, first: str, against: str, run: Run, tmp_path: Path
    ) -> None:
        names = {f"self_attn.{w}_proj.weight": shape for w, shape in (("q", (32, 24)), ("k", (16, 24)))}
        names |= {f"self_attn.{w}_norm.weight": (8,) for w in "qk"}
        source = write(
            tmp_path / "n",
            {"model_type": "newlm", "architectures": ["NewLM"], **NUMBERS, "rms_norm_eps": 1e-6},
            layers(names, prefix="model.layers.{}."),
        )
        fill(source, "norm", value)
        text = run("recipes", "check", source).stderr
        offered = [line.strip() for line in text.splitlines() if line.startswith("  --recipe ")]
        assert offered[0].startswith(f"--recipe {first}")
        assert "evidence" not in offered[0]
        assert ("stored gain + 1" if value == 0 else "plain gain") in offered[0]
        assert any(
            line.startswith(f"--recipe {against}") and "the evidence is against it" in line
            for line in offered
        )
        assert f"is {value:.2g}, which speaks {'for' if value == 0 else 'against'} gain + 1" in text
        layer_norm = [line for line in offered if "(LayerNorm" in line]
        assert all("the evidence is against it" in line for line in layer_norm)

    def test_kin_come_before_the_plain(self, run: Run, tmp_path: Path) -> None:
        tiny = build_tiny(
            tmp_path / "t", config={"model_type": "mistral9", "architectures": ["M"], **NUMBERS}
        )
        offered = [
            line
            for line in run("recipes", "check", tiny.path).stderr.splitlines()
            if line.startswith("  --recipe")
        ]
        assert offered[0].startswith("  --recipe mistral ")


class TestMessages:
    def test_layers_are_spoken_of_by_number_or_as_each(self, run: Run, tmp_path: Path) -> None:
        for gone in ({1}, {0, 2}):
            shapes = layers(SEPARATE)
            for n in gone:
                del shapes[f"net.h.{n}.attn.k_proj.weight"]
            tensors = {
                name.replace("net.h", "model.layers").replace("attn.", "self_attn."): s
                for name, s in shapes.items()
            }
            source = write(
                tmp_path / str(len(gone)),
                {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **NUMBERS},
                tensors,
            )
            text = run("recipes", "check", source).stdout
            assert "layer {layer}" not in text
            what = "layer 1 has a query weight" if gone == {1} else "each layer has a query weight"
            assert what in text

    def test_errors_list_recipes_near_by_and_not_all(self, run: Run) -> None:
        for arguments in (("lama",), ("check", "lama")):
            error = run("recipes", *arguments).stderr
            assert "near it: llama" in error
            assert len(error) < 400

    def test_a_recipe_that_fits_is_told_on_stdout(self, run: Run, tmp_path: Path) -> None:
        result = run("recipes", "check", build_tiny(tmp_path / "t").path)
        assert "Recipe llama fits" in result.stdout
        assert not result.stderr


def test_many_experts_are_left_out_and_nothing_of_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slim, "_MANY", 5)
    experts = {
        f"model.layers.{n}.mlp.experts.{e}.{w}_proj.weight": torch.ones(1)
        for n in range(3)
        for e in range(4)
        for w in ("up", "gate")
    }
    norms = {f"model.layers.{n}.self_attn.{w}_norm.weight": torch.ones(8) for n in range(3) for w in "qk"}
    whole = open_checkpoint(build_tiny(tmp_path / "t", extra={**experts, **norms}).path)
    small = slim.slim(whole)
    assert set(whole.tensors) - set(small.tensors) == set(experts)
    for recipe in shipped_recipes().values():
        assert examine(recipe, small).to_json() == examine(recipe, whole).to_json()
