"""From ``org/name[@revision]`` to a commit, and to its files: in the Hub cache, or read where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qkpatch.checkpoint.hub_errors import hub_errors, is_out_of_reach
from qkpatch.checkpoint.hub_token import hub_api
from qkpatch.checkpoint.remote import RemoteRepo
from qkpatch.checkpoint.transfer import Listed
from qkpatch.errors import HubError


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


@dataclass(frozen=True)
class Found:
    """A revision of a repository, and where its files are."""

    place: Path | RemoteRepo
    repo: str
    requested_revision: str | None
    commit: str


def download(hub_id: HubId) -> Found:
    """Fetch the snapshot into the Hub cache, or find it there. Honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Raises:
        HubError: with the cause and the next step, one sentence for each kind.
    """
    with hub_errors(str(hub_id)):
        path = Path(hub_api().snapshot_download(hub_id.repo, revision=hub_id.revision))
    # snapshots/<commit>: the cache's layout names the commit that the revision resolved to.
    return Found(path, hub_id.repo, hub_id.revision, path.name)


def look(hub_id: HubId, *, use_cache: bool = True) -> Found:
    """The snapshot in the Hub cache, where it is complete, or the files as they are on the Hub; none is downloaded.

    Raises:
        HubError: as :func:`download`.
    """
    from huggingface_hub import constants
    from huggingface_hub.hf_api import RepoFile

    api, is_offline = hub_api(), constants.is_offline_mode()
    with hub_errors(str(hub_id)):
        found = api.resolve_revision(hub_id.repo, revision=hub_id.revision, local_files_only=is_offline)
    commit = found.resolved
    cached = _cached(hub_id, commit) if use_cache else None
    if cached is None:
        try:
            with hub_errors(str(hub_id)):
                entries = list(api.list_repo_tree(hub_id.repo, recursive=True, revision=commit))
        except HubError as error:
            if use_cache and is_out_of_reach(error.__cause__):
                with hub_errors(str(hub_id)):  # it may be whole, where nothing says that it is not
                    cached = Path(api.snapshot_download(hub_id.repo, revision=commit, local_files_only=True))
                return Found(cached, hub_id.repo, hub_id.revision, commit)
            raise
        listed = [
            Listed(e.path, e.size, e.blob_id, None if e.lfs is None else e.lfs.sha256)
            for e in entries
            if isinstance(e, RepoFile)
        ]
        return Found(RemoteRepo.of(hub_id.repo, commit, listed), hub_id.repo, hub_id.revision, commit)
    return Found(cached, hub_id.repo, hub_id.revision, commit)


def _cached(hub_id: HubId, commit: str) -> Path | None:
    """The snapshot of a commit, where the cache has all of it and knows that it has."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        with hub_errors(str(hub_id)):
            path = Path(hub_api().snapshot_download(hub_id.repo, revision=commit, local_files_only=True))
            tree = get_cached_repo_tree(hub_id.repo, revision=commit)
    except (HubError, CachedRepoTreeNotFoundError) as error:
        if isinstance(error, HubError) and not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        return None
    is_whole = all((path / e.path).is_file() and (path / e.path).stat().st_size == e.size for e in tree)
    return path if is_whole else None
