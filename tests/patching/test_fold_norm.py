"""``--fold-norm``: the gain γ before attention is part of the product, M̃ = diag(γ) M diag(γ)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import REPO, build_tiny
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import rms_norm
from typer.testing import Result

H, K, D_HEAD, D_MODEL = 4, 2, 8, 24
LAYER = "model.layers.{}."
QUERY = LAYER.format(1) + "self_attn.q_proj.weight"
GAIN = LAYER.format(1) + "input_layernorm.weight"
# recipe, whether it has a query-key norm, and whether its gains are stored less one
FAMILIES = {"llama": (False, 0), "qwen3": (True, 0), "gemma3-text": (True, 1)}
MODEL = {"llama": ("llama", "Llama"), "qwen3": ("qwen3", "Qwen3"), "gemma3-text": ("gemma3_text", "Gemma3")}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_channel = pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])


def build(
    path: Path,
    family: str = "llama",
    gains: dict[str, Tensor | None] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Path:
    """A checkpoint of ``family`` with random gains of both signs, but for those that ``gains`` replaces."""
    has_norms, less = FAMILIES[family]
    generator = torch.Generator().manual_seed(3)
    extra: dict[str, Tensor | None] = {}
    for layer in range(3):
        stem = LAYER.format(layer)
        gamma = torch.rand(D_MODEL, generator=generator) * 3 + 0.1
        extra[f"{stem}input_layernorm.weight"] = gamma * (-1) ** torch.arange(D_MODEL) - less
        for which in "qk" if has_norms else "":
            norm = torch.rand(D_HEAD, generator=generator) * 2 + 0.25
            extra[f"{stem}self_attn.{which}_norm.weight"] = norm - less
    extra.update(gains or {})
    model_type, architecture = MODEL[family]
    config = {
        "model_type": model_type, "architectures": [f"{architecture}ForCausalLM"], "num_hidden_layers": 3,
        "hidden_size": D_MODEL, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D_HEAD,
    }  # fmt: skip
    stored = {name: t.to(dtype) for name, t in extra.items() if t is not None}
    return build_tiny(path, config=config, extra=stored, dtype=dtype, **options).path


def read(path: Path) -> dict[str, Tensor]:
    return {n: t.double() for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def gain_of(source: Path, family: str = "llama") -> oracle.Matrix:
    return read(source)[GAIN].numpy() + FAMILIES[family][1]


def factors(source: Path, head: int, family: str = "llama") -> tuple[oracle.Matrix, oracle.Matrix]:
    """W_Q and the keys under the query-key norm, unfolded."""
    tensors, (has_norms, less) = read(source), FAMILIES[family]
    stem = LAYER.format(1) + "self_attn."
    W_Q = tensors[f"{stem}q_proj.weight"].view(H, D_HEAD, -1)[head].numpy()
    W_K = tensors[f"{stem}k_proj.weight"].view(K, D_HEAD, -1)[head * K // H].numpy()
    if has_norms:
        g_q, g_k = (tensors[f"{stem}{which}_norm.weight"].numpy() + less for which in "qk")
        W_K = np.diag(g_q) @ np.diag(g_k) @ W_K
    return W_Q, W_K


def folded(source: Path, head: int, family: str = "llama") -> tuple[oracle.Matrix, oracle.Matrix]:
    """The factors of M̃: diag(γ) W_Qᵀ and W_K diag(γ), dense."""
    gamma = np.diag(gain_of(source, family))
    W_Q, W_K = factors(source, head, family)
    return W_Q @ gamma, W_K @ gamma


def query(out: Path, head: int) -> oracle.Matrix:
    return read(out)[QUERY].view(H, D_HEAD, -1)[head].numpy()


def apply(run, source: Path, name: str, *flags: object) -> dict[str, Any]:
    """Edit layer 1, prove it, return the manifest."""
    out = source.parent / name
    result = run("apply", source, "--layers", 1, "--modes", 2, *flags, "-o", out)
    assert result.exit_code == 0, result.output
    verified = run("verify", out, "--source", source)
    assert verified.exit_code == 0, verified.output
    document: dict[str, Any] = json.loads((out / "qkpatch.json").read_text())
    return document


def refused(run, source: Path, command: str = "apply", *flags: object) -> Result:
    """The failure of a folded edit, which leaves nothing behind."""
    out = source.parent / "out"
    result = run(command, source, "--layers", 1, "--modes", 2, "--fold-norm", *flags, "-o", out)
    assert result.exit_code == 3, result.output
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]
    return result


@every_family
@every_channel
@pytest.mark.parametrize("select", ["dominant", "bottom"])
def test_each_head_is_edited_in_the_folded_basis_and_mapped_back(
    family: str, channel: str, select: str, run, tmp_path: Path
) -> None:
    source = build(tmp_path / "source", family)
    flags = ("--channel", channel, "--select", select, "--alpha", 0.25)
    manifest = apply(run, source, "out", *flags, "--fold-norm")
    gamma = gain_of(source, family)
    assert manifest["edit"]["fold_norm"] is True
    (edit,) = manifest["edits"]
    assert edit["folded_norm"] == GAIN
    for head, record in enumerate(edit["heads"]):
        W_Q, W_K = folded(source, head, family)
        dense = oracle.decompose(W_Q, W_K, channel)
        modes = oracle.choose(dense, channel, select, 2)
        assert (dense.gap(modes) or 1) > 1e-3
        expected = oracle.edit(W_Q, W_K, channel, modes, 0.25, dense)
        stored = query(tmp_path / "out", head)
        assert oracle.ulps(stored, oracle.round_to(expected.W_Q / gamma, "BF16"), "BF16") <= 1
        unfolded = oracle.edit(*factors(source, head, family), channel, modes, 0.25).W_Q
        assert not np.allclose(stored, unfolded, rtol=0.02)
        # The manifest's figures are those of the folded product.
        W_after = stored * gamma
        M, M_after = W_Q.T @ W_K, W_after.T @ W_K
        count = len(record["values_before"])
        assert tuple(record["modes"]) == modes
        assert record["rank"] == len(dense.S)
        before, after = (oracle.values(W, W_K, channel, count) for W in (W_Q, W_after))
        assert record["values_before"] == pytest.approx(before.tolist(), rel=1e-8, abs=1e-11)
        assert record["values_after"] == pytest.approx(after.tolist(), rel=1e-8, abs=1e-9)
        assert record["frobenius_before"] == pytest.approx(np.linalg.norm(M))
        assert record["frobenius_after"] == pytest.approx(np.linalg.norm(M_after))
        change = np.linalg.norm(W_after - W_Q) / np.linalg.norm(W_Q)
        assert record["relative_change"] == pytest.approx(change)
        assert record["gap"] == pytest.approx(dense.gap(modes), rel=1e-6)
        assert record["gains"] == pytest.approx(oracle.gains(dense, modes, M_after, channel), abs=1e-8)
        if expected.realised is not None:
            assert record["realised_share"] == pytest.approx(expected.realised, rel=1e-7)


@every_family
def test_the_spectra_are_those_of_the_folded_product(family: str, run, tmp_path: Path) -> None:
    source = build(tmp_path / "source", family)
    values: dict[bool, list[list[float]]] = {}
    for fold in (False, True):
        flags = ("--fold-norm",) if fold else ()
        result = run("inspect", source, "--layers", 1, "--json", *flags)
        values[fold] = [h["singular_values"] for h in json.loads(result.stdout)["layers"][0]["heads"]]
    for head in range(H):
        for fold, (W_Q, W_K) in (
            (False, factors(source, head, family)),
            (True, folded(source, head, family)),
        ):
            expected = np.linalg.svd(W_Q.T @ W_K, compute_uv=False)[:D_HEAD]
            np.testing.assert_allclose(values[fold][head], expected, rtol=1e-9)
        assert not np.allclose(values[False][head], values[True][head], rtol=0.1)


def test_the_layers_own_logits_lose_the_removed_modes_of_the_normed_input(run, tmp_path: Path) -> None:
    """x̂ = γ ⊙ x / rms(x): logits of unit-rms inputs are xᵀ M̃ y."""
    source = build(tmp_path / "source", dtype=torch.float32)
    apply(run, source, "out", "--alpha", 0, "--fold-norm")
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 50, D_MODEL, generator=generator, dtype=torch.float64)
    weight = torch.from_numpy(gain_of(source))

    def logits(path: Path, head: int) -> oracle.Matrix:
        """Of normed x and y, by the layer's own order of things."""
        a, b = (rms_norm(of, (D_MODEL,), weight, eps=0.0).numpy() for of in (x, y))
        W_Q, W_K = factors(path, head)
        return (a @ W_Q.T) @ (b @ W_K.T).T

    scale = np.sqrt((x**2).mean(-1).numpy())[:, None] * np.sqrt((y**2).mean(-1).numpy())[None]
    for head in range(H):
        gamma = gain_of(source)[:, None]
        W_Q, W_K = factors(source, head)
        U, S, Vh = np.linalg.svd(gamma * (W_Q.T @ W_K) * gamma.T)
        lost = x.numpy() @ (U[:, :2] * S[:2]) @ Vh[:2] @ y.numpy().T / scale
        before, after = logits(source, head), logits(tmp_path / "out", head)
        assert np.linalg.norm(lost) > 0.3 * np.linalg.norm(before)
        np.testing.assert_allclose(after, before - lost, atol=2e-6 * np.abs(before).max())


