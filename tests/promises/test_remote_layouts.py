"""Families whose modelling code is not in transformers, and what no tiny model shows, by hand-built checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import families_special
import numpy as np
import oracle
import pytest
import remote_families
import remote_served
import torch
import transformers
from kinds import first_of_each
from remote_families import COUNTS, D_HEAD, FUSED_ROWS, PUBLISHED, WIDE, H, K, Remote, Tensors
from safetensors.torch import load_file, save_file

from qkpatch.checkpoint.header import TensorRef
from qkpatch.model.tower import read_tower
from qkpatch.recipes.catalogue import get_recipe, shipped_recipes
from qkpatch.recipes.heads import HeadLayout, RowLayout

CASES = {**remote_families.CASES, **remote_served.CASES}
REMOTE = remote_families.REMOTE | remote_served.REMOTE
LAYER = 1  # the one that is edited


def way(name: str) -> tuple[object, ...]:
    """How a family stores queries and keys."""
    case = CASES[name]
    return case.split.__module__, case.split.__qualname__, bool(case.decoys), case.attention is None


def recipe_of(name: str) -> str:
    return name.partition(":")[0]


def build(case: Remote) -> Tensors:
    """Random weights; gains that matter, since all ones would hide a wrong or forgotten one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        case.stem.format(i) + name: shape
        for i in range(COUNTS["num_hidden_layers"])
        for name, shape in case.shapes.items()
    }
    shapes |= dict.fromkeys(case.decoys, (H * D_HEAD, 24))
    return {
        name: (
            torch.rand(shape, generator=generator) + 0.5
            if "norm" in name and name not in case.decoys
            else torch.randn(shape, generator=generator)
        ).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def write(path: Path, config: dict[str, object], tensors: Tensors, *, shards: int = 1) -> Path:
    """A checkpoint whose tensors are dealt out to the shards in turn."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, path / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def read_all(path: Path) -> Tensors:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_every_remote_family_has_a_case_and_says_what_it_is_tested_on() -> None:
    """Others have a transformers class, and classes of remote code besides."""
    tested = {recipe_of(name): shipped_recipes()[recipe_of(name)].tested for name in CASES}
    assert {name for name, on_what in tested.items() if on_what == "documented layout"} == REMOTE


@pytest.mark.parametrize("name", first_of_each(CASES, way))
def test_a_remote_family_is_edited_in_its_query_rows_and_nowhere_else(name: str, run, tmp_path: Path) -> None:
    case, before = CASES[name], build(CASES[name])
    source, out = write(tmp_path / "source", case.config, before, shards=3), tmp_path / "out"
    chosen = [] if case.attention is None else ["--attention", case.attention]
    result = run("apply", source, "--layers", LAYER, "--modes", 2, "--alpha", 0, "-o", out, *chosen)
    assert result.exit_code == 0, result.output
    assert f"recipe {recipe_of(name)}," in result.stdout
    assert run("verify", out, "--source", source).exit_code == 0

    after, stem = read_all(out), case.stem.format(LAYER)
    assert set(after) == set(before)
    assert [n for n in before if not torch.equal(before[n], after[n])] == [stem + case.query]
    old, new = case.split(before, stem), case.split(after, stem)
    assert len(old.queries) == len(old.keys) == H
    assert torch.equal(old.keys, new.keys)
    assert old.rest is None or torch.equal(old.rest, new.rest)
    for h in range(H):
        W_Q, W_K = old.queries[h].double().numpy(), old.keys[h].double().numpy()
        edited = new.queries[h].double().numpy()
        expected = oracle.edit(W_Q, W_K, "full", (0, 1), 0.0, oracle.decompose(W_Q, W_K, "full")).W_Q
        assert oracle.ulps(edited, oracle.round_to(expected, "BF16"), "BF16") <= 1
        others = old.keys[(h + H // 2) % H].double().numpy()  # of another group
        wrong = oracle.edit(W_Q, others, "full", (0, 1), 0.0).W_Q
        assert not np.allclose(edited, wrong, rtol=0.05)


@pytest.mark.parametrize(
    "name", first_of_each((n for n in CASES if get_recipe(recipe_of(n)).tensors.input_norm is not None), way)
)
def test_the_norm_before_attention_is_where_the_recipe_says(name: str, run, tmp_path: Path) -> None:
    case, chosen = CASES[name], ["--layers", LAYER, "--modes", 2, "--alpha", 0, "--fold-norm"]
    source = write(tmp_path / "source", case.config, build(case))
    result = run("apply", source, *chosen, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "qkpatch.json").read_text())
    assert manifest["edit"]["fold_norm"] is True


@pytest.mark.parametrize(("recipe", "config", "numbers"), PUBLISHED)
def test_published_configs_and_class_defaults_come_to_the_models_numbers(
    recipe: str, config: dict[str, object], numbers: tuple[int, ...]
) -> None:
    tower = read_tower(get_recipe(recipe), config)
    layout = tower.layout
    found = (tower.n_layers, layout.n_heads, layout.n_kv_heads, layout.d_head, layout.d_model)
    assert found == numbers


def test_gemma_2s_logit_cap_is_recorded_with_ovis() -> None:
    case = CASES["ovis:1.6"]
    tower = read_tower(get_recipe("ovis"), case.config)
    assert tower.logits["attn_logit_softcapping"] == 50.0
    assert "attn_logit_softcapping" not in read_tower(get_recipe("ovis"), CASES["ovis:2"].config).logits


def test_internvl_whose_config_names_another_language_model_is_refused(run, tmp_path: Path) -> None:
    case = CASES["internvl-internlm2"]
    llm_config = case.config["llm_config"]
    assert isinstance(llm_config, dict)
    config = {**case.config, "llm_config": {**llm_config, "model_type": "qwen2"}}
    result = run("plan", write(tmp_path / "qwen2", config, build(case)))
    assert result.exit_code == 3
    assert "knows the language models internlm2, not 'qwen2'" in result.stderr


@pytest.mark.parametrize("name", ["minicpm-v:2.6", "internvl-chat:qwen2", "molmo:7B-D"])
def test_optional_norms_are_stored_in_all_layers_or_in_none(name: str, run, tmp_path: Path) -> None:
    case, norms = CASES[name], get_recipe(recipe_of(name)).tensors.norms
    assert norms is not None
    shapes = {norms.query: D_HEAD, norms.key: D_HEAD}
    if name.startswith("molmo"):
        shapes = {norms.query: H * D_HEAD, norms.key: K * D_HEAD}
    stray = {case.stem.format(0) + norm: torch.ones(size) for norm, size in shapes.items()}
    source = write(tmp_path / "some", case.config, {**build(case), **stray})
    result = run("plan", source, "--layers", LAYER)
    assert result.exit_code == 3
    assert "2 norms of queries and keys, and" in result.stderr


def test_both_experts_of_cogvlm2_are_edited_when_asked_for(run, tmp_path: Path) -> None:
    case, before = CASES["cogvlm2"], build(CASES["cogvlm2"])
    source, out = write(tmp_path / "source", case.config, before), tmp_path / "out"
    both = ["--attention", "language,vision"]
    result = run("apply", source, "--layers", LAYER, "--modes", 2, "--alpha", 0, "-o", out, *both)
    assert result.exit_code == 0, result.output
    after = read_all(out)
    stem = case.stem.format(LAYER) + "self_attn."
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        f"{stem}{expert}_expert_query_key_value.weight" for expert in ("language", "vision")
    }


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        # CogVLM 1 stores as many key heads as query heads and has no key that says so.
        ("cogvlm2", {"num_multi_query_heads": None}, [FUSED_ROWS, 3 * WIDE]),
        # Without multi_query_attention ChatGLM stores [query, key, value] per head, and no number of groups.
        (
            "glm-4v-9b",
            {"multi_query_attention": False, "multi_query_group_num": 1},
            [FUSED_ROWS, (H + 2) * D_HEAD],
        ),
    ],
)
def test_fused_rows_that_config_json_contradicts_are_refused(
    name: str, changes: dict[str, object], expected: list[int], run, tmp_path: Path
) -> None:
    case = CASES[name]
    source = write(tmp_path / "source", {**case.config, **changes}, build(case))
    result = run("plan", source, "--layers", LAYER)
    assert result.exit_code == 3
    stored, said = expected
    assert f"stored as [{stored}, " in result.stderr
    assert f"config.json says [{said}, " in result.stderr


@pytest.mark.parametrize(
    ("model_type", "architecture", "section", "stem", "query"),
    [
        (
            "deepseek_vl_v2",
            "DeepseekVLV2ForCausalLM",
            "language_config",
            "language.model.layers.{}.",
            "q_proj",
        ),
        (
            "deepseek_vl_v2",
            "DeepseekVLV2ForCausalLM",
            "language_config",
            "language.model.layers.{}.",
            "q_b_proj",
        ),
        (
            "kimi_vl",
            "KimiVLForConditionalGeneration",
            "text_config",
            "language_model.model.layers.{}.",
            "q_proj",
        ),
    ],
)
def test_multi_head_latent_attention_is_refused(
    model_type: str, architecture: str, section: str, stem: str, query: str, run, tmp_path: Path
) -> None:
    counts = {**COUNTS, "hidden_size": 48, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    config = {"model_type": model_type, "architectures": [architecture], section: counts}
    tensors = {
        f"{stem.format(i)}self_attn.{name}.weight": torch.randn(shape)
        for i in range(COUNTS["num_hidden_layers"])
        for name, shape in {
            query: (H * 12, 48), "kv_a_proj_with_mqa": (20, 48), "kv_b_proj": (H * 16, 16)
        }.items()
    }  # fmt: skip
    result = run("plan", write(tmp_path / "mla", config, tensors), "--layers", LAYER)
    assert result.exit_code == 3
    assert "multi-head latent attention (MLA)" in result.stderr


def test_moondream_3_is_refused(run, tmp_path: Path) -> None:
    """Its config.json is Moondream 2's; its temperature depends on the very rows that would be edited."""
    case = CASES["moondream2"]
    tau = {
        f"{case.stem.format(i)}attn.tau.{which}": torch.randn(H, FUSED_ROWS)
        for i in range(COUNTS["num_hidden_layers"])
        for which in ("wq", "wv")
    }
    source = write(tmp_path / "moondream3", case.config, {**build(case), **tau})
    result = run("plan", source, "--layers", LAYER)
    assert result.exit_code == 3
    assert "attn.tau" in result.stderr


def test_original_llava_as_pickles_is_refused_with_the_way_out(run, tmp_path: Path) -> None:
    source = write(tmp_path / "llava", CASES["llava-original:1.5"].config, build(CASES["llava-original:1.5"]))
    (source / "model.safetensors").rename(source / "pytorch_model-00001-of-00002.bin")
    result = run("plan", source)
    assert result.exit_code != 0
    assert "only pickled weights: pytorch_model-00001-of-00002.bin" in result.stderr
    assert "save_pretrained" in result.stderr


@pytest.mark.parametrize(
    ("recipe", "extra"),
    [
        ("glm4v-moe", "model.language_model.layers.{}.self_attn."),  # numbered past the last layer
        ("qwen3.5", "mtp.layers.0.self_attn."),  # a tree of its own
    ],
)
def test_multi_token_prediction_layers_are_left_alone(recipe: str, extra: str, run, tmp_path: Path) -> None:
    case = families_special.CASES[recipe]
    torch.manual_seed(0)
    source, out = tmp_path / "source", tmp_path / "out"
    model = getattr(transformers, case.model_class)(case.config())
    n_layers = model.config.text_config.num_hidden_layers
    model.to(torch.bfloat16).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    last = f"model.language_model.layers.{n_layers - 1}.self_attn."
    copies = {n.replace(last, extra.format(n_layers)): t.clone() for n, t in tensors.items() if last in n}
    assert extra.format(n_layers) + "q_proj.weight" in copies
    before = {**tensors, **copies}
    save_file(before, source / "model.safetensors", {"format": "pt"})

    result = run("plan", source, "--layers", n_layers)
    assert result.exit_code == 2
    assert f"layer {n_layers} is out of range" in result.stderr
    result = run("apply", source, "--layers", f"0-{n_layers - 1}", "--modes", 2, "--alpha", 0, "-o", out)
    assert result.exit_code == 0, result.output
    after = load_file(out / "model.safetensors")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert changed.isdisjoint(copies)


def test_qwen3_5_norms_the_rows_that_the_gated_layout_calls_queries() -> None:
    """What the module's own forward hands to its query norm, head by head, and what the norm's gain is."""
    case = families_special.CASES["qwen3.5"]
    torch.manual_seed(0)
    model = getattr(transformers, case.model_class)(case.config()).float()
    attention = model.model.language_model.layers[1].self_attn
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data.uniform_(0.5, 1.5)
    seen: dict[str, torch.Tensor] = {}
    attention.q_proj.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0]))
    for which in "qk":
        getattr(attention, f"{which}_norm").register_forward_hook(
            lambda _, inputs, output, which=which: seen.update({which: inputs[0], f"{which} normed": output})
        )
    with torch.no_grad():
        model(input_ids=torch.arange(4, 12)[None])

    W_Q, W_K = attention.q_proj.weight.detach(), attention.k_proj.weight.detach()
    layout = HeadLayout(families_special.H, 2, 16, W_Q.shape[1], RowLayout.gated)
    for which, W, n_heads, place in (
        ("q", W_Q, layout.n_heads, layout.query_range),
        ("k", W_K, layout.n_kv_heads, layout.key_range),
    ):
        assert W.shape == (layout.query_shape if which == "q" else layout.key_shape)
        ref = TensorRef(which, "s", "F32", tuple(W.shape), 0, W.numel() * 4)
        gain = 1 + getattr(attention, f"{which}_norm").weight.detach()
        for h in range(n_heads):
            first, last = (at // (4 * W.shape[1]) for at in place(ref, h))
            projected = seen["x"] @ W[first:last].T
            assert torch.allclose(seen[which][..., h, :], projected, atol=1e-5)
            rms = projected.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
            assert torch.allclose(seen[f"{which} normed"][..., h, :], projected / rms * gain, atol=1e-4)
