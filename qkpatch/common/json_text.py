"""JSON: read strictly, and written in one canonical form: the same values, the same bytes."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from typing import Any

from qkpatch.errors import CheckpointError

SIGNIFICANT_DIGITS = 9
MAX_DEPTH = 64
# In memory a value takes 100 to 300 bytes, however short it is written. 10^12 parameters lie in some 200,000 tensors:
# 400,000 values of an index, 1.6 million of a header.
MAX_VALUES = 4_000_000
MAX_DIGITS = 300  # of a whole number: float, which all readers may want, holds no more
# Walks a JSON text from escape to escape; group 1 is half a surrogate pair without the other half.
_ESCAPE = re.compile(r"\\(?:u[dD][89aAbB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F])|.)")

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Json = Any

_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_SCALARS = {str, int, float, bool, type(None)}


def measured(value: Json) -> Json:
    """A figure that was measured, to nine significant digits; a tuple item by item, anything else as it is.

    Settings are not rounded: another α gives other bytes.
    """
    if isinstance(value, tuple):
        return tuple(measured(item) for item in value)
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


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
        items = (f"{inner}{_text(key)}: {_canonical(value[key], inner)}" for key in sorted(value))
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    # Figures come by the hundred thousand.
    if isinstance(value, list | tuple) and not _SCALARS.issuperset(map(type, value)):
        return "[\n" + ",\n".join(inner + _canonical(item, inner) for item in value) + f"\n{indent}]"
    return _text(value)


def load_json(raw: bytes, where: str, *, unique: bool = False) -> Any:
    """Parse JSON; ``unique`` refuses keys that are repeated, of which readers take one or another.

    NaN and Infinity are taken: transformers writes Infinity into some config.json, others NaN into an index.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if unique and len(result) != len(items):
            raise CheckpointError("a key appears twice in one JSON object", where=where)
        return result

    try:
        check_size(raw)
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=pairs, parse_int=_integer)
        if (half := half_surrogate(text)) is not None:
            raise ValueError(f"half a surrogate pair (char {half})")
        return value
    except (ValueError, RecursionError) as error:
        is_page = raw.lstrip()[:1] == b"<"
        fix = f"mend it, or download it again{', since it is an HTML page' if is_page else ''}"
        if raw.startswith(_MARKS):
            fix = "save it as UTF-8 without a byte-order mark"
        raise CheckpointError(f"not valid JSON: {error}", where=where, fix=fix) from error


def check_size(raw: bytes) -> None:
    """Raise :class:`ValueError` where JSON may hold more than :data:`MAX_VALUES`; the text is not parsed for that."""
    if (n_values := count_values(raw)) > MAX_VALUES:
        raise ValueError(f"{n_values:,} values, more than any real file of this kind ({MAX_VALUES:,})")


def count_values(raw: bytes) -> int:
    """As many values as JSON, or a part of its text, can hold at most."""
    return sum(map(raw.count, (b",", b"[", b"{")))


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def half_surrogate(text: str) -> int | None:
    """Where valid JSON escapes half a surrogate pair without the other, which no UTF-8 can hold."""
    return next((escape.start() for escape in _ESCAPE.finditer(text) if escape[1]), None)
