"""What the user asked for, as values: flags over ``--config EDIT.yaml``. Text is parsed here and nowhere further in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from qkpatch.common.number_ranges import as_numbers, format_ranges, some
from qkpatch.common.text import NUMBER, meant
from qkpatch.errors import UsageError
from qkpatch.recipes.recipe import is_prefix
from qkpatch.spectral.rule import Channel, Select

if TYPE_CHECKING:
    from qkpatch.common.strict_yaml import Fields

E = TypeVar("E", bound=Enum)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip
_MOST_GLOBS = 64 << 10  # characters of --exclude, all of which each name is held against
_SIZE = re.compile(r"(\d{1,18})\s*([KMGT]I?B)?", re.ASCII | re.IGNORECASE)


_KINDS: dict[str, Any] = {
    "recipe": str, "prefix": str, "modes": int, "min_modes": int, "energy": int | float, "alpha": int | float,
    "seed": int, "fold_norm": bool, "max_shard_size": int
}  # fmt: skip

# What lies between 0 and 1, and what that means.
_SHARES = {
    "energy": "above 0: 0.3 takes as many modes as hold 0.3 of a head's energy",
    "alpha": "0 removes the modes, 1 changes nothing",
}
# What an item of ``edits`` may say: what may differ from layer to layer.
ITEM_KEYS = ("layers", "modes", "min_modes", "energy", "alpha", "channel", "select")
_MOST = 1000  # items, and layers of one: a short text could name a million in each of many thousands


@dataclass(frozen=True)
class Request:
    """The edit as asked for; None stands for "not said". What is wrong whatever the model is refused here.

    Raises:
        UsageError: ``alpha`` or ``energy`` outside [0, 1], ``modes`` < 1, no layer or head, an absurd seed; items of
            ``edits`` that contradict each other, or what is said beside them.
    """

    recipe: str | None = None  # a shipped one by name, or a file of the user's
    prefix: str | None = None  # what the language model's layers begin with, in place of the recipe's own
    attention: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    modes: int | None = None  # under energy, the most
    min_modes: int | None = None  # under energy, the least
    energy: float | None = None  # the share of a head's energy that its modes are to hold
    alpha: float | None = None
    channel: Channel | None = None
    select: Select | None = None
    seed: int | None = None
    fold_norm: bool | None = None
    max_shard_size: int | None = None  # bytes
    exclude: tuple[str, ...] | None = None  # globs of what is left out of OUT, besides what always is
    edits: tuple[Request, ...] | None = None  # of some layers each; what is said beside them holds for all

    @classmethod
    def of(cls, **said: Any) -> Request:
        """A request from what people write: ``layers=range(10, 19)`` or ``"10-18"``, ``channel="full"``, ``"5GB"``."""
        if unknown := said.keys() - {f.name for f in fields(cls)}:
            known = [f.name for f in fields(cls)]
            fix = f"{meant(unknown, known)}there are {', '.join(known)}"
            raise UsageError(f"no setting of an edit: {some(sorted(unknown))}", fix=fix)
        given = {key: value for key, value in said.items() if value is not None}
        return cls(**{key: _READ[key](value) if key in _READ else value for key, value in given.items()})

    @classmethod
    def asked(cls, request: Request | None, edit: dict[str, Any]) -> Request:
        """``request``, or one of the fields ``edit`` in its place."""
        if request is not None and edit:
            raise UsageError(f"{', '.join(edit)} beside a request", fix="put it into the request")
        (request := request or cls.of(**edit)).check_seed()
        return request

    def __post_init__(self) -> None:
        for what, kinds in _KINDS.items():
            given = getattr(self, what)
            # A bool is an int in Python, and no number here.
            if given is not None and not (
                isinstance(given, kinds) and (type(given) is bool) == (kinds is bool)
            ):
                kind = getattr(kinds, "__name__", "number")
                is_number = isinstance(given, str) and kinds is not bool  # in the eyes of whoever wrote it
                fix = NUMBER if is_number else None
                raise UsageError(f"{given!r:.80} is no {kind}", where=_flag(what), fix=fix)
        for what in ("attention", "exclude"):
            if not all(isinstance(name, str) for name in getattr(self, what) or ()):
                raise UsageError("what it names is named by a text", where=f"--{what}")
        if sum(map(len, self.exclude or ())) > _MOST_GLOBS:
            raise UsageError("it is longer than anybody writes", where="--exclude")
        if "" in (self.exclude or ()):
            raise UsageError("it names nothing", where="--exclude", fix="name a file, a folder or a glob")
        for what in ("layers", "heads", "attention"):
            if getattr(self, what) == ():
                raise UsageError("it names nothing", where=_flag(what), fix="name at least one")
        if self.prefix is not None and not is_prefix(self.prefix):
            what = f"{self.prefix!r:.80} does not hold {{layer}} once, and no other brace"
            fix = "write it as a recipe does, with the dot at its end: 'llm.model.layers.{layer}.'"
            raise UsageError(what, where="--prefix", fix=fix)
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError(f"{self.max_shard_size} is no size", where="--max-shard-size")
        for what, fix in _SHARES.items():
            share = getattr(self, what)
            if share is not None and (not 0.0 <= share <= 1.0 or self.energy == 0):
                raise UsageError(f"{share} is not between 0 and 1", where=_flag(what), fix=fix)
        for what in ("modes", "min_modes"):
            if (least := getattr(self, what)) is not None and least < 1:
                raise UsageError(f"{least} is not at least 1", where=_flag(what))
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"{self.seed} is not between 0 and 2^63 - 1", where="--seed")
        if self.select is Select.subspace and self.channel not in (None, Channel.full):
            what = (
                f"--select subspace draws directions that belong to no channel, not to {self.channel.value}"
            )
            raise UsageError(what, where="--channel", fix="drop --channel, or choose another --select")
        if self.edits is not None:
            _items(self.edits, self)

    @property
    def parts(self) -> tuple[Request, ...]:
        """What is asked for of some layers each: one part where there are no ``edits``."""
        if self.edits is None:
            return (self,)
        beside = replace(self, edits=None)
        return tuple(item.over(beside) for item in self.edits)

    @property
    def draws(self) -> bool:
        """Whether anything is drawn, which a seed decides."""
        return any(part.select in (Select.random, Select.subspace) for part in self.parts)

    def check_seed(self) -> None:
        """Raise :class:`UsageError` where there is a seed and nothing is drawn: it would do nothing."""
        if self.seed is not None and not self.draws:
            fix = "leave it out, or add --select random or --select subspace"
            raise UsageError("nothing is drawn, so a seed would do nothing", where="--seed", fix=fix)

    @property
    def said(self) -> dict[str, Any]:
        """The fields that say something."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def without(self, *names: str) -> Request:
        """This request, with nothing said of these fields, in its items either."""
        items = None if self.edits is None else tuple(item.without(*names) for item in self.edits)
        return replace(self, **dict.fromkeys(names), edits=items)

    def over(self, other: Request) -> Request:
        """This request, with what it does not say taken from ``other``."""
        return replace(other, **self.said)


