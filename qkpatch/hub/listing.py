"""What the Hub lists of a repository, checked: names that files can have, apart from each other, sizes, digests."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import NamedTuple

from qkpatch.checkpoint.tree import is_plain_relative
from qkpatch.errors import CheckpointError
from qkpatch.hub.errors import hub_errors
from qkpatch.hub.token import hub_api

_LONGEST_PART, _LONGEST = 255, 2048  # bytes: what file systems take, and half of what Linux does
_MOST_FOLDERS = 64 << 20  # characters of their names; each file may name many
_DIGEST = re.compile("git:[0-9a-f]{40}|sha256:[0-9a-f]{64}")


class Listed(NamedTuple):
    """A file as the Hub lists it."""

    name: str
    size: int
    blob: str  # what Git calls its content
    sha256: str | None  # of large files
    is_copyable: bool  # from one repository to another, on the Hub's side


def listing(repo: str, revision: str | None, where: str) -> list[Listed]:
    """All files of a repository at a revision, sorted.

    Raises:
        CheckpointError: an entry that no sound repository has.
        HubError: they cannot be listed.
    """
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(where):
        entries = list(hub_api().list_repo_tree(repo, recursive=True, revision=revision))
    found: dict[str, Listed] = {}
    for e in entries:
        if isinstance(e, RepoFile):
            sha256 = None if e.lfs is None else e.lfs.sha256
            file = Listed(e.path, e.size, e.blob_id, sha256, e.lfs is not None and bool(e.xet_hash))
            if (why := "is there twice" if file.name in found else _fault(file)) is not None:
                raise _unsound(file.name, why, where)
            found[file.name] = file
    if sum(name.count("/") * len(name) for name in found) > _MOST_FOLDERS:
        raise _unsound(next(iter(found)), "lies in more folders than any file", where)
    folders = {str(folder) for name in found for folder in PurePosixPath(name).parents}
    if clash := sorted(folders & found.keys()):
        raise _unsound(clash[0], "is a file, and a directory as well", where)
    return sorted(found.values())


def _fault(file: Listed) -> str | None:
    """Why no file can be as it is listed; None where one can."""
    if not isinstance(file.name, str) or not is_plain_relative(file.name):
        return "is no plain path"
    parts = [len(part.encode(errors="surrogatepass")) for part in file.name.split("/")]
    is_long = max(parts) > _LONGEST_PART or sum(parts) + len(parts) > _LONGEST
    if is_long or re.search("[\ud800-\udfff]", file.name):
        return "no file can be called"
    if type(file.size) is not int or not 0 <= file.size < 2**63:
        return f"has {file.size!r:.40} bytes"
    digests = [f"git:{file.blob}"] + ([] if file.sha256 is None else [f"sha256:{file.sha256}"])
    return None if all(map(_DIGEST.fullmatch, digests)) else "has no digest"


def _unsound(name: object, why: str, where: str) -> CheckpointError:
    fix = "do not use this repository: it is broken or hostile"
    return CheckpointError(f"it lists {name!r:.300}, which {why}", where=where, fix=fix)
