"""What pip is asked for to have the oldest, or the newest, version of each dependency that is allowed; torch stays.

python -m scripts.floors            typer==0.26 and so on
python -m scripts.floors --newest   typer>=0.26 and so on
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import requires

from packaging.requirements import Requirement

EXTRA = "eval"  # what people install; others are for development, and pinned
LEFT = {"torch", "qkpatch"}


def allowed() -> list[Requirement]:
    """The dependencies of the package and of its extra for people."""
    found = map(Requirement, requires("qkpatch") or ())
    return [
        one
        for one in found
        if one.name not in LEFT and (one.marker is None or one.marker.evaluate({"extra": EXTRA}))
    ]


def floors() -> Iterator[str]:
    """Each pinned to where its range begins.

    Raises:
        ValueError: a range has no beginning, so that nobody could test it.
    """
    for one in allowed():
        least = [part.version for part in one.specifier if part.operator == ">="]
        if len(least) != 1:
            raise ValueError(f"{one} has no one least version")
        yield f"{one.name}=={least[0]}"


if __name__ == "__main__":
    print(*([f"{r.name}{r.specifier}" for r in allowed()] if "--newest" in sys.argv else floors()))
