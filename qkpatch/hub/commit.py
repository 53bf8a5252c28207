"""One commit on the Hub: files copied on its side from the base repository, and files that are sent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qkpatch.checkpoint.present_files import PresentHere
from qkpatch.checkpoint.source import WEIGHT_SUFFIXES
from qkpatch.common.system import path_of
from qkpatch.errors import HubError, MismatchError, UsageError, plain, redact
from qkpatch.hub.errors import hub_errors
from qkpatch.hub.listing import listing
from qkpatch.hub.token import hub_api

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_IN_MEMORY = 10 << 20  # bytes of a file that is sent as it was read; of larger ones the descriptor is kept


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
    sha256: str | None  # None where OUT is still to be made
    is_copy: bool  # on the Hub's side, from the base repository, where the file has that digest
    content: bytes | None = None  # of our own; None: it lies in OUT


@dataclass(frozen=True)
class PushRepository:
    """The repository on the Hub that a commit goes to."""

    name: str  # org/name
    private: bool  # where it is still to be made
    create_pr: bool  # a pull request in place of a commit


def copyable(base: Base) -> dict[str, str]:
    """SHA-256 of the files that the Hub can copy from one repository to another: its large ones.

    Raises:
        HubError: they cannot be listed.
    """
    files = listing(base.repo, base.commit, f"{base.repo}@{base.commit[:12]}")
    return {file.name: file.sha256 for file in files if file.sha256 is not None and file.is_copyable}


def check_repository(repository: PushRepository, names: Sequence[str]) -> None:
    """Refuse what cannot be published there, before anything is computed or sent.

    Raises:
        UsageError: the repository has other weights, which a loader might take; or is not as private as asked for.
        HubError: no token, or the Hub cannot be asked.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if get_token() is None:
        fix = "hf auth login, or set HF_TOKEN"
        raise HubError("publishing needs a token", where=repository.name, fix=fix)
    try:
        files = listing(repository.name, None, repository.name)
        with hub_errors(repository.name):
            is_public = hub_api().model_info(repository.name).private is False
    except HubError as error:
        cause = error.__cause__
        if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            return  # it will be made
        raise
    if is_public and repository.private:
        fix = "choose a new name, or make it private on the Hub"
        raise UsageError("the repository is there already, and public", where=repository.name, fix=fix)
    others = [f.name for f in files if f.name.endswith(WEIGHT_SUFFIXES) and f.name not in names]
    if others:
        what = f"it holds other weights, {others[0]} for one, which would stay beside the patched ones"
        raise UsageError(what, where=repository.name, fix="choose a new repository, or remove them")


def publish(
    repository: PushRepository, present: PresentHere, base: Base | None, steps: Sequence[Step], summary: str
) -> str:
    """Make the repository where there is none, and the commit; returns its address.

    What is sent is what had the steps' digests: files are open, or in memory, until their content is there, and no
    commit is made where one has changed by then.

    Raises:
        MismatchError: a file does not have the digest of its step.
        FileSystemError: a file has changed.
        HubError: refused, or broken off: then there is no commit.
    """
    from huggingface_hub import CommitOperationCopy

    api = hub_api()
    with ExitStack() as stack, hub_errors(repository.name):
        additions = [_addition(step, present, stack) for step in steps if not step.is_copy]
        copies = [
            CommitOperationCopy(
                src_path_in_repo=step.name,
                path_in_repo=step.name,
                src_revision=base.commit,
                src_repo_id=base.repo,
                src_repo_type="model",
            )
            for step in steps
            if step.is_copy and base is not None
        ]
        api.create_repo(repository.name, private=repository.private or None, exist_ok=True)
        name, is_pr = repository.name, repository.create_pr
        # An empty list of patterns: the repository's own .gitignore must not leave anything out.
        api.preupload_lfs_files(name, additions, create_pr=is_pr, gitignore_content="")
        for step in steps:
            if step.content is None:
                present.confirm(step.name)
        done = api.create_commit(name, [*additions, *copies], commit_message=summary, create_pr=is_pr)
    return plain(redact(str(done.pr_url or done.commit_url)))


def _addition(step: Step, present: PresentHere, stack: ExitStack) -> CommitOperationAdd:
    """One file to be sent; large ones by a descriptor that ``stack`` keeps open."""
    from huggingface_hub import CommitOperationAdd

    content: bytes | str
    if step.content is not None:
        content = step.content
    elif step.size <= _IN_MEMORY:
        content = present.read(step.name)
    else:
        opened = stack.enter_context(present.open(step.name))
        content = path_of(opened.fd, opened.where)
    operation = CommitOperationAdd(path_in_repo=step.name, path_or_fileobj=content)
    if operation.upload_info.sha256.hex() != step.sha256:
        fix = "run again when nothing writes to it"
        raise MismatchError("it is not what was verified any more", where=step.name, fix=fix)
    return operation
