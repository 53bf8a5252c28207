"""Checkpoints that qkpatch will not edit: each refused by name, with exit code 3, before OUT exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Tiny, build_tiny
from safetensors.torch import load_file, save_file

from qkpatch.errors import AmbiguousError
from qkpatch.model.choice import choose_recipe

Q = "model.layers.1.self_attn.q_proj"


def rewrite(tiny: Tiny, *, drop: tuple[str, ...] = (), add: dict[str, torch.Tensor] | None = None) -> None:
    path = tiny.path / "model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if n not in drop} | (add or {})
    save_file(tensors, path, {"format": "pt"})


def refusal(run, tiny: Tiny, tmp_path: Path, *options: object) -> str:
    """The message on stderr; also checks exit code 3, no traceback and that nothing was written."""
    out = tmp_path / "out"
    result = run("apply", tiny.path, "-o", out, "--modes", 2, *(options or ("--layers", "0-2")))
    assert result.exit_code == 3, result.output
    assert "Traceback" not in result.output
    assert not out.exists()
    assert list(tmp_path.glob(".out*")) == []
    return " ".join(result.stderr.split())


u8, i32 = (lambda *s: torch.zeros(s, dtype=torch.uint8)), (lambda *s: torch.zeros(s, dtype=torch.int32))
f32 = torch.zeros


@pytest.mark.parametrize(
    ("method", "stored"),
    [
        ("AWQ", {"qweight": i32(24, 4), "qzeros": i32(1, 4), "scales": f32(1, 32)}),
        ("GPTQ", {"qweight": i32(3, 32), "qzeros": i32(1, 4), "scales": f32(1, 32), "g_idx": i32(24)}),
        ("bitsandbytes 4-bit", {"weight": u8(384, 1), "weight.absmax": f32(12), "weight.quant_map": f32(16)}),
        ("bitsandbytes 8-bit", {"weight": torch.zeros(32, 24, dtype=torch.int8), "SCB": f32(32)}),
        ("FP8", {"weight": f32(32, 24).to(torch.float8_e4m3fn), "weight_scale_inv": f32(32, 3)}),
        ("compressed-tensors", {"weight_packed": i32(32, 3), "weight_scale": f32(32, 1)}),
        ("compressed-tensors NVFP4", {"weight_packed": u8(32, 12), "weight_global_scale": f32(1)}),
        (
            "compressed-tensors or ModelOpt",
            {"weight": f32(32, 24).to(torch.float8_e4m3fn), "weight_scale": f32(32, 3)},
        ),
        ("ModelOpt", {"weight": u8(32, 12), "weight_scale": f32(32, 2), "weight_scale_2": f32(1)}),
        (
            "MLX",
            {"weight": torch.zeros(32, 3, dtype=torch.uint32), "scales": f32(32, 1), "biases": f32(32, 1)},
        ),
        ("I8", {"weight": torch.zeros(32, 24, dtype=torch.int8)}),
    ],
)
def test_quantised_queries_are_refused_by_the_name_of_the_method(
    method: str, stored: dict[str, torch.Tensor], tiny: Tiny, run, tmp_path: Path
) -> None:
    rewrite(tiny, drop=(f"{Q}.weight",), add={f"{Q}.{name}": tensor for name, tensor in stored.items()})
    message = refusal(run, tiny, tmp_path)
    assert method in message
    assert Q in message
    assert "unquantised" in message


def test_a_wholly_quantised_checkpoint_is_refused_by_method_too(tiny: Tiny, run, tmp_path: Path) -> None:
    names = [tiny.name(layer, which) for layer in range(3) for which in "qk"]
    add = {n.replace(".weight", s): i32(4, 4) for n in names for s in (".qweight", ".qzeros", ".scales")}
    rewrite(tiny, drop=tuple(names), add=add)
    assert "AWQ" in refusal(run, tiny, tmp_path)


def test_float_queries_in_an_otherwise_quantised_checkpoint_are_edited(
    tiny: Tiny, run, tmp_path: Path
) -> None:
    v = tiny.name(1, "v").removesuffix(".weight")
    rewrite(
        tiny,
        drop=(f"{v}.weight",),
        add={f"{v}.qweight": i32(4, 4), f"{v}.qzeros": i32(4), f"{v}.scales": f32(4)},
    )
    result = run("apply", tiny.path, "-o", tmp_path / "out", "--layers", "1", "--modes", 2)
    assert result.exit_code == 0, result.output


def test_an_adapter_that_was_not_merged_is_refused(tiny: Tiny, run, tmp_path: Path) -> None:
    rewrite(tiny, drop=(f"{Q}.weight",), add={f"{Q}.base_layer.weight": f32(32, 24)})
    assert "merge the adapter" in refusal(run, tiny, tmp_path)


@pytest.mark.parametrize("known", [True, False], ids=["known model type", "unknown model type"])
def test_multi_head_latent_attention_is_refused_with_the_reason(
    known: bool, tiny: Tiny, run, tmp_path: Path
) -> None:
    mla = {f"model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight": f32(4, 24) for i in range(3)}
    rewrite(tiny, drop=tuple(tiny.name(i, "k") for i in range(3)), add=mla)
    if not known:
        (tiny.path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    assert "latent attention (MLA)" in refusal(run, tiny, tmp_path)


def test_a_layer_without_keys_of_its_own_is_refused_by_number(tiny: Tiny, run, tmp_path: Path) -> None:
    rewrite(tiny, drop=(tiny.name(1, "k"),))
    assert f"layer 1 has a query weight and no key weight {tiny.name(1, 'k')}" in refusal(run, tiny, tmp_path)


def test_a_layer_without_queries_is_refused_by_number(tiny: Tiny, run, tmp_path: Path) -> None:
    rewrite(tiny, drop=(tiny.name(1, "q"),))
    assert f"layer 1 has no {tiny.name(1, 'q')}" in refusal(run, tiny, tmp_path)


def test_a_shape_that_contradicts_the_config_is_refused_with_both_numbers(
    tiny: Tiny, run, tmp_path: Path
) -> None:
    config = json.loads((tiny.path / "config.json").read_text())
    (tiny.path / "config.json").write_text(json.dumps(config | {"head_dim": 6}))
    message = refusal(run, tiny, tmp_path)
    assert "stored as [32, 24]" in message
    assert "config.json says [24, 24]: 4 heads × head_dim 6" in message


def test_two_language_towers_are_ambiguous(tmp_path: Path, run) -> None:
    prefix = "language_model.model.layers.{layer}.self_attn."
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": {}}
    twin = {"model.language_model.layers.0.self_attn.q_proj.weight": f32(32, 24)}
    tiny = build_tiny(tmp_path / "two", prefix=prefix, config=config, extra=twin)
    assert "under 2 prefixes" in refusal(run, tiny, tmp_path)


def test_pickles_are_never_opened(tmp_path: Path, run, tiny: Tiny) -> None:
    (tiny.path / "model.safetensors").rename(tiny.path / "pytorch_model.bin")
    message = refusal(run, tiny, tmp_path)
    assert "only pickled weights: pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_no_weights_at_all(tmp_path: Path, run, tiny: Tiny) -> None:
    (tiny.path / "model.safetensors").unlink()
    assert "no .safetensors weights" in refusal(run, tiny, tmp_path)


def test_a_missing_config_is_named(tmp_path: Path, run, tiny: Tiny) -> None:
    (tiny.path / "config.json").unlink()
    assert "there is no config.json" in refusal(run, tiny, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": NaN', "\xff", "[" * 100_000])
def test_a_broken_config_is_named(text: str, tmp_path: Path, run, tiny: Tiny) -> None:
    (tiny.path / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refusal(run, tiny, tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path, run, tiny: Tiny) -> None:
    path = tiny.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    message = refusal(run, tiny, tmp_path)
    assert "model.safetensors" in message
    assert "download the file again" in message


def test_several_shards_without_an_index_are_ambiguous(tmp_path: Path, run, tiny: Tiny) -> None:
    (tiny.path / "model.safetensors").rename(tiny.path / "one.safetensors")
    save_file({"a": f32(1)}, tiny.path / "two.safetensors")
    assert "2 .safetensors files and no index" in refusal(run, tiny, tmp_path)


class TestIndex:
    """The index must agree with the headers about what is edited, and stay inside the directory."""

    @pytest.fixture
    def sharded(self, tmp_path: Path) -> Tiny:
        return build_tiny(tmp_path / "sharded", shards=[("q_proj",), ("",)])

    def edit(self, tiny: Tiny, change) -> None:
        path = tiny.path / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    def test_a_tensor_the_index_puts_elsewhere(self, sharded: Tiny, run, tmp_path: Path) -> None:
        self.edit(sharded, lambda m: m.update({sharded.name(0, "k"): "model-00001-of-00002.safetensors"}))
        message = refusal(run, sharded, tmp_path)
        assert "disagrees with the shards' headers" in message
        assert sharded.name(0, "k") in message

    def test_a_tensor_the_index_does_not_know(self, sharded: Tiny, run, tmp_path: Path) -> None:
        self.edit(sharded, lambda m: m.pop(sharded.name(0, "q")))
        assert "does not list it" in refusal(run, sharded, tmp_path)

    def test_a_query_that_the_index_names_and_no_shard_has(self, sharded: Tiny, run, tmp_path: Path) -> None:
        path = sharded.path / "model-00001-of-00002.safetensors"
        weights = load_file(path)
        del weights[sharded.name(0, "q")]
        save_file(weights, path, {"format": "pt"})
        assert f"layer 0 has no {sharded.name(0, 'q')}" in refusal(run, sharded, tmp_path)
        assert run("plan", sharded.path, "--layers", 1, "--modes", 2).exit_code == 0

    def test_a_shard_that_is_not_there(self, sharded: Tiny, run, tmp_path: Path) -> None:
        (sharded.path / "model-00002-of-00002.safetensors").unlink()
        assert "the index names 1 file(s) that are not there" in refusal(run, sharded, tmp_path)

    @pytest.mark.parametrize(
        "hostile", ["../other/model.safetensors", "/etc/passwd", "a/../b", "", "a\\b", ".", 7]
    )
    def test_a_path_that_leaves_the_directory(self, hostile, sharded: Tiny, run, tmp_path: Path) -> None:
        self.edit(sharded, lambda m: m.update({sharded.name(0, "q"): hostile}))
        assert "not a plain path inside the checkpoint" in refusal(run, sharded, tmp_path)

    def test_one_tensor_in_two_shards(self, sharded: Tiny, run, tmp_path: Path) -> None:
        path = sharded.path / "model-00001-of-00002.safetensors"
        save_file({**load_file(path), sharded.name(0, "k"): f32(16, 24)}, path, {"format": "pt"})
        assert "stored twice" in refusal(run, sharded, tmp_path)

    def test_a_key_that_appears_twice(self, sharded: Tiny, run, tmp_path: Path) -> None:
        path = sharded.path / "model.safetensors.index.json"
        name = f'"{sharded.name(0, "q")}": "model-00001-of-00002.safetensors"'
        path.write_text(path.read_text().replace(name, f"{name}, {name}"))
        assert "a key appears twice" in refusal(run, sharded, tmp_path)

    def test_a_stale_single_file_beside_the_index(self, sharded: Tiny, run, tmp_path: Path) -> None:
        save_file({"a": f32(1)}, sharded.path / "model.safetensors")
        assert "an edit of the shards would do nothing" in refusal(run, sharded, tmp_path)


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_the_weights_are_an_error(
    which: str, value: float, tiny: Tiny, run, tmp_path: Path
) -> None:
    name = tiny.name(1, which)
    weight = load_file(tiny.path / "model.safetensors")[name]
    weight[9, 3] = value
    rewrite(tiny, add={name: weight})
    message = refusal(run, tiny, tmp_path)
    assert "holds NaN or Inf" in message
    assert name in message


def test_an_edit_that_rounds_away_is_an_error_and_not_a_success(tiny: Tiny, run, tmp_path: Path) -> None:
    message = refusal(run, tiny, tmp_path, "--layers", "1", "--alpha", "0.9999999")
    assert "the edit leaves every value as it is" in message
    assert tiny.name(1, "q") in message


def test_an_edit_too_large_for_the_dtype_is_an_error(tmp_path: Path, run) -> None:
    # Keys of which one direction is nearly absent: the closed form divides by it, and float16 ends at 65504.
    tiny = build_tiny(tmp_path / "ill", n_heads=1, n_kv_heads=1, d_head=2, d_model=4, dtype=torch.float16)
    q = torch.tensor([[0, 0, 100.0, 0], [0, 1, 0, 0]], dtype=torch.float16)
    k = torch.tensor([[1.0, 1, 0, 0], [1, 1, 6e-8, 0]], dtype=torch.float16)
    rewrite(tiny, add={tiny.name(1, "q"): q, tiny.name(1, "k"): k})
    message = refusal(run, tiny, tmp_path, "--layers", "1", "--channel", "symmetric", "--alpha", "0")
    assert "does not fit in the stored dtype" in message


def test_the_names_of_mlx_are_named_before_a_recipe_is() -> None:
    names = ["language_model.model.layers.3.self_attn.q_proj.weight"]
    config = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    with pytest.raises(AmbiguousError) as caught:
        choose_recipe(config, names)
    assert "MLX saves such names" in str(caught.value.fix)


@pytest.mark.parametrize(("beside", "cure"), [("vision_tower.x", "restore its"), ("language_model.x", "MLX")])
def test_a_text_models_config_beside_the_weights_of_a_whole_model(beside: str, cure: str) -> None:
    names = ["language_model.model.layers.3.self_attn.q_proj.weight", beside]
    config = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    with pytest.raises(AmbiguousError) as caught:
        choose_recipe(config, names)
    assert cure in str(caught.value.fix)
