"""JSON in one canonical form: the same values, the same bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

SIGNIFICANT_DIGITS = 9
MAX_DEPTH = 64

Json = Any


def round_number(x: float) -> float:
    """``x`` to nine significant digits.

    Raises:
        ValueError: NaN or Inf, which JSON cannot hold.
    """
    if not math.isfinite(x):
        raise ValueError(f"{x} cannot be recorded")
    return float(f"{x:.{SIGNIFICANT_DIGITS}g}")


def canonical_json(value: Json) -> str:
    """Sorted keys, two-space indent, lists of scalars on one line, numbers by :func:`round_number`."""
    return _canonical(value, "") + "\n"


def _canonical(value: Json, indent: str) -> str:
    inner = indent + "  "
    if len(inner) > 2 * MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, Mapping):
        if not value:
            return "{}"
        items = (
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {_canonical(value[key], inner)}"
            for key in sorted(value)
        )
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(item, (Mapping, list, tuple)) for item in value):
            return "[\n" + ",\n".join(inner + _canonical(item, inner) for item in value) + f"\n{indent}]"
        return "[" + ", ".join(_canonical(item, inner) for item in value) + "]"
    if isinstance(value, float):
        value = round_number(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
