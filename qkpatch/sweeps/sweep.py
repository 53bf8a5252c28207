"""A sweep, from its plan to SWEEP/, where each part appears whole and a run that ended early is gone on with."""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.names import USUAL, came_by_itself
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import Present
from qkpatch.common.interrupts import signals_held
from qkpatch.common.json_text import canonical_json, load_json
from qkpatch.common.number_ranges import some
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.common.typed_json import as_json
from qkpatch.errors import UsageError
from qkpatch.model.locate import Access
from qkpatch.model.model import open_model
from qkpatch.model.targets import LayerTarget
from qkpatch.output.destination import check_apart, check_out
from qkpatch.patching.apply import check_run
from qkpatch.planning.manifest import planned_manifest
from qkpatch.planning.memory import choose_threads
from qkpatch.planning.plan import EditPlan, plan_of
from qkpatch.planning.request import Request, check_device_name
from qkpatch.planning.settings import EditSettings, resolve
from qkpatch.spectral.rule import Channel, Sums
from qkpatch.sweeps.evaluation import FILES, evaluation
from qkpatch.sweeps.grid import Form, read_grid
from qkpatch.sweeps.record import SWEEP_NAME, Figures, Sweep, VariantRecord

PARTS_NAME = "parts.json"  # while SWEEP/ grows


def sweep(
    source: str | Path,
    grid: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    form: str = "none",
    many: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    observer: Observer = UNSEEN,
) -> Sweep:
    """Many edits of SOURCE from one read: each product is decomposed once per channel, every variant derived from it.

    What is done in ``out`` stays, so that a run that ended early is gone on with.

    Args:
        source: as of :func:`qkpatch.plan`; of a repository, headers and the rows that are needed are fetched.
        grid: a YAML file, or what one says: lists of ``layers``, ``modes``, ``alpha``, ``channel``, ``select`` and
            ``seed``; ``matched``; for all variants ``heads``, ``recipe``, ``prefix``, ``attention``, ``fold_norm``.
        out: the directory of the sweep.
        form: ``none``: figures alone.
        many: whether there may be more than a thousand variants.
        device: as of :func:`qkpatch.apply`.
        threads: as of :func:`qkpatch.apply`.
        observer: hears of heads.

    Raises:
        UsageError: a grid or a variant that cannot be; an OUT that holds something else.
        QKPatchError: as :func:`qkpatch.apply`.
    """
    check_device_name(device)
    requests = read_grid(grid, many=many)
    reading, edits, planned = _planned(str(source), requests, form)
    checkpoint = reading.model.checkpoint
    n_threads = choose_threads(threads, reading.head_memory, len(checkpoint.tensors))
    check_apart(Path(out), checkpoint)
    check_out(Path(out), overwrite=True, force=True)  # what is in it is looked at below
    check_run(reading, device, n_threads)
    with os_errors("create a directory", out):
        Path(out).mkdir(parents=True, exist_ok=True)
    with Rooted(Path(out)) as root:
        found = _standing(root, planned)
        root.replace(SWEEP_NAME, found.dumps().encode())
        for name, text in evaluation(reading, requests).items():
            root.replace(name, text.encode())
        if all(variant.figures is not None for variant in found.variants):
            _remove(root, [PARTS_NAME])
            return found
        parts = (
            [] if root.status(PARTS_NAME) is None else load_json(Present(root).read(PARTS_NAME), PARTS_NAME)
        )
        left = reading.edits[len(parts) :]
        observer.begins("look", 0, len(left) * len(reading.settings.heads))
        with signals_held():  # torch's imports swallow what is raised in their midst
            from qkpatch.sweeps.figures import figures
        for sums in figures(replace(reading, edits=left), edits, device, n_threads, observer):
            parts.append(sums)
            root.replace(PARTS_NAME, canonical_json(parts).encode())
        checkpoint.check_still()
        of_targets = list(zip(reading.edits, parts, strict=True))
        done = replace(found, variants=tuple(_done(variant, of_targets) for variant in found.variants))
        root.replace(SWEEP_NAME, done.dumps().encode())
        _remove(root, [PARTS_NAME])
        return done


def _done(variant: VariantRecord, of_targets: list[tuple[LayerTarget, dict[str, Any]]]) -> VariantRecord:
    own = [(target, Sums(*sums[variant.name])) for target, sums in of_targets if variant.name in sums]
    layers = tuple(Figures.of([sums], target.layer, target.attention) for target, sums in own)
    return replace(variant, figures=Figures.of(sums for _, sums in own), layers=layers)


def _planned(
    source: str, requests: Mapping[str, Request], form: str
) -> tuple[EditPlan, dict[str, EditSettings], Sweep]:
    """One plan that reads all layers that a variant edits, what is done to them, and the record with nothing done."""
    if form not in list(Form):
        raise UsageError(f"{form!r:.80} is none of {', '.join(Form)}", where="--as")
    edits, one = dict[str, EditSettings](), next(iter(requests.values()))
    model = open_model(source, one.recipe, one.attention, Access.ranges, USUAL, one.prefix)
    for name, request in requests.items():
        try:
            edits[name] = resolve(request, model)
        except UsageError as error:
            raise UsageError(f"{name}: {error.what}", where=error.where, fix=error.fix) from error
    layers = tuple(sorted({n for edit in edits.values() for n in (*edit.layers, *edit.skipped_layers)}))
    kinds = {(request.channel, request.select): request for request in requests.values()}
    fewest = {Channel.antisymmetric: 2}  # a pair
    plans = [
        plan_of(model, replace(kind, layers=layers, modes=fewest.get(kind.channel or Channel.full, 1)))
        for kind in kinds.values()
    ]
    told, warnings = planned_manifest(plans[0], ""), (warning for plan in plans for warning in plan.warnings)
    variants = tuple(VariantRecord(name, edit.block) for name, edit in edits.items())
    files = {name: file.content for name, file in model.checkpoint.files.items()}
    digest = hashlib.sha256(
        canonical_json(as_json([told.recipe, form, variants, files])).encode()
    ).hexdigest()
    common = (told.tool, told.source, told.recipe.name, Form(form), digest)
    return plans[0], edits, Sweep(*common, variants, tuple(dict.fromkeys(warnings)))


def _standing(root: Rooted, planned: Sweep) -> Sweep:
    """What is done of ``planned`` already; what a kill left half written goes."""
    try:
        fcntl.flock(root.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what, fix = "another run is writing to it", "wait for it, or choose another -o"
        raise UsageError(what, where=str(root.path), fix=fix) from error
    ours = "|".join(map(re.escape, [SWEEP_NAME, PARTS_NAME, *FILES]))
    is_left, names = re.compile(rf"\.({ours})\.[0-9a-f]{{8}}").fullmatch, root.names()
    if SWEEP_NAME in names:
        found = Sweep.loads(Present(root).read(SWEEP_NAME), str(root.path / SWEEP_NAME))
        if found.digest != planned.digest:
            what = "holds the sweep of another grid, of another SOURCE, or with another --as"
            raise UsageError(what, where=str(root.path), fix="choose another -o, or remove it")
    elif foreign := [name for name in names if not is_left(name) and not came_by_itself(name, ())]:
        what = f"exists, and is no sweep: it holds {some(foreign)}"
        raise UsageError(what, where=str(root.path), fix="choose another -o")
    else:
        found = planned
    _remove(root, filter(is_left, names))
    return found


def _remove(root: Rooted, names: Iterable[str]) -> None:
    for name in names:
        if (status := root.status(name)) is not None:
            root.remove(name, status)
