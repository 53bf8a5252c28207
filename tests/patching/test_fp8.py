"""FP8: rows are dequantised, edited and stored again, a scale grows only where its block or row overflows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

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

    def theirs(self, codes: torch.Tensor, scale: torch.Tensor, block: list[int] | None) -> torch.Tensor:
        # Older ones import triton here, and others take what this file builds.
        from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

        return _dequantize_fp8_weight(codes, scale, block, torch.float32)

    def test_dequantising_is_what_transformers_does(self) -> None:
        codes, scale = quantise(self.W)
        ours = dequantise(codes, scale, BLOCK)
        assert torch.equal(ours, self.theirs(codes, scale, [128, 128]))

    @pytest.mark.parametrize("shape", [(), (256, 1)], ids=["tensor", "rows"])
    def test_one_scale_to_a_tensor_or_a_row_is_what_transformers_multiplies_by(
        self, shape: tuple[int, ...]
    ) -> None:
        codes, scale = self.W.to(torch.float8_e4m3fn), torch.rand(shape) + 0.5
        block = (1, 192) if shape else (256, 192)
        ours = dequantise(codes, scale.view(-1, 1), block)
        assert torch.equal(ours, self.theirs(codes, scale, None))
        again, same = requantise(ours.double(), scale.view(-1, 1).double(), block)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(same, scale.view(-1, 1).double())

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
        (torch.tensor(0.5), "quantised with FP8: stored as weight, weight_scale_inv"),
        (torch.ones(512, 1), "quantised with FP8"),
        (torch.ones(8, 3), "quantised with FP8"),
        (torch.ones(4, 2, dtype=torch.int32), "quantised with FP8"),
    ],
)
def test_other_scales_than_those_that_the_config_names_are_refused(
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
    config = transformers.LlamaConfig(
        hidden_size=d_model, num_hidden_layers=2, num_attention_heads=H, num_key_value_heads=K, head_dim=D_HEAD,
        intermediate_size=256, vocab_size=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
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
    how = transformers.FineGrainedFP8Config(dequantize=True)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(
        out, quantization_config=how, output_loading_info=True
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


# -------- one scale to a row, or to the tensor

FP8 = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}  # fmt: skip
# How it is published: the scale's name and shape, what config.json says, what else lies beside.
FORMS = {
    "Ministral": ("weight_scale_inv", (), FP8, "activation_scale"),
    "compressed-tensors, tensor": ("weight_scale", (1,), COMPRESSED, None),
    "ModelOpt": ("weight_scale", (), {"quant_method": "modelopt", "quant_algo": "FP8"}, "input_scale"),
    "compressed-tensors, channel": ("weight_scale", (-1, 1), COMPRESSED, None),
    "FBGEMM": ("weight_scale", (-1,), {"quant_method": "fbgemm_fp8"}, "input_scale"),
}


def build_in(
    form: str, path: Path, scales: torch.dtype, made_of: Callable[..., torch.Tensor] = torch.Tensor.clone
) -> None:
    """:func:`build` with its layers 1 and 2 in another form."""
    tensors = build(path)
    name, shape, quantization, beside = FORMS[form]
    for layer in (1, 2):
        for which in "qk":
            stem = STEM.format(layer, which)
            W = made_of(tensors.pop(stem + "weight").float() * expand(tensors.pop(stem + "weight_scale_inv")))
            by_row = W.abs().amax(1, keepdim=True)
            scale = ((by_row if -1 in shape else by_row.max()) / 448).to(scales)
            tensors[stem + "weight"] = (W / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[stem + name] = scale.reshape(shape)
            if beside is not None:
                tensors[stem + beside] = torch.tensor(0.5, dtype=torch.bfloat16)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def against(W: torch.Tensor) -> torch.Tensor:
    """Rows that all read the mean of the input; one in each head has one number against it, which grows without it."""
    W = 1 + W / 100
    W[5::D_HEAD, 7] = -1.2
    return W


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


def read_in(form: str, path: Path, which: str) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Values (heads, d_head, d_model), codes, and what one code is worth in each row."""
    held, stem = load_file(path / "model.safetensors"), STEM.format(1, which)
    codes = held[stem + "weight"]
    unit = held[stem + FORMS[form][0]].double().reshape(-1, 1).expand(len(codes), 1).numpy()
    values = codes.double().numpy() * unit
    return values.reshape(-1, D_HEAD, D_MODEL), codes.view(torch.uint8), unit.reshape(-1, D_HEAD, 1)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("form", FORMS)
