"""``StoreUrl``: a folder of a store, as people write it. What is no plain place, or holds a secret, is refused here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qkpatch.checkpoint.tree import is_plain_relative
from qkpatch.errors import UsageError, in_url

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)(?P<chain>::.*)?://(?P<rest>.*)", re.DOTALL)
_AT, _COLON = re.compile(in_url("@")), re.compile(in_url(":"))
_QUERY = re.compile(rf"{in_url('?#')}|{in_url(';')}[^/;]{{0,64}}{in_url('=')}")
# Names that mean one store, and the extra that brings its client.
_SAME = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure", "http": "https", "https": "https"}
# Where an object is there whole or not at all, so that OUT may be there.
WRITABLE = ("s3", "gs", "az", "memory")
_LOCAL = ("file", "local")


@dataclass(frozen=True)
class StoreUrl:
    """``scheme://bucket/folder``, without a slash at its end."""

    scheme: str  # in its first spelling: s3, gs, az
    place: str  # what follows, as it was written
    text: str

    @classmethod
    def parse(cls, text: str) -> StoreUrl | None:
        """The URL; None where ``text`` does not have that form.

        Raises:
            UsageError: a URL that is no folder of a store, or that has a secret in it.
        """
        found = _URL.fullmatch(text)
        if found is None:
            return None
        scheme, rest = found["scheme"].lower(), found["rest"].rstrip("/")
        if found["chain"]:
            raise UsageError(
                "a URL inside another one", where=text, fix="name the store itself, as s3://bucket/folder"
            )
        if scheme in _LOCAL:
            raise UsageError("a file of this machine", where=text, fix="write its path, without the scheme")
        host, _, folder = rest.partition("/")
        is_azure = _SAME.get(scheme, scheme) == "az"  # container@account
        users = [user for part in rest.split("/") for user in _AT.split(part)[:-1]]
        if (_AT.search(host) and not is_azure) or any(map(_COLON.search, users)) or _QUERY.search(rest):
            what = "the URL has a user, a password, a token or a signature in it, which would be shown and recorded"
            fix = "leave it out: the client has its credentials from its own configuration (docs/stores.md)"
            raise UsageError(what, where=f"{scheme}://...", fix=fix)
        if not host or (folder and not is_plain_relative(folder)):
            raise UsageError("not a folder of a store", where=text, fix="write scheme://bucket/folder")
        return cls(_SAME.get(scheme, scheme), rest, f"{scheme}://{rest}")

    @property
    def name(self) -> str:
        """The last part, by which the folder goes."""
        return self.place.rpartition("/")[2]

    def check_apart(self, other: StoreUrl) -> None:
        """Raise :class:`UsageError` where this, as OUT, and ``other``, as SOURCE, are one, or one in the other."""
        ours, theirs = (
            re.sub("@[^/]*", "", f"{url.place}/") for url in (self, other)
        )  # whatever the account
        if self.scheme != other.scheme or not (ours.startswith(theirs) or theirs.startswith(ours)):
            return
        relation = "is" if ours == theirs else "lies in" if ours.startswith(theirs) else "holds"
        what = f"OUT {relation} SOURCE, which is never written to"
        raise UsageError(what, where=self.text, fix="choose an OUT beside SOURCE")

    def check_writable(self) -> None:
        """Raise :class:`UsageError` where objects could be seen before they are whole."""
        if self.scheme not in WRITABLE:
            what = f"OUT cannot be at {self.scheme}://, where others would see files that are half written"
            raise UsageError(what, where=self.text, fix="an OUT at s3://, gs:// or az://, or a directory")
