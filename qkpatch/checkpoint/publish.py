"""One commit on the Hub: files copied on its side from the base repository, and files that are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qkpatch.checkpoint.hub_errors import hub_errors
from qkpatch.checkpoint.hub_token import hub_api
from qkpatch.checkpoint.source import WEIGHT_SUFFIXES
from qkpatch.errors import HubError, UsageError
from qkpatch.redaction import redact


@dataclass(frozen=True)
class Base:
    """The repository and the commit that OUT was made from."""

    repo: str
    commit: str


@dataclass(frozen=True)
class Step:
    """One file of a commit."""

    name: str
    size: int
    is_copy: bool  # on the Hub's side, from the base repository
    content: bytes | None = None  # of our own; None: it lies in OUT


@dataclass(frozen=True)
class Target:
    """Where a commit goes."""

    repo: str
    private: bool
    create_pr: bool


def copyable(base: Base) -> dict[str, int]:
    """Sizes of the files that the Hub can copy from one repository to another: its large ones.

    Raises:
        HubError: they cannot be listed.
    """
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(f"{base.repo}@{base.commit[:12]}"):
        entries = list(hub_api().list_repo_tree(base.repo, recursive=True, revision=base.commit))
    return {e.path: e.size for e in entries if isinstance(e, RepoFile) and e.lfs is not None and e.xet_hash}


def check_target(target: Target, names: Sequence[str]) -> None:
    """Refuse what cannot be published there, before anything is computed or sent.

    Raises:
        UsageError: the repository has other weights, which a loader might take; or is not as private as asked for.
        HubError: no token, or the Hub cannot be asked.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    if get_token() is None:
        raise HubError("publishing needs a token", where=target.repo, fix="hf auth login, or set HF_TOKEN")
    api = hub_api()
    try:
        with hub_errors(target.repo):
            entries = list(api.list_repo_tree(target.repo, recursive=True))
            is_public = api.model_info(target.repo).private is False
    except HubError as error:
        cause = error.__cause__
        if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            return  # it will be made
        raise
    if is_public and target.private:
        raise UsageError(
            "the repository is there already, and public",
            where=target.repo,
            fix="choose a new name, or make it private on the Hub",
        )
    others = [
        e.path
        for e in entries
        if isinstance(e, RepoFile) and e.path.endswith(WEIGHT_SUFFIXES) and e.path not in names
    ]
    if others:
        raise UsageError(
            f"it holds other weights, {others[0]} for one, which would stay beside the patched ones",
            where=target.repo,
            fix="choose a new repository, or remove them",
        )


def publish(target: Target, out: Path, base: Base | None, steps: Sequence[Step], summary: str) -> str:
    """Make the repository where there is none, and the commit; returns its address.

    Raises:
        HubError: refused, or broken off: then there is no commit.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy

    api = hub_api()
    operations: list[CommitOperationAdd | CommitOperationCopy] = []
    for step in steps:
        if step.is_copy and base is not None:
            operations.append(
                CommitOperationCopy(
                    src_path_in_repo=step.name,
                    path_in_repo=step.name,
                    src_revision=base.commit,
                    src_repo_id=base.repo,
                    src_repo_type="model",
                )
            )
        else:
            source = str(out / step.name) if step.content is None else step.content
            operations.append(CommitOperationAdd(path_in_repo=step.name, path_or_fileobj=source))
    with hub_errors(target.repo):
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        done = api.create_commit(target.repo, operations, commit_message=summary, create_pr=target.create_pr)
    return redact(str(done.pr_url or done.commit_url))
