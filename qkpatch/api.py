"""The library under the command line: what notebooks, sweeps and clusters call. Nothing is printed.

Importing this module imports no torch; a call that computes does. Calls may be made from several threads at once.
Every failure that can be explained is a :class:`~qkpatch.errors.QKPatchError` with ``what``, ``where`` and ``fix``.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkpatch.adapters.lora import lora
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.cluster.finish import finish
from qkpatch.common.checked import checked
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.errors import UsageError, refuse_warnings
from qkpatch.evaluation import evaluate as evaluate
from qkpatch.evaluation import tune as tune
from qkpatch.model.locate import Access, local_path, locate, out_url
from qkpatch.model.model import open_model
from qkpatch.output.destination import check_out
from qkpatch.output.options import Writing
from qkpatch.patches.in_place import apply_in_place, make_patch
from qkpatch.patches.in_place import foresee_in_place as foresee_in_place
from qkpatch.patches.undo import revert
from qkpatch.planning.manifest import Manifest, planned_manifest
from qkpatch.planning.memory import choose_threads
from qkpatch.planning.patch_file import read_patch
from qkpatch.planning.plan import EditPlan, downloaded, make_plan
from qkpatch.planning.request import Request, check_device_name
from qkpatch.sweeps.collect import collect as collect
from qkpatch.sweeps.sweep import sweep

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from qkpatch.compare.diff_types import Difference
    from qkpatch.compare.verify import Verification
    from qkpatch.patching.in_memory import LoadedEdit
    from qkpatch.patching.spectra import LayerSpectra
    from qkpatch.recipes.recipe import Recipe

PathLike = str | Path


def plan(
    source: PathLike,
    request: Request | None = None,
    *,
    out: PathLike | None = None,
    writing: Writing | None = None,
    cache: bool = True,
    patch: PathLike | None = None,
    **edit: Any,
) -> EditPlan:
    """Decide an edit from headers alone: which rows of which tensors are written, and which files are carried over.

    Per query head ``M = W_Qᵀ W_K`` (d_model × d_model, rank ≤ d_head) has the singular value decomposition
    ``U diag(S) Vᵀ``; the edit multiplies the first ``modes`` of ``S`` by ``alpha`` and maps the result back to the
    queries, ``W_Q' = W_Q (I − (1 − alpha) U_r U_rᵀ)``. Keys stay.

    Args:
        source: a directory, a ``.safetensors`` file, the URL of a folder in a store (``s3://bucket/name``),
            ``org/name[@revision]``, or a recipe's name.
        request: the edit as a value; in its place, its fields by keyword: ``layers=range(10, 19)`` (or ``"10-18"``),
            ``heads``, ``modes=4``, ``alpha=0.8`` in [0, 1], ``channel="full"``, ``select="dominant"``, ``seed``,
            ``recipe``, ``prefix``, ``attention``, ``fold_norm``, ``max_shard_size`` (bytes, or ``"5GB"``),
            ``exclude`` (globs of what is left out of OUT); ``energy=0.3``: as many modes of each head as hold that
            share of ``Σ s_j²``, at least ``min_modes`` and at most ``modes``; ``edits=[{"layers": "10-14",
            "modes": 4}, ...]``: what differs by layer, over what is said beside it.
        out: where it is to be written, where :func:`apply` would refuse that: then it is refused now.
        writing: how, likewise.
        cache: read a snapshot in the Hub cache where there is a whole one.
        patch: a file of :func:`make_patch`, whose rows are written in place of computed ones; of the edit, only
            ``max_shard_size``, ``exclude``, and ``recipe`` where that is a file of the user's own, may be said besides.
        **edit: the fields of ``request``.

    Raises:
        UsageError: the request contradicts itself or the model; OUT cannot be written.
        FileSystemError: OUT does not fit.
        AmbiguousError: no recipe fits, or more than one.
        UnsupportedError: a checkpoint that qkpatch recognises and does not edit.
        QKPatchError: SOURCE cannot be found or read.
    """
    request = Request.asked(request, edit)
    how = Writing() if writing is None else writing
    if out is not None:
        refuse_early(source, out, how)
    access = Access.ranges if cache else Access.no_cache
    plan_it = make_plan if patch is None else read_patch(Path(patch)).plan
    made = plan_it(str(source), request, access)
    planned_manifest(made, "")  # which refuses what no record could say, such as a broken one in SOURCE
    if out is None:
        return made
    if (url := out_url(out)) is not None:
        from qkpatch.uploads.apply import standing_in_store

        return replace(made, is_done=isinstance(standing_in_store(url, made, how), Manifest))
    from qkpatch.compare.overwrite import standing

    return replace(made, is_done=isinstance(standing(Path(out), made, how), Manifest))


def refuse_early(source: PathLike, out: PathLike, writing: Writing) -> None:
    """Refuse an OUT that is wrong anyway, before the Hub is asked; where SOURCE is here, :func:`plan` looks at both."""
    if (url := out_url(out)) is not None:
        from qkpatch.uploads.apply import check_url

        check_url(url, str(source), writing)
    elif local_path(str(source)) is None:
        check_out(Path(out), overwrite=writing.overwrite, force=writing.force)


def apply(
    plan: EditPlan,
    out: PathLike | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    cache: bool = True,
    observer: Observer = UNSEEN,
    writing: Writing | None = None,
    part: tuple[int, int] | None = None,
    **how: Any,
) -> Manifest:
    """Write the edited checkpoint and return its manifest, ``OUT/qkpatch.json``.

    SOURCE is only read. OUT appears whole, by one rename, or not at all; in a store, object by object, the manifest
    last. The bytes do not depend on ``threads``. Where OUT is what would be written, as its manifest records, nothing
    is: ``run.already_done`` of that says so.

    Args:
        plan: of :func:`plan`.
        out: a directory, or the URL of a folder in a store; by default ``plan.default_out``.
        device: ``cpu``, ``cuda``, ``cuda:i`` or ``auto``.
        threads: heads that are computed side by side; by default processors, within 450 MiB.
        cache: of the Hub: download into the Hub cache first; else straight into OUT.
        observer: hears of progress, from any thread.
        writing: how OUT is written; in its place, its fields by keyword.
        part: ``(i, N)``: write this share of OUT alone, of which the manifest is, for :func:`finish` to join.
        **how: of ``writing``: ``overwrite``, ``force``, ``resume``, ``digest``, ``link``, ``link_cache``, ``strict``.

    Raises:
        UsageError: OUT cannot be written, or holds what qkpatch did not write; there is no such device.
        HubError: a file does not come, or is not what the Hub lists.
        FileSystemError: reading, writing or space; SOURCE changed meanwhile.
        NumericalError: NaN or Inf, or a tensor that the edit would leave as it was.
        WarnedError: there is a warning, and ``strict``.
    """
    from qkpatch.cluster.part import apply_part
    from qkpatch.cluster.share import check_part, share_of
    from qkpatch.compare.overwrite import check_fits, standing
    from qkpatch.patching.apply import apply_plan, check_run

    writing = Writing(**how) if writing is None else writing
    source = plan.model.source
    straight = None if source.path is not None or (cache and source.kind == "hub") else source.kind
    mine = None if part is None else check_part(part, writing, straight=straight)
    check_device_name(device)
    refuse_warnings(plan.warnings, strict=writing.strict)
    n_threads = choose_threads(threads, plan.head_memory, len(plan.model.checkpoint.tensors))
    run: dict[str, Any] = {"observer": observer, "device": device, "threads": n_threads, "writing": writing}
    if out is not None and (url := out_url(out)) is not None:
        from qkpatch.cluster.in_store import apply_part_in_store
        from qkpatch.uploads.apply import into_store

        run["download"] = partial(downloaded, observer=observer) if cache else None
        return apply_part_in_store(plan, url, mine, **run) if mine else into_store(plan, url, **run)
    place = plan.default_out if out is None else Path(out)
    found = standing(place, plan, writing, observer, is_whole=False)
    if isinstance(found, Manifest):
        return found
    check_fits(place, share_of(plan, mine), writing)
    check_run(plan, device, n_threads)
    if source.path is None and source.kind == "hub" and cache:
        plan = downloaded(plan, observer)
        check_fits(place, share_of(plan, mine), writing)
    if plan.patch is not None:
        plan.patch.check_source(plan)
    n_heads = len(plan.edits) * len(plan.settings.heads)
    observer.begins("copy" if plan.model.source.path else "download", plan.output_bytes, n_heads)
    return apply_part(plan, place, mine, **run) if mine else apply_plan(plan, place, replaced=found, **run)


def spectra(
    source: PathLike,
    request: Request | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    observer: Observer = UNSEEN,
    **edit: Any,
) -> tuple[LayerSpectra, ...]:
    """The singular values of the query-key products, by layer and head; nothing is written.

    Args:
        source: as of :func:`plan`; of a repository, headers and the rows that are needed are fetched.
        request: as of :func:`plan`; ``modes``, or ``energy`` head by head, is the r of energy share and gap. All
            layers where none is named.
        device: as of :func:`apply`.
        threads: as of :func:`apply`.
        observer: hears of heads.
        **edit: the fields of ``request``.

    Raises:
        QKPatchError: as :func:`plan`; weights that hold NaN or Inf.
    """
    from qkpatch.patching.inspection import Inspection

    request = Request.asked(request, edit)
    check_device_name(device)
    return tuple(Inspection.of(str(source), request).spectra(device, threads, observer))


def verify(
    out: PathLike,
    source: PathLike | None = None,
    *,
    recipe: str | None = None,
    recompute: bool = True,
    observer: Observer = UNSEEN,
) -> Verification:
    """Check that OUT is SOURCE with only the planned rows changed, and these by the edit that its manifest records.

    Args:
        out: what :func:`apply` wrote, a directory or a URL.
        source: what it was made from, of a repository or a store by default the one that the manifest names; of a
            repository, the planned rows are fetched and digests compared.
        recipe: the YAML file, where OUT was made by a recipe of the user's own.
        recompute: compute the planned heads anew; else their rows are believed where their digests are right.
        observer: hears of bytes compared, and heads computed.

    Raises:
        CheckpointError: OUT has no manifest, or one that cannot be read.
        QKPatchError: SOURCE cannot be opened, or nothing says where it is.
    """
    from qkpatch.compare.verify import check, n_heads, opened_out, recorded

    with opened_out(_named(out)) as present:
        manifest = recorded(present)
        place = manifest.source.found_at(None if source is None else str(source), present.address)
        observer.begins("compare", present.size, n_heads(manifest) if recompute else 0)
        return check(present, place, observer, recipe, recomputed=recompute)


def _named(out: PathLike) -> PathLike:
    if out == "":
        raise UsageError("OUT is empty", fix="name the directory; is a variable unset?")
    return out


def diff(a: PathLike, b: PathLike, *, observer: Observer = UNSEEN) -> Difference:
    """Compare two checkpoints by tensors and files, however they are divided into shards, and under A's names.

    Raises:
        QKPatchError: one of them cannot be read.
    """
    from qkpatch.compare.diff import compare

    return compare(locate(str(a)), locate(str(b)), observer)


def recipe_for(source: PathLike) -> Recipe:
    """The recipe that fits a checkpoint, from its config and headers alone.

    Raises:
        AmbiguousError: none fits, or more than one.
        QKPatchError: SOURCE cannot be found or read.
    """
    return open_model(str(source), access=Access.ranges).recipe


def card(
    out: PathLike,
    results: PathLike | None = None,
    base_results: PathLike | None = None,
    *,
    write: bool = False,
) -> str:
    """The model card of an output, as Markdown.

    Args:
        out: what :func:`apply` wrote.
        results: ``*_results.json`` of lmms-eval on OUT.
        base_results: the same of a run on SOURCE.
        write: put it in place of the card in OUT, by one rename.

    Raises:
        UsageError: one of the results without the other, or of different tasks.
        QKPatchError: OUT has no manifest that can be read, or a card that was emptied; it cannot be written.
    """
    from qkpatch.compare.verify import read_out
    from qkpatch.publishing.card import CARD_NAME, model_card
    from qkpatch.publishing.lmms_eval import compare_both

    comparison = compare_both(results, base_results)
    manifest, base_card = read_out(Path(_named(out)))
    text = model_card(manifest, Path(out).resolve().name, base_card, comparison)
    if write:
        with Rooted(Path(out)) as root:
            root.replace(CARD_NAME, text.encode())
    return text


def patch_model(model: torch.nn.Module, request: Request | None = None, **edit: Any) -> LoadedEdit:
    """Edit a loaded transformers model in place: the numbers that :func:`apply` would store, bit for bit.

    All heads are computed before the first is written.

    Args:
        model: with its ``config``, its weights in one place.
        request: as of :func:`plan`, but for ``max_shard_size`` and ``exclude``.
        **edit: the fields of ``request``.

    Returns:
        What was written; its ``restore()`` puts the former bits back.

    Raises:
        UnsupportedError: weights on ``meta`` or on several devices, or quantised ones.
        QKPatchError: as :func:`plan`.
    """
    from qkpatch.patching.in_memory import edit_loaded

    return edit_loaded(model, Request.asked(request, edit))


@contextmanager
def patched(model: torch.nn.Module, request: Request | None = None, **edit: Any) -> Iterator[LoadedEdit]:
    """:func:`patch_model` for the length of a ``with`` block; the former bits are back however it ends."""
    made = patch_model(model, request, **edit)
    try:
        yield made
    finally:
        made.restore()


__all__ = (
    "apply", "apply_in_place", "card", "collect", "diff", "evaluate", "finish", "lora", "make_patch", "patch_model",
    "patched", "plan", "recipe_for", "revert", "spectra", "sweep", "tune", "verify",
)  # fmt: skip

for _call in __all__:
    globals()[_call] = checked(globals()[_call])
