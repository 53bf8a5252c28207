"""``round_once`` is one rounding to nearest even, for every stored dtype."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkpatch.spectral.rounding import round_once

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    out = round_once(torch.from_numpy(np.atleast_1d(x)), DTYPES[dtype])
    assert out.dtype == DTYPES[dtype]
    return out.double().numpy()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit by bit: the sign of zero counts."""
    return np.array_equal(a, b) and np.array_equal(np.signbit(a), np.signbit(b))


def grid(dtype: str) -> np.ndarray:
    """All finite numbers ≥ 0 of a 16-bit dtype, ascending; for float32 every 65,521st."""
    if dtype == "F32":
        return np.arange(0, 0x7F800000, 65521, dtype=np.int32).view(np.float32).astype(np.float64)
    stop = {"BF16": 0x7F80, "F16": 0x7C00}[dtype]
    return torch.arange(stop, dtype=torch.int16).view(DTYPES[dtype]).double().numpy()


def midpoints(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Exact midpoints above the grid's numbers, and whether the number below is the even one."""
    below = grid(dtype)
    half_step = np.ldexp(0.5, oracle.step_exponent(below, dtype))
    return below + half_step, oracle.ordinal(below, dtype) % 2 == 0


@every_dtype
def test_the_oracle_picks_the_nearest_number_and_the_even_one_of_two(dtype: str) -> None:
    numbers = grid(dtype)
    middle, even_below = midpoints(dtype)
    up = 2 * middle - numbers
    down, above = np.nextafter(middle, 0), np.nextafter(middle, np.inf)
    top = oracle.FORMATS[dtype][1] + 1
    up = np.where(up >= 2.0**top, np.inf, up)
    assert same(oracle.round_to(numbers, dtype), numbers)
    assert same(oracle.round_to(down, dtype), numbers)
    assert same(oracle.round_to(above, dtype), up)
    assert same(oracle.round_to(middle, dtype), np.where(even_below, numbers, up))


@every_dtype
def test_every_midpoint_and_its_float64_neighbours_round_once(dtype: str) -> None:
    middle, _ = midpoints(dtype)
    for x in (middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf)):
        assert same(rounded(x, dtype), oracle.round_to(x, dtype))
        assert same(rounded(-x, dtype), oracle.round_to(-x, dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_plain_cast_rounds_twice_next_to_a_midpoint(dtype: str) -> None:
    middle, even_below = midpoints(dtype)
    x = np.where(even_below, np.nextafter(middle, np.inf), np.nextafter(middle, 0))
    plain = torch.from_numpy(x).to(DTYPES[dtype]).double().numpy()
    wrong = plain != oracle.round_to(x, dtype)
    assert wrong.mean() > 0.9
    assert same(rounded(x[wrong], dtype), oracle.round_to(x[wrong], dtype))


@every_dtype
@given(values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=64))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_any_float64_rounds_once(dtype: str, values: list[float]) -> None:
    x = np.array(values, dtype=np.float64)
    assert same(rounded(x, dtype), oracle.round_to(x, dtype))


@every_dtype
def test_values_of_every_exponent_round_once(dtype: str) -> None:
    generator = np.random.default_rng(0)
    _, largest, smallest = oracle.FORMATS[dtype]
    exponents = generator.integers(smallest - 30, largest + 3, 100_000)
    x = np.ldexp(generator.standard_normal(100_000), exponents)
    expected = oracle.round_to(x, dtype)
    tiny = 2.0**smallest
    assert np.isinf(expected).any()
    assert (expected == 0).any()
    assert ((expected != 0) & (np.abs(expected) < tiny)).any()
    assert same(rounded(x, dtype), expected)


@every_dtype
def test_numbers_of_the_dtype_stay_and_zero_keeps_its_sign(dtype: str) -> None:
    for x in (grid(dtype), -grid(dtype)):
        assert same(rounded(x, dtype), x)


@every_dtype
def test_overflow_starts_half_a_step_above_the_largest_number(dtype: str) -> None:
    bits, largest, _ = oracle.FORMATS[dtype]
    top = (2 - 2.0 ** (1 - bits)) * 2.0**largest
    edge = top + 2.0 ** (largest - bits)
    x = np.array([top, np.nextafter(edge, 0), edge, -edge, np.inf])
    assert same(rounded(x, dtype), np.array([top, top, np.inf, -np.inf, np.inf]))


@every_dtype
def test_nan_stays_nan(dtype: str) -> None:
    assert np.isnan(rounded(np.array([np.nan]), dtype)).all()
