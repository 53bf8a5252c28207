"""What the Hub lists of a repository, checked: names that files can have, apart from each other, sizes, digests."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from qkpatch.checkpoint.tree import is_plain_relative
from qkpatch.errors import CheckpointError
from qkpatch.hub.errors import hub_errors
from qkpatch.hub.token import hub_api

_LONGEST_PART, _LONGEST = 255, 2048  # bytes: what file systems take, and half of what Linux does
_MOST = 2**63  # bytes of a file, as offsets are
_GIT, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


class Listed(NamedTuple):
    """A file as the Hub lists it."""

    name: str
    size: int
    blob: str  # what Git calls its content
    sha256: str | None  # of large files
    is_copyable: bool = False  # from one repository to another, on the Hub's side


def listing(repo: str, revision: str | None, where: str) -> list[Listed]:
    """All files of a repository at a revision, sorted.

    Raises:
        CheckpointError: an entry that no sound repository has.
        HubError: they cannot be listed.
    """
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(where):
        entries = [
            e
            for e in hub_api().list_repo_tree(repo, recursive=True, revision=revision)
            if isinstance(e, RepoFile)
        ]
    found: dict[str, Listed] = {}
    for entry in entries:
        file = Listed(
            entry.path,
            entry.size,
            entry.blob_id,
            None if entry.lfs is None else entry.lfs.sha256,
            entry.lfs is not None and bool(entry.xet_hash),
        )
        if (why := _fault(file)) is not None:
            raise _unsound(where, file.name, why)
        if file.name in found:
            raise _unsound(where, file.name, "is there twice")
        found[file.name] = file
    folders = {str(folder) for name in found for folder in PurePosixPath(name).parents}
    if clash := sorted(folders & found.keys()):
        raise _unsound(where, clash[0], "is a file, and a directory as well")
    return sorted(found.values())


def _fault(file: Listed) -> str | None:
    """Why no file can be as it is listed; None where one can."""
    if not isinstance(file.name, str) or not is_plain_relative(file.name):
        return "is no plain path"
    try:
        parts = [len(part.encode()) for part in file.name.split("/")]
    except UnicodeEncodeError:
        return "is no UTF-8"
    if max(parts) > _LONGEST_PART or sum(parts) + len(parts) > _LONGEST:
        return "is longer than a file's name can be"
    if type(file.size) is not int or not 0 <= file.size < _MOST:
        return f"has {file.size!r:.40} bytes"
    if not _is(_GIT, file.blob) or not (file.sha256 is None or _is(_SHA256, file.sha256)):
        return "has no digest"
    return None


def _is(pattern: re.Pattern[str], digest: Any) -> bool:
    return isinstance(digest, str) and pattern.fullmatch(digest) is not None


def _unsound(where: str, name: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"it lists {name!r:.300}, which {why}",
        where=where,
        fix="do not use this repository: it is broken or hostile",
    )
