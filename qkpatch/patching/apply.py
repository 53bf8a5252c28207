"""The engine: files are copied while heads are edited, and OUT is published last. Success is the last act."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.common.interrupts import import_torch, signals_held, signals_let_through
from qkpatch.common.json_text import Json, canonical_json
from qkpatch.common.number_ranges import abbreviate
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.common.text import Warned, warned
from qkpatch.errors import FileSystemError, HubError, QKPatchError, StoreError, no_torch, refuse_warnings
from qkpatch.model.targets import LayerTarget
from qkpatch.output.destination import Replaced
from qkpatch.output.journal import Journal
from qkpatch.output.options import PLAIN, Digest, Writing
from qkpatch.output.space import check_limits
from qkpatch.output.staged_files import StagedFiles
from qkpatch.output.staging import Staging
from qkpatch.patching.checked_sources import Sources
from qkpatch.patching.copier import COPIES_AHEAD, Copier
from qkpatch.patching.threads import Crew
from qkpatch.planning.blocks import RunBlock, ToolBlock
from qkpatch.planning.manifest import EditRecord, HeadRecord, Manifest, planned_manifest
from qkpatch.planning.memory import peak_memory
from qkpatch.planning.patch_file import Patch, rows_of
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.sha256sums import sums_text
from qkpatch.spectral.rule import EditRule, Select

if TYPE_CHECKING:
    from qkpatch.patching.edit_heads import Editor, Write

GAP_WARNING = 1e-3
ROUNDING_WARNING = 0.1  # FP8 has three bits: a small change drowns in its rounding
_NAMED = 8  # heads that a warning names
_OPEN_FILES = 12  # beside those of OUT, and what each thread reads from: staging, its journal, a library


class PartOf(NamedTuple):
    """What a part belongs to."""

    room: Rooted  # the directory that all parts share
    said: Mapping[str, Json]  # of it, in the part's record; there is also when each file was written


def apply_plan(
    plan: EditPlan,
    out: Path,
    *,
    observer: Observer = UNSEEN,
    device: str = "cpu",
    threads: int = 1,
    writing: Writing = PLAIN,
    replaced: Replaced | None = None,
    part: PartOf | None = None,
) -> Manifest:
    """Write the edited checkpoint to ``out`` and return its manifest; the same bytes whatever ``threads``.

    SOURCE is only read. OUT appears whole, by one rename, or not at all; it takes the place of what was ``replaced``.
    Where ``plan`` is a share, ``part`` says of what.

    Raises:
        UsageError: OUT came into being meanwhile, or there is no such device.
        FileSystemError: reading, writing or space.
        NumericalError: NaN or Inf, or a tensor that the edit would leave as it was.
        WarnedError: there is a warning, and ``writing`` is strict.
    """
    checkpoint = plan.model.checkpoint
    checkpoint.check_still()
    fingerprint = fingerprint_of(plan, writing)
    started = now()
    with signals_held(), ExitStack() as stack:
        resume = fingerprint if writing.resume else None
        shared = None if part is None else part.room
        staging = stack.enter_context(Staging(out, resume, checkpoint.mode, shared))
        journal = stack.enter_context(Journal(staging.room, fingerprint))
        staged = StagedFiles(staging.files)
        stack.enter_context(_keeping(staging, staged, journal, plan, writing))
        sources = Sources(plan, staged, writing)
        copier = stack.enter_context(Copier(plan, sources, staged, journal, writing, observer))
        crew = stack.enter_context(Crew(threads, alongside=copier.lanes + 1))
        with signals_let_through():  # but not while any of the above begins or ends
            copier.prepare(crew)
            copying = copier.start(crew)
            editor = editor_of(plan, device)
            carried = copier.wait(copying, crew) if sources.is_download else {}
            heads: dict[LayerTarget, tuple[HeadRecord, ...]] = {}
            digests: dict[LayerTarget, Future[_Digests]] = {}
            for target, records in editor.edited(plan, sources.open, crew, copier.write, observer):
                heads[target] = records
                if plan.writes_all_of(target):  # and while it is in the page cache
                    digests[target] = crew.start(partial(_digests, sources, copier, writing, target))
            if not sources.is_download:
                carried = copier.wait(copying, crew)
            copier.seal()
            for target in plan.edits:
                if target not in digests:
                    digests[target] = crew.start(partial(_digests, sources, copier, writing, target))
            edited = {t: (*digests[t].result(), heads[t]) for t in plan.edits}
            done = done_manifest(plan, editor, edited)
            hashed = {name: how.sha256 for name, how in carried.items()}
            hashed |= copier.edited_digests(crew, carried)
            further = {} if part is None else {**part.said, "written": staged.times}
            copied_by = Counter(how.means for how in carried.values())
            manifest = replace(
                done,
                source=replace(done.source, checked=sources.is_checked),
                files=tuple(replace(file, sha256=hashed[file.name]) for file in done.files),
                output=replace(done.output, digest=writing.digest),
                run=RunBlock(started, now(), copied_by, editor.stack, further=further),
            )
            refuse_warnings((*manifest.warnings, *staging.lacks), strict=writing.strict)
            record = manifest.dumps().encode()
            if writing.digest is Digest.files and part is None:
                staged.write_new(SUMS_NAME, sums_text(manifest, record).encode())
            staged.write_new(MANIFEST_NAME, record)
            staged.check(checkpoint.directories)
            checkpoint.check_still()
            staging.publish(checkpoint.directories, None if replaced is None else replaced.check)
    return manifest.telling(weaker=tuple(staging.lacks) or None)


def check_run(plan: EditPlan, device: str, threads: int) -> None:
    """Refuse what cannot be computed here, before a file is made or downloaded.

    Raises:
        UsageError: torch is not there, or has no such device.
        FileSystemError: more open files or memory than this process may have.
    """
    if plan.patch is None and find_spec("torch") is None:
        raise no_torch()
    memory = peak_memory(threads, plan.head_memory, len(plan.model.checkpoint.tensors))
    n_files = len(plan.edits_by_file) + min(COPIES_AHEAD, len(plan.output.files)) + 2 * threads
    is_limited = check_limits(_OPEN_FILES + n_files, memory)
    is_remote = plan.model.source.path is None  # nor is anything downloaded for a torch that does not work
    # These two are always there.
    if plan.patch is None and (is_limited or is_remote or device not in ("auto", "cpu")):
        _editor(device)


@contextmanager
def _keeping(
    staging: Staging, staged: StagedFiles, journal: Journal, plan: EditPlan, writing: Writing
) -> Iterator[None]:
    """What is done stays where a run that resumes may do better: if it is asked for, or the Hub failed; say so."""
    try:
        yield
    except BaseException as error:
        if is_to_be_kept(error, writing) and (sizes := journal.sizes) and staging.can_be_kept:
            staging.is_kept = True
            with suppress(FileSystemError):
                staged.prune(sizes, plan.model.checkpoint.directories)
            say_kept(error, sizes, len(plan.output.files))
        raise


def is_to_be_kept(error: BaseException, writing: Writing) -> bool:
    """Whether what is done stays when a run ends so: a run that resumes may do better."""
    is_final = isinstance(error, QKPatchError) and not isinstance(error, FileSystemError)
    return isinstance(error, HubError | StoreError) or (writing.resume and not is_final)


def say_kept(error: BaseException, sizes: Mapping[str, int], total: int) -> None:
    """Let an error say what is kept: files, of ``total``, and their bytes."""
    kept = f"{sum(sizes.values()):,} bytes in {len(sizes)} of {total} file(s) are kept"
    vars(error)["kept"] = kept
    if isinstance(error, QKPatchError):
        error.fix = f"{f'{error.fix}; ' if error.fix else ''}{kept} for a run with --resume"


class Recorded(NamedTuple):
    """New rows out of a patch file, with the figures that travel in it; to be asked as an editor is, without torch."""

    patch: Patch
    device: str
    tool: ToolBlock
    stack: Mapping[str, str] | None

    def edited(
        self, plan: EditPlan, _: object, crew: Crew, write: Write, observer: Observer
    ) -> Iterator[tuple[LayerTarget, tuple[HeadRecord, ...]]]:
        """As :meth:`Editor.edited`."""
        with self.patch.file.open() as file:
            for target in plan.edits:
                for head in plan.settings.heads:
                    crew.check()
                    for ref, begin, end, at in plan.head_ranges(target, head):
                        rows = self.patch.rows[rows_of(ref, begin, end).name]
                        write(plan.output.place(ref).shard, file.read(rows.nbytes, rows.begin), at)
                    observer.edited(1)
                yield target, self.patch.heads[target.query.name]


def editor_of(plan: EditPlan, device: str) -> Editor | Recorded:
    """Where new rows come from: the plan's patch file, or what computes them."""
    if plan.patch is None:
        return _editor(device)
    made = plan.patch.manifest
    return Recorded(plan.patch, made.compute.device, made.tool, made.run.stack)


