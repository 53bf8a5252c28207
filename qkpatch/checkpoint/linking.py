"""Hard links in place of copies, where that is safe; and the Hub cache, where it is not."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qkpatch.checkpoint.files import FileId, os_errors
from qkpatch.checkpoint.tree import LocalFile, SourceFile


def is_cached(real: Path) -> bool:
    """Whether a file lies in the Hub cache, ``models--org--name/blobs``, which is huggingface_hub's to change."""
    return real.parent.name == "blobs" and real.parent.parent.name.startswith(("models--", "datasets--"))


def known_sum(file: SourceFile) -> str | None:
    """The SHA-256 of a file of the Hub's large-file storage: listed there, and its name in the Hub cache."""
    if not isinstance(file, LocalFile):
        return file.known_sum
    real = Path(os.path.realpath(file.path))
    return real.name if is_cached(real) and re.fullmatch("[0-9a-f]{64}", real.name) else None


def linkable(file: SourceFile, *, even_cached: bool) -> LocalFile | None:
    """``file``, where a hard link may stand for a copy of it."""
    if not isinstance(file, LocalFile):
        return None
    return file if even_cached or not is_cached(Path(os.path.realpath(file.path))) else None


def linked(file: LocalFile, staged: Path) -> bool:
    """Make ``staged`` a hard link to ``file``, links resolved; False where the file system cannot."""
    with os_errors("link", staged):
        staged.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(file.path), staged)
    except OSError:
        return False  # another file system, too many links, not permitted: copying will do
    if FileId.of(staged.stat()) != file.id:
        staged.unlink()
        return False  # it changed meanwhile, which copying will tell
    return True
