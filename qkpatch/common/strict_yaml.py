"""Strict reading of YAML and JSON settings: every key known, every type exact, all faults told together.

:func:`top_level` reads what others wrote, such as the head of a model card, and leaves it to the letter.

YAML's ``safe_load`` keeps the last of two equal keys and reads ``1e-3`` as a string; here the first is a
fault and the second is refused by type, each with its place: ``$.config.defaults: expected int, got str '1e-3'``.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from enum import Enum
from itertools import pairwise
from typing import Any, TypeVar

import yaml

from qkpatch.common.text import NUMBER, cut, meant
from qkpatch.errors import RecipeError

E = TypeVar("E", bound=Enum)
T = TypeVar("T")

_PLAIN_TYPES = {"null", "bool", "int", "float", "str"}
# What no file's name, or no UTF-8, can hold; escapes can write it.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,299})", re.ASCII)

_MOST_UNKNOWN = 100
MAX_BYTES = 1 << 20  # settings are written by hand; more than 1 MiB is a mistake or an attack


class _StrictLoader(yaml.SafeLoader):
    """``SafeLoader`` without duplicate keys, aliases (so no alias bombs), tags, and numbers that are not decimal."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _refused("aliases (*name) are not allowed", parent)
        # A tag may ask for a type that the value is not, and PyYAML's constructors trust it: `!!map [a]`, `!!bool x`.
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _refused(f"a value is tagged as {event.tag}; leave the tag out", event)
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode):
            if node.tag.rpartition(":")[2] not in _PLAIN_TYPES:
                raise _refused(f"{node.value!r} is tagged as {node.tag}; quote it", node)
            if found := _NO_TEXT.search(node.value):
                raise _refused(f"a text holds the character {found[0]!r}", node)
            # YAML 1.1 reads 010 as eight, 1:30 and 1:30.0 as ninety, and 1_0.5 as ten and a half.
            is_int, is_float = (node.tag.endswith(kind) for kind in (":int", ":float"))
            if (is_int and not _INTEGER.fullmatch(node.value)) or (is_float and set(node.value) & set(":_")):
                raise _refused(
                    f"{node.value!r} is not a plain decimal number; write 10 or 0.5, or quote it", node
                )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused by the superclass
            if key in seen:
                raise _refused(f"duplicate key {key!r}", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refused(what: str, at: Any) -> yaml.MarkedYAMLError:
    """The error for something that YAML knows and settings do not need; ``at`` is a node or an event."""
    return yaml.constructor.ConstructorError(None, None, what, getattr(at, "start_mark", None))


def load_yaml(text: bytes, where: str) -> Any:
    """Parse one YAML document; malformed text, duplicate keys, aliases and tags are a :class:`RecipeError`."""
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{len(text)} bytes of YAML, more than {MAX_BYTES}", where=where)
    try:
        return yaml.load(text.decode("utf-8"), Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8: {error}", where=where) from error
    except RecursionError as error:
        raise RecipeError("nested too deeply", where=where) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise RecipeError(f"not valid YAML: {error.problem or error.context}", where=place) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # OverflowError is PyYAML's for "\Uffffffff", a character beyond all.
        raise RecipeError(f"not valid YAML: {error}", where=where) from error


def yaml_text(value: Any) -> str:
    """What :func:`load_yaml` reads back; an innermost list or mapping is on one line."""
    return str(yaml.safe_dump(value, default_flow_style=None, sort_keys=False, width=1 << 20))


# A key's lines to the letter; and its text or texts, None for each null, None where it has another value.
Entry = tuple[str, tuple[str | None, ...] | None]


def top_level(text: str, where: str) -> dict[str, Entry] | None:
    """The top-level keys of a document in any of YAML's spellings; None where it is no mapping.

    Raises:
        RecipeError: it is not YAML, or longer than a person writes.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{len(text)} characters of YAML", where=where)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise RecipeError(f"not YAML: {getattr(error, 'problem', None) or error}", where=where) from error
    if not isinstance(root, yaml.MappingNode):
        return {} if root is None else None
    keys, begins = [key for key, _ in root.value], [key.start_mark.index for key, _ in root.value[1:]]
    lines = [text[begin:end] for begin, end in pairwise([0, *begins, len(text)])]
    # In braces, indented, behind a question mark, or with names for values, lines do not stand by themselves.
    if root.flow_style or "&" in text or any(key.start_mark.column for key in keys):
        alone = (yaml.MappingNode(root.tag, [pair], flow_style=False) for pair in root.value)
        lines = [yaml.serialize(one, None, yaml.SafeDumper, allow_unicode=True, width=1e9) for one in alone]
    return {
        key.value: (own, _texts(value))
        for (key, value), own in zip(root.value, lines, strict=False)
        if isinstance(key, yaml.ScalarNode)
    }


def _texts(node: yaml.Node) -> tuple[str | None, ...] | None:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        return None
    return tuple(None if item.tag.endswith(":null") else item.value for item in items)


class Fields:
    """Typed access to one mapping; collects faults of itself and its children instead of raising.

    ``take`` each expected key, then ``finish`` the root: what was not taken is an unknown key.
    """

    def __init__(self, data: Any, where: str, path: str = "$", faults: list[str] | None = None) -> None:
        self.path = path
        self._where = where
        self._faults = faults if faults is not None else []
        self._children: list[Fields] = []
        self._data: dict[Any, Any] = data if isinstance(data, dict) else {}
        self._taken: set[Any] = set()
        if not isinstance(data, dict):
            self.fault("expected a mapping, got " + ("nothing" if data is None else _show(data)))

    def fault(self, message: str, key: object = None) -> None:
        """Record a fault at this mapping or at one of its keys."""
        self._faults.append(f"{self.path if key is None else f'{self.path}.{key}'}: {message}")

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def is_a(self, key: str, kind: type) -> bool:
        """Whether the value at ``key`` is exactly of ``kind``, for keys that may be written in several ways."""
        return type(self._data.get(key)) is kind

    def string_keys(self) -> list[str]:
        """All keys, each of which must be a string."""
        for key in self._data:
            if not isinstance(key, str):
                self.fault(f"expected a string as key, got {_show(key)}")
        return [key for key in self._data if isinstance(key, str)]

    def take(self, key: str, kind: type[T], *, default: T, required: bool = False) -> T:
        """The value at ``key`` when it is exactly of ``kind`` (an int counts as float, a bool never as int)."""
        self._taken.add(key)
        if key not in self._data:
            if required:
                self.fault("missing", key)
            return default
        value = self._data[key]
        if kind is float and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if type(value) is not kind:
            fix = ""
            if kind is list and type(value) in (str, int, float):
                fix = f"; write {key}: [{value!s:.60}]"
            elif kind in (int, float) and type(value) is str:
                fix = f"; {NUMBER}"
            elif kind is int and type(value) is float and value.is_integer() and abs(value) < 1e15:
                fix = f"; write {key}: {value:.0f}"
            self.fault(f"expected {kind.__name__}, got {_show(value)}{fix}", key)
            return default
        return value

    def take_optional(self, key: str, kind: type[T]) -> T | None:
        """The value at ``key``, None where there is none."""
        self._taken.add(key)
        return self.take(key, kind, default=kind()) if key in self._data else None

    def take_member(self, key: str, kind: type[E]) -> E | None:
        """The member of ``kind`` whose value is the text at ``key``, None where there is none."""
        text = self.take_optional(key, str)
        try:
            return kind(text) if self.is_a(key, str) else None
        except ValueError:
            self.fault(f"{text!r} is not one of {', '.join(str(item.value) for item in kind)}", key)
            return None

    def take_list(self, key: str, kind: type[T], *, required: bool = False) -> tuple[T, ...]:
        """The list at ``key`` with every item exactly of ``kind``; empty where absent."""
        items = self.take(key, list, default=[], required=required)
        if required and key in self._data and not items:
            self.fault("must not be empty", key)
        for i, item in enumerate(items):
            if type(item) is not kind:
                self.fault(f"expected {kind.__name__}, got {_show(item)}", f"{key}[{i}]")
        return tuple(item for item in items if type(item) is kind)

    def take_mapping(self, key: str, *, required: bool = False) -> Fields:
        """The mapping at ``key`` as ``Fields`` of its own."""
        self._taken.add(key)
        if required and key not in self._data:
            self.fault("missing", key)
        child = Fields(self._data.get(key, {}), self._where, f"{self.path}.{key}", self._faults)
        self._children.append(child)
        return child

    def finish(self) -> None:
        """Report unknown keys here and below, and raise all faults as one :class:`RecipeError`."""
        self._note_unknown()
        if self._faults:
            faults = [f"  {fault}" for fault in self._faults]
            raise RecipeError([f"{len(faults)} fault(s):", *faults], where=self._where)

    def _note_unknown(self) -> None:
        known = sorted(str(key) for key in self._taken)
        # Some are enough to be told, and each takes time.
        for key in [key for key in self._data if key not in self._taken][:_MOST_UNKNOWN]:
            self.fault(f"unknown key ({meant([str(key)], known)}known here: {', '.join(known)})", key)
        for child in self._children:
            child._note_unknown()


def _show(value: Any) -> str:
    return f"{type(value).__name__} {cut(repr(value), 60)}"
