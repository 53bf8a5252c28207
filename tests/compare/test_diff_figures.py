"""The figures of a tensor that differs are those of numpy and of the oracle, whatever its bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from two_sides import comparing, differing, flipped
from typer.testing import Result

from qkpatch.checkpoint.pairs import CHUNK
from qkpatch.common.dtypes import DTYPE_BITS


@pytest.fixture
def compare(run: Callable[..., Result], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    return comparing(differing(run), tmp_path)


# -------- figures, by numpy and by the oracle's ordinals

INTEGER = {
    "F64": np.int64,
    "F32": np.int32,
    "F16": np.int16,
    "BF16": np.int16,
    "F8_E4M3": np.int8,
    "F8_E5M2": np.int8,
}
FRACTION = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}


def numbers(data: bytes, dtype: str) -> oracle.Matrix:
    """What the bytes mean, without torch."""
    raw = np.frombuffer(data, INTEGER[dtype])
    if dtype == "BF16":
        with np.errstate(invalid="ignore"):
            return (raw.astype(np.int64) << 16).astype(np.int32).view(np.float32).astype(np.float64)
    if dtype in ("F8_E5M2", "F8_E4M3"):
        return np.array([small(int(code) & 255, dtype) for code in raw])
    with np.errstate(invalid="ignore"):
        return raw.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]).astype(np.float64)


def small(code: int, dtype: str) -> float:
    """One FP8 number, by the definition of its format."""
    fraction, bias = (2, 15) if dtype == "F8_E5M2" else (3, 7)
    sign, exponent, rest = (-1) ** (code >> 7), (code & 127) >> fraction, code & (2**fraction - 1)
    if dtype == "F8_E5M2" and exponent == 31:
        return sign * float("inf") if rest == 0 else float("nan")
    if dtype == "F8_E4M3" and code & 127 == 127:
        return float("nan")
    if exponent == 0:
        return sign * rest * 2.0 ** (1 - bias - fraction)
    return float(sign * (1 + rest / 2**fraction) * 2.0 ** (exponent - bias))


def ordinals(data: bytes, dtype: str) -> list[int]:
    """Positions among all the numbers of a format."""
    if dtype in oracle.FORMATS:
        return [int(n) for n in oracle.ordinal(numbers(data, dtype), dtype)]
    if dtype == "F64":
        raw = [int(n) for n in np.frombuffer(data, np.int64)]
        return [n if n >= 0 else -(n + 2**63) for n in raw]
    line = sorted({x for x in (small(code, dtype) for code in range(256)) if np.isfinite(x)})
    return [line.index(x) if x in line else 0 for x in numbers(data, dtype)]


def expected(a: bytes, b: bytes, dtype: str) -> dict[str, Any]:
    """The figures again."""
    x, y = numbers(a, dtype), numbers(b, dtype)
    raw_a, raw_b = (np.frombuffer(data, INTEGER[dtype]) for data in (a, b))
    differs = raw_a != raw_b
    finite = np.isfinite(x) & np.isfinite(y)
    moved = differs & finite & (x != y)
    with np.errstate(over="ignore", invalid="ignore"):
        delta = (y - x)[moved]
    distances = [
        abs(p - q) for p, q, m in zip(ordinals(a, dtype), ordinals(b, dtype), moved, strict=True) if m
    ]
    buckets: dict[tuple[int, int | None], int] = {}
    for distance in distances:
        first, last = 1, 1
        while last < distance and last <= 2 ** FRACTION[dtype]:
            first, last = last + 1, last * 2
        key = (first, last if last <= 2 ** FRACTION[dtype] else None)
        buckets[key] = buckets.get(key, 0) + 1
    norm_a = np.linalg.norm(x[np.isfinite(x)])
    return {
        "elements": len(x),
        "differing_elements": int(differs.sum()),
        "differing_bytes": sum(p != q for p, q in zip(a, b, strict=True)),
        "differing": int(moved.sum()),
        "zero_signs": int((differs & (x == 0) & (y == 0)).sum()),
        "infinite": int((differs & ~np.isnan(x) & ~np.isnan(y) & ~finite).sum()),
        "nan_only_in_a": int((np.isnan(x) & ~np.isnan(y)).sum()),
        "nan_only_in_b": int((np.isnan(y) & ~np.isnan(x)).sum()),
        "nan_payloads": int((differs & np.isnan(y) & np.isnan(x)).sum()),
        "max_abs": float(np.abs(delta).max(initial=0)),
        "frobenius": float(np.linalg.norm(delta)),
        "frobenius_a": float(norm_a),
        "relative": float(np.linalg.norm(delta) / norm_a),
        "max_ulps": min(max(distances, default=0), 2**63 - 1),
        "ulps": [
            {"first": f, "last": t, "count": n}
            for (f, t), n in sorted(buckets.items(), key=lambda i: i[0][0])
        ],
    }


def check(found: dict[str, Any], want: dict[str, Any]) -> None:
    got = {**found, **found["values"]}
    for key, value in want.items():
        if isinstance(value, float):
            assert got[key] == pytest.approx(value, rel=1e-12), key
        else:
            assert got[key] == value, key


@pytest.mark.parametrize("dtype", INTEGER)
def test_the_figures_of_arbitrary_bits_are_the_oracles(dtype: str, compare) -> None:
    rng = np.random.default_rng(7)
    n = 3000
    raw_a = rng.integers(
        np.iinfo(INTEGER[dtype]).min, np.iinfo(INTEGER[dtype]).max, n, INTEGER[dtype], endpoint=True
    )
    if dtype == "F64":  # not so large that differences overflow; that is another test
        raw_a = (rng.standard_normal(n) * 10.0 ** rng.integers(-20, 20, n)).view(np.int64)
        raw_a[:3] = np.array([np.nan, np.inf, -np.inf]).view(np.int64)
    raw_b = raw_a.copy()
    near = rng.random(n) < 0.6
    steps = rng.integers(-40 if INTEGER[dtype] is not np.int8 else -6, 7, n)
    with np.errstate(over="ignore"):
        raw_b[near] = (raw_a + steps.astype(INTEGER[dtype]))[near]
    raw_b[~near & (rng.random(n) < 0.5)] = rng.permutation(raw_a)[:1]
    raw_a[-4:-2], raw_b[-4:-2] = 0, np.iinfo(INTEGER[dtype]).min  # +0 and -0
    a, b = raw_a.tobytes(), raw_b.tobytes()
    want = expected(a, b, dtype)
    assert want["zero_signs"] >= 2
    assert want["differing"] > 500
    check(compare(dtype, a, b, [30, 100]), want)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_figures_of_a_tensor_of_several_chunks_are_the_oracles(dtype: str, compare) -> None:
    """Chunks that are equal, before and after those that differ, count towards the norm of A."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(5 * CHUNK // 4 + 77) * 0.1).astype(np.float32)
    x[600_000] = 5  # whose change is the largest, not the last
    raw_a = x.view(np.int32) if dtype == "F32" else (x.view(np.int32) >> 16).astype(np.int16)
    raw_b = raw_a.copy()
    per_chunk = CHUNK // raw_a.itemsize
    raw_b[per_chunk + 5 : per_chunk + 2005 : 3] += 1
    raw_b[[600_000, -2]] ^= np.iinfo(raw_a.dtype).min
    a, b = raw_a.tobytes(), raw_b.tobytes()
    check(compare(dtype, a, b, [len(x)]), expected(a, b, dtype))


