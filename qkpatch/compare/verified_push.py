"""Verify OUT, then publish it as it was verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import PresentHere
from qkpatch.common.number_ranges import some
from qkpatch.common.observer import Observer
from qkpatch.common.text import verify_command
from qkpatch.compare.verify import Verification, check, n_heads, recorded
from qkpatch.errors import MismatchError, UsageError
from qkpatch.model.locate import Access
from qkpatch.planning.manifest import Manifest
from qkpatch.planning.plan import EditPlan
from qkpatch.publishing.commit_plan import Publication, Wish, plan_publication

_SHOWN = 5  # mismatches


def publish_verified(
    out: Path,
    wish: Wish,
    source: str | None,
    recipe: str | None,
    *,
    observer: Observer,
    decide: Callable[[Publication], bool],
) -> str | None:
    """Publish an output; returns the commit's address, None where ``decide``, which is shown it, says no.

    Without ``source`` it is the repository that the manifest names.

    Raises:
        MismatchError: OUT is not what its manifest says.
        QKPatchError: as :func:`check` and :func:`plan_publication`.
    """
    with Rooted(out) as root:
        present = PresentHere(root)
        manifest = recorded(present)
        plan = _verified(present, manifest, source, recipe, observer)
        publication = plan_publication(wish, manifest, plan, present)
        return publication.carry_out(present) if decide(publication) else None


def _verified(
    present: PresentHere, manifest: Manifest, source: str | None, recipe: str | None, observer: Observer
) -> EditPlan:
    """OUT against SOURCE, and where the manifest names a repository that SOURCE is not, against that as well."""
    said, verified = manifest.source, None
    claim = said.address
    for place in (source, claim):
        if place is None or (verified is not None and verified.model.source.kind == "hub"):
            continue
        observer.begins("compare", present.size, n_heads(manifest))
        result = check(present, place, observer, recipe, Access.listed, any_card=False)
        if result.plan is None or not result.ok:
            raise _mismatch(result, present.root.path, place, recipe)
        if place == claim and result.plan.model.source.kind != "hub":
            hidden = "a path here bears the repository's name and hides it"
            raise UsageError(hidden, where=claim, fix="call it from elsewhere")
        verified = verified or result.plan
    if verified is None:
        what = f"nothing says where {said.name!r} is, and only what was verified is published"
        raise UsageError(what, where="--push", fix="say what OUT was made from: --source SOURCE")
    return verified


def _mismatch(result: Verification, out: Path, source: str, recipe: str | None) -> MismatchError:
    found = [f"{mismatch.where}: {mismatch.what}" for mismatch in result.mismatches]
    return MismatchError(
        f"it is not what its manifest says, so it is not published: {some(found, _SHOWN, '; ')}",
        where=str(out),
        fix=f"{verify_command(str(out), source, recipe)} shows all; apply again",
    )
