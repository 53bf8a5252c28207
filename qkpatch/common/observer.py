"""``Observer``: who hears of progress."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Hears of progress, from any thread; whoever shows it decides how."""

    def begins(self, what: str, n_bytes: int, n_heads: int, of: str = "heads") -> None:
        """A part of the work begins: ``n_bytes`` will be copied or compared and ``n_heads`` (or others) done."""
        return

    def copied(self, n_bytes: int) -> None:
        """``n_bytes`` more were copied or compared."""
        return

    def edited(self, n_heads: int) -> None:
        """``n_heads`` more were edited."""
        return


class Unseen(Observer):
    """An observer that shows nothing."""


UNSEEN = Unseen()
