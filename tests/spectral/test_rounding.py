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


NARROW = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn}
del NARROW["F32"]
every_narrow_dtype = pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)


def rounded_to_odd_first(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boldo & Melquiond's way for every number, which ``round_once`` goes only where it must."""
    near = x.to(torch.float32)
    error = x - near.to(torch.float64)  # exact
    bits = near.view(torch.int32)
    away = ((error > 0) == (x > 0)).to(torch.int32) * 2 - 1
    is_even_and_inexact = (error.abs() > 0) & (bits % 2 == 0)
    return (bits + away * is_even_and_inexact).view(torch.float32).to(dtype)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int8 if x.element_size() == 1 else torch.int16)


def hard_cases(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a narrow dtype, the midpoints between them, and what lies at any small distance from those."""
    size = torch.finfo(dtype).bits
    codes = torch.arange(-(2 ** (size - 1)), 2 ** (size - 1), dtype=torch.int16 if size == 16 else torch.int8)
    numbers = codes.view(dtype).double()
    finite = numbers[numbers.isfinite()].sort().values
    top = torch.finfo(dtype).max
    step = top - finite[-2]
    edges = torch.tensor([top + step / 2, top + step, 2 * top, 1e38, 3.5e38, 1e300, torch.inf]).double()
    exact = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, edges, -edges])
    tiny = torch.tensor([5e-324, 1e-310, 1e-46, 7e-46, 1e-45, 1e-38]).double()
    relative = 1 + torch.tensor([2.0**-k for k in (*range(8, 34), 40, 52)]).double()
    near = torch.cat([exact * factor for factor in (*relative, *1 / relative)])
    neighbours = [torch.nextafter(exact, torch.full_like(exact, to)) for to in (-torch.inf, torch.inf)]
    return torch.cat([exact, near, *neighbours, tiny, -tiny, torch.tensor([torch.nan]).double()])


@every_narrow_dtype
def test_only_midpoints_need_care_and_every_bit_is_as_if_all_had_it(dtype: torch.dtype) -> None:
    hard = hard_cases(dtype)
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(
        200_001, generator=generator, dtype=torch.float64
    )  # odd, so that blocks are of one
    spread = ordinary * torch.logspace(-50, 40, 200_001, dtype=torch.float64)
    for x in (hard, -hard, ordinary, spread, ordinary[:-1].view(100, 2000), hard.to(torch.float32).double()):
        assert torch.equal(bits_of(round_once(x, dtype)), bits_of(rounded_to_odd_first(x, dtype)))
    plain = bits_of(hard.to(torch.float32).to(dtype)) != bits_of(round_once(hard, dtype))
    assert 0.01 < plain.float().mean() < 0.5


@every_narrow_dtype
@given(x=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=64))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_64_bits_round_as_if_all_had_care(dtype: torch.dtype, x: list[int]) -> None:
    numbers = torch.tensor(x).view(torch.float64)
    assert torch.equal(bits_of(round_once(numbers, dtype)), bits_of(rounded_to_odd_first(numbers, dtype)))


@every_narrow_dtype
def test_nothing_and_slices_round_too(dtype: torch.dtype) -> None:
    assert round_once(torch.empty(0, 7, dtype=torch.float64), dtype).shape == (0, 7)
    x = hard_cases(dtype)[:1000].view(20, 50)
    for part in (x.mT, x[:, 3:20], x[3], x[0, 0]):
        assert torch.equal(
            bits_of(round_once(part, dtype)), bits_of(rounded_to_odd_first(part.contiguous(), dtype))
        )
