"""A sweep, from headers to SWEEP/, where each part appears whole and a run that ended early is gone on with."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkpatch.adapters.modules import Runtime, query_modules
from qkpatch.adapters.writing import write_adapter
from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.names import USUAL, came_by_itself
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import Present
from qkpatch.common.interrupts import signals_held
from qkpatch.common.json_text import canonical_json
from qkpatch.common.number_ranges import some
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.common.typed_json import as_json
from qkpatch.compare.overwrite import standing
from qkpatch.errors import UsageError
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
from qkpatch.sweeps.parts import Parts
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
    device: str = "cpu",
    threads: int | None = None,
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
        device: as of :func:`qkpatch.apply`.
        threads: how many layers are computed side by side.
        observer: hears of heads.

    Raises:
        UsageError: a grid or a variant that cannot be; an OUT that holds something else.
        QKPatchError: as :func:`qkpatch.apply` and :func:`qkpatch.lora`.
    """
    check_device_name(device)
    requests, out = read_grid(grid, many=many), Path(out)
    plans, reading, planned = _planned(str(source), requests, member(form, Form, "--as"))
    checkpoint, per_thread = reading.model.checkpoint, reading.head_memory
    if reading.model.source.path is None:  # what is read of a repository waits in memory
        per_thread += max(target.read_bytes(reading.settings.heads) for target in reading.edits)
    n_threads = choose_threads(threads, per_thread, len(checkpoint.tensors))
    check_apart(out, checkpoint)
    check_out(out, overwrite=True, force=True)  # what is in it is looked at below
    check_run(reading, device, n_threads)
    is_lora = planned.form is Form.lora
    modules = query_modules(reading.model, reading.edits, Runtime.peft) if is_lora else {}
    with os_errors("create a directory", out):
        out.mkdir(parents=True, exist_ok=True)
    with Rooted(out) as root:
        variants = _standing(root, planned)

        def save() -> Sweep:
            done = replace(planned, variants=tuple(variants.values()))
            root.replace(SWEEP_NAME, done.dumps().encode())
            return done

        left = {name: plan for name, plan in plans.items() if variants[name].figures is None}
        replaced = {name: _replaced(out, name, plan, planned.form) for name, plan in left.items()}
        save()
        for name, text in evaluation(reading, requests).items():
            root.replace(name, text.encode())
        with Parts(root, reading.edits, left) as parts:
            rest = replace(reading, edits=parts.missing)
            observer.begins("look", 0, len(rest.edits) * len(reading.settings.heads))
            with signals_held():  # torch's imports swallow what is raised in their midst
                from qkpatch.adapters.factors import unpacked
                from qkpatch.patching.device import choose_device
                from qkpatch.sweeps.figures import Kept, figures
            each = figures(rest, left, planned.form, parts.keep, device, n_threads, observer)
            for target, found in zip(rest.edits, each, strict=True):
                parts.add(target, found)
            checkpoint.check_still()
            saved = time.monotonic()
            for name, plan in left.items():
                files: dict[str, str | None] = {}
                if is_lora and requests[name].select is not Select.shrink:
                    layers = [(unpacked(t, parts.kept(name, t)), modules[t]) for t in plan.edits]
                    manifest = planned_manifest(plan, device)
                    made = write_adapter(
                        out / name, checkpoint, manifest, Runtime.peft, layers, replaced[name]
                    )
                    files = {f"{name}/{file.name}": file.sha256 for file in made.files}
                elif planned.form is Form.patch:
                    editor = Kept(choose_device(device), parts, name)
                    patch = make_patch(plan, out / f"{name}.qkpatch", device=device, editor=editor)
                    with root.reading(patch.name) as opened:
                        files = {patch.name: opened.sha256(0, opened.size)}
                of_all, by_layer = parts.figures(name)
                variants[name] = replace(variants[name], figures=of_all, layers=by_layer, files=files)
                if time.monotonic() - saved > _SAVED_EVERY:
                    save()
                    saved = time.monotonic()
        done = save()
        root.replace(REPORT_NAME, report(done).encode())
        return done


def _replaced(out: Path, name: str, plan: EditPlan, form: Form) -> Replaced | None:
    """What a kill left of a variant unrecorded: an adapter, which is to be replaced, or a patch file, which goes."""
    if form is Form.patch and os.path.lexists(file := out / f"{name}.qkpatch"):
        read_patch(file, f"remove {file}, and it is made anew")
        file.unlink()
    found = (
        None if form is not Form.lora else standing(out / name, plan, Writing(overwrite=True), is_whole=False)
    )
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
        warnings.append("shrink has full rank, so there is no adapter of it; evaluate.sh makes checkpoints")
    variants = tuple(VariantRecord(name, plan.settings.block) for name, plan in plans.items())
    files = {name: file.content for name, file in model.checkpoint.files.items()}
    digest = hashlib.sha256(
        canonical_json(as_json([told.recipe, form, variants, files])).encode()
    ).hexdigest()
    common = (told.tool, told.source, told.recipe.name, form, digest)
    record = Sweep(*common, variants, tuple(dict.fromkeys(warnings)))
    return plans, replace(any_of, edits=targets), record


def _standing(root: Rooted, planned: Sweep) -> dict[str, VariantRecord]:
    """What is done of ``planned`` already, and is as it was left; what a kill left half written goes."""
    try:
        fcntl.flock(root.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what, fix = "another run is writing to it", "wait for it, or choose another -o"
        raise UsageError(what, where=str(root.path), fix=fix) from error
    is_left = re.compile(
        rf"\.({'|'.join(map(re.escape, [SWEEP_NAME, REPORT_NAME, *FILES]))})\.[0-9a-f]{{8}}"
    ).fullmatch
    present, found = Present(root), planned
    if SWEEP_NAME in present.files:
        found = Sweep.loads(present.read(SWEEP_NAME), str(root.path / SWEEP_NAME))
        if found.digest != planned.digest:
            what = "holds the sweep of another grid, of another SOURCE, or with another --as"
            raise UsageError(what, where=str(root.path), fix="choose another -o, or remove it")
    elif foreign := [name for name in root.names() if not is_left(name) and not came_by_itself(name, ())]:
        what = f"exists, and is no sweep: it holds {some(foreign)}"
        raise UsageError(what, where=str(root.path), fix="choose another -o")
    for name in filter(is_left, root.names()):
        if (status := root.status(name)) is not None:
            root.remove(name, status)

    def is_as_left(variant: VariantRecord) -> bool:
        files = variant.files.items()
        return all(name in present.files and present.sha256(name) == digest for name, digest in files)

    blank = {variant.name: variant for variant in planned.variants}
    return {v.name: v if is_as_left(v) else blank[v.name] for v in found.variants}
