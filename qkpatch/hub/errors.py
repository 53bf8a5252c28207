"""Around every call to the Hub: the token is guarded, and what can go wrong is worded once, with the next step."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from qkpatch.errors import HubError, QKPatchError
from qkpatch.hub.answers import httpx
from qkpatch.hub.token import refusal_in, token_guarded
from qkpatch.stores.errors import is_theirs


def is_tls_failure(error: BaseException | None) -> bool:
    """Whether a certificate that was not accepted led to ``error``."""
    while error is not None:
        if isinstance(error, ssl.SSLError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into :class:`HubError`, and keep the token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_CACHE.startswith("~"):  # as it stays in a container whose user has no home
        fix = "set HOME, or HF_HOME to a directory of yours"
        raise HubError("no home directory is known, so the Hub cache is nowhere", where=where, fix=fix)
    try:
        with token_guarded():
            yield
    except Exception as error:
        refusal = refusal_in(error)
        if refusal is not None:  # whatever huggingface_hub made of it
            raise HubError(refusal.what, where=where, fix=refusal.fix) from error
        if isinstance(error, HFValidationError):
            raise HubError(f"not a name that the Hub allows: {error}", where=where, fix="check it") from error
        # A name that is not found is ours to raise: it is looked up before the library asks.
        if isinstance(error, QKPatchError | MemoryError) or not (is_out_of_reach(error) or is_theirs(error)):
            raise
        raise _explained(error, where) from error


def _explained(error: Exception, where: str) -> HubError:
    from huggingface_hub import constants, errors

    said = " ".join(str(error).split())
    if is_tls_failure(error):
        what = f"no secure connection to the Hub: {_root(error)}"
        fix = "if a proxy signs with its own, name its CA in SSL_CERT_FILE; check the machine's clock too"
    elif isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError: comes first
        what, fix = "the repository is gated", "accept its terms on the Hub, then set HF_TOKEN"
    elif _status(error) == 401 and _is_token_refused(error):
        what = "the Hub does not accept the token"
        fix = "is it expired? Make a new one: hf auth login, or HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = "no such model repository, or it is private or gated"
        fix = "check the name, or set HF_TOKEN; of a gated one accept the terms on the Hub first"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, fix = "no such branch, tag or commit", "check what follows the @"
    elif isinstance(error, errors.IncompleteSnapshotError):
        what = "only a part of it is in the local cache, and the Hub cannot be reached"
        fix = "run it once more with a connection and without HF_HUB_OFFLINE: what is there is kept"
    elif is_out_of_reach(error):
        why = "HF_HUB_OFFLINE forbids it" if constants.is_offline_mode() else error.__cause__ or error
        what = f"not in the local cache, and the Hub cannot be reached: {why}"
        fix = "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or point SOURCE at a directory"
    elif isinstance(error, errors.EntryNotFoundError):
        what, fix = "the repository has no such file any more", "try again"
    elif _status(error) == 429:
        what = "the Hub's rate limit is reached"
        fix = "wait some minutes, or set HF_TOKEN: its limits are higher"
    elif _status(error) == 403:
        what, fix = f"the Hub forbids it: {said}", "does the token have the right to do this?"
    elif isinstance(error, errors.FileDuplicationError):
        what = f"the Hub cannot copy the base repository's files: {said}"
        fix = "are both repositories in one storage region? If not, send everything: hf upload"
    elif isinstance(error, errors.HfHubHTTPError):
        is_refusal = 400 <= (_status(error) or 500) < 500
        fix = "check the name, and HF_ENDPOINT: is that a Hub?" if is_refusal else "try again later"
        what = f"the Hub answered: {said}"
    elif isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return _explained(error.__cause__, where)  # how the library says that one of its threads failed
    elif isinstance(error, TypeError | AttributeError | LookupError | RuntimeError | AssertionError):
        what = f"the answer is none that a Hub gives: {type(error).__name__}: {said}"
        fix = "check HF_ENDPOINT: is that a Hub?"
    else:  # a broken connection, a full disk, or an answer that is no Hub's
        what, fix = f"the transfer failed: {said}", "check connection, HF_ENDPOINT and disk space"
    return HubError(what, where=where, fix=fix)


def _root(error: BaseException) -> BaseException:
    """The error that began the chain that ends in ``error``."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_token_refused(error: Exception) -> bool:
    """The Hub says 401 of missing repositories too, where no token was sent."""
    from huggingface_hub.errors import RepositoryNotFoundError

    said = str(getattr(getattr(error, "response", None), "headers", {}).get("X-Error-Message", ""))
    is_about_token = "credentials" in said.lower() or "token" in said.lower()
    return is_about_token or not isinstance(error, RepositoryNotFoundError)


def is_out_of_reach(error: BaseException | None) -> bool:
    """Whether no answer came at all: offline, or no connection."""
    from huggingface_hub import errors

    kinds = errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.RevisionResolutionError
    return isinstance(error, (*kinds, httpx().ConnectError, httpx().TimeoutException))
