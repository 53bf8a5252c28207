"""``qkpatch apply`` and ``qkpatch plan``: the same decisions, carried out or only shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkpatch.boundary import command
from qkpatch.commands.publishing import push_out, push_wish, show
from qkpatch.errors import UsageError
from qkpatch.options import (
    AlphaOpt,
    AttentionOpt,
    ChannelOpt,
    ConfigOpt,
    CreatePrOpt,
    DebugOpt,
    DeviceOpt,
    FoldOpt,
    HeadsOpt,
    IncludeHiddenOpt,
    IncludeOpt,
    JsonOpt,
    LayersOpt,
    ModesOpt,
    PrivateOpt,
    PushOpt,
    QuietOpt,
    RecipeOpt,
    SeedOpt,
    SelectOpt,
    ShardOpt,
    SourceArg,
    ThreadsOpt,
    edit_request,
    expanded,
)
from qkpatch.request import Request, check_device_name
from qkpatch.writing import Digest, Writing

if TYPE_CHECKING:
    from qkpatch.locate import Access
    from qkpatch.plan import EditPlan


@command
def apply(
    source: SourceArg,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Directory to write.",
            show_default="SOURCE's name, qkpatch, a hash of the edit",
            callback=expanded,
        ),
    ] = None,
    layers: LayersOpt = None,
    modes: ModesOpt = None,
    alpha: AlphaOpt = None,
    channel: ChannelOpt = None,
    select: SelectOpt = None,
    seed: SeedOpt = None,
    heads: HeadsOpt = None,
    recipe: RecipeOpt = None,
    attention: AttentionOpt = None,
    fold_norm: FoldOpt = False,
    config: ConfigOpt = None,
    device: DeviceOpt = "cpu",
    threads: ThreadsOpt = None,
    max_shard_size: ShardOpt = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan only; the same as `qkpatch plan`.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output of qkpatch.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --overwrite: replace OUT whatever it holds.")
    ] = False,
    digest: Annotated[
        Digest,
        typer.Option(help="SHA-256 of the edited tensors; of all files, as SHA256SUMS; or of nothing."),
    ] = Digest.edited,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links to files of SOURCE that are not edited.")
    ] = False,
    link_cache: Annotated[
        bool, typer.Option("--link-cache", help="The same, even to files in the Hub cache.")
    ] = False,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache", help="From the Hub straight into OUT: one copy on the disk, none in the cache."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take over what a killed run of the same edit had done.")
    ] = False,
    push: PushOpt = None,
    private: PrivateOpt = False,
    create_pr: CreatePrOpt = False,
    include: IncludeOpt = None,
    include_hidden: IncludeHiddenOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Write an edited copy of SOURCE to OUT, with a manifest of what was changed."""
    from qkpatch.budget import choose_threads
    from qkpatch.checkpoint.target import check_out
    from qkpatch.console import bars, note, print_text, show_warnings, silent, size_text
    from qkpatch.locate import Access
    from qkpatch.manifest import planned_manifest
    from qkpatch.patch import apply_plan
    from qkpatch.plan import make_plan
    from qkpatch.publication import plan_publication
    from qkpatch.replacing import replaceable
    from qkpatch.tables import show_applied

    if force and not overwrite:
        raise UsageError("--force goes with --overwrite", fix="add --overwrite, or leave it out")
    request = edit_request(
        layers,
        modes,
        alpha,
        channel,
        select,
        seed,
        heads,
        recipe,
        attention,
        fold_norm,
        config,
        max_shard_size,
    )
    wish = push_wish(
        push, private=private, create_pr=create_pr, include=include, include_hidden=include_hidden
    )
    writing = Writing(digest, link or link_cache, link_cache, resume, overwrite, force)
    is_quiet = quiet or as_json
    if dry_run:
        plan = _preview(
            source,
            request,
            out,
            device,
            threads,
            as_json=as_json,
            quiet=quiet,
            overwrite=overwrite,
            force=force,
        )
        if wish is not None:
            show(
                plan_publication(wish, planned_manifest(plan, device), plan, None),
                quiet=quiet,
                as_json=as_json,
            )
        return
    say = silent if quiet else note
    if no_cache:
        check_no_cache(source, writing)
    plan = decide(source, request, out, device, Access.no_cache if no_cache else Access.ranges, writing)
    if out is None:
        out = Path(plan.default_name)
        check_out(out, plan.model.source.path, overwrite=overwrite, force=force)
        say(f"OUT is not named, so it is {out} in the current directory")
    # What is refused is refused before a download.
    with bars(plan.output_bytes if overwrite else 0, 0, quiet=is_quiet, verb="look at OUT:") as observer:
        replaced = replaceable(out, plan, writing, observer.copied)
    if wish is not None:
        plan_publication(wish, planned_manifest(plan, device), plan, None)
    if plan.model.source.path is None and not no_cache:
        say(f"{plan.model.source.name}: {size_text(plan.model.checkpoint.size)} into the Hub cache")
        plan = make_plan(source, request)
    n_threads = choose_threads(threads, plan.head_memory, len(plan.model.checkpoint.tensors))
    n_heads, verb = len(plan.edits) * len(plan.settings.heads), "download" if no_cache else "copy"
    with bars(plan.output_bytes, n_heads, quiet=is_quiet, verb=verb) as observer:
        manifest = apply_plan(
            plan,
            out,
            device=device,
            threads=n_threads,
            observer=observer,
            writing=writing,
            replaced=replaced,
        )
    if not quiet:
        show_warnings(manifest.warnings)
    if as_json:
        print_text(manifest.dumps())
    elif not quiet:
        show_applied(plan, manifest, source, out)
    if wish is not None:
        where = None if plan.model.source.kind == "hub" else source
        own = plan.model.recipe_file
        say(f"Published: {push_out(out, wish, where, own, quiet=quiet, as_json=as_json)}")


