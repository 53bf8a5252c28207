"""The Cholesky factor of a Gram matrix is used where it is as good as a QR, and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qkpatch.spectral.edit import edit_query, measure
from qkpatch.spectral.factors import Factor
from qkpatch.spectral.product import QKProduct
from qkpatch.spectral.rounding import round_once
from qkpatch.spectral.rule import Channel, EditRule, Select

EPS = torch.finfo(torch.float64).eps
ROUNDOFF = {"F8_E4M3": 2.0**-4, "BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
GRADES = range(13)
every_channel = pytest.mark.parametrize("channel", Channel, ids=lambda c: c.value)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graded(grade: float, d_head: int = 16, d_model: int = 48, seed: int = 0) -> Tensor:
    """Weights (1, d_head, d_model) with the condition number 10^grade."""
    U, V = (torch.linalg.qr(random(n, d_head, seed=seed + i)).Q for i, n in enumerate((d_head, d_model)))
    return ((U * torch.logspace(0, -grade, d_head, dtype=torch.float64)) @ V.mT)[None]


def pairs(grade: int, d_head: int, seed: int) -> Tensor:
    """As :func:`graded`, of numbers that bfloat16 and float16 hold: rows in pairs, which differ in one quiet column."""
    W = random(d_head // 2, 47, seed=seed).to(torch.float16).to(torch.bfloat16).double()
    W = W.repeat_interleave(2, dim=0)
    quiet = (torch.arange(d_head) % 2) * 2.0 ** -math.ceil(grade * math.log2(10))
    return torch.cat([W, quiet[:, None].double()], dim=1)[None]


def kappa(W: Tensor) -> float:
    """‖D R⁻¹‖_F by other means."""
    scaled = W / torch.linalg.vector_norm(W, dim=-1, keepdim=True)
    return float(torch.linalg.svdvals(scaled).pow(-2).sum().sqrt())


def takes_qr(factor: Factor) -> list[int]:
    return factor._factors[2]


def error(factor: Factor) -> Tensor:
    """‖Qᵀ Q − I‖ of each head."""
    eye = torch.eye(factor.R.shape[-2], dtype=torch.float64)
    Q = factor.basis.lift(eye.expand(len(factor.W), -1, -1))
    return torch.linalg.matrix_norm(Q.mT @ Q - eye, 2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_a_basis_is_as_orthonormal_as_the_stored_format_can_tell(dtype: str, seed: int) -> None:
    ways = set()
    for grade in GRADES:
        W = graded(grade, seed=seed)
        factor = Factor(W, ROUNDOFF[dtype])
        ways.add(way := bool(takes_qr(factor)))
        allowed = 4 * EPS * kappa(W) ** 2
        if way:
            assert allowed > 2.0**-24 * ROUNDOFF[dtype]
            allowed = 16 * EPS
        assert allowed < 2.0**-21 * ROUNDOFF[dtype] or way
        assert error(factor) <= allowed
        lifted = factor.basis.lift(factor.R)
        assert torch.linalg.matrix_norm(lifted - W.mT) <= 64 * EPS * torch.linalg.matrix_norm(W)
    assert ways == ({True} if dtype == "F64" else {True, False})


@pytest.mark.parametrize("seed", range(3))
def test_the_switch_is_at_the_condition_number_of_the_scaled_rows(seed: int) -> None:
    limit = math.sqrt(2.0**-24 * ROUNDOFF["BF16"] / EPS)
    assert limit == 1024
    for grade in np.arange(0, 6, 0.05):
        W = graded(float(grade), seed=seed)
        assert not 0.999 < kappa(W) / limit < 1.001
        assert bool(takes_qr(Factor(W, ROUNDOFF["BF16"]))) == (kappa(W) > limit)
        # Loud and quiet rows are no obstacle.
        loud = W * torch.logspace(0, 12, 16, dtype=torch.float64)[:, None]
        assert takes_qr(Factor(loud, ROUNDOFF["BF16"])) == takes_qr(Factor(W, ROUNDOFF["BF16"]))


def test_dependent_zero_and_too_many_rows_take_the_qr() -> None:
    W = random(1, 8, 20)
    assert takes_qr(Factor(W, 2.0**-8)) == []
    for rows in ([0, 0, 2, 3], [0, 1, 2, 3]):
        singular = W[:, rows]
        singular[:, 3] *= 0 if rows[1] else 1
        assert takes_qr(Factor(singular, 2.0**-8)) == [0]
        assert error(Factor(singular, 2.0**-8)) < 1e-14
    tall = Factor(random(2, 8, 5), 2.0**-8)
    assert takes_qr(tall) == [0, 1]
    assert tall.R.shape == (2, 5, 8)


def test_each_head_goes_its_own_way() -> None:
    W = torch.cat([graded(grade, seed=grade) for grade in (0, 7, 1, 12, 3)])
    together = Factor(W, ROUNDOFF["BF16"])
    assert takes_qr(together) == [1, 3]
    for i in range(5):
        alone = Factor(W[i : i + 1], ROUNDOFF["BF16"])
        assert takes_qr(alone) == ([0] if i in (1, 3) else [])
        assert torch.allclose(alone.R[0], together.R[i], rtol=0, atol=1e-15)
    taken = together.take([3, 0, 3])
    assert error(taken).max() < 1e-14
    assert torch.equal(taken.R, together.R[[3, 0, 3]])
    assert takes_qr(together) == [1, 3]


@pytest.mark.parametrize("grade", GRADES)
def test_singular_values_are_right_relative_to_themselves(grade: int) -> None:
    """Where they come from Gram matrices; a QR is only right relative to the largest."""
    W_Q, W_K = graded(grade, seed=5), graded(0, seed=7)
    found = QKProduct(Factor(W_Q, 2.0**-8), Factor(W_K, 2.0**-8))
    (spectrum,) = found.spectra(Channel.full)
    by_qr = QKProduct(Factor(W_Q), Factor(W_K)).spectra(Channel.full)[0]
    bound = EPS * (kappa(W_Q) ** 2 + kappa(W_K) ** 2) if not takes_qr(found.query) else 0.0
    assert torch.all((spectrum.S - by_qr.S).abs() <= bound * by_qr.S + 16 * EPS * by_qr.S[0])
    assert spectrum.rank == by_qr.rank


def by_projection(W_Q: Tensor, W_K: Tensor, channel: Channel, alpha: float) -> np.ndarray:
    """The edit, dense: from M itself."""
    q, k = W_Q[0].numpy(), W_K[0].numpy()
    dense = oracle.decompose(q, k, channel.value)
    modes = oracle.choose(dense, channel.value, "dominant", 4)
    if channel is Channel.full:  # no inverse of W_K, whose condition number would be in the result
        U = dense.U[:, list(modes)]
        return q - (1 - alpha) * (q @ U) @ U.T
    return oracle.edit(q, k, channel.value, modes, alpha, dense).W_Q


@every_channel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grade", GRADES)
def test_edits_are_those_of_the_dense_oracle_whatever_the_condition(
    grade: int, dtype: str, channel: Channel
) -> None:
    if dtype in ("BF16", "F16"):
        W_Q = pairs(min(grade, 7 if dtype == "F16" else 12), 16, seed=grade)
    else:
        W_Q = graded(grade, seed=grade).to(DTYPES[dtype]).double()
    # In half a product the closed form divides by the keys: their condition is the result's.
    W_K = graded(max(grade, 1) if channel is Channel.full else 1, seed=20).to(DTYPES[dtype]).double()
    product = QKProduct(Factor(W_Q, ROUNDOFF[dtype]), Factor(W_K, ROUNDOFF[dtype]))
    edit = edit_query(product, EditRule(channel, Select.dominant, 4, 0.5), [torch.Generator()])
    expected = by_projection(W_Q, W_K, channel, 0.5)
    if dtype == "F64":
        assert np.linalg.norm(edit.W_Q[0].numpy() - expected) <= 1e-13 * np.linalg.norm(expected)
        return
    stored = round_once(edit.W_Q, DTYPES[dtype])[0].double()
    rounded = oracle.round_to(expected, dtype)
    # What float64 leaves open of a row; a number as quiet as that has no last place to be held to.
    left_open = 16 * EPS * np.linalg.norm(W_Q[0].numpy(), axis=-1, keepdims=True) + np.zeros_like(expected)
    is_quiet = ROUNDOFF[dtype] * np.abs(expected) < left_open
    assert oracle.ulps(np.where(is_quiet, rounded, stored.numpy()), rounded, dtype) <= 1
    assert np.all(np.abs(stored.numpy() - expected)[is_quiet] <= 2 * left_open[is_quiet])
    assert np.mean(is_quiet) <= 1 / 8
    (report,) = measure(product, edit, stored[None])
    values = oracle.values(stored.numpy(), W_K[0].numpy(), channel.value, len(report.values_after))
    assert np.allclose(report.values_after, values, rtol=1e-9, atol=1e-12 * abs(values[0]))


@pytest.mark.fixtures
def test_all_heads_of_a_real_model_take_their_gram_matrix_and_store_what_a_qr_stores(smollm2: Path) -> None:
    tensors = {n: t for file in smollm2.glob("*.safetensors") for n, t in load_file(file).items()}
    layers = sum(name.endswith("q_proj.weight") for name in tensors)
    took_qr = differ = 0
    for layer in range(layers):
        name = f"model.layers.{layer}.self_attn."
        W_Q, W_K = (tensors[f"{name}{x}_proj.weight"].double().unflatten(0, (-1, 64)) for x in "qk")
        keys = [i // (len(W_Q) // len(W_K)) for i in range(len(W_Q))]
        results = []
        for roundoff in (ROUNDOFF["BF16"], 0.0):
            product = QKProduct(Factor(W_Q, roundoff), Factor(W_K, roundoff).take(keys))
            rule = EditRule(Channel.full, Select.dominant, 4, 0.5)
            results.append(
                round_once(edit_query(product, rule, [torch.Generator()] * len(W_Q)).W_Q, torch.bfloat16)
            )
            took_qr += len(takes_qr(product.query)) if roundoff else 0
        differ += int((results[0] != results[1]).sum())
    assert (layers, took_qr, differ) == (30, 0, 0)
