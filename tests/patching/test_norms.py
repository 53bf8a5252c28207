"""Norms of queries and keys: the product against the layer's own code, and its edit against a dense oracle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import build_tiny
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm
from typer.testing import Result

H, K, D_HEAD, D_MODEL = 4, 2, 8, 24
STEM = "model.layers.{layer}.self_attn."
STEM_1 = STEM.format(layer=1)  # of the edited layer


@dataclass(frozen=True)
class Case:
    """How one model family normalises queries and keys; the gains' shapes by d, K, H."""

    kind: str = "rms"
    over: str = "head"
    query: str = "d"
    key: str = "d"
    plus_one: bool = False
    optional: bool = False

    @property
    def fields(self) -> dict[str, object]:
        names = {"query": "self_attn.q_norm.weight", "key": "self_attn.k_norm.weight"}
        return {**names, **{k: v for k, v in vars(self).items() if k not in names}}

    def gains(self, seed: int, biases: bool = False) -> dict[str, Tensor]:
        """Gains of one layer, all different; with the projections' biases and the LayerNorm's."""
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, Tensor] = {}
        for which, n, shape in (("q", H, self.query), ("k", K, self.key)):
            size = {"d": (D_HEAD,), "n d": (n, D_HEAD), "nd": (n * D_HEAD,)}[shape]
            gain = torch.rand(size, generator=generator) * 2 + 0.25
            found[f"{which}_norm.weight"] = gain - int(self.plus_one)
            if biases:
                found[f"{which}_proj.bias"] = torch.rand(n * D_HEAD, generator=generator)
            if biases and self.kind == "layer":
                found[f"{which}_norm.bias"] = torch.rand(size, generator=generator)
        return found


CASES = {
    "rms": Case(),
    "rms, plus one": Case(plus_one=True),
    "rms, gains of each head": Case(query="n d", key="n d"),
    "rms, query gains of each head": Case(query="n d", plus_one=True),
    "rms, key gains of each head": Case(key="n d"),
    "rms of the projection": Case(over="projection", query="nd", key="nd"),
    "rms of the projection, plus one": Case(over="projection", query="nd", key="nd", plus_one=True),
    "rms as stored, of the projection": Case(over="stored", query="nd", key="nd"),
    "rms as stored, of each head": Case(over="stored", query="n d"),
    "layer": Case("layer"),
    "layer, plus one": Case("layer", plus_one=True),
    "layer, gains of each head": Case("layer", query="n d", key="n d"),
}
WHOLE_LAYER_NORM = Case("layer", "projection", "nd", "nd")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


RECIPE = """
name: probe
title: Probe
default_repo: nobody/probe
tested: documented layout
match: {model_types: [probe], architectures: [ProbeForCausalLM]}
config: {sections: [.], class_defaults: {probe: {num_hidden_layers: 3}}}
defaults: {layers: middle-third, modes: 2}
"""


def write_recipe(path: Path, norms: dict[str, object] | None, module: str = "") -> None:
    """The recipe for what :func:`build_tiny` writes; ``module`` goes from the prefix into the names."""
    names = {"query": f"{module}q_proj.weight", "key": f"{module}k_proj.weight", "orientation": "out_in"}
    tensors = {"prefixes": [STEM.removesuffix(module)], **names, **({"norms": norms} if norms else {})}
    path.write_text(f"{RECIPE}tensors: {json.dumps(tensors)}\n")


def build(
    path: Path,
    case: Case,
    layers: tuple[int, ...] = (0, 1, 2),
    biases: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    stray: dict[str, Tensor] | None = None,
    **options: Any,
) -> Path:
    """A checkpoint whose ``layers`` have the norms of ``case``, and ``probe.yaml`` beside it."""
    gains = {STEM.format(layer=n) + name: t for n in layers for name, t in case.gains(n, biases).items()}
    extra = {name: t.to(dtype) for name, t in {**gains, **(stray or {})}.items()}
    numbers = {"hidden_size": D_MODEL, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D_HEAD}
    config = {"model_type": "probe", "architectures": ["ProbeForCausalLM"], **numbers}
    write_recipe(path.parent / "probe.yaml", case.fields, "self_attn.")
    return build_tiny(path, config=config, extra=extra, dtype=dtype, **options).path


