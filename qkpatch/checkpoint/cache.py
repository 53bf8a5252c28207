"""The Hub cache as paths tell it: ``models--org--name/snapshots/<commit>/file``, a link to ``../../blobs/<digest>``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from qkpatch.checkpoint.content import Content
from qkpatch.common.json_text import load_json
from qkpatch.errors import CheckpointError

_MOST_LINKS = 8
_COMMIT = re.compile("[0-9a-f]{40}")


class Snapshot(NamedTuple):
    """A repository's files at a commit, in the cache."""

    repo: str
    commit: str


def blob_of(path: Path) -> Path | None:
    """The entry of a ``blobs`` directory that ``path`` is or leads to; None where it leads to none.

    The entry may be a link itself, to a store that all repositories share; its name is the content's digest.
    """
    for _ in range(_MOST_LINKS):
        if path.parent.name == "blobs" and path.parent.parent.name.startswith(("models--", "datasets--")):
            return path
        try:
            linked = path.readlink()
        except OSError:
            return None
        path = Path(os.path.normpath(Path(os.path.realpath(path.parent)) / linked))
    return None


def blobs_of(repo: str) -> frozenset[str]:
    """The names of all blobs of a repository that the cache holds."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
    try:
        return frozenset(path.name for path in folder.iterdir())
    except OSError:
        return frozenset()


def snapshot_at(path: Path) -> Snapshot | None:
    """Which snapshot a directory is; None for one outside the cache of this machine, whatever it is called."""
    real = Path(os.path.realpath(path))
    folder = real.parent.parent
    if real.parent.name != "snapshots" or not folder.name.startswith("models--"):
        return None
    if not _COMMIT.fullmatch(real.name) or not is_in_cache(real):
        return None
    return Snapshot(folder.name.removeprefix("models--").replace("--", "/"), real.name)


def listing_at(snapshot: Path) -> dict[str, tuple[int, Content]] | None:
    """Bytes and contents that the Hub lists of a snapshot's files, as huggingface_hub noted; None where it did not."""
    noted = snapshot.parent.parent / "trees" / f"{snapshot.name}.json"
    try:
        files = load_json(noted.read_bytes(), noted.name)["files"]
        large = {name: Content("sha256", e["lfs_sha256"]) for name, e in files.items() if "lfs_sha256" in e}
        return {
            name: (e["size"], large.get(name) or Content("git", e["blob_id"])) for name, e in files.items()
        }
    except (OSError, CheckpointError, AttributeError, KeyError, TypeError):
        return None


def leads_out(path: Path, root: Path) -> bool:
    """Whether a file below ``root`` lies elsewhere, links resolved, and not in the blobs of the snapshot that it is."""
    real, top = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    homes = [top]
    if snapshot_at(top) is not None:
        # Its own, and those that all repositories share.
        homes += [top.parent.parent / "blobs", top.parent.parent.parent / "blobs"]
    return not any(home in real.parents for home in homes)


def is_in_cache(path: Path) -> bool:
    """Whether a path lies in the cache that huggingface_hub uses here."""
    from huggingface_hub import constants

    return Path(os.path.realpath(constants.HF_HUB_CACHE)) in Path(os.path.realpath(path.parent)).parents
