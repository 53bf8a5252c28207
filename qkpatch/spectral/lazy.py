"""``cached_property`` for what threads compute side by side."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functools import cached_property as cached_property
else:

    class cached_property(functools.cached_property):  # noqa: N801 - as in functools
        """Equivalent to ``functools.cached_property`` from Python 3.12 on.

        Before, that holds one lock for all instances while it computes: no two threads could factor a head at a time.
        The values of one instance may be computed twice here, if two threads ask at once.
        """

        def __get__(self, instance: object | None, owner: type | None = None) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self.attrname] = self.func(instance)  # found there from now on
            return value
