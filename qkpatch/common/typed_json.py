"""Frozen dataclasses as JSON objects and back: fields are keys, and their type hints are what is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from math import isfinite
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from qkpatch.common.json_text import Json

# The field for keys that a class does not know, where it has one: they are kept, and written as they were.
FURTHER = "further"
# Records come by the hundred thousand, and hints by the dozen.
_origin: Callable[[Any], Any] = cache(get_origin)
_args: Callable[[Any], Any] = cache(get_args)
# What marks a field that is no key in JSON where it is None: ``field(default=None, metadata=LEFT_OUT)``.
LEFT_OUT = {"left_out": True}


class Only(NamedTuple):
    """Marks a hint of which not every value is right: ``Annotated[int, Only("count", lambda n: n >= 0)]``."""

    what: str
    holds: Callable[[Any], object]


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


def from_json(kind: Any, value: Json, path: str = "$") -> Any:
    """``value`` as a ``kind``: a dataclass, or a type hint in one. An int counts as float, and stays as it is written.

    Raises:
        ValueError: another type, a float that is not finite, a key that is missing or unknown, and where:
            ``$.edit.modes: expected int, got str``.
    """
    if kind is Any:
        return value
    if _origin(kind) in (UnionType, Union):
        kind = _choices(kind).get(type(value), _args(kind)[0])
    if _origin(kind) is Annotated:
        kind, only = _args(kind)
        if not only.holds(made := from_json(kind, value, path)):
            raise ValueError(f"{path}: {value!r:.80} is no {only.what}")
        return made
    shape = _shape(kind)
    is_whole = shape is float and type(value) is int and abs(value) < 2**1023
    if type(value) is not shape and not is_whole:
        raise ValueError(f"{path}: expected {shape.__name__}, got {type(value).__name__}")
    if shape is float and not isfinite(value):
        raise ValueError(f"{path}: {value} is no finite number")
    if shape is kind:
        return value
    if shape is list:
        return _read_items(_args(kind), value, path)
    if is_dataclass(kind):
        return _read_fields(kind, value, path)
    if shape is dict:
        return {key: from_json(_args(kind)[1], item, f"{path}.{key}") for key, item in value.items()}
    if value not in (known := [item.value for item in kind]):
        raise ValueError(f"{path}: {value!r} is not one of {', '.join(known)}")
    return kind(value)


def unknown_keys(value: Any, path: str = "$") -> Iterator[str]:
    """Where a dataclass, or one in it, keeps keys that its class does not know."""
    if isinstance(value, tuple) and value and is_dataclass(value[0]):  # figures come by the hundred thousand
        for i, item in enumerate(value):
            yield from unknown_keys(item, f"{path}[{i}]")
    for f in fields(value) if is_dataclass(value) else ():
        if f.name == FURTHER:
            yield from (f"{path}.{key}" for key in getattr(value, FURTHER))
        else:
            yield from unknown_keys(getattr(value, f.name), f"{path}.{f.name}")


@cache
def _choices(kind: Any) -> dict[Any, Any]:
    return {_shape(one): one for one in reversed(_args(kind))}


@cache
def _shape(kind: Any) -> Any:
    """What JSON has for a ``kind``."""
    if _origin(kind) is Annotated:
        return _shape(_args(kind)[0])
    if is_dataclass(kind) or _origin(kind) is Mapping:
        return dict
    if _origin(kind) is tuple:
        return list
    return str if issubclass(kind, Enum) else kind


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """By name, the type, and whether it must be there."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: (hints[f.name], f.default is f.default_factory is MISSING) for f in fields(kind)}


def _read_fields(kind: Any, value: dict[str, Json], path: str) -> Any:
    rest, made, known = dict(value), {}, _fields(kind)
    for name, (hint, is_needed) in known.items():
        if name in rest and name != FURTHER:
            made[name] = from_json(hint, rest.pop(name), f"{path}.{name}")
        elif is_needed:
            raise ValueError(f"{path}.{name}: missing")
    if rest and FURTHER not in known:
        raise ValueError(f"{path}.{min(rest)}: unknown key")
    if rest:
        made[FURTHER] = from_json(known[FURTHER][0], rest, path)
    return kind(**made)


def _read_items(kinds: tuple[Any, ...], items: list[Json], path: str) -> tuple[Any, ...]:
    if kinds[-1] is ...:
        is_float = kinds[0] is float
        if all(type(item) is kinds[0] for item in items) and not (is_float and not all(map(isfinite, items))):
            return tuple(items)
        kinds = kinds[:1] * len(items)
    if len(kinds) != len(items):
        raise ValueError(f"{path}: expected {len(kinds)} items, got {len(items)}")
    return tuple(from_json(kinds[i], item, f"{path}[{i}]") for i, item in enumerate(items))