def test_ulps_are_counted_between_all_pairs_of_bfloat16_steps(compare) -> None:
    """From 1.0 up by every power of two, and one beside it."""
    steps = [d for k in range(1, 9) for d in (2**k - 1, 2**k, 2**k + 1)]
    a = np.full(len(steps), 0x3F80, np.int16)
    b = (a + np.array(steps)).astype(np.int16)
    found = compare("BF16", a.tobytes(), b.tobytes(), [len(steps)])
    check(found, expected(a.tobytes(), b.tobytes(), "BF16"))
    assert found["values"]["max_ulps"] == 257
    assert found["values"]["ulps"][-1]["first"] == 129
    assert found["values"]["ulps"][-1]["last"] is None


def test_float64_beyond_its_own_range_is_said_without_a_number(compare) -> None:
    a, b = np.array([1.7e308, 1e-320, 3.0]), np.array([-1.7e308, 1e-320, 3.0])
    values = compare("F64", a.tobytes(), b.tobytes(), [3])["values"]
    assert values["max_abs"] is None
    assert values["frobenius"] is None
    assert values["frobenius_a"] == pytest.approx(1.7e308)
    assert values["max_ulps"] == 2**63 - 1  # as far as can be counted
    assert values["ulps"] == [{"first": 2**52 + 1, "last": None, "count": 1}]


