"""From ``org/name[@revision]`` to a local snapshot and the commit it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Snapshot:
    """A downloaded revision."""

    path: Path
    repo: str
    requested_revision: str | None
    commit: str


def download(hub_id: HubId) -> Snapshot:
    """Fetch the snapshot into the Hub cache, or find it there. Honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Raises:
        HubError: with the cause and the next step, one sentence for each kind.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # whichever client this version of the library uses
    except ImportError:
        import httpx  # type: ignore[no-redef,import-not-found]

    where = hub_id.repo + (f"@{hub_id.revision}" if hub_id.revision else "")
    try:
        path = Path(snapshot_download(hub_id.repo, revision=hub_id.revision))
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError: must come first
        raise HubError(
            "the repository is gated", where=where, fix="accept its terms on the Hub, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            "no such model repository, or it is private", where=where, fix="check the name, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            "no such branch, tag or commit", where=where, fix="check what follows the @"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"not in the local cache, and the Hub cannot be reached: {error.__cause__ or error}",
            where=where,
            fix="check the connection and HF_HUB_OFFLINE, or point SOURCE at a directory",
        ) from error
    except HfHubHTTPError as error:
        raise HubError(f"the Hub answered: {error}", where=where, fix="try again later") from error
    except (
        OSError,
        httpx.HTTPError,
        ValueError,
    ) as error:  # a broken connection, or an answer that is no Hub's
        raise HubError(
            f"download failed: {error}", where=where, fix="check connection, HF_ENDPOINT and disk space"
        ) from error
    # snapshots/<commit>: the cache's layout names the commit that the revision resolved to.
    return Snapshot(path, hub_id.repo, hub_id.revision, path.name)
