"""``Writing``: how OUT is written. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Digest(str, Enum):
    """Of what SHA-256 is taken."""

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


PLAIN = Writing()
