"""``qkpatch apply``: an edited copy of SOURCE, or an edit without one; ``qkpatch finish``: of parts, the whole."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkpatch.checkpoint.names import UNFINISHED
from qkpatch.cli.command import command
from qkpatch.cli.commands.plan import preview
from qkpatch.cli.commands.publishing import push_out, push_wish, show_commit
from qkpatch.cli.flags import (
    ClusterFlags,
    CopyFlags,
    EditFlags,
    OutOpt,
    OutOrUrlArg,
    PushFlags,
    RunFlags,
    ShowFlags,
    SourceArg,
    WriteFlags,
    place_of,
)
from qkpatch.errors import UsageError, refuse_warnings
from qkpatch.output.options import Digest

if TYPE_CHECKING:
    from qkpatch.common.part import Part
    from qkpatch.planning.plan import EditPlan
    from qkpatch.publishing.commit_plan import Publication, Wish


@command
def apply(
    source: SourceArg,
    *,
    out: OutOpt = None,
    edit: EditFlags,
    copy: CopyFlags,
    run: RunFlags,
    write: WriteFlags,
    cluster: ClusterFlags,
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
    """Write an edited copy of SOURCE to OUT, with a manifest of what was changed; or edit without a copy.

    Example: qkpatch apply org/name --layers 10-18 --modes 4 -o edited
    """
    from qkpatch import api
    from qkpatch.cli.console import end_strictly, note, print_text, show_warnings
    from qkpatch.cli.progress import bars
    from qkpatch.cli.tables import show_applied, show_edits
    from qkpatch.cluster.on_ray import apply_on_ray
    from qkpatch.common.text import as_word, size_text
    from qkpatch.model.locate import local_path
    from qkpatch.planning.patch_file import read_patch

    writing, request, wish = write.writing(strict=show.strict), copy.over(edit.request), push_wish(publish)
    place = None if out is None else place_of(out)
    own = "--patch-only" if write.patch_only else "--in-place" if write.in_place else None
    if own is not None:
        others = {**vars(writing), "no-cache": no_cache, "push": wish, "strict": False}
        own_others = {"patch": write.patch, "in-place": write.in_place, "dry-run": dry_run}
        others |= own_others if write.patch_only else {"out": place}
        others |= vars(cluster)
        others["digest"] = write.digest is Digest.files or (write.patch_only and write.digest is Digest.none)
        if wrong := [name.replace("_", "-") for name, given in others.items() if given]:
            raise UsageError(f"--{wrong[0]} does not go with {own}", where=own, fix="leave one of them out")
        if write.in_place and not dry_run and (Path(source) / UNFINISHED).exists():
            note("An edit in place had been cut short: it is undone first")
            api.revert(source)
    part = _part(cluster, {"--push": wish, "--dry-run": dry_run})
    if no_cache and local_path(source) is not None:
        raise UsageError("SOURCE is on this machine already", where="--no-cache", fix="leave it out")
    if no_cache and (writing.link or writing.link_cache):
        raise UsageError("nothing is there to link to", where="--link", fix="leave out --link or --no-cache")
    if isinstance(place, str) and (own is not None or wish is not None):
        raise UsageError(
            f"{own or '--push'} is of files on this machine", where=place, fix="name a path: -o OUT"
        )
    if place is not None and own is None:
        api.refuse_early(source, place, writing)
    # What is in OUT is read once, when a run begins.
    seen, cache = place if dry_run else None, not no_cache
    plan = api.plan(source, request, out=seen, writing=writing, cache=cache, patch=write.patch)
    if dry_run:
        publication = _foreseen(plan, wish, run)
        warnings = [*preview(plan, place, run, show, is_in_place=write.in_place)]
        if publication is not None:
            show_commit(publication, show)
            warnings += publication.warnings
        end_strictly(warnings, show)
        return
    say = (lambda _: None) if show.quiet else note
    if place is None and own is None:
        place = plan.default_out
        beside = "in the current directory" if place.parent == Path() else "beside SOURCE"
        say(f"OUT is not named, so it is {place} {beside}")
    publication = _foreseen(plan, wish, run)  # what is refused is refused before a download
    refuse_warnings([*plan.warnings, *(publication.warnings if publication else ())], strict=show.strict)
    model = plan.model
    with bars(quiet=show.is_bare) as observer:
        how: dict[str, Any] = {**vars(run), "observer": observer}
        if write.in_place:
            manifest = api.apply_in_place(plan, digest=write.digest, strict=show.strict, **how)
        elif write.patch_only:
            place = api.make_patch(plan, place, strict=show.strict, **how)
            manifest = read_patch(place).manifest
        else:
            if model.source.path is None and model.source.kind == "hub" and not no_cache:
                size = size_text(model.checkpoint.size)
                say(f"{model.source.name}: {size} into the Hub cache, unless OUT is done already")
            how |= {"cache": not no_cache, "writing": writing}
            if cluster.ray is not None and part is not None and place is not None:
                here = str(Path(source).absolute()) if model.source.kind in ("directory", "file") else source
                again = {"source": here, "request": request, "patch": write.patch and write.patch.absolute()}
                manifest = apply_on_ray(again, place, part.total, address=cluster.ray, **how)
            else:
                manifest = api.apply(plan, place, part=part, **how)
    if not show.quiet:
        show_warnings([*manifest.warnings, *(manifest.run.weaker or ())])
    if not show.is_bare and "part" in manifest.run.further and place is not None:
        wrote = f"{'Already done:' if manifest.run.already_done else 'Wrote'} part {part} of {place}"
        files = f"{len(manifest.edits)} tensor(s) edited, {len(manifest.files)} file(s)"
        next_step = shlex.join(["qkpatch", "finish", as_word(str(place))])
        show_edits(plan, manifest, f"{wrote}: {files}", f"When all parts are done: {next_step}")
    elif not show.is_bare and own is None and place is not None:
        show_applied(plan, manifest, place)
    elif not show.is_bare:
        then = ["qkpatch", "revert" if place is None else "apply", as_word(source)]
        then += [] if place is None else ["--patch", as_word(str(place)), "-o", "OUT"]
        did = "Already done" if manifest.run.already_done else "Edited in place" if place is None else "Wrote"
        rows = f"{len(manifest.edits)} tensor(s), {size_text(plan.edited_bytes)} of rows"
        verb = "Undo" if place is None else "Apply"
        show_edits(plan, manifest, f"{did} {place or source}: {rows}", f"{verb} it with: {shlex.join(then)}")
    if wish is not None and isinstance(place, Path):
        where = None if plan.model.source.kind == "hub" else source
        say(f"Published: {push_out(place, wish, where, plan.model.recipe_file, show)}")
    refuse_warnings(manifest.run.weaker or (), strict=show.strict)  # what became known when all was done
    # Last, so that stdout is one document: this, or an error.
    if show.as_json:
        print_text(manifest.dumps())


@command
def finish(out: OutOrUrlArg, show: ShowFlags) -> None:
    """Check all parts of OUT, and publish it: what one machine would have written. It may be run again."""
    from qkpatch import api
    from qkpatch.cli.console import print_text, results, safe, show_warnings
    from qkpatch.cli.progress import bars
    from qkpatch.common.text import as_word, size_text

    with bars(quiet=show.is_bare) as observer:
        manifest = api.finish(place_of(out), strict=show.strict, observer=observer)
    if not show.quiet:
        show_warnings([*manifest.warnings, *(manifest.run.weaker or ())])
    if show.as_json:
        print_text(manifest.dumps())
    elif not show.quiet:
        size = size_text(sum(file.size for file in manifest.files))
        did = "Already done:" if manifest.run.already_done else "Wrote"
        with results() as console:
            done = f"{len(manifest.edits)} tensor(s) edited, {len(manifest.files)} file(s), {size}"
            console.print(safe(f"{did} {out}: {done}"))
            console.print(
                safe(f"Prove it with: {shlex.join(['qkpatch', 'verify', as_word(str(out))])} --source SOURCE")
            )


def _part(cluster: ClusterFlags, others: Mapping[str, object]) -> Part | None:
    """The part that is to be written, or by Ray, the last of all."""
    from qkpatch.common.part import Part, parse_part

    asked, ray = cluster.part, cluster.ray
    if asked is None and ray is None:
        return None
    if wrong := [where for where, given in others.items() if given]:
        what = "it is of a whole OUT, which `qkpatch finish` makes of parts"
        raise UsageError(
            what, where=wrong[0], fix="leave it out; to publish: qkpatch card OUT --push ORG/NAME"
        )
    if ray is None:
        return parse_part(str(asked), os.environ)
    if asked is None or not re.fullmatch(r"\d{1,9}", asked, re.ASCII):
        raise UsageError("into how many parts?", where="--ray", fix="say it: --part 8")
    return Part.of((int(asked), int(asked)))


def _foreseen(plan: EditPlan, wish: Wish | None, run: RunFlags) -> Publication | None:
    """The commit as far as it is known before OUT is there; refuses what cannot be published."""
    from qkpatch.planning.manifest import planned_manifest
    from qkpatch.publishing.commit_plan import plan_publication

    return None if wish is None else plan_publication(wish, planned_manifest(plan, run.device), plan, None)