def test_removal_is_idempotent_in_the_folded_basis(run, tmp_path: Path) -> None:
    source = build(tmp_path / "source", dtype=torch.float32)
    heads = apply(run, source, "once", "--alpha", 0, "--fold-norm")["edits"][0]["heads"]
    assert all(abs(gain) < 1e-6 for head in heads for gain in head["gains"])
    gamma = gain_of(source)
    for head in range(H):
        W_Q, W_K = folded(source, head)
        removed = oracle.decompose(W_Q, W_K, "full").U[:, :2]
        once = query(tmp_path / "once", head) * gamma
        assert np.linalg.norm(W_Q @ removed) > 1
        assert np.linalg.norm(once @ removed) < 1e-5
        projected = once - (once @ removed) @ removed.T
        np.testing.assert_allclose(projected, once, atol=1e-6)
        plain = oracle.decompose(*factors(source, head), "full").U[:, :2]
        assert np.linalg.norm(query(tmp_path / "once", head) @ plain) > 0.05


@every_channel
@pytest.mark.parametrize("select", ["dominant", "random", "shrink", "bottom"])
def test_a_constant_gain_makes_no_difference(channel: str, select: str, run, tmp_path: Path) -> None:
    source = build(tmp_path / "source", gains={GAIN: torch.full((D_MODEL,), -2.0)})
    seed = ("--seed", 7) if select == "random" else ()
    flags = ("--channel", channel, "--select", select, "--alpha", 0.5, *seed)
    plain, fold = apply(run, source, "plain", *flags), apply(run, source, "fold", *flags, "--fold-norm")
    assert plain["edit"]["fold_norm"] is False
    assert plain["edits"][0]["folded_norm"] is None
    a, b = (read(tmp_path / name)[QUERY].numpy() for name in ("plain", "fold"))
    assert oracle.ulps(a, b, "BF16") <= 1
    assert not np.allclose(a, read(source)[QUERY].numpy())
    for one, other in zip(plain["edits"][0]["heads"], fold["edits"][0]["heads"], strict=True):
        assert one["modes"] == other["modes"]
        assert other["values_before"] == pytest.approx([4 * v for v in one["values_before"]], rel=1e-8)


