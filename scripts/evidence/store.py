"""Results on disk, a line each as soon as it is there, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Store:
    """A file of JSON lines, ``[key, value]``; a line cut short by a kill is dropped and made again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole, _, rest = path.read_text("utf-8").rpartition("\n")
            if rest:
                path.write_text(f"{whole}\n" if whole else "", "utf-8")
            for line in whole.splitlines():
                key, value = json.loads(line)
                self._values[key] = value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of ``key``, made and written down where it is missing."""
        if key not in self._values:
            value = make()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, value], separators=(",", ":")) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._values[key] = value
        return self._values[key]
