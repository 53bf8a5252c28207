"""What is not published unless somebody insists: secrets, by their names, and what SOURCE only reached by links."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qkpatch.checkpoint.names import is_private


@dataclass(frozen=True)
class Insisted:
    """What the user wants to be published all the same."""

    names: tuple[str, ...] = ()  # globs, for what SOURCE reached by links that lead out of it
    hidden: bool = False  # what is private by its name

    def withholds(self, name: str, outside: Collection[str]) -> str | None:
        """The flag without which a file is not published; None for one that is."""
        if name in outside and not any(fnmatchcase(name, pattern) for pattern in self.names):
            return "--include"
        return "--include-hidden" if is_private(name) and not self.hidden else None
