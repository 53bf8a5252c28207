"""``qkpatch apply``: an edited copy of SOURCE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.commands.plan import preview
from qkpatch.cli.commands.publishing import push_out, push_wish, show_commit
from qkpatch.cli.flags import EditFlags, OutOpt, PushFlags, RunFlags, ShowFlags, SourceArg, WriteFlags
from qkpatch.errors import UsageError
from qkpatch.output.options import Writing

if TYPE_CHECKING:
    from qkpatch.planning.plan import EditPlan
    from qkpatch.publishing.commit_plan import Publication, Wish


@command
def apply(
    source: SourceArg,
    *,
    out: OutOpt = None,
    edit: EditFlags,
    run: RunFlags,
    write: WriteFlags,
    publish: PushFlags,
    show: ShowFlags,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache", help="From the Hub straight into OUT: one copy on the disk, none in the cache."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only; as `qkpatch plan`.")] = False,
) -> None:
    """Write an edited copy of SOURCE to OUT, with a manifest of what was changed."""
    from qkpatch import api
    from qkpatch.cli.console import note, print_text, show_warnings
    from qkpatch.cli.progress import bars
    from qkpatch.cli.tables import show_applied
    from qkpatch.common.text import size_text
    from qkpatch.model.locate import local_path

    writing = Writing(**vars(write))
    request, wish = edit.request, push_wish(publish)
    if no_cache and local_path(source) is not None:
        raise UsageError("SOURCE is on this machine already", where="--no-cache", fix="leave it out")
    if no_cache and (writing.link or writing.link_cache):
        raise UsageError("nothing is there to link to", where="--link", fix="leave out --link or --no-cache")
    if out is not None:
        api.refuse_early(source, out, writing)
    # What is in OUT is read once, when a run begins.
    plan = api.plan(source, request, out=out if dry_run else None, writing=writing, cache=not no_cache)
    if dry_run:
        publication = _foreseen(plan, wish, run)
        preview(plan, out, run, show)
        if publication is not None:
            show_commit(publication, show)
        return
    say = (lambda _: None) if show.quiet else note
    if out is None:
        out = plan.default_out
        place = "in the current directory" if out.parent == Path() else "beside SOURCE"
        say(f"OUT is not named, so it is {out} {place}")
    _foreseen(plan, wish, run)  # what is refused is refused before a download
    model = plan.model
    with bars(quiet=show.is_bare) as observer:
        if model.source.path is None and not no_cache:
            size = size_text(model.checkpoint.size)
            say(f"{model.source.name}: {size} into the Hub cache, unless OUT is done already")
        manifest = api.apply(plan, out, **vars(run), cache=not no_cache, observer=observer, writing=writing)
    if not show.quiet:
        show_warnings([*manifest.warnings, *(manifest.run.weaker or ())])
    if not show.is_bare:
        show_applied(plan, manifest, out)
    if wish is not None:
        where = None if plan.model.source.kind == "hub" else source
        say(f"Published: {push_out(out, wish, where, plan.model.recipe_file, show)}")
    # Last, so that stdout is one document: this, or an error.
    if show.as_json:
        print_text(manifest.dumps())


def _foreseen(plan: EditPlan, wish: Wish | None, run: RunFlags) -> Publication | None:
    """The commit as far as it is known before OUT is there; refuses what cannot be published."""
    from qkpatch.planning.manifest import planned_manifest
    from qkpatch.publishing.commit_plan import plan_publication

    return None if wish is None else plan_publication(wish, planned_manifest(plan, run.device), plan, None)
