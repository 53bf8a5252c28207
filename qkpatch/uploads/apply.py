"""``into_store``: an edited checkpoint at a URL. What is at OUT is asked first; success is the last act."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial

from qkpatch.checkpoint.names import CLAIM
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.common.interrupts import signals_held, signals_let_through
from qkpatch.common.json_text import Json
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.compare.overwrite import already_done
from qkpatch.errors import QKPatchError, UsageError, refuse_warnings
from qkpatch.model.locate import store_url
from qkpatch.model.targets import LayerTarget
from qkpatch.output.options import Digest, Writing
from qkpatch.patching.apply import (
    check_run,
    done_manifest,
    editor_of,
    fingerprint_of,
    is_to_be_kept,
    now,
    say_kept,
)
from qkpatch.patching.threads import Crew
from qkpatch.planning.blocks import RunBlock
from qkpatch.planning.manifest import HeadRecord, Manifest
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.sha256sums import refuse_own_sums, sums_text
from qkpatch.stores.present import PresentInStore
from qkpatch.stores.store import open_store
from qkpatch.stores.url import StoreUrl
from qkpatch.uploads.claim import Claim
from qkpatch.uploads.objects import Objects
from qkpatch.uploads.rows import Rows


def check_url(out: StoreUrl, source: str, writing: Writing) -> None:
    """Refuse an OUT in a store that is wrong whatever is there, before anything is asked.

    Raises:
        UsageError: no OUT can be there, it overlaps with SOURCE, or is to be written as only a directory can be.
    """
    out.check_writable()
    if out.name.endswith(".safetensors"):
        raise UsageError(
            "OUT is a folder; the files keep their names in it", where=out.text, fix="name a folder"
        )
    if (url := store_url(source)) is not None:
        out.check_apart(url)
    wrong = [name for name in ("link", "link_cache", "force") if getattr(writing, name)]
    if wrong:
        flag = f"--{wrong[0].replace('_', '-')}"
        raise UsageError(
            "a store has no links, and nothing there is replaced", where=flag, fix="leave it out"
        )


def standing_in_store(
    out: StoreUrl, plan: EditPlan, writing: Writing, observer: Observer = UNSEEN
) -> Manifest | Claim | None:
    """What is at OUT: the manifest of just what ``plan`` would write, the claim of an unfinished one, or None: nothing.

    Raises:
        UsageError: it holds something else, or an unfinished OUT that is neither to be gone on with nor removed.
        StoreError: it cannot be listed.
    """
    check_url(out, plan.model.source.text, writing)
    if writing.digest is Digest.files:
        refuse_own_sums(plan.model.checkpoint)
    store = open_store(out)
    listed = store.listing()
    if MANIFEST_NAME in listed:
        if writing.overwrite:
            what = "a whole OUT is there, and a store cannot replace it at once"
            raise UsageError(what, where=out.text, fix="choose another -o, or remove it yourself")
        return already_done(PresentInStore(out), plan, writing, observer)
    claim = Claim.found(store)
    if claim is not None:
        is_same = claim.fingerprint == fingerprint_of(plan, writing)
        if not writing.overwrite and not (writing.resume and is_same):
            of = "" if is_same else ", of another edit, SOURCE or version,"
            what = f"an OUT{of} that was not finished, or is being written by another run"
            go_on = "go on with it: --resume; or " if is_same else ""
            raise UsageError(what, where=out.text, fix=f"{go_on}remove it and begin anew: --overwrite")
        return claim
    check_free(out, listed)
    return None


def check_free(out: StoreUrl, listed: Mapping[str, object]) -> None:
    """Raise :class:`UsageError` where OUT, which nobody has claimed, holds anything."""
    if listed:
        what = f"it holds {next(iter(listed))!r:.300}, and there is no {MANIFEST_NAME}: qkpatch did not write this"
        raise UsageError(what, where=out.text, fix="choose another -o")


def into_store(
    plan: EditPlan,
    out: StoreUrl,
    *,
    download: Callable[[EditPlan], EditPlan] | None,
    observer: Observer,
    device: str,
    threads: int,
    writing: Writing,
    part: Mapping[str, Json] | None = None,
) -> Manifest:
    """Write the edited checkpoint to ``out``, unless it is there, and return its manifest; as in a directory.

    Objects appear whole: weights, other files, the index and config.json, and ``qkpatch.json`` last. ``download``
    brings a plan of a repository on the Hub to its cache; None where that is not to be used. Where ``plan`` is a share,
    its record says of what ``part`` it is.

    Raises:
        UsageError: as :func:`standing_in_store`; a repository that is not to come by way of the Hub cache.
        StoreError: the store takes or gives something not; another run has claimed OUT.
        FileSystemError: SOURCE changed, or there is no room for the edited tensors on this machine.
        QKPatchError: as :func:`apply_plan`.
    """
    found = standing_in_store(out, plan, writing, observer)
    if isinstance(found, Manifest):
        store = open_store(out)
        if store.read(CLAIM) is not None:  # of a run that was killed when OUT was whole
            store.remove([CLAIM])
        return found
    check_run(plan, device, threads)
    plan = fetched(plan, download)
    if plan.patch is not None:
        plan.patch.check_source(plan)
    observer.begins("upload", plan.output_bytes, len(plan.edits) * len(plan.settings.heads))
    return _write(plan, out, found, part, observer, device, threads, writing)


def fetched(plan: EditPlan, download: Callable[[EditPlan], EditPlan] | None) -> EditPlan:
    """The plan of files that are in a store, or on this machine; raises as :func:`into_store`."""
    if plan.model.source.path is not None or plan.model.source.kind != "hub":
        return plan
    if download is None:
        what = "from the Hub into a store goes by way of the Hub cache, where files are checked"
        raise UsageError(what, where="--no-cache", fix="leave it out")
    return download(plan)


def _write(
    plan: EditPlan, out: StoreUrl, found: Claim | None, part: Mapping[str, Json] | None, observer: Observer,
    device: str, threads: int, writing: Writing,
) -> Manifest:  # fmt: skip
    """To ``out``, which nothing speaks against; what a run whose claim was ``found`` had made is taken, or goes."""
    checkpoint, started = plan.model.checkpoint, now()
    checkpoint.check_still()
    claim = Claim(open_store(out), fingerprint_of(plan, writing), tuple(plan.output.files))
    with signals_held(), ExitStack() as stack:
        stack.enter_context(claimed(claim, found, writing))
        rows = stack.enter_context(Rows(plan))
        crew = stack.enter_context(Crew(threads, alongside=1))
        with signals_let_through():
            objects = Objects(plan, claim, rows, writing, observer, crew.check)
            untouched, edited_files, others = objects.in_order()
            copying = crew.start(partial(objects.make, untouched))
            rows.fill(crew)
            refs = [ref for target in plan.edits for ref in target.written]
            is_digested = writing.digest is not Digest.none
            before = dict(zip(refs, crew.map(rows.sha256, refs), strict=True)) if is_digested else {}
            editor = editor_of(plan, device)
            heads: dict[LayerTarget, tuple[HeadRecord, ...]] = {}
            for target, records in editor.edited(plan, rows.open, crew, rows.write, observer):
                heads[target] = records
            after = dict(zip(refs, crew.map(rows.sha256, refs), strict=True)) if is_digested else {}
            copying.result()
            objects.make(edited_files)
            objects.make(others)
            edited = {
                t: ([before.get(r) for r in t.written], [after.get(r) for r in t.written], heads[t])
                for t in plan.edits
            }
            done = done_manifest(plan, editor, edited)
            # By which a part's objects are known when it is joined.
            written = {name: entry.identity for name, entry in objects.made.items()}
            further: Mapping[str, Json] = {} if part is None else {**part, "written": written}
            source = plan.model.source
            came = {extent.file.name for file in plan.output.files.values() for extent in file.extents}
            is_checked = None if source.kind != "hub" else source.checked >= came
            manifest = replace(
                done,
                source=replace(done.source, checked=is_checked),
                files=tuple(replace(file, sha256=objects.sha256[file.name]) for file in done.files),
                output=replace(done.output, digest=writing.digest),
                run=RunBlock(started, now(), dict(objects.means), editor.stack, further=further),
            )
            refuse_warnings(manifest.warnings, strict=writing.strict)
            record = manifest.dumps().encode()
            if writing.digest is Digest.files and part is None:
                objects.put(SUMS_NAME, sums_text(manifest, record).encode())
            checkpoint.check_still()
            claim.check_made(objects.made)
        claim.publish(record)
    return manifest


@contextmanager
def claimed(claim: Claim, found: Claim | None, writing: Writing) -> Iterator[None]:
    """OUT is this run's. Where it fails, all it made is removed, or kept where a run that resumes may do better."""
    store = claim.store
    if found is not None and (not writing.resume or found.fingerprint != claim.fingerprint):
        found.remove_all(store.listing())
        found = None
    if found is None:
        claim.make()
    else:
        claim.take_over(found)
        store.abort_left()
    try:
        yield
    except BaseException as error:
        if not claim.is_lost:
            if claim.done and is_to_be_kept(error, writing):
                say_kept(error, {name: done.size for name, done in claim.done.items()}, len(claim.files))
            else:
                with suppress(QKPatchError):
                    claim.remove_all({*store.listing()} - {CLAIM})
        raise
