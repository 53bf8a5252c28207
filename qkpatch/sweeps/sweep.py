"""A sweep, from headers to SWEEP/, where each part appears whole and a run that ended early is gone on with."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkpatch.adapters.modules import Runtime, query_modules
from qkpatch.adapters.writing import FILE_NAMES, adapter_record, write_adapter
from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.names import USUAL, came_by_itself
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import PresentHere
from qkpatch.common.interrupts import import_torch
from qkpatch.common.json_text import canonical_json
from qkpatch.common.number_ranges import some
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.common.part import Part
from qkpatch.common.text import warned
from qkpatch.common.typed_json import as_json
from qkpatch.compare.overwrite import standing
from qkpatch.compare.verify import recorded
from qkpatch.errors import UsageError, refuse_warnings
from qkpatch.model.locate import Access
from qkpatch.model.model import open_model
from qkpatch.output.destination import Replaced, check_apart, check_out
from qkpatch.output.options import Writing
from qkpatch.patches.in_place import make_patch
from qkpatch.patching.apply import check_run
from qkpatch.planning.manifest import planned_manifest
from qkpatch.planning.memory import choose_threads
from qkpatch.planning.patch_file import read_patch
from qkpatch.planning.plan import EditPlan, plan_of
from qkpatch.planning.request import Request, check_device_name, member
from qkpatch.spectral.rule import Select
from qkpatch.sweeps.evaluation import FILES, evaluation
from qkpatch.sweeps.grid import Form, read_grid
from qkpatch.sweeps.parts import PARTS_NAME, Maker, Parts
from qkpatch.sweeps.record import SWEEP_NAME, Sweep, VariantRecord
from qkpatch.sweeps.report import REPORT_NAME, report

_SAVED_EVERY = 5.0  # seconds: a record of many variants takes a while to write


def sweep(
    source: str | Path,
    grid: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    form: str = "lora",
    many: bool = False,
    strict: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    part: tuple[int, int] | None = None,
    observer: Observer = UNSEEN,
) -> Sweep:
    """Many edits of SOURCE from one read: each product is decomposed once per channel, every variant derived from it.

    What is done in ``out`` stays, so that a run that ended early is gone on with.

    Args:
        source: as of :func:`qkpatch.plan`; of a repository, headers and the rows that are needed are fetched.
        grid: a YAML file, or what one says: lists of ``layers``, ``modes``, ``energy``, ``alpha``, ``channel``,
            ``select``, ``seed``; ``matched``; for all ``heads``, ``recipe``, ``prefix``, ``attention``, ``fold_norm``.
        out: the directory of the sweep.
        form: ``lora``, an adapter of each variant that has one; ``patch``, a patch file; ``none``, figures alone.
        many: whether there may be more than a thousand variants.
        strict: whether a warning is an error, and nothing is written.
        device: as of :func:`qkpatch.apply`.
        threads: how many layers are computed side by side.
        part: ``(i, N)``: look at this share of the layers alone; the same without it makes the variants of all.
        observer: hears of heads.

    Raises:
        UsageError: a grid or a variant that cannot be; an OUT that holds something else.
        QKPatchError: as :func:`qkpatch.apply` and :func:`qkpatch.lora`.
    """
    check_device_name(device)
    mine = None if part is None else Part.of(part)
    requests, out = read_grid(grid, many=many), Path(out)
    plans, reading, planned = _planned(str(source), requests, member(form, Form, "--as"))
    refuse_warnings(planned.warnings, strict=strict)
    checkpoint, per_thread = reading.model.checkpoint, reading.head_memory
    if reading.model.source.path is None:  # what is read of a repository waits in memory
        per_thread += max(target.read_bytes(reading.settings.heads) for target in reading.edits)
    n_threads = choose_threads(threads, per_thread, len(checkpoint.tensors))
    check_apart(out, checkpoint)
    check_out(out, overwrite=True, force=True)  # what is in it is looked at below
    check_run(reading, device, n_threads)
    modules = query_modules(reading.model, reading.edits, Runtime.peft) if planned.form is Form.lora else {}
    with os_errors("create a directory", out):
        out.mkdir(parents=True, exist_ok=True)
    with Rooted(out) as root:
        variants = _standing(root, planned, reading, is_shared=mine is not None)

        def save() -> Sweep:
            done = replace(planned, variants=tuple(variants.values()))
            root.replace(SWEEP_NAME, done.dumps().encode())
            return done

        left = {name: plan for name, plan in plans.items() if variants[name].figures is None}
        replaced = {name: _replaced(out, name, plan, planned.form) for name, plan in left.items()}
        if mine is None or root.status(SWEEP_NAME) is None:
            save()
        with Parts(root, reading.edits, left, _maker(planned, device), mine) as parts:
            if mine is None:
                for name, text in evaluation(reading, requests).items():
                    root.replace(name, text.encode())
            rest = replace(reading, edits=parts.missing)
            observer.begins("look", 0, len(rest.edits) * len(reading.settings.heads))
            from qkpatch.adapters.factors import unpacked
            from qkpatch.sweeps.figures import Kept, figures

            each = figures(rest, left, planned.form, parts.keep, device, n_threads, observer)
            for target, found in zip(rest.edits, each, strict=True):
                parts.add(target, found)
            checkpoint.check_still()
            if mine is not None:
                return replace(
                    planned, variants=tuple(variants.values()), already_done=not rest.edits or None
                )
            saved, digests = time.monotonic(), dict[TensorRef, str]()
            for name, plan in left.items():
                files: dict[str, str | None] = {}
                if planned.form is Form.lora and _files_of(variants[name], planned.form):
                    layers = [(unpacked(t, parts.kept(name, t)), modules[t]) for t in plan.edits]
                    record = adapter_record(plan, device, digests)
                    made = write_adapter(out / name, checkpoint, record, Runtime.peft, layers, replaced[name])
                    files = {f"{name}/{file.name}": file.sha256 for file in made.files}
                elif planned.form is Form.patch:
                    editor = Kept(parts, name, *parts.maker[1:])
                    patch = out / PARTS_NAME / f"{name}.qkpatch"
                    make_patch(plan, patch, device=device, editor=editor)
                    parts.publish(patch.name)
                    with root.reading(patch.name) as opened:
                        files = {patch.name: opened.sha256(0, opened.size)}
                of_all, by_layer = parts.figures(name)
                variants[name] = replace(variants[name], figures=of_all, layers=by_layer, files=files)
                if time.monotonic() - saved > _SAVED_EVERY:
                    save()
                    saved = time.monotonic()
            done = save()  # before what it is made of goes
        root.replace(REPORT_NAME, report(done).encode())
        return replace(done, already_done=not left or None)


def _files_of(variant: VariantRecord, form: Form) -> set[str]:
    """What is made of a variant, in SWEEP/."""
    if form is Form.lora and variant.edit.select is not Select.shrink:
        return {f"{variant.name}/{file}" for file in FILE_NAMES}
    return {f"{variant.name}.qkpatch"} if form is Form.patch else set()


def _replaced(out: Path, name: str, plan: EditPlan, form: Form) -> Replaced | None:
    """What a kill left of a variant unrecorded, which is to be replaced; what is another's is refused."""
    place, found, made = out / name, None, None
    if form is Form.patch and os.path.lexists(place := out / f"{name}.qkpatch"):
        made = read_patch(place, f"remove {place}, and it is made anew").manifest
    elif form is Form.lora:
        found = standing(place, plan, Writing(overwrite=True), is_whole=False)
        if isinstance(found, Replaced) and found.entries:
            with Rooted(place) as root:
                made = recorded(PresentHere(root))
    planned = planned_manifest(plan, "")
    if made is not None and (made.edit, made.recipe) != (planned.edit, planned.recipe):
        raise UsageError("it is of another edit", where=str(place), fix="move it away, or choose another -o")
    return found if isinstance(found, Replaced) else None


