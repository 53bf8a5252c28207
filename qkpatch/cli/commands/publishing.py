"""What ``apply --push`` and ``card --push`` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qkpatch.cli.console import show_warnings
from qkpatch.cli.flags import PushFlags, ShowFlags
from qkpatch.errors import UsageError, refuse_warnings

if TYPE_CHECKING:
    from qkpatch.publishing.commit_plan import Publication, Wish
    from qkpatch.publishing.lmms_eval import Comparison


def push_wish(publish: PushFlags, comparison: Comparison | None = None) -> Wish | None:
    """What ``--push`` asks for, None without it; refuses flags that go with it alone."""
    if publish.push is not None:
        from qkpatch.publishing.commit_plan import Wish, parse_repository
        from qkpatch.publishing.private_files import Insisted

        repository = parse_repository(publish.push, private=publish.private, create_pr=publish.create_pr)
        insisted = Insisted(tuple(publish.include or ()), publish.include_hidden)
        return Wish(repository, insisted, comparison)
    if publish != PushFlags():
        what = "--private, --create-pr, --include and --include-hidden go with --push"
        raise UsageError(what, fix="add --push org/name")
    return None


def push_out(
    out: Path, wish: Wish, source: str | None, recipe: str | None, show: ShowFlags, *, dry_run: bool = False
) -> str | None:
    """:func:`publish_verified`, which shows the commit; None for ``dry_run``, which does not make it."""
    from qkpatch.compare.verified_push import publish_verified

    def decide(publication: Publication) -> bool:
        show_commit(publication, show)
        refuse_warnings(publication.warnings, strict=show.strict)
        return not dry_run

    from qkpatch.cli.progress import bars

    with bars(quiet=show.is_bare) as observer:
        return publish_verified(out, wish, source, recipe, observer=observer, decide=decide)


def show_commit(publication: Publication, show: ShowFlags) -> None:
    """The commit, and what is not in it."""
    from qkpatch.cli.tables import show_publication

    if not show.is_bare:
        show_publication(publication)
    if not show.quiet:
        show_warnings(publication.warnings)
