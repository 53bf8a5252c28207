"""JSON in one canonical form: the same values, the same bytes; and numbers as people read and records hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

SIGNIFICANT_DIGITS = 9
MAX_DEPTH = 64

Json = Any


def measured(value: Json) -> Json:
    """A figure that was measured, to nine significant digits; a tuple item by item, anything else as it is.

    Settings are not rounded: another α gives other bytes.

    Raises:
        ValueError: NaN or Inf, which JSON cannot hold.
    """
    if isinstance(value, tuple):
        return tuple(measured(item) for item in value)
    return float(f"{_finite(value):.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def exact(x: float) -> str:
    """A setting as people write it, with all the digits that it takes to read the same number again: ``0.8``, ``1``."""
    return repr(x).removesuffix(".0")


def canonical_json(value: Json) -> str:
    """Sorted keys, two-space indent, lists of scalars on one line, each number as short as it can be read back exactly.

    Raises:
        ValueError: NaN or Inf, which JSON cannot hold; or lists in lists, deeper than anything qkpatch writes.
    """
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
    return json.dumps(_finite(value) if isinstance(value, float) else value, ensure_ascii=False)


def _finite(x: float) -> float:
    if not math.isfinite(x):
        raise ValueError(f"{x} cannot be recorded")
    return x