def _planned(
    source: str, requests: Mapping[str, Request], form: Form
) -> tuple[dict[str, EditPlan], EditPlan, Sweep]:
    """The plan of each variant, one that reads all that they edit, and the record with nothing done."""
    plans, one = dict[str, EditPlan](), next(iter(requests.values()))
    model = open_model(source, one.recipe, one.attention, Access.ranges, USUAL, one.prefix)
    for name, request in requests.items():
        try:
            plans[name] = plan_of(model, request)
        except UsageError as error:
            raise UsageError(f"{name}: {error.what}", where=error.where, fix=error.fix) from error
    layers, any_of = {n for plan in plans.values() for n in plan.settings.layers}, next(iter(plans.values()))
    targets = model.targets(tuple(sorted(layers)), fold_norm=any_of.settings.fold_norm)
    told, warnings = planned_manifest(any_of, ""), [each for plan in plans.values() for each in plan.warnings]
    if form is Form.lora and any(request.select is Select.shrink for request in requests.values()):
        what = "shrink has full rank, so there is no adapter of it; evaluate.sh makes checkpoints"
        warnings.append(warned(what))
    variants = tuple(VariantRecord(name, plan.settings.block) for name, plan in plans.items())
    common = (told.tool, told.source, told.recipe.name, form, _digest(any_of, form, variants))
    record = Sweep(*common, variants, tuple(dict.fromkeys(warnings)))
    return plans, replace(any_of, edits=targets), record