@command
def plan(
    source: SourceArg,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where OUT would be.", callback=expanded)
    ] = None,
    layers: LayersOpt = None,
    modes: ModesOpt = None,
    alpha: AlphaOpt = None,
    channel: ChannelOpt = None,
    select: SelectOpt = None,
    seed: SeedOpt = None,
    heads: HeadsOpt = None,
    recipe: RecipeOpt = None,
    attention: AttentionOpt = None,
    fold_norm: FoldOpt = False,
    config: ConfigOpt = None,
    device: DeviceOpt = "cpu",
    threads: ThreadsOpt = None,
    max_shard_size: ShardOpt = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="OUT may be an earlier output.")] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show what `apply` would do, from headers alone: tensors, heads, bytes, disk and memory."""
    request = edit_request(
        layers,
        modes,
        alpha,
        channel,
        select,
        seed,
        heads,
        recipe,
        attention,
        fold_norm,
        config,
        max_shard_size,
    )
    _preview(
        source, request, out, device, threads, as_json=as_json, quiet=quiet, overwrite=overwrite, force=False
    )


def decide(
    source: str, request: Request, out: Path | None, device: str, access: Access, writing: Writing
) -> EditPlan:
    """The plan, with everything refused that can be without a download."""
    from qkpatch.checkpoint.target import check_apart, check_out
    from qkpatch.locate import local_path
    from qkpatch.plan import make_plan

    check_device_name(device)
    if out is not None:
        check_out(out, local_path(source), overwrite=writing.overwrite, force=writing.force)
    plan = make_plan(source, request, access)
    if out is not None:
        check_apart(out, plan.model.checkpoint)
    return plan


def check_no_cache(source: str, writing: Writing) -> None:
    """Refuse ``--no-cache`` where it means nothing."""
    from qkpatch.locate import local_path

    if local_path(source) is not None:
        raise UsageError("SOURCE is on this machine already", where="--no-cache", fix="leave it out")
    if writing.link:
        raise UsageError("nothing is there to link to", where="--link", fix="leave out --link or --no-cache")


def _preview(
    source: str,
    request: Request,
    out: Path | None,
    device: str,
    threads: int | None,
    *,
    as_json: bool,
    quiet: bool,
    overwrite: bool,
    force: bool,
) -> EditPlan:
    from qkpatch.budget import choose_threads, peak_memory
    from qkpatch.canonical import canonical_json
    from qkpatch.checkpoint.space import free_bytes
    from qkpatch.console import print_text, show_warnings
    from qkpatch.locate import Access
    from qkpatch.manifest import planned_manifest
    from qkpatch.tables import show_plan

    writing = Writing(overwrite=overwrite, force=force)
    plan = decide(source, request, out, device, Access.ranges, writing)
    n_tensors = len(plan.model.checkpoint.tensors)
    n_threads = choose_threads(threads, plan.head_memory, n_tensors)
    memory = peak_memory(n_threads, plan.head_memory, n_tensors)
    free_disk = free_bytes(out if out is not None else Path("out"))
    if not quiet:
        show_warnings(plan.warnings)
    if as_json:
        costs = {
            "output_bytes": plan.output_bytes,
            "edited_bytes": plan.edited_bytes,
            "free_disk_bytes": free_disk,
            "expected_peak_memory_bytes": memory,
            "threads": n_threads,
        }
        print_text(canonical_json({**planned_manifest(plan, device).to_json(), "costs": costs}))
    elif not quiet:
        show_plan(plan, free_disk, memory, n_threads)
    return plan