def test_each_published_form_is_edited_on_its_values(
    form: str, scales: torch.dtype, run: Callable[..., Any], tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    build_in(form, source, scales)
    result = run(
        "apply", source, "--layers", "0-1", "--heads", "0-1,3", "--modes", 2, "--alpha", 0, "-o", out
    )
    assert result.exit_code == 0, result.output
    assert run("verify", out, "--source", source).exit_code == 0
    Q, codes, unit = read_in(form, source, "q")
    keys, key_codes, _ = read_in(form, source, "k")
    Q_after, codes_after, unit_after = read_in(form, out, "q")
    assert torch.equal(read_in(form, out, "k")[1], key_codes)
    assert torch.equal(codes[256:384], codes_after[256:384])  # head 2 stays as it is
    is_shared = -1 not in FORMS[form][1]
    growth = unit_after / unit
    assert set(np.unique(growth)) <= ({1.0} if is_shared else {1.0, 2.0})
    for h in (0, 1, 3):
        W_K = keys[h * K // H]
        exact = oracle.edit(Q[h], W_K, "full", (0, 1), 0.0, oracle.decompose(Q[h], W_K, "full")).W_Q
        # A value on the edge between two numbers may go either way: the oracle's last bits are its own.
        wanted, margin = exact / unit_after[h], 1e-9
        is_close = Q_after[h] / unit_after[h] == nearest(wanted)
        is_edge = nearest(wanted * (1 + margin)) != nearest(wanted * (1 - margin))
        assert (is_close | is_edge).all()
        assert not np.array_equal(Q[h], Q_after[h])
    plain, fp8 = json.loads((out / "qkpatch.json").read_text())["edits"]
    assert plain["scale_tensor"] is None
    assert fp8["scale_tensor"] == (None if is_shared else STEM.format(1, "q") + FORMS[form][0])
    held, stored = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {n for n in held if not torch.equal(bits(held[n]), bits(stored[n]))}
    edited = {STEM.format(layer, "q") + "weight" for layer in (0, 1)}
    assert changed - edited <= ({fp8["scale_tensor"]} if (growth != 1).any() else set())


def test_a_row_that_overflows_grows_and_a_tensor_that_would_is_refused(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    flags = ("--layers", 1, "--modes", 1, "--alpha", 0)
    by_row, whole = "compressed-tensors, channel", "Ministral"
    source, out = tmp_path / "source", tmp_path / "out"
    build_in(by_row, source, torch.float32, against)
    assert run("apply", source, *flags, "-o", out).exit_code == 0
    growth = read_in(by_row, out, "q")[2] / read_in(by_row, source, "q")[2]
    assert growth.max() == 2.0
    assert run("verify", out, "--source", source).exit_code == 0
    one = tmp_path / "one"
    build_in(whole, one, torch.float32, against)
    result = run("apply", one, *flags, "-o", tmp_path / "refused")
    assert result.exit_code == 3
    assert "too large to be stored with the whole tensor's one scale" in result.stderr
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight_zero_point": torch.zeros(1)}, "quantised with compressed-tensors"),
        ({"weight_scale_2": torch.tensor(1.0)}, "quantised with ModelOpt"),
        ({"weight_scale": torch.ones(512, 6)}, "quantised with compressed-tensors or ModelOpt"),
        ({"weight": torch.zeros(512, D_MODEL, dtype=torch.int8)}, "quantised with compressed-tensors"),
    ],
)
def test_what_only_looks_like_it_is_refused(
    changes: Tensors, said: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    build_in("compressed-tensors, channel", source, torch.float32)
    held = load_file(source / "model.safetensors")
    held |= {STEM.format(1, "q") + name: value for name, value in changes.items()}
    save_file(held, source / "model.safetensors", {"format": "pt"})
    result = run("plan", source, "--layers", 1)
    assert result.exit_code == 3
    assert said in result.stderr


def test_heads_of_any_size_may_have_a_scale_to_each_row(run: Callable[..., Any], tmp_path: Path) -> None:
    for form in ("compressed-tensors, channel", "Ministral"):
        source = tmp_path / form
        build_in(form, source, torch.bfloat16)
        config = json.loads((source / "config.json").read_text())
        sizes = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
        (source / "config.json").write_text(json.dumps(config | sizes))
        assert run("apply", source, "--layers", 1, "--modes", 2, "-o", source / "../out").exit_code == 0
        assert run("verify", tmp_path / "out", "--source", source).exit_code == 0
        assert run("inspect", tmp_path / "out", "--layers", 1).exit_code == 0
        shutil.rmtree(tmp_path / "out")
