"""Hard links in place of copies, where that is safe."""

from __future__ import annotations

import os
from pathlib import Path

from qkpatch.checkpoint.files import FileId, os_errors
from qkpatch.checkpoint.hub_cache import blob_of
from qkpatch.checkpoint.tree import LocalFile, SourceFile


def linkable(file: SourceFile, *, even_cached: bool) -> LocalFile | None:
    """``file``, where a hard link may stand for a copy of it."""
    if not isinstance(file, LocalFile):
        return None
    return file if even_cached or blob_of(file.path) is None else None


def linked(file: LocalFile, staged: Path) -> bool:
    """Make ``staged`` a hard link to ``file``, links resolved; False where the file system cannot."""
    with os_errors("link", staged):
        staged.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(file.path), staged)
    except OSError:
        return False  # another file system, too many links, not permitted: copying will do
    if FileId.of(staged.stat()).but_for_links != file.id.but_for_links:
        staged.unlink()
        return False  # it changed meanwhile, which copying will tell
    return True
