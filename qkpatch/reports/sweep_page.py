"""The page of a sweep: what each variant removes and how far it moves the queries, controls marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qkpatch.reports.page import page


@dataclass(frozen=True)
class Mark:
    """One variant."""

    name: str
    edit: str  # what it does, in a line
    select: str
    channel: str
    removed: float  # 1 − ‖M'‖² / ‖M‖²
    change: float  # ‖ΔW_Q‖ / ‖W_Q‖
    realised: float | None
    layers: Sequence[tuple[int, float]]  # each with its own change


def sweep_page(source: str, marks: Sequence[Mark]) -> str:
    """HTML that holds all it needs."""
    return page("sweep.html", {"title": f"Sweep of {source}", "variants": [vars(mark) for mark in marks]})
