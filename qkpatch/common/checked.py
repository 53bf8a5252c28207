"""Calls from outside: an argument of another type than is asked for is told as any other slip, before all else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import cache, wraps
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from qkpatch.errors import UsageError

_PLAIN = (str, int, float, type(None))
F = TypeVar("F", bound=Callable[..., Any])


def checked(function: F) -> F:
    """``function``, whose arguments must be what its hints name, as far as those are classes.

    Raises:
        UsageError: one is not, or is missing or unknown.
    """
    signature = inspect.signature(function)
    many = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    named = {key: one for key, one in signature.parameters.items() if one.kind not in many}

    @wraps(function)
    def call(*arguments: Any, **more: Any) -> Any:
        try:
            bound = signature.bind(*arguments, **more).arguments
        except TypeError as error:
            fix = f"its arguments are {', '.join(named)}"
            raise UsageError(str(error), where=f"{function.__name__}(...)", fix=fix) from None
        for name, given in bound.items():
            with suppress(NameError, TypeError):  # a class of a library that is imported late, or a protocol
                kind = _hint(function, named[name].annotation) if name in named else Any
                each = get_args(kind) if isinstance(kind, UnionType) else (kind,)
                kinds = [get_origin(one) or one for one in each]
                if not any(one is Any or _fits(given, one) for one in kinds):
                    called = " or ".join("None" if one is type(None) else one.__name__ for one in kinds)
                    where = f"{function.__name__}({name}=...)"
                    # What holds others may hold a secret.
                    said = repr(given)[:80] if isinstance(given, _PLAIN) else f"a {type(given).__name__}"
                    raise UsageError(f"{said} is no {called}", where=where)
        return function(*arguments, **more)

    return call  # type: ignore[return-value]


def _fits(given: Any, kind: Any) -> bool:
    return isinstance(given, kind) or (issubclass(kind, Enum) and given in [one.value for one in kind])


@cache
def _hint(function: Callable[..., Any], text: str) -> Any:
    """One hint alone: those beside it may not be known yet."""
    only = type("Only", (), {"__annotations__": {"hint": text}})
    return get_type_hints(only, function.__globals__)["hint"]
