"""What safetensors calls its dtypes: how wide each is, which hold floating point numbers, which of them can be edited.

FP8 with block scales is edited too, by rules of its own: :mod:`qkpatch.spectral.fp8`.
"""

from __future__ import annotations

from typing import NamedTuple


class FloatFormat(NamedTuple):
    """A floating point format that torch has."""

    torch: str  # its name there
    fraction: int  # explicit bits of the significand: 2^fraction ULPs are a factor of two


# fmt: off
DTYPE_BITS: dict[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}
# fmt: on
FLOATS = {
    "F64": FloatFormat("float64", 52),
    "F32": FloatFormat("float32", 23),
    "F16": FloatFormat("float16", 10),
    "BF16": FloatFormat("bfloat16", 7),
    "F8_E4M3": FloatFormat("float8_e4m3fn", 3),
    "F8_E5M2": FloatFormat("float8_e5m2", 2),
    "F8_E4M3FNUZ": FloatFormat("float8_e4m3fnuz", 3),
    "F8_E5M2FNUZ": FloatFormat("float8_e5m2fnuz", 2),
}
EDITABLE = ("F64", "F32", "F16", "BF16")