def test_squares_of_tiny_and_huge_float64_do_not_vanish(compare) -> None:
    for scale in (1e-200, 1e200):
        a = np.array([3.0, 4.0, 0.0]) * scale
        b = np.array([3.0, 4.5, 0.0]) * scale
        values = compare("F64", a.tobytes(), b.tobytes(), [3])["values"]
        assert values["frobenius_a"] == pytest.approx(5 * scale, rel=1e-14)
        assert values["relative"] == pytest.approx(0.1, rel=1e-12)


def test_a_tensor_of_zeros_has_no_relative_change(compare, run, tmp_path: Path) -> None:
    values = compare("F32", bytes(8), np.array([0, 2], np.float32).tobytes(), [2])["values"]
    assert (values["frobenius"], values["frobenius_a"], values["relative"]) == (2, 0, None)


def test_a_scalar(compare) -> None:
    a, b = (np.float32(x).tobytes() for x in (1.0, -1.0))
    found = compare("F32", a, b, [])
    assert (found["elements"], found["differing_elements"]) == (1, 1)
    assert found["values"]["max_ulps"] == 2 * 0x3F800000
    assert found["values"]["relative"] == 2


# -------- what is no plain number


def f32(*bits: int) -> bytes:
    return np.array(bits, np.uint32).tobytes()


NAN, OTHER_NAN, INF, ONE, MINUS = 0x7FC00000, 0xFFC00001, 0x7F800000, 0x3F800000, 0x80000000


def test_nans_are_counted_apart_and_leave_the_figures_alone(compare) -> None:
    found = compare("F32", f32(NAN, NAN, ONE, ONE, NAN), f32(OTHER_NAN, ONE, NAN, ONE + 1, NAN), [5])
    values = found["values"]
    assert found["differing_elements"] == 4
    assert (values["nan_payloads"], values["nan_only_in_a"], values["nan_only_in_b"]) == (1, 1, 1)
    assert (values["differing"], values["max_ulps"]) == (1, 1)
    assert values["frobenius"] == values["max_abs"] == 2**-23
    assert values["frobenius_a"] == pytest.approx(2**0.5)


def test_signs_of_zero_differ_in_bits_and_not_in_value(compare, run, tmp_path: Path) -> None:
    found = compare("F32", f32(0, MINUS, ONE), f32(MINUS, 0, ONE), [3])
    assert (found["differing_elements"], found["values"]["zero_signs"]) == (2, 2)
    assert (found["values"]["differing"], found["values"]["frobenius"], found["values"]["ulps"]) == (0, 0, [])
    text = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors").stdout
    assert "2 ±0 (equal in value)" in text


def test_infinities_are_counted_apart(compare) -> None:
    values = compare("F32", f32(INF, ONE, INF, INF), f32(ONE, INF, INF | MINUS, INF), [4])["values"]
    assert (values["infinite"], values["differing"], values["frobenius"], values["frobenius_a"]) == (
        3,
        0,
        0,
        1,
    )


