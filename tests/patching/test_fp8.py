"""Block FP8: rows are dequantised, edited and stored again, a block's scale grows only where it overflows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from qkpatch.spectral.fp8 import dequantise, requantise

H, K, D_HEAD, D_MODEL, BLOCK = 4, 2, 128, 192, (128, 128)
STEM = "model.layers.{}.self_attn.{}_proj."
NUMBERS = np.arange(256, dtype=np.uint8)
CODES = torch.from_numpy(NUMBERS).view(torch.float8_e4m3fn).double().numpy()
FINITE = np.unique(CODES[np.isfinite(CODES)])
Tensors = dict[str, torch.Tensor]


def nearest(x: np.ndarray) -> np.ndarray:
    """The nearest E4M3 number by search, ties to the even code, beyond the largest the largest."""
    at = np.clip(np.searchsorted(FINITE, x), 1, len(FINITE) - 1)
    low, high = FINITE[at - 1], FINITE[at]
    is_tie = (x - low) == (high - x)
    even = {value: code % 2 == 0 for code, value in enumerate(CODES)}
    low_is_even = np.vectorize(even.__getitem__)(low)
    return np.where(is_tie, np.where(low_is_even, low, high), np.where(x - low < high - x, low, high))


def quantise(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What DeepSeek's tools do: a scale per block, largest value to 448."""
    rows, columns = (-(-n // 128) for n in W.shape)
    scale = torch.empty(rows, columns)
    codes = torch.empty(W.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = W[at].abs().max() / 448
            codes[at] = (W[at] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


class TestCodec:
    """The arithmetic alone."""

    W = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))

    def test_dequantising_is_what_transformers_does(self) -> None:
        codes, scale = quantise(self.W)
        ours = dequantise(codes, scale, BLOCK)
        assert torch.equal(ours, _dequantize_fp8_weight(codes, scale, [128, 128], torch.float32))

    def test_what_is_stored_already_is_stored_as_it_was(self) -> None:
        codes, scale = quantise(self.W)
        again, same = requantise(dequantise(codes, scale.double(), BLOCK), scale.double(), BLOCK)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(same, scale.double())

    def test_each_value_goes_to_the_nearest_number_in_one_rounding(self) -> None:
        middle = (FINITE[1:] + FINITE[:-1]) / 2
        x = np.concatenate(
            [FINITE, middle, np.nextafter(middle, 9e9), np.nextafter(middle, -9e9), [460.0, 464.0]]
        )
        W = torch.zeros(128, 128, dtype=torch.float64)
        W.view(-1)[: len(x)] = torch.from_numpy(x)
        codes, scale = requantise(W, torch.ones(1, 1, dtype=torch.float64), BLOCK)
        assert scale.item() == 1.0
        assert np.array_equal(codes.double().view(-1)[: len(x)].numpy(), nearest(x))

    @pytest.mark.parametrize(
        ("largest", "growth"), [(464.0, 1), (464.1, 2), (900.0, 2), (929.0, 4), (7000.0, 16)]
    )
    def test_only_the_block_that_overflows_grows_and_keeps_its_other_values(
        self, largest: float, growth: int
    ) -> None:
        codes, scale = quantise(self.W)
        scale = scale.double()
        W = dequantise(codes, scale, BLOCK)
        edited = W.clone()
        edited[130, 5] = -largest * scale[1, 0]
        new_codes, new_scale = requantise(edited, scale, BLOCK)
        assert (new_scale / scale).tolist() == [[1, 1], [growth, 1]]
        kept = dequantise(new_codes, new_scale, BLOCK)
        others = torch.ones_like(W, dtype=torch.bool)
        others[130, 5] = False
        smallest = growth * scale[1, 0] * 2.0**-6  # under it codes are subnormal
        exact = others & (W.abs() >= smallest)
        assert torch.equal(kept[exact], W[exact])
        assert (kept - W)[others].abs().max() <= smallest / 16
        assert abs(kept[130, 5] / edited[130, 5] - 1) < 2.0**-4


def build(path: Path, scales: torch.dtype = torch.float32, apart: bool = False) -> Tensors:
    """A llama of three layers whose projections are in block FP8; layer 0 is in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    for layer in range(3):
        for which, heads in (("q", H), ("k", K)):
            name = STEM.format(layer, which)
            W = torch.randn(heads * D_HEAD, D_MODEL, generator=generator) / 14
            # One direction that all rows share, so that removing it moves them.
            W += torch.outer(torch.randn(len(W), generator=generator), torch.linspace(-0.3, 0.3, D_MODEL))
            if layer == 0:
                tensors[name + "weight"] = W.to(torch.bfloat16)
                continue
            codes, scale = quantise(W)
            if scales == torch.uint8:
                exponents = scale.log2().ceil()
                codes = (W / expand(exponents.exp2())).to(torch.float8_e4m3fn)
                scale = (exponents + 127).to(torch.uint8)
            tensors[name + "weight"], tensors[name + "weight_scale_inv"] = codes, scale.to(scales)
    path.mkdir()
    is_scale = {name: name.endswith("_scale_inv") and apart for name in tensors}
    shards = {"model-00001-of-00002.safetensors": False, "model-00002-of-00002.safetensors": True}
    weight_map = {}
    for shard, holds_scales in shards.items():
        held = {n: t for n, t in tensors.items() if is_scale[n] == holds_scales}
        if scales == torch.uint8:
            held = {n: t.view(torch.float8_e8m0fnu) if n.endswith("inv") else t for n, t in held.items()}
        save_file(held or {"model.norm.weight": torch.ones(D_MODEL)}, path / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(held or {"model.norm.weight": 0}, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3, "hidden_size": D_MODEL,
        "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D_HEAD,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return tensors


def expand(scale: torch.Tensor) -> torch.Tensor:
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :D_MODEL]


def read(path: Path, which: str, layer: int = 1) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """A projection's values (heads, d_head, d_model), its codes and its scales as float64."""
    held = {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}
    name = STEM.format(layer, which)
    codes, scale = held[name + "weight"], held[name + "weight_scale_inv"]
    if scale.dtype == torch.float8_e8m0fnu:
        scale = (scale.view(torch.uint8).double() - 127).exp2()
    values = codes.double() * expand(scale.double())
    return values.view(-1, D_HEAD, D_MODEL).numpy(), codes, scale.double()


@pytest.mark.parametrize(
    "scales", [torch.float32, torch.bfloat16, torch.uint8], ids=["F32", "BF16", "F8_E8M0"]
)
@pytest.mark.parametrize("apart", [False, True], ids=["one shard", "scales in another shard"])
def test_the_edit_is_made_on_the_values_and_stored_in_the_nearest_codes(
    scales: torch.dtype, apart: bool, run: Callable[..., Any], tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    build(source, scales, apart)
    chosen = (0, 1, 3)
    result = run(
        "apply", source, "--layers", "0-1", "--heads", "0-1,3", "--modes", 2, "--alpha", 0, "-o", out
    )
    assert result.exit_code == 0, result.output
    assert "requantisation" in result.stdout
    assert run("verify", out, "--source", source).exit_code == 0

    Q, codes, scale = read(source, "q")
    keys, key_codes, key_scale = read(source, "k")
    Q_after, codes_after, scale_after = read(out, "q")
    _, key_codes_after, key_scale_after = read(out, "k")
    assert torch.equal(key_codes.view(torch.uint8), key_codes_after.view(torch.uint8))
    assert torch.equal(key_scale, key_scale_after)
    growth = scale_after / scale
    assert set(growth.unique().tolist()) <= {1.0, 2.0}
    assert growth[2].tolist() == [1.0, 1.0]  # head 2 stays as it is
    assert torch.equal(codes.view(torch.uint8)[256:384], codes_after.view(torch.uint8)[256:384])
    for h in chosen:
        W_K = keys[h * K // H]
        exact = oracle.edit(Q[h], W_K, "full", (0, 1), 0.0, oracle.decompose(Q[h], W_K, "full")).W_Q
        unit = expand(scale_after)[128 * h : 128 * h + 128].numpy()
        # A value on the edge between two numbers may go either way: the oracle's last bits are its own.
        expected, margin = nearest(exact / unit), 1e-9
        is_close = (Q_after[h] / unit == expected) | (nearest(exact / unit * (1 + margin)) != expected)
        assert (is_close | (nearest(exact / unit * (1 - margin)) != expected)).all()
        assert np.abs(exact / unit).max() <= 464

    manifest = json.loads((out / "qkpatch.json").read_text())
    plain, fp8 = manifest["edits"]
    assert plain["scale_tensor"] is None
    assert max(head["rounding_error"] for head in plain["heads"]) < 0.02
    assert fp8["scale_tensor"] == STEM.format(1, "q") + "weight_scale_inv"
    assert (fp8["scale_sha256_before"] == fp8["scale_sha256_after"]) == bool((growth == 1).all())
    for head in fp8["heads"]:
        h = head["head"]
        W_K = keys[h * K // H]
        exact = oracle.edit(Q[h], W_K, "full", (0, 1), 0.0, oracle.decompose(Q[h], W_K, "full")).W_Q
        expected = np.linalg.norm(Q_after[h] - exact) / np.linalg.norm(exact - Q[h])
        assert head["rounding_error"] == pytest.approx(expected, rel=1e-6)
        assert head["values_after"][0] == pytest.approx(np.linalg.norm(Q_after[h].T @ W_K, 2), rel=1e-6)


def test_a_block_that_overflows_gets_a_larger_scale(run: Callable[..., Any], tmp_path: Path) -> None:
    """All queries read the mean of the input; column 7 works against it, and is larger once that is taken away."""
    source, out = tmp_path / "source", tmp_path / "out"
    tensors = build(source)
    generator = torch.Generator().manual_seed(2)
    for which, heads in (("q", H), ("k", K)):
        W = torch.outer(torch.randn(heads * D_HEAD, generator=generator), torch.ones(D_MODEL))
        W[:, 7] *= -0.9
        W += torch.randn(W.shape, generator=generator) / 100
        name = STEM.format(1, which)
        tensors[name + "weight"], tensors[name + "weight_scale_inv"] = quantise(W)
    save_file(tensors, source / "model-00001-of-00002.safetensors", {"format": "pt"})
    result = run("apply", source, "--layers", 1, "--modes", 1, "--alpha", 0, "-o", out)
    assert result.exit_code == 0, result.output
    scale, scale_after = read(source, "q")[2], read(out, "q")[2]
    assert (scale_after / scale).max() == 2.0
    assert run("verify", out, "--source", source).exit_code == 0
    edit = json.loads((out / "qkpatch.json").read_text())["edits"][0]
    assert edit["scale_sha256_before"] != edit["scale_sha256_after"]

    # verify looks at scales too
    shard = out / "model-00001-of-00002.safetensors"
    changed = load_file(shard)
    changed[STEM.format(2, "q") + "weight_scale_inv"] *= 2
    save_file(changed, shard, {"format": "pt"})
    result = run("verify", out, "--source", source)
    assert result.exit_code == 1
    assert "weight_scale_inv" in result.stdout


def replace_tensors(source: Path, **changes: torch.Tensor) -> None:
    shard = source / "model-00001-of-00002.safetensors"
    held = load_file(shard) | {STEM.format(1, n[0]) + n[2:]: t for n, t in changes.items()}
    save_file(held, shard, {"format": "pt"})


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor(0.5), "quantised with block FP8: stored as weight, weight_scale_inv"),
        (torch.ones(512, 1), "quantised with block FP8"),
        (torch.ones(8, 3), "quantised with block FP8"),
        (torch.ones(4, 2, dtype=torch.int32), "quantised with block FP8"),
    ],
)
def test_other_scales_than_those_of_blocks_are_refused(
    scale: torch.Tensor, message: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    build(source)
    replace_tensors(source, q_weight_scale_inv=scale)
    result = run("plan", source, "--layers", 1)
    assert result.exit_code == 3
    assert message in result.stderr


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused_and_nothing_is_left(
    bad: float, run: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    tensors = build(source)
    scale = tensors[STEM.format(1, "k") + "weight_scale_inv"].clone()
    scale[1, 0] = bad
    replace_tensors(source, k_weight_scale_inv=scale)
    result = run("apply", source, "--layers", 1, "--heads", 3, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert "k_proj.weight_scale_inv" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_heads_that_share_a_block_are_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4})
    )
    result = run("plan", source, "--layers", 1)
    assert result.exit_code == 3
    assert "a block would hold rows of several heads" in result.stderr


def test_a_small_edit_that_drowns_in_rounding_is_a_warning(run: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(source)
    result = run("apply", source, "--layers", "0-1", "--modes", 1, "--alpha", 0.95, "-o", tmp_path / "out")
    assert "rounding to F8_E4M3 adds noise" in result.stderr
    assert "in 1 tensor(s)" in result.stderr


def test_transformers_loads_the_values_that_were_stored(run: Callable[..., Any], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    d_model = 256  # whole blocks only: its loader takes a cut block for a narrow one
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=d_model, num_hidden_layers=2, num_attention_heads=H, num_key_value_heads=K, head_dim=D_HEAD,
        intermediate_size=256, vocab_size=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    held = {}
    for name, W in load_file(source / "model.safetensors").items():
        is_linear = name.endswith("_proj.weight")
        held |= (
            dict(zip([name, f"{name}_scale_inv"], quantise(W.float()), strict=True))
            if is_linear
            else {name: W}
        )
    save_file(held, source / "model.safetensors", {"format": "pt"})
    document = json.loads((source / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (source / "config.json").write_text(json.dumps({**document, "quantization_config": fp8}))
    assert run("apply", source, "--layers", 1, "--modes", 2, "-o", out).exit_code == 0
    loaded, report = LlamaForCausalLM.from_pretrained(
        out, quantization_config=FineGrainedFP8Config(dequantize=True), output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    W_Q = loaded.model.layers[1].self_attn.q_proj.weight.detach().double().numpy()
    stored, before = (load_file(path / "model.safetensors") for path in (out, source))
    name = STEM.format(1, "q") + "weight"
    values, old = (
        dequantise(t[name], t[name + "_scale_inv"].double(), BLOCK).numpy() for t in (stored, before)
    )
    assert oracle.ulps(W_Q, oracle.round_to(values, "BF16"), "BF16") <= 1
    assert not np.allclose(values, old)


def test_queries_alone_may_be_quantised(run: Callable[..., Any], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    build(source)
    shard = source / "model-00001-of-00002.safetensors"
    held = load_file(shard)
    scale = held.pop(STEM.format(1, "k") + "weight_scale_inv")
    held[STEM.format(1, "k") + "weight"] = (held[STEM.format(1, "k") + "weight"].float() * expand(scale)).to(
        torch.bfloat16
    )
    save_file(held, shard, {"format": "pt"})
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"][STEM.format(1, "k") + "weight_scale_inv"]
    index.write_text(json.dumps(document))
    assert run("apply", source, "--layers", 1, "--modes", 2, "-o", out).exit_code == 0
    assert run("verify", out, "--source", source).exit_code == 0
    assert run("inspect", out, "--layers", 1).exit_code == 0
