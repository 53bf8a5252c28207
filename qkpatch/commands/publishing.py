"""What ``apply --push`` and ``card --push`` have in common."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from qkpatch.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from qkpatch.checkpoint.present import Present
    from qkpatch.manifest import Manifest
    from qkpatch.plan import EditPlan
    from qkpatch.publication import Publication, Wish
    from qkpatch.results import Comparison
    from qkpatch.verify import Verification

_SHOWN = 5  # mismatches


def push_wish(
    push: str | None,
    *,
    private: bool,
    create_pr: bool,
    include: list[str] | None,
    include_hidden: bool,
    comparison: Comparison | None = None,
) -> Wish | None:
    """What ``--push`` asks for, None without it; refuses flags that go with it alone.

    Args:
        push: the repository.
        private: whether a new one is private.
        create_pr: a pull request instead of a commit.
        include: files to publish though SOURCE reached them by links.
        include_hidden: publish what is private by its name, too.
        comparison: results for the card.
    """
    if push is not None:
        from qkpatch.publication import Wish, parse_target
        from qkpatch.withheld import Insisted

        target = parse_target(push, private=private, create_pr=create_pr)
        return Wish(target, Insisted(tuple(include or ()), include_hidden), comparison)
    if private or create_pr or include or include_hidden:
        raise UsageError(
            "--private, --create-pr, --include and --include-hidden go with --push", fix="add --push org/name"
        )
    return None


def push_out(
    out: Path,
    wish: Wish,
    source: str | None,
    recipe: str | None,
    *,
    quiet: bool,
    as_json: bool = False,
    dry_run: bool = False,
) -> str | None:
    """Verify OUT and publish it, as it was verified; returns the commit's address, None for ``dry_run``.

    Args:
        out: OUT.
        wish: what is asked for.
        source: SOURCE; None for the repository that the manifest names.
        recipe: where a recipe of the user's own is.
        quiet: print nothing but errors.
        as_json: print no table, since stdout is for something else.
        dry_run: do all but send.

    Raises:
        MismatchError: OUT is not what its manifest says.
        QKPatchError: as :func:`verify` and :func:`plan_publication`.
    """
    from qkpatch.checkpoint.present import Present
    from qkpatch.checkpoint.rooted import Rooted
    from qkpatch.publication import plan_publication
    from qkpatch.verify import recorded

    with Rooted(out) as root:
        present = Present(root)
        manifest = recorded(present)
        plan = _verified(present, manifest, source, recipe, quiet=quiet or as_json)
        publication = plan_publication(wish, manifest, plan, present)
        show(publication, quiet=quiet, as_json=as_json)
        return None if dry_run else publication.carry_out(present)


def show(publication: Publication, *, quiet: bool, as_json: bool = False) -> None:
    """The commit, and what is not in it."""
    from qkpatch.console import show_warnings
    from qkpatch.tables import show_publication

    if not (quiet or as_json):
        show_publication(publication)
    if not quiet:
        show_warnings(publication.warnings)


def _verified(
    present: Present, manifest: Manifest, source: str | None, recipe: str | None, *, quiet: bool
) -> EditPlan:
    """OUT against SOURCE, and where the manifest names a repository that SOURCE is not, against that as well."""
    from qkpatch.console import bars
    from qkpatch.locate import Access
    from qkpatch.verify import check

    said, verified = manifest.source, None
    claim = f"{said['name']}@{said['commit']}" if said["kind"] == "hub" else None
    for place in (source, claim):
        if place is None or (verified is not None and verified.model.source.kind == "hub"):
            continue
        with bars(present.size, 0, quiet=quiet, verb="compare") as observer:
            result = check(present, place, observer.copied, recipe, Access.listed)
        if result.plan is None or not result.ok:
            raise _mismatch(result, present.root.path, place, recipe)
        if place == claim and result.plan.model.source.kind != "hub":
            raise UsageError(
                "a path here bears the repository's name and hides it",
                where=claim,
                fix="call it from elsewhere",
            )
        verified = verified or result.plan
    if verified is None:
        raise UsageError(
            f"nothing says where {said['name']!r} is, and only what was verified is published",
            where="--push",
            fix="say what OUT was made from: --source SOURCE",
        )
    return verified


def _mismatch(result: Verification, out: Path, source: str, recipe: str | None) -> MismatchError:
    found = [f"{mismatch.where}: {mismatch.what}" for mismatch in result.mismatches]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    own = ["--recipe", recipe] if recipe else []
    return MismatchError(
        f"it is not what its manifest says, so it is not published: {'; '.join(found[:_SHOWN])}{more}",
        where=str(out),
        fix=shlex.join(["qkpatch", "verify", str(out), "--source", source, *own]) + " shows all; apply again",
    )
