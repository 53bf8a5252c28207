"""Around every call to a store's client: what can go wrong is worded once, with the next step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from qkpatch.errors import QKPatchError, StoreError, redact

_SKEWED = ("RequestTimeTooSkewed", "too skewed", "too far from the server time")
_BUSY = ("SlowDown", "reduce your request rate", "TooManyRequests", "429", "ServerBusy", "503", "Throttl")
_MOVED_ON = ("PreconditionFailed", "pre-condition", "precondition", "ConditionNotMet", "FileExpired")
_MISSING = ("404", "NoSuch", "Not Found", "ResourceNotFoundError")
_FORBIDDEN = ("401", "403", "AccessDenied", "Forbidden", "AuthorizationFailure", "AuthenticationFailed",
              "AuthorizationPermissionMismatch")  # fmt: skip
# How clients say that nobody is there.
_UNREACHED = ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionTimeoutError", "ClientConnector",
              "ConnectionRefused", "Cannot connect to host", "FSTimeoutError", "ReadTimeoutError")  # fmt: skip
_NO_KEY = ("NoCredentials", "PartialCredentials", "DefaultCredentialsError", "ClientAuthenticationError",
           "Must provide either a connection_string")  # fmt: skip


class ShortAnswerError(ConnectionError):
    """Fewer or more bytes came than were asked for."""


@contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Turn what fsspec's clients raise, each of a kind of its own, into :class:`StoreError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, QKPatchError | MemoryError) or not is_theirs(error):
            raise
        raise explained(error, where) from error


def is_theirs(error: Exception) -> bool:
    """Whether a client raised it, and no line of ours: of what servers say, clients take much for granted."""
    if isinstance(error, ShortAnswerError):
        return True
    *_, (frame, _line) = walk_tb(error.__traceback__)
    return not str(frame.f_globals.get("__name__")).startswith("qkpatch.")


def says(error: Exception, words: tuple[str, ...]) -> bool:
    """Whether an error, by its kind or its text, says one of these words."""
    said = f"{type(error).__name__}: {error}"
    return any(re.search(rf"\b{word}\b" if word.isdigit() else re.escape(word), said) for word in words)


def has_changed(error: Exception) -> bool:
    """Whether the store refused since the object is not, or no longer, the one that was meant."""
    return not isinstance(error, FileExistsError) and says(error, _MOVED_ON)


def is_unreached(error: Exception) -> bool:
    """Whether no server was met; clients try that for a while themselves."""
    return says(error, _UNREACHED)


def is_passing(error: Exception) -> bool:
    """Whether trying again may help: a broken connection, a store that is busy; not what it refuses."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of web servers, whatever the failure was
    if has_changed(error) or says(error, (*_SKEWED, *_NO_KEY, *_MISSING, *_FORBIDDEN)):
        return False
    lasting = FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError
    return not isinstance(error, (*lasting, NotImplementedError, TypeError, QKPatchError))


def explained(error: Exception, where: str) -> StoreError:
    """The same failure, with what to do about it."""
    # What Azure adds from there on is for its support.
    said = " ".join(redact(str(error).partition("RequestId:")[0]).split())
    if says(error, _SKEWED):
        what = "the store finds the time of this machine wrong"
        fix = "set the clock: stores refuse old signatures"
    elif has_changed(error):
        return changed_object(where)
    elif says(error, _NO_KEY):
        what, fix = f"the client has no credentials: {said}", "give it its own: docs/stores.md says where"
    elif is_unreached(error):
        what = f"the server cannot be reached: {said or type(error).__name__}"
        fix = "check URL, connection and proxies, AWS_ENDPOINT_URL"
    elif isinstance(error, FileExistsError):
        what, fix = "somebody else has made it meanwhile", "is another qkpatch writing there?"
    elif isinstance(error, FileNotFoundError) or says(error, ("ResourceNotFoundError",)):
        what, fix = "there is no such bucket, container or object", "check the URL"
    elif isinstance(error, PermissionError) or says(error, _FORBIDDEN):
        what, fix = f"the store forbids it: {said}", "do the client's credentials have the right to do this?"
    elif says(error, _BUSY):
        what, fix = f"the store is busy, and stays so: {said}", "try again later"
    elif not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
        what = f"the store does not answer as one: {type(error).__name__}: {said}"
        fix = "check URL and connection"
    else:
        what = f"the transfer failed: {said or type(error).__name__}"
        fix = "try again; check URL and connection"
    return StoreError(what, where=where, fix=fix)


def changed_object(where: str) -> StoreError:
    """The error for an object that is replaced or removed while it is used."""
    what = "the object changed while qkpatch was running"
    return StoreError(what, where=where, fix="run again when nothing writes there")
