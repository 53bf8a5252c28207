"""What a web server has: its pages link to files and to further pages."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from qkpatch.checkpoint.open_directory import MOST_NAMES
from qkpatch.common.interrupts import check_stop
from qkpatch.errors import CheckpointError

MOST_PAGES = 1000  # folders, each of them a page


def crawled(fs: Any, root: str, where: str) -> dict[str, Any]:
    """Facts by address of all that pages from ``root`` on link to.

    Raises:
        CheckpointError: pages link to each other without end.
    """
    found, waiting = dict[str, Any](), [root]
    for page in waiting:
        check_stop()
        if len(waiting) > MOST_PAGES or len(found) > MOST_NAMES:
            what = f"more than {MOST_PAGES} folders or {MOST_NAMES} files, which no checkpoint has"
            raise CheckpointError(what, where=where, fix="name the folder of the model itself")
        with suppress(OSError if page != root else FileNotFoundError):
            listed = {info["name"]: info for info in fs.ls(page, detail=True)}
            found |= listed
            inner = {name.rstrip("/") for name, info in listed.items() if info["type"] == "directory"}
            waiting += sorted(inner - {*waiting})
    return found
