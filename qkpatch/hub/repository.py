"""From ``org/name[@revision]`` to a commit, and to its files: in the Hub cache, or read where they are."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qkpatch.checkpoint.cache import blob_of, blobs_of, listing_at
from qkpatch.checkpoint.content import Content, damaged
from qkpatch.checkpoint.files import open_read
from qkpatch.common.waiting import waiting_for
from qkpatch.errors import HubError
from qkpatch.hub.errors import hub_errors, is_out_of_reach
from qkpatch.hub.listing import listing
from qkpatch.hub.remote import RemoteRepo
from qkpatch.hub.token import hub_api

_HASHING = 4  # files at a time: SHA-256 is slower than most disks


@dataclass(frozen=True)
class HubId:
    """A model repository on the Hub, at a revision or at its default branch."""

    repo: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """``org/name`` or ``org/name@revision``; None where ``text`` does not have that form."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        repo, _, revision = text.partition("@")
        if repo.count("/") != 1 or (revision == "" and "@" in text):
            return None
        try:
            validate_repo_id(repo)
        except HFValidationError:
            return None
        return cls(repo, revision or None)

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


class Found(NamedTuple):
    """Where the files of a revision are, and its commit."""

    place: Path | RemoteRepo
    commit: str
    checked: frozenset[str] = frozenset()  # files that are what the Hub lists, by their digests


def download(hub_id: HubId) -> Found:
    """Fetch the snapshot into the Hub cache, or find it there. Honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Raises:
        HubError: with the cause and the next step, one sentence for each kind.
    """
    before = blobs_of(hub_id.repo)
    with hub_errors(str(hub_id)):
        path = Path(hub_api().snapshot_download(hub_id.repo, revision=hub_id.revision))
    # snapshots/<commit>: the cache's layout names the commit that the revision resolved to.
    check_snapshot(path)
    return Found(path, path.name, _check_new(path, before))


def _check_new(snapshot: Path, before: Collection[str]) -> frozenset[str]:
    """Hash what came into the cache just now, since the library checks sizes alone; the names of those files.

    Raises:
        HubError: a file is not what its blob's name says; it is removed, so that the next run downloads it anew.
    """
    blobs: dict[str, tuple[Path, Content]] = {}
    for path in snapshot.rglob("*"):
        blob = blob_of(path)
        content = None if blob is None or blob.name in before else Content.of_name(blob.name)
        if blob is not None and content is not None:
            blobs[path.relative_to(snapshot).as_posix()] = blob, content

    def check(name: str) -> None:
        blob, content = blobs[name]
        with open_read(blob) as opened:
            is_sound = content.is_in(opened)
        if not is_sound:
            for path in (blob.resolve(), blob):
                path.unlink(missing_ok=True)
            raise damaged(f"{snapshot.parent.parent.name}: {name}")

    with ThreadPoolExecutor(_HASHING) as pool:
        list(pool.map(check, blobs))
    return frozenset(blobs)


def check_snapshot(snapshot: Path) -> None:
    """Refuse a snapshot in the Hub cache of which a file is a link to another blob than the Hub lists.

    Raises:
        HubError: it is; where the cache has no listing of it, nothing can be said.
    """
    for name, (_, content) in (listing_at(snapshot) or {}).items():
        blob = blob_of(snapshot / name)
        if blob is not None and blob.name != content.digest:
            raise HubError(
                "the Hub cache has another file there than the Hub lists",
                where=str(snapshot / name),
                fix=f"remove {snapshot}, and run again: it will be made anew",
            )


def open_repository(hub_id: HubId, *, use_cache: bool = True) -> Found:
    """The snapshot in the Hub cache, where it is complete, or the files as they are on the Hub; none is downloaded.

    Raises:
        HubError: as :func:`download`.
    """
    from huggingface_hub import constants

    api, is_offline = hub_api(), constants.is_offline_mode()
    with hub_errors(str(hub_id)), waiting_for(f"{hub_id} on the Hub"):
        found = api.resolve_revision(hub_id.repo, revision=hub_id.revision, local_files_only=is_offline)
    commit = found.resolved
    if Content.of_name(commit) is None:
        raise HubError(f"the Hub names no commit: {commit!r:.80}", where=str(hub_id), fix="check HF_ENDPOINT")
    if use_cache and (cached := _cached(hub_id, commit)) is not None:
        return Found(cached, commit)
    try:
        return Found(RemoteRepo.of(hub_id.repo, commit, listing(hub_id.repo, commit, str(hub_id))), commit)
    except HubError as error:
        if not use_cache or not is_out_of_reach(error.__cause__):
            raise
    # It may be whole, where nothing says that it is not.
    return Found(_in_cache(hub_id, commit), commit)


def _in_cache(hub_id: HubId, commit: str) -> Path:
    with hub_errors(str(hub_id)):
        return Path(hub_api().snapshot_download(hub_id.repo, revision=commit, local_files_only=True))


def _cached(hub_id: HubId, commit: str) -> Path | None:
    """The snapshot of a commit, where the cache has all of it and knows that it has."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = _in_cache(hub_id, commit)
    except HubError as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        return None
    sizes = {path / name: size for name, (size, _) in (listing_at(path) or {}).items()}
    if not sizes or not all(file.is_file() and file.stat().st_size == size for file, size in sizes.items()):
        return None
    check_snapshot(path)
    return path