@dataclass(frozen=True)
class Attention:
    """Queries and keys of layer 1 as a modelling file computes them."""

    case: Case
    tensors: dict[str, Tensor]  # without the stem

    @classmethod
    def read(cls, case: Case, path: Path, biases: bool = True) -> Attention:
        stored = {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
        own = {n.removeprefix(STEM_1): t.double() for n, t in stored.items() if n.startswith(STEM_1)}
        return cls(case, {n: t for n, t in own.items() if biases or not n.endswith(".bias")})

    def weight(self, which: str, head: int) -> oracle.Matrix:
        return self.tensors[f"{which}_proj.weight"].view(-1, D_HEAD, D_MODEL)[head].numpy()

    def project(self, x: Tensor, which: str) -> Tensor:
        y = x @ self.tensors[f"{which}_proj.weight"].T + self.tensors.get(f"{which}_proj.bias", 0)
        return y if self.case.query == "nd" else y.view(len(x), -1, D_HEAD)

    def normed(self, x: Tensor, which: str, eps: float = 1e-9) -> Tensor:
        """(tokens, heads, d_head)."""
        y = self.project(x, which)
        norm = rms_norm if self.case.kind == "rms" else layer_norm
        gain = self.tensors[f"{which}_norm.weight"] + float(self.case.plus_one)
        y = norm(y, y.shape[-1:], eps=eps) * gain + self.tensors.get(f"{which}_norm.bias", 0)
        return y.view(len(x), -1, D_HEAD)

    def numerators(self, which: str) -> Tensor:
        """What the normed unit inputs are when their own sizes are multiplied back in; linear in the input."""
        unit = torch.eye(D_MODEL, dtype=torch.float64)
        y = self.project(unit, which)
        y = y - y.mean(-1, keepdim=True) if self.case.kind == "layer" else y
        size = y.square().mean(-1).sqrt()
        return self.normed(unit, which, eps=0.0) * size.view(D_MODEL, -1, 1)

    def product(self, head: int) -> oracle.Matrix:
        """M of one head, without any formula for it. For layers without biases."""
        q, k = self.numerators("q")[:, head], self.numerators("k")[:, head * K // H]
        return (q @ k.T).numpy()

    def factors(self, head: int) -> tuple[oracle.Matrix, oracle.Matrix]:
        """W_Q and the keys with all that the norms do, by the definition: [C] diag(g_q) diag(g_k) [C] W_K."""
        at = {"q": head, "k": head * K // H}
        gains = [self.tensors[f"{which}_norm.weight"].view(-1, D_HEAD) for which in at]
        G_q, G_k = (
            np.diag(g[h if len(g) > 1 else 0].numpy() + float(self.case.plus_one))
            for g, h in zip(gains, at.values(), strict=True)
        )
        C = np.eye(D_HEAD) - (np.ones((D_HEAD, D_HEAD)) / D_HEAD if self.case.kind == "layer" else 0)
        return self.weight("q", head), C @ G_q @ G_k @ C @ self.weight("k", at["k"])


def apply(run, source: Path, *flags: object) -> tuple[Path, Result]:
    """Edit layer 1 by the recipe beside SOURCE, and prove the result."""
    out, recipe = source.parent / "out", source.parent / "probe.yaml"
    result = run("apply", source, "--recipe", recipe, "--layers", 1, *flags, "-o", out)
    assert result.exit_code == 0, result.output
    verified = run("verify", out, "--source", source, "--recipe", recipe)
    assert verified.exit_code == 0, verified.output
    return out, result


def singular_values(M: oracle.Matrix) -> oracle.Matrix:
    return np.linalg.svd(M, compute_uv=False)[:D_HEAD]


def ask(run, command: str, source: Path) -> Result:
    return run(command, source, "--recipe", source.parent / "probe.yaml", "--layers", 1, "--json")


def spectra(run, source: Path) -> list[list[float]]:
    result = ask(run, "inspect", source)
    assert result.exit_code == 0, result.output
    return [head["singular_values"] for head in json.loads(result.stdout)["layers"][0]["heads"]]


@every_case
def test_the_spectra_are_those_of_the_product_that_the_layer_computes(
    case: Case, run, tmp_path: Path
) -> None:
    source = build(tmp_path / "source", case)
    attention = Attention.read(case, source)
    for head, values in enumerate(spectra(run, source)):
        M = attention.product(head)
        W_Q, keys = attention.factors(head)
        np.testing.assert_allclose(W_Q.T @ keys, M, atol=1e-12)  # two independent ways to M
        np.testing.assert_allclose(values, singular_values(M), rtol=1e-9, atol=1e-12)
        wrong = singular_values(W_Q.T @ attention.weight("k", head * K // H))
        assert not np.allclose(values, wrong, rtol=0.02)


def test_layer_norm_over_the_projection_is_centred_over_all_heads_or_refused(run, tmp_path: Path) -> None:
    source = build(tmp_path / "source", WHOLE_LAYER_NORM)
    if ask(run, "inspect", source).exit_code == 2:
        return
    attention = Attention.read(WHOLE_LAYER_NORM, source)
    for head, values in enumerate(spectra(run, source)):
        np.testing.assert_allclose(values, singular_values(attention.product(head)), rtol=1e-9, atol=1e-12)


@every_case
@pytest.mark.parametrize(
    ("channel", "select"),
    [("full", "dominant"), ("symmetric", "dominant"), ("antisymmetric", "dominant"), ("full", "bottom")],
)
def test_each_head_is_edited_as_the_dense_definition_says(
    channel: str, select: str, case: Case, run, tmp_path: Path
) -> None:
    source = build(tmp_path / "source", case)
    out, _ = apply(run, source, "--channel", channel, "--select", select, "--modes", 2, "--alpha", 0.25)
    attention, after = Attention.read(case, source), Attention.read(case, out)
    records = json.loads((out / "qkpatch.json").read_text())["edits"][0]["heads"]
    for head in range(H):
        W_Q, keys = attention.factors(head)
        assert np.linalg.matrix_rank(keys) == D_HEAD - (case.kind == "layer")
        dense = oracle.decompose(W_Q, keys, channel)
        modes = oracle.choose(dense, channel, select, 2)
        assert (dense.gap(modes) or 1) > 1e-3
        expected = oracle.edit(W_Q, keys, channel, modes, 0.25, dense)
        stored = after.weight("q", head)
        assert oracle.ulps(stored, oracle.round_to(expected.W_Q, "BF16"), "BF16") <= 1
        assert records[head]["rank"] == len(dense.S)
        assert tuple(records[head]["modes"]) == modes
        assert records[head]["values_before"][: len(dense.S)] == pytest.approx(dense.S.tolist(), rel=1e-8)
        if expected.realised is not None:
            assert records[head]["realised_share"] == pytest.approx(expected.realised, rel=1e-7)


@every_case
def test_the_layers_own_queries_no_longer_see_what_was_removed(case: Case, run, tmp_path: Path) -> None:
    source = build(tmp_path / "source", case, biases=True, dtype=torch.float32)
    out, _ = apply(run, source, "--modes", 2, "--alpha", 0)
    before, after = Attention.read(case, source), Attention.read(case, out)
    bare, edited = (Attention.read(case, path, biases=False) for path in (source, out))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, D_MODEL, generator=generator, dtype=torch.float64)
    x[0] = 0  # queries of nothing but the bias

    def moved(attention: Attention, head: int, directions: Tensor) -> float:
        """How far q̂ moves when the input moves along ``directions``."""
        step = torch.randn(len(x), 2, generator=generator, dtype=torch.float64) * 3
        q, shifted = (attention.normed(y, "q")[:, head] for y in (x, x + step @ directions.T))
        if case.query == "nd":  # other heads move the common size: directions alone can stay
            q, shifted = (y / y.norm(dim=-1, keepdim=True) for y in (q, shifted))
        return float((q - shifted).abs().max())

    for head in range(H):
        M = bare.product(head)
        U = torch.from_numpy(np.linalg.svd(M)[0][:, :2].copy())
        ungained = bare.weight("q", head).T @ bare.weight("k", head * K // H)
        ungained = torch.from_numpy(np.linalg.svd(ungained)[0][:, :2].copy())
        assert moved(before, head, U) > 0.1
        assert moved(after, head, U) < 1e-5
        assert moved(after, head, ungained) > 0.05
        # The numerator of the true logits loses those two modes and nothing else.
        left = M - U.numpy() @ U.numpy().T @ M
        np.testing.assert_allclose(edited.product(head), left, atol=1e-6 * np.linalg.norm(M))


def test_norms_of_another_shard_are_read_there_and_biases_are_named(run, tmp_path: Path) -> None:
    case = CASES["layer, gains of each head"]
    shards = [["q_proj"], ["q_norm"], ["k_norm", "k_proj"], [""]]
    source = build(tmp_path / "source", case, biases=True, shards=shards)
    attention = Attention.read(case, source, biases=False)
    for head, values in enumerate(spectra(run, source)):
        np.testing.assert_allclose(values, singular_values(attention.product(head)), rtol=1e-9, atol=1e-12)
    out, _ = apply(run, source, "--alpha", 0)
    edit = json.loads((out / "qkpatch.json").read_text())["edits"][0]
    assert edit["norms"] == [STEM_1 + f"{which}_norm.weight" for which in "qk"]
    assert set(edit["biases"]) == {STEM_1 + f"{w}_{of}.bias" for w in "qk" for of in ("proj", "norm")}


NOTHING, SHIFTS = "shrinking W_Q changes nothing", "only shifts weight between heads"


@pytest.mark.parametrize("name", [*CASES, "rms, biases"])
def test_shrinking_normed_queries_does_what_is_said(name: str, run, tmp_path: Path) -> None:
    case, biases = CASES[name.removesuffix(", biases")], name.endswith("biases")
    said = "" if biases else SHIFTS if case.query == "nd" else NOTHING
    source = build(tmp_path / "source", case, biases=biases, dtype=torch.float32)
    out, result = apply(run, source, "--select", "shrink", "--alpha", 0)
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, shrunk = (Attention.read(case, path).normed(x, "q") for path in (source, out))
    ratio = shrunk / q  # one for a whole head, but for a bias
    assert torch.allclose(ratio, ratio[:, :, :1].expand_as(ratio), rtol=1e-4) != biases
    assert torch.allclose(q, shrunk, atol=1e-5) == (said == NOTHING)
    warning = " ".join(result.stderr.split())
    assert (NOTHING in warning, SHIFTS in warning) == (said == NOTHING, said == SHIFTS)


@pytest.mark.parametrize("layers", [(0, 1, 2), (), (0,), (0, 2), (1,)], ids=str)
def test_optional_norms_are_in_all_layers_or_in_none(layers: tuple[int, ...], run, tmp_path: Path) -> None:
    case = Case(optional=True)
    source = build(tmp_path / "source", case, layers)
    result = ask(run, "plan", source)
    assert result.exit_code == (0 if len(layers) in (0, 3) else 3), result.stderr
    if result.exit_code == 0:
        assert len(json.loads(result.stdout)["edits"][0]["norms"]) == (2 if layers else 0)
        attention = Attention.read(case, source)
        M = attention.product(0) if layers else attention.weight("q", 0).T @ attention.weight("k", 0)
        np.testing.assert_allclose(spectra(run, source)[0], singular_values(M), rtol=1e-9)


@pytest.mark.parametrize("stray", ["q_layernorm.weight", "k_layernorm.weight"])
def test_optional_norms_under_another_spelling_are_not_passed_over(stray: str, run, tmp_path: Path) -> None:
    strays = {STEM.format(layer=layer) + stray: torch.ones(D_HEAD) for layer in range(3)}
    source = build(tmp_path / "source", Case(optional=True), (), stray=strays)
    result = ask(run, "plan", source)
    assert result.exit_code == 3
    assert stray in result.stderr


@pytest.mark.parametrize("module", ["self_attn.", ""], ids=["in the names", "in the prefix"])
def test_undeclared_norms_are_refused_however_the_names_are_cut(module: str, run, tmp_path: Path) -> None:
    source = build(tmp_path / "source", Case())
    write_recipe(tmp_path / "probe.yaml", None, module)
    result = ask(run, "plan", source)
    assert result.exit_code == 3
    assert "which recipe probe does not declare" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("over", "which", "shape", "expected"),
    [
        ("head", "q", (H * D_HEAD,), " holds [8] or [4, 8] numbers"),
        ("head", "q", (K, D_HEAD), " holds [8] or [4, 8] numbers"),
        ("head", "k", (H, D_HEAD), " holds [8] or [2, 8] numbers"),
        ("projection", "q", (D_HEAD,), " holds [32] numbers"),
        ("projection", "k", (H * D_HEAD,), " holds [16] numbers"),
    ],
)
def test_gains_of_another_shape_are_refused(
    over: str, which: str, shape: tuple[int, ...], expected: str, run, tmp_path: Path
) -> None:
    case = Case(over=over, **dict.fromkeys(("query", "key"), "d" if over == "head" else "nd"))
    stray = {STEM_1 + f"{which}_norm.weight": torch.ones(shape)}
    result = ask(run, "plan", build(tmp_path / "source", case, stray=stray))
    assert result.exit_code == 3
    assert expected in " ".join(result.stderr.split())