def _digest(plan: EditPlan, form: Form, variants: Iterable[VariantRecord]) -> str:
    """Of SOURCE's files and of all that is asked for, whatever is done of it."""
    asked = [VariantRecord(variant.name, variant.edit) for variant in variants]
    files = {name: file.everywhere for name, file in plan.model.checkpoint.files.items()}
    said = as_json([planned_manifest(plan, "").recipe, form, asked, files])
    return hashlib.sha256(canonical_json(said).encode()).hexdigest()


def _maker(planned: Sweep, device: str) -> Maker:
    import_torch()
    from qkpatch.patching.edit_heads import Editor

    editor = Editor.on(device)
    return planned.digest, editor.tool, editor.stack, str(editor.device)


def _standing(root: Rooted, planned: Sweep, plan: EditPlan, *, is_shared: bool) -> dict[str, VariantRecord]:
    """What is done of ``planned`` already, and is as it was left; what a kill left half written goes.

    ``is_shared``: others write parts of it meanwhile.
    """
    if not root.lock(shared=is_shared):
        what, fix = "another run is writing to it", "wait for it, or choose another -o"
        raise UsageError(what, where=str(root.path), fix=fix)
    own = "|".join(map(re.escape, (SWEEP_NAME, REPORT_NAME, *FILES)))
    is_left = re.compile(rf"\.({own})\.[0-9a-f]{{8}}").fullmatch
    names = root.names()  # before it is looked for the record, which other parts write first
    present, found = PresentHere(root), planned
    if SWEEP_NAME in present.files:
        with root.reading(SWEEP_NAME) as opened:
            found = Sweep.loads(opened.whole(), opened.where)
        if found.digest != planned.digest:
            same = _digest(plan, found.form, found.variants) == found.digest  # else a grid is told by names
            grids = [[(v.name, same and v.edit) for v in one.variants] for one in (found, planned)]
            others = ["another grid"] * (grids[0] != grids[1]) + ["another SOURCE or recipe"] * (not same)
            others += ["another --as"] * (found.form is not planned.form)
            what = f"holds the sweep of {' and '.join(others)}"
            raise UsageError(what, where=str(root.path), fix="choose another -o, or remove it")
    elif foreign := [name for name in names if not is_left(name) and not came_by_itself(name, ())]:
        what = f"exists, and is no sweep: it holds {some(foreign)}"
        raise UsageError(what, where=str(root.path), fix="choose another -o")
    for name in filter(is_left, [] if is_shared else names):
        root.discard(name)

    def is_as_left(v: VariantRecord) -> bool:
        are_there = all(n in present.files and present.sha256(n) == digest for n, digest in v.files.items())
        return are_there and v.files.keys() == _files_of(v, planned.form)

    known = {variant.name: variant for variant in found.variants if is_as_left(variant)}
    return {blank.name: known.get(blank.name, blank) for blank in planned.variants}