def test_smallest_numbers_around_zero_are_two_steps_apart(compare) -> None:
    assert compare("F32", f32(1), f32(MINUS | 1), [1])["values"]["max_ulps"] == 2


@pytest.mark.parametrize(
    ("dtype", "elements"),
    [("U8", 2), ("I8", 2), ("BOOL", 2), ("F8_E8M0", 2), ("U16", 1), ("I16", 1), ("U32", 1), ("I32", 1), ("I64", 1),
     ("U64", 1), ("C64", 1), ("F4", None), ("F6_E2M3", None), ("F6_E3M2", None), ("F2_FUTURE", None)],
)  # fmt: skip
def test_what_has_no_ulps_is_counted_by_elements_and_bytes(dtype: str, elements: int | None, compare) -> None:
    data = bytes(48)
    n = 48 * 8 // DTYPE_BITS.get(dtype, 2)
    found = compare(dtype, data, flipped(flipped(data, 9), 8), [n])
    assert (found["differing_bytes"], found["differing_elements"]) == (2, elements)
    assert found["values"] is None


@pytest.mark.parametrize("dtype", ["F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_all_pairs_of_neighbours_in_fp8_without_negative_zero_are_one_step_apart(dtype: str, compare) -> None:
    codes = bytes(range(127)), bytes(range(1, 128))
    values = compare(dtype, *codes, [127])["values"]
    assert values["ulps"] == [{"first": 1, "last": 1, "count": 127}]
    assert compare(dtype, b"\x80\x81", b"\x01\x01", [2])["values"]["nan_only_in_a"] == 1


# -------- in two dtypes


@pytest.mark.parametrize("wide", ["F32", "F64"])
@pytest.mark.parametrize("narrow", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_another_float_dtype_is_compared_by_value(narrow: str, wide: str, compare) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, np.iinfo(INTEGER[narrow]).max * 3 // 4, 500, INTEGER[narrow])
    x = numbers(codes.tobytes(), narrow)
    y = x.copy()
    kind = {"F32": np.float32, "F64": np.float64}[wide]
    same = compare(narrow, codes.tobytes(), y.astype(kind).tobytes(), [500], wide)
    assert (same["differing_elements"], same["differing_bytes"], same["values"]["frobenius"]) == (0, None, 0)
    y[::7] *= 1.5
    y[3] = np.nan
    found = compare(narrow, codes.tobytes(), y.astype(kind).tobytes(), [500], wide)
    moved = (x != y) & ~np.isnan(y)
    values = found["values"]
    assert values["differing"] == moved.sum()
    assert values["nan_only_in_b"] == 1
    assert values["frobenius"] == pytest.approx(np.linalg.norm((y - x)[moved]))
    assert values["frobenius_a"] == pytest.approx(np.linalg.norm(x))
    assert (values["ulps"], values["max_ulps"]) == (None, None)


def test_another_float_dtype_over_several_chunks(compare) -> None:
    x = np.random.default_rng(0).standard_normal(CHUNK // 3).astype(np.float32)
    y = x.astype(np.float64)
    y[-1] += 1
    found = compare("F32", x.tobytes(), y.tobytes(), [len(x)], "F64")
    assert found["differing_elements"] == 1
    assert found["values"]["max_abs"] == pytest.approx(1)
    assert found["values"]["frobenius_a"] == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-12)


def test_nan_is_nan_and_signs_of_zero_count_in_any_dtype(compare) -> None:
    a = np.array([np.nan, 0.0, 1.0], np.float32).tobytes()
    b = np.array([np.nan, -0.0, 1.0], np.float64).tobytes()
    found = compare("F32", a, b, [3], "F64")
    assert (found["differing_elements"], found["values"]["zero_signs"]) == (1, 1)
