"""Frozen dataclasses as JSON objects and back: fields are keys, and their type hints are what is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache, partial
from itertools import count, repeat
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from qkpatch.common.json_text import Json

# The field for keys that a class does not know, where it has one: they are kept, and written as they were.
FURTHER = "further"
# What marks a field that is no key in JSON where it is None: ``field(default=None, metadata=LEFT_OUT)``.
LEFT_OUT = {"left_out": True}

_Read = Callable[[Json], Any]


class _WrongError(ValueError):
    """What is wrong with a value, and the steps that lead to it, the last one first."""

    def __str__(self) -> str:
        what, *steps = self.args
        return f"${''.join(reversed(steps))}: {what}"


def as_json(value: Any) -> Json:
    """Plain JSON values of a dataclass, or of what a field of one may hold."""
    if is_dataclass(value):
        named = [(f, getattr(value, f.name)) for f in fields(value)]
        said = {f.name: item for f, item in named if f.metadata != LEFT_OUT or item is not None}
        value = {**said.pop(FURTHER, {}), **said}
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def from_json(kind: Any, value: Json) -> Any:
    """``value`` as a ``kind``: a dataclass, or a type hint in one. An int counts as float, and stays as it is written.

    Raises:
        ValueError: another type, a key that is missing or unknown, and where: ``$.edit.modes: expected int, got str``.
    """
    return _reader(kind)[1](value)


@cache
def _reader(kind: Any) -> tuple[Any, _Read]:
    """What JSON has for a ``kind``, and what reads it. Made once: records come by the hundred thousand."""
    origin, args = get_origin(kind), get_args(kind)
    shape, read = kind, None
    if isinstance(kind, UnionType):
        (_, first), of_type = _reader(args[0]), dict(map(_reader, reversed(args)))
        return None, lambda value: of_type.get(type(value), first)(value)
    if kind is Any:
        return None, lambda value: value
    if is_dataclass(kind):
        shape, read = dict, _fields_reader(kind)
    elif origin is Mapping:
        shape, read = dict, partial(_read_values, _reader(args[1])[1])
    elif origin is tuple:
        shape, read = list, partial(_read_items, args, [_reader(one)[1] for one in args if one is not ...])
    elif issubclass(kind, Enum):
        shape, read = str, partial(_read_member, {item.value: item for item in kind})

    def checked(value: Json) -> Any:
        is_whole = shape is float and type(value) is int and abs(value) < 2**1023
        if type(value) is not shape and not is_whole:
            raise _WrongError(f"expected {shape.__name__}, got {type(value).__name__}")
        return value if read is None else read(value)

    return shape, checked


def _each(parts: Iterable[tuple[str | int, _Read, Json]]) -> Iterator[Any]:
    for place, read, value in parts:
        try:
            yield read(value)
        except _WrongError as error:
            error.args += (f"[{place}]" if isinstance(place, int) else f".{place}",)
            raise


def _fields_reader(kind: Any) -> _Read:
    hints = get_type_hints(kind)
    known = {f.name: _reader(hints[f.name])[1] for f in fields(kind) if f.name != FURTHER}
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]

    def read(value: dict[str, Json]) -> Any:
        there = [name for name in known if name in value]
        made = dict(zip(there, _each((name, known[name], value[name]) for name in there), strict=True))
        if missing := [name for name in needed if name not in made]:
            raise _WrongError("missing", f".{missing[0]}")
        rest = {} if len(made) == len(value) else {key: value[key] for key in value if key not in made}
        if rest and FURTHER not in hints:
            raise _WrongError("unknown key", f".{min(rest)}")
        return kind(**made, **({FURTHER: rest} if rest else {}))

    return read


def _read_values(read: _Read, value: dict[str, Json]) -> dict[str, Any]:
    return dict(zip(value, _each((key, read, item) for key, item in value.items()), strict=True))


def _read_items(kinds: tuple[Any, ...], readers: Iterable[_Read], items: list[Json]) -> tuple[Any, ...]:
    if kinds[-1] is ...:
        if all(type(item) is kinds[0] for item in items):
            return tuple(items)
        readers = repeat(*readers)
    elif len(kinds) != len(items):
        raise _WrongError(f"expected {len(kinds)} items, got {len(items)}")
    return tuple(_each(zip(count(), readers, items, strict=False)))


def _read_member(known: Mapping[str, Enum], value: str) -> Enum:
    if value not in known:
        raise _WrongError(f"{value!r} is not one of {', '.join(known)}")
    return known[value]