def _editor(device: str) -> Editor:
    """The part that computes; ``import torch`` takes a second, in which files are being copied already."""
    import_torch()
    with signals_held():  # see `unwrapped`, which comes too late for what is kept
        from qkpatch.patching.edit_heads import Editor

    return Editor.on(device)


def fingerprint_of(plan: EditPlan, writing: Writing) -> str:
    """What a run must have in common with one that it resumes: the plan, the stack, and the very files of SOURCE."""
    files = {
        # A hard link that the run before made has moved the file's ctime; the two names are one file anyway.
        name: str(file.id.but_for_links) if writing.may_link(file) else file.content
        for name, file in plan.model.checkpoint.files.items()
    }
    document = {**planned_manifest(plan, "").to_json(), "source_files": files}
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()


_Digests = tuple[Sequence[str | None], Sequence[str | None]]
Done = tuple[Sequence[str | None], Sequence[str | None], tuple[HeadRecord, ...]]


def done_manifest(plan: EditPlan, editor: Editor | Recorded, done: Mapping[LayerTarget, Done]) -> Manifest:
    """The manifest of a plan that is carried out, but for files and times; ``done``: before, after, and figures."""
    planned = planned_manifest(plan, str(editor.device))
    edits = tuple(record.done(*done[t]) for record, t in zip(planned.edits, plan.edits, strict=True))
    warnings = (*planned.warnings, *numerical_warnings(edits, plan.settings.rule_of))
    run = RunBlock(stack=editor.stack)
    return replace(planned, tool=editor.tool, edits=edits, warnings=warnings, run=run)


