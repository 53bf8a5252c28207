"""SOURCE, as the user wrote it: a path, a URL, a Hub id or a recipe's name. What it is, and where it lies."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

from qkpatch.checkpoint.cache import snapshot_at
from qkpatch.checkpoint.tree import Repository, near_paths
from qkpatch.errors import FileSystemError, UsageError
from qkpatch.recipes.catalogue import get_recipe, shipped_recipes
from qkpatch.recipes.descriptions import near_names
from qkpatch.recipes.recipe import Recipe
from qkpatch.stores.url import StoreUrl

# A repository as browsers and other tools name it.
_PAGE = re.compile(
    r"(?P<scheme>https?://[^/]+/|hf://(?:models/)?)?(?P<id>\w[\w.-]*/[\w.-]+)"
    r"(?:@(?P<at>[^/?#]+)|/(?:tree|blob|resolve)/(?P<tree>[^/?#]+)[^?#]*)?/?(?:[?#].*)?",
    re.ASCII,
)

_LOST_SLASH = re.compile("([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)  # how a path shows a URL


class Access(Enum):
    """How a repository on the Hub is read."""

    download = "into the Hub cache, all of it"
    ranges = "where it is, by byte ranges, unless the Hub cache has all of it"
    no_cache = "where it is, whatever the Hub cache has"
    listed = "where it is, even where SOURCE names a snapshot in the Hub cache"


@dataclass(frozen=True)
class Source:
    """A located checkpoint; ``name`` never holds an absolute path, nor a secret: of a store it is the URL."""

    place: Path | Repository
    kind: str  # "directory", "file", "store", "hub", or "memory"
    name: str
    requested_revision: str | None = None
    commit: str | None = None
    recipe: Recipe | None = None  # when SOURCE was a recipe's name
    checked: frozenset[str] = frozenset()  # files that were downloaded just now and are what the Hub lists
    text: str = ""  # as the user wrote it

    @property
    def path(self) -> Path | None:
        """The path of SOURCE on this machine; None where it is elsewhere."""
        return self.place if isinstance(self.place, Path) else None

    @property
    def address(self) -> str:
        """What finds it again."""
        if self.path is not None:
            return str(self.path)
        return f"{self.name}@{self.commit}" if self.kind == "hub" else self.name


def locate(text: str, access: Access = Access.download) -> Source:
    """Find SOURCE: a URL of a store, an existing path, a recipe name, or ``org/name[@revision]`` on the Hub.

    ``org/name`` is a path where ``org`` is, or is nearly, a directory here that holds something of a similar name.

    Raises:
        UsageError: it is none of these.
        HubError: the Hub cannot deliver it.
        StoreError: a store cannot.
    """
    if not text:
        raise UsageError("SOURCE is empty", fix="name it; is a variable of the shell unset?")
    if (url := store_url(text)) is not None:
        from qkpatch.stores.remote import StoreFolder

        return Source(StoreFolder.at(url), "store", url.text, text=url.text)
    path = local_path(text)
    here = None if path is None else replace(_local(path), text=text)
    if here is not None and (here.commit is None or access is not Access.listed):
        return here
    # A tenth of a second, for SOURCE elsewhere alone.
    from qkpatch.hub.repository import HubId, download, open_repository

    recipe: Recipe | None = None
    if here is not None and here.commit is not None:
        hub_id: HubId | None = HubId(here.name, here.commit)
    elif text in shipped_recipes():
        recipe = get_recipe(text)
        if recipe.default_repo is None:
            what = f"recipe {text} stands for no repository: none is known that it reads"
            fix = "name the checkpoint itself: org/name[@revision], or a directory"
            raise UsageError(what, where=text, fix=fix)
        hub_id = HubId.parse(recipe.default_repo)
    else:
        hub_id = HubId.parse(text)
    near = near_paths(text) if path is None and text not in shipped_recipes() else []
    if near:
        is_id = "" if hub_id is None else f"; if it is meant to be on the Hub: {text}@main"
        otherwise = is_id if "/" in text else f"; {near_names(text, shipped_recipes())}"
        raise UsageError("no such file or directory", where=text, fix=f"near: {', '.join(near)}{otherwise}")
    page = _PAGE.fullmatch(text) if hub_id is None else None
    if page is not None and (page["scheme"] or page["tree"]):
        revision = page["at"] or page["tree"]
        meant = f"{page['id']}@{revision}" if revision else page["id"]
        raise UsageError("an address, not a Hub id", where=text, fix=f"write org/name[@revision]: {meant}")
    if path is None and "://" not in text:
        _check_slashes(text, "no such file or directory")
    if hub_id is None or (path is None and text.startswith((".", "/", "~"))):
        fix = f"check the path; {near_names(text, shipped_recipes())}"
        raise UsageError("no such file or directory, recipe, or Hub id (org/name)", where=text, fix=fix)
    if access is Access.download:
        found = download(hub_id)
    else:
        found = open_repository(hub_id, use_cache=access is Access.ranges)
    place, commit, checked = found
    return Source(place, "hub", hub_id.repo, hub_id.revision, commit, recipe, checked, text)


def store_url(text: str) -> StoreUrl | None:
    """SOURCE or OUT as a folder of a store; None where it is none, such as a page of the Hub.

    Raises:
        UsageError: as :meth:`StoreUrl.parse`.
    """
    scheme, _, rest = text.partition("://")
    hubs = {"huggingface.co", "hf.co", urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc}
    is_page = scheme == "hf" or (scheme in ("http", "https") and rest.partition("/")[0] in hubs)
    return None if is_page or "://" not in text else StoreUrl.parse(text)


def out_url(text: str | Path) -> StoreUrl | None:
    """OUT as a folder of a store; None where it is a path.

    Raises:
        UsageError: as :func:`store_url`; an address that is neither.
    """
    url = None if isinstance(text, Path) else store_url(text)
    if url is None:
        _check_slashes(str(text), "OUT is a directory, or the URL of a folder in a store, as text")
    return url


def _check_slashes(text: str, what: str) -> None:
    if lost := _LOST_SLASH.fullmatch(text):
        is_page, url = "://" in text, f"{lost[1]}://{lost[2]}"  # of the Hub
        fix = "to publish: --push ORG/NAME" if is_page else f"a URL has two slashes: {url}"
        raise UsageError(what, where=text, fix=fix)


def local_path(text: str) -> Path | None:
    """SOURCE as an existing path, None where it is none.

    Raises:
        FileSystemError: permission is missing even to look it up.
    """
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - Path's raises for ~nobody/x, a name like any other
    try:
        path.stat()
    except PermissionError as error:
        fix = "check the permissions of its parents"
        raise FileSystemError("no permission to look it up", where=str(path), fix=fix) from error
    except (OSError, ValueError):  # also names that no file can have: too long, or with a NUL
        return None
    return path


def _local(path: Path) -> Source:
    if path.is_file():
        return Source(path, "file", _text(path.name))
    snapshot = snapshot_at(path)
    if snapshot is not None:
        from qkpatch.hub.repository import check_snapshot

        check_snapshot(path.resolve())
        return Source(path, "hub", snapshot.repo, None, snapshot.commit)
    return Source(path, "directory", _text(path.resolve().name))


def _text(name: str) -> str:
    """A file's name as text, whatever bytes it has."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