def parse_request(text: bytes, where: str) -> Request:
    """Read ``EDIT.yaml``, the flags of ``apply`` as keys; all faults in one :class:`RecipeError`."""
    from qkpatch.common.strict_yaml import Fields, load_yaml

    root = Fields(load_yaml(text, where), where)
    said: dict[str, Any] = {key: _range_text(root, key) for key in ("layers", "heads", "max_shard_size")}
    kinds = {**_KINDS, "attention": str, **dict.fromkeys(_SHARES, float)}
    said = {key: root.take_optional(key, kind) for key, kind in kinds.items() if key not in said} | said
    said |= {"channel": root.take_member("channel", Channel), "select": root.take_member("select", Select)}
    said["exclude"] = root.take_list("exclude", str)
    listed = root.take("edits", list, default=[])
    said["edits"] = _items(listed, fault=root.fault) if "edits" in root else None
    root.finish()
    return Request.of(**said)


def parse_size(text: str) -> int:
    """Bytes of ``5GB`` (decimal, as in transformers), ``512MiB`` or ``1000``.

    Raises:
        UsageError: it is no such text, or nothing at all.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    if size == 0:
        fix = "write it like 5GB, 512MiB or 5000000000"
        raise UsageError(f"{text!r} is no size", where="--max-shard-size", fix=fix)
    return size


def check_device_name(name: str) -> None:
    """Refuse a device that no machine has; whether this one has it, torch will say.

    Raises:
        UsageError: not ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
    """
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name, re.ASCII):
        raise UsageError(f"{name!r} is not a device", where="--device", fix="use auto, cpu, cuda or cuda:0")


def member(value: E | str, kind: type[E], where: str) -> E:
    """The member of ``kind`` that has this value; :class:`UsageError` where none has."""
    try:
        return kind(value)
    except ValueError:
        fix = f"choose one of {', '.join(str(item.value) for item in kind)}"
        raise UsageError(f"{value!r} is none of them", where=where, fix=fix) from None


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _items(
    given: Any, beside: Request | None = None, fault: Callable[[str, str], None] | None = None
) -> tuple[Request, ...]:
    """The items of ``edits``; what is wrong, also with what is said ``beside``, is told to ``fault``, or raised."""
    faults: list[str] = []
    tell = fault or (lambda what, key: faults.append(f"{key}: {what}"))
    is_list = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    if not 0 < len(listed := list(given) if is_list else []) <= _MOST:
        tell(f"it is no list of 1 to {_MOST} edits", "edits")
    items, owners = list[Request](), dict[int, int]()
    for i, item in enumerate(listed[:_MOST]):
        at, told = f"edits[{i}]", item.said if isinstance(item, Request) else item
        if not isinstance(told, Mapping):
            tell(f"{told!r:.80} is no mapping", at)
            continue
        said, made = dict[str, Any](), Request()
        # Key by key, so that all faults are told; then together.
        for where, part in (*((f"{at}.{key!s:.80}", {key: told[key]}) for key in told), (at, said)):
            try:
                if any(value is None for value in part.values()):
                    raise UsageError("it says nothing")
                if unknown := {*map(str, part)} - {*ITEM_KEYS}:
                    is_common = unknown <= {f.name for f in fields(Request)}
                    said_so = "it holds for all: put it beside edits" if is_common else "unknown key"
                    near = "" if is_common else meant(unknown, ITEM_KEYS)
                    raise UsageError(f"{said_so} ({near}an item has {', '.join(ITEM_KEYS)})")
                made = Request.of(**part)
                said |= part
            except UsageError as error:
                tell(f"{error.what}{f' ({error.fix})' if error.fix else ''}", where)
        items.append(made)
        for key in said:
            if getattr(beside, key, None) not in (None, getattr(made, key)):
                tell(f"{_flag(key)} beside edits says otherwise", f"{at}.{key}")
        if "layers" not in told:
            tell("missing", f"{at}.layers")
        if twice := [n for n in made.layers or () if owners.setdefault(n, i) != i]:
            tell(f"{format_ranges(twice)} named in edits[{owners[twice[0]]}] too", f"{at}.layers")
        if len(twice) > _MOST:
            break
    if faults:
        fix = "say a thing once: in an item, or beside edits for all of them"
        raise UsageError(faults, where="edits", fix=fix)
    return tuple(items)


# What people write in another form than a request holds.
_READ: dict[str, Callable[[Any], Any]] = {
    "layers": lambda given: as_numbers(given, "--layers"),
    "heads": lambda given: as_numbers(given, "--heads"),
    "attention": lambda given: tuple(
        [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    ),
    "exclude": lambda given: (given,) if isinstance(given, str) else tuple(given) or None,
    **dict.fromkeys(_SHARES, lambda given: float(given) if type(given) is int and given in (0, 1) else given),
    "channel": lambda given: member(given, Channel, "--channel"),
    "select": lambda given: member(given, Select, "--select"),
    "max_shard_size": lambda given: parse_size(given) if isinstance(given, str) else given,
    "edits": _items,
}


def _range_text(root: Fields, key: str) -> str | None:
    if root.is_a(key, int):  # `layers: 10` is a number in YAML
        return str(root.take(key, int, default=0))
    if root.is_a(key, list):  # `layers: [10, 11]`
        return ",".join(str(number) for number in root.take_list(key, int, required=True))
    return root.take_optional(key, str)
