"""Of cases that differ little, `make test` runs the first of each kind; `make test-long` runs every one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest


def first_of_each(cases: Iterable[Any], kind: Callable[[Any], Hashable]) -> list[Any]:
    """All cases as parameters, with the mark `long` on those whose kind was there before."""
    seen: set[Hashable] = set()
    marked = []
    for case in cases:
        this = kind(case)
        marked.append(pytest.param(case, marks=pytest.mark.long if this in seen else ()))
        seen.add(this)
    return marked