@every_family
def test_shrink_matches_the_size_of_the_dominant_edit_in_the_folded_basis(
    family: str, run, tmp_path: Path
) -> None:
    source = build(tmp_path / "source", family, dtype=torch.float32)
    shrunk = apply(run, source, "shrink", "--fold-norm", "--select", "shrink", "--alpha", 0.25)
    edited = apply(run, source, "dominant", "--fold-norm", "--alpha", 0.25)
    gamma = gain_of(source, family)
    for head in range(H):
        W_Q, _ = folded(source, head, family)
        sizes = [
            np.linalg.norm(query(tmp_path / name, head) * gamma - W_Q) for name in ("shrink", "dominant")
        ]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)
        ratio = query(tmp_path / "shrink", head) / factors(source, head, family)[0]
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
        changes = [of["edits"][0]["heads"][head]["relative_change"] for of in (shrunk, edited)]
        assert changes[0] == pytest.approx(changes[1], rel=1e-5)


def test_a_random_subspace_is_drawn_in_the_folded_row_space(run, tmp_path: Path) -> None:
    source = build(tmp_path / "source", dtype=torch.float32)
    apply(run, source, "out", "--fold-norm", "--select", "subspace", "--alpha", 0)
    gamma = gain_of(source)
    for head in range(H):
        W_Q, _ = folded(source, head)
        change = query(tmp_path / "out", head) * gamma - W_Q
        G = np.linalg.svd(change)[2][:2].T
        np.testing.assert_allclose(W_Q @ (np.eye(D_MODEL) - G @ G.T), W_Q + change, atol=1e-5)
        assert np.linalg.svd(change, compute_uv=False)[2] < 1e-5


def test_the_flag_may_stand_in_a_settings_file_and_the_gain_in_another_shard(run, tmp_path: Path) -> None:
    source = build(tmp_path / "source", shards=[["q_proj"], ["input_layernorm"], [""]])
    settings = tmp_path / "edit.yaml"
    settings.write_text("layers: 1\nmodes: 2\nalpha: 0.25\nfold_norm: true\n")
    flagged = apply(run, source, "flag", "--alpha", 0.25, "--fold-norm")
    result = run("apply", source, "--config", settings, "-o", tmp_path / "file")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "file" / "qkpatch.json").read_text())
    assert told["edits"] == flagged["edits"]
    settings.write_text("layers: 1\nfold_norm: 'yes'\n")
    result = run("plan", source, "--config", settings)
    assert result.exit_code == 2
    assert "$.fold_norm: expected bool, got str 'yes'" in result.stderr


