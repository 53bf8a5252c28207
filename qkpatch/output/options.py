"""``Writing``: how OUT is written. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeGuard

from qkpatch.checkpoint.cache import blob_of
from qkpatch.checkpoint.tree import LocalFile, SourceFile
from qkpatch.errors import UsageError

if TYPE_CHECKING:
    from qkpatch.output.layout import OutputFile


class Digest(str, Enum):
    """Which bytes of OUT the manifest has a SHA-256 of."""

    edited = "edited"  # the edited tensors, before and after
    files = "files"  # every file besides, also written as SHA256SUMS
    none = "none"


# How a file may come into OUT, in the words of what copies, links and uploads; "none" where no byte had to.
MEANS = {
    "none", "resumed", "hardlink", "reflink", "copy_file_range", "sendfile", "read_write", "direct", "download",
    "upload", "store_copy", "part_copy",
}  # fmt: skip


@dataclass(frozen=True)
class Writing:
    """How OUT is written. What is in it does not depend on it, but for digests."""

    digest: Digest = Digest.edited
    link: bool = False  # hard links in place of copies, for files that are not edited
    link_cache: bool = False  # also to files in the Hub cache, which other programs may clear or replace
    resume: bool = False
    overwrite: bool = False
    force: bool = False  # overwrite whatever is there
    strict: bool = False  # a warning is an error, and there is no OUT

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "digest", Digest(self.digest))
        except ValueError:
            fix = f"choose one of {', '.join(kind.value for kind in Digest)}"
            raise UsageError(f"{self.digest!r:.80} is none of them", where="--digest", fix=fix) from None
        for name, given in vars(self).items():
            if name != "digest" and type(given) is not bool:
                where = f"--{name.replace('_', '-')}"
                raise UsageError(f"{given!r:.80} is neither true nor false", where=where)
        if self.force and not self.overwrite:
            raise UsageError("--force goes with --overwrite", fix="add --overwrite, or leave it out")

    def may_link(self, file: SourceFile) -> TypeGuard[LocalFile]:
        """Whether a hard link to a file of SOURCE may stand for a copy of it."""
        if not (self.link or self.link_cache) or not isinstance(file, LocalFile):
            return False
        return self.link_cache or blob_of(file.path) is None

    def linkable(self, file: OutputFile) -> LocalFile | None:
        """The file of SOURCE that a hard link to may stand for ``file`` of OUT, where that is not edited."""
        original = file.original
        return original if original is not None and self.may_link(original) else None


PLAIN = Writing()
