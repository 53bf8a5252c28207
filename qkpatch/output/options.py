"""``Writing``: how OUT is written. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeGuard

from qkpatch.checkpoint.cache import blob_of
from qkpatch.checkpoint.tree import LocalFile, SourceFile


class Digest(str, Enum):
    """Which bytes of OUT the manifest has a SHA-256 of."""

    edited = "edited"  # the edited tensors, before and after
    files = "files"  # every file besides, also written as SHA256SUMS
    none = "none"


@dataclass(frozen=True)
class Writing:
    """How OUT is written. What is in it does not depend on it, but for digests."""

    digest: Digest = Digest.edited
    link: bool = False  # hard links in place of copies, for files that are not edited
    link_cache: bool = False  # also to files in the Hub cache, which other programs may clear or replace
    resume: bool = False
    overwrite: bool = False
    force: bool = False  # overwrite whatever is there

    def may_link(self, file: SourceFile) -> TypeGuard[LocalFile]:
        """Whether a hard link to a file of SOURCE may stand for a copy of it."""
        if not (self.link or self.link_cache) or not isinstance(file, LocalFile):
            return False
        return self.link_cache or blob_of(file.path) is None


PLAIN = Writing()