def _digests(sources: Sources, copier: Copier, writing: Writing, target: LayerTarget) -> _Digests:
    """SHA-256 of each written tensor in SOURCE, and of what reached the file in OUT."""
    if writing.digest is Digest.none:
        return [None] * len(target.written), [None] * len(target.written)
    before: list[str | None] = [sources.tensor_digest(ref) for ref in target.written]
    after: list[str | None] = [copier.staged_digest(ref) for ref in target.written]
    return before, after


def numerical_warnings(edits: Sequence[EditRecord], rule_of: Callable[[int], EditRule]) -> list[Warned]:
    """What a user should know about the spectra that were met; ``rule_of`` a layer."""
    heads = [(f"{e.layer}.{head.head}", rule_of(e.layer), head) for e in edits for head in e.heads]
    narrow = [name for name, _, head in heads if head.gap is not None and head.gap < GAP_WARNING]
    short, held, counts = list[str](), list[str](), set[int]()
    for name, rule, head in heads:
        n, values = rule.count(head.values_before), head.values_before
        # Where no single modes are edited, the rank is what there is.
        if (len(head.modes) if head.modes or rule.select is Select.random else head.rank) < n:
            short.append(name)
            counts.add(n)
        if rule.energy and n < replace(rule, modes=len(values)).count(values):
            held.append(name)
    wanted = " or ".join(map(str, sorted(counts)))
    told = {
        f"relative gap under {GAP_WARNING:g} at the cut, so the choice of modes is nearly arbitrary": narrow,
        f"there are fewer than {wanted} such modes above rounding, so fewer were edited": short,
        "as many modes as --modes allows, half of all by default, hold less than --energy asks for": held,
    }
    warnings = []
    for what, names in told.items():
        if names:
            named = abbreviate(names, _NAMED)
            warnings.append(warned(f"{what}, in {len(names)} head(s) (layer.head): {named}"))
    coarse = [edit for edit in edits if _mean_rounding(edit) > ROUNDING_WARNING]
    if coarse:
        worst = max(_mean_rounding(edit) for edit in coarse)
        noise = f"adds noise of up to {worst:.0%} of the edit's size (mean over heads)"
        warnings.append(warned(f"rounding to {coarse[0].dtype} {noise}, in {len(coarse)} tensor(s)"))
    return warnings


def _mean_rounding(edit: EditRecord) -> float:
    return mean(head.rounding_error for head in edit.heads)


def now() -> str:
    """The time of day, as manifests have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