@pytest.mark.parametrize("change", [{"fold_norm": False}, {"folded_norm": None}], ids=str)
def test_verify_does_not_take_a_folded_edit_for_a_plain_one(
    change: dict[str, object], run, tmp_path: Path
) -> None:
    source = build(tmp_path / "source")
    document = apply(run, source, "out", "--fold-norm")
    (document["edit"] if "fold_norm" in change else document["edits"][0]).update(change)
    (tmp_path / "out" / "qkpatch.json").write_text(json.dumps(document))
    assert run("verify", tmp_path / "out", "--source", source).exit_code == 1


@pytest.mark.parametrize(
    ("gain", "message"),
    [
        (None, "needs the gain before attention, [24] numbers; there is nothing"),
        (torch.ones(D_HEAD), "[24] numbers; there is BF16 [8]"),
        (torch.ones(1, D_MODEL), "[24] numbers; there is BF16 [1, 24]"),
        (torch.arange(D_MODEL).float(), "leave the flag out, or layer 1"),
        (torch.cat([torch.ones(23), torch.tensor([1e-7])]), "the smallest is 1e-07 (the largest 1)"),
        (torch.zeros(D_MODEL), "the smallest is 0 (the largest 0)"),
        (torch.cat([torch.ones(23), torch.tensor([torch.nan])]), "of layer 1 holds NaN or Inf"),
        (torch.cat([torch.ones(23), torch.tensor([torch.inf])]), "holds NaN or Inf"),
    ],
    ids=["absent", "short", "two axes", "a zero", "a tiny one", "zeros", "NaN", "Inf"],
)
def test_a_gain_that_cannot_be_divided_by_is_refused_by_name(
    gain: Tensor | None, message: str, run, tmp_path: Path
) -> None:
    source = build(tmp_path / "source", gains={GAIN: gain})
    told = " ".join(refused(run, source).stderr.split())
    assert message in told
    assert GAIN in told
    assert run("plan", source, "--layers", 1).exit_code == 0


def test_a_gain_of_minus_one_under_plus_one_is_a_zero(run, tmp_path: Path) -> None:
    gain = torch.zeros(D_MODEL)
    gain[5] = -1
    assert "the smallest is 0" in refused(run, build(tmp_path / "source", "gemma3-text", {GAIN: gain})).stderr


def test_a_recipe_without_a_gain_before_attention_refuses_the_flag(run, tmp_path: Path) -> None:
    source = build(tmp_path / "source", prefix="model.language_model.layers.{layer}.self_attn.")
    config = json.loads((source / "config.json").read_text())
    text = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    nested = {"model_type": "cohere2_vision", "text_config": {"model_type": "cohere2", **text}}
    (source / "config.json").write_text(
        json.dumps({**nested, "architectures": ["Cohere2VisionForConditionalGeneration"]})
    )
    for command in ("apply", "plan"):
        result = refused(run, source, command)
        assert "no RMSNorm before attention" in " ".join(result.stderr.split())
    assert run("plan", source, "--layers", 1).exit_code == 0


def test_a_model_that_has_its_norm_after_attention_refuses_the_flag(run, tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    text = (REPO / "configs" / "llama.yaml").read_text().replace("name: llama", "name: late")
    recipe = tmp_path / "source" / "late.yaml"
    recipe.write_text(text.replace("input_layernorm.weight}", "input_layernorm.weight, unless: is_late}"))
    config = json.loads((source / "config.json").read_text())
    for is_late, code in ((False, 0), (None, 0), (True, 3)):
        (source / "config.json").write_text(json.dumps({**config, "is_late": is_late}))
        result = run("plan", source, "--recipe", recipe, "--fold-norm")
        assert result.exit_code == code, result.stderr


def test_an_edit_that_selects_nothing_is_none_in_float64_too(run, tmp_path: Path) -> None:
    """W γ / γ need not be W: a product of zero must not be edited by rounding alone."""
    generator = torch.Generator().manual_seed(0)
    gains = {
        QUERY: torch.randn(H * D_HEAD, D_MODEL, generator=generator, dtype=torch.float64),
        QUERY.replace("q_proj", "k_proj"): torch.zeros(K * D_HEAD, D_MODEL),
        GAIN: torch.rand(D_MODEL, generator=generator, dtype=torch.float64) + 0.5,
    }
    source = build(tmp_path / "source", gains=gains, dtype=torch.float64)
    assert "leaves every value as it is" in " ".join(refused(run, source).stderr.split())
