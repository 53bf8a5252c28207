"""Where a manifest is not what its own edit leads to on SOURCE; figures and digests aside."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.common.typed_json import FURTHER, as_json
from qkpatch.compare.byte_by_byte import Mismatch
from qkpatch.output.options import Digest
from qkpatch.planning.manifest import FileRecord, Manifest
from qkpatch.planning.plan import EditPlan

_RECIPE_KEYS = {"name", "prefix", "config", "tensors", "others"}
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?", re.ASCII)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", re.ASCII)
# What a recipe may come to know more of: which of it was taken is in `prefix` and in `model`.
_WIDENED = {"prefixes", "sections", "class_defaults"}


def differences(
    manifest: Manifest, planned: Manifest, plan: EditPlan, unpublished: Collection[str]
) -> Iterator[Mismatch]:
    """Where the manifest is not the plan that its own edit leads to; figures and digests aside."""
    recipe = planned.recipe
    theirs, ours = (as_json(m.recipe) for m in (manifest, planned))
    keys = theirs.keys() & ours.keys()
    if manifest.recipe.sha256 != recipe.sha256:  # another version's, or another: then by what decides an edit
        keys, theirs, ours = _RECIPE_KEYS, _deciding(theirs), _deciding(ours)
    other = [key for key in sorted(keys) if theirs[key] != ours[key]]
    if other:
        what = f"it was made with another recipe called {recipe.name} ({', '.join(other)} differ)"
        yield Mismatch(MANIFEST_NAME, f"{what}; if that is a file of yours, say --recipe FILE.yaml")
    for block in ("edit", "model"):
        ours, theirs = (as_json(getattr(m, block)) for m in (planned, manifest))
        # The flags may have said the same as the recipe.
        for key in sorted(vars(getattr(planned, block)).keys() - {"from_recipe", FURTHER}):
            if (said := theirs.get(key)) != (planned_one := ours.get(key)):
                yield Mismatch(MANIFEST_NAME, f"{block}.{key} is {said!r}, planned {planned_one!r}")
    if manifest.source.previous_edit != planned.source.previous_edit:
        yield Mismatch(MANIFEST_NAME, "source.previous_edit is not what SOURCE's own manifest records")
    files = {file.name: file for file in manifest.files}
    for file in planned.files:
        noted = files.pop(file.name, None)
        if noted is None and file.name in unpublished:
            continue
        if noted is None or _known_first(noted) != _known_first(file):
            yield Mismatch(file.name, "the manifest's record of this file is not what it should be")
    for name in files:
        yield Mismatch(name, "is in the manifest only")
    yield from _contradictions(manifest, planned, plan)
    recorded = {edit.tensor: edit for edit in manifest.edits}
    layouts = {target.query.name: target.layout for target in plan.edits}
    for edit in planned.edits:
        heads = [(head, layouts[edit.tensor].kv_head(head)) for head in plan.settings.heads]
        record = recorded.pop(edit.tensor, None)
        if record is None:
            yield Mismatch(edit.tensor, "should be edited, and the manifest has no record of it")
        elif record.without_figures() != edit:
            yield Mismatch(edit.tensor, "the manifest's record of this tensor is not what SOURCE stores")
        elif [(head.head, head.kv_head) for head in record.heads] != heads:
            yield Mismatch(edit.tensor, "the manifest's heads of this tensor are not the planned ones")
    for name in recorded:
        yield Mismatch(name, "the manifest records an edit that its own settings do not lead to")


def _contradictions(manifest: Manifest, planned: Manifest, plan: EditPlan) -> Iterator[Mismatch]:
    """What a manifest says that no run of ``apply`` would have said."""
    source, run, digest = manifest.source, manifest.run, manifest.output.digest
    modes = {part.modes for part in manifest.edit.parts}
    times = [run.started, run.finished]
    is_of_recipe = "modes" in manifest.edit.from_recipe and manifest.recipe.sha256 == planned.recipe.sha256
    said = {
        "tool.name": manifest.tool.name == planned.tool.name,
        "compute.device": _DEVICE.fullmatch(manifest.compute.device),
        "compute.dtype": manifest.compute.dtype == planned.compute.dtype,
        "source": source.kind == "hub" or not (source.commit or source.requested_revision or source.checked),
        "run.stack": run.stack is None or run.stack.get("torch") == manifest.tool.torch,
        "run": None in times
        or (all(map(_TIME.fullmatch, map(str, times))) and times == sorted(map(str, times))),
        "run.copied_by": run.copied_by is None or sum(run.copied_by.values()) == len(planned.files),
        "edit.from_recipe": (not is_of_recipe or modes == {plan.model.recipe.default_modes})
        and manifest.edit.from_recipe in ((), ("layers",), ("modes",), ("layers", "modes")),
    }
    for key, is_so in said.items():
        if not is_so:
            yield Mismatch(MANIFEST_NAME, f"{key} contradicts what else it says, or what qkpatch writes")
    for file in manifest.files:
        if file.action == "copied" and len({file.sha256, file.source_sha256} - {None}) > 1:
            yield Mismatch(file.name, "was copied, and its digests in SOURCE and OUT are recorded as two")
        if digest is Digest.files and file.sha256 is None:
            yield Mismatch(file.name, "its digest is not recorded, and the manifest says that all are")
    # Older ones do not say which digests they have; an edit has all of them or none.
    digests = [d for e in manifest.edits for w in e.written for d in (w.sha256_before, w.sha256_after)]
    if None in digests and (any(digests) if digest is None else digest is not Digest.none):
        yield Mismatch(
            MANIFEST_NAME, "digests of edited tensors are missing, and it says that they are there"
        )


def _deciding(said: Any) -> Any:
    """What of a recipe's block decides an edit that was made with it."""
    if isinstance(said, dict):
        return {key: _deciding(value) for key, value in said.items() if key not in _WIDENED}
    return [*map(_deciding, said)] if isinstance(said, list) else said


def _known_first(file: FileRecord) -> FileRecord:
    """The record without digests: one is taken last, the other only where SOURCE lies in the Hub cache.

    Also without where it was from: copies of SOURCE need not have its links.
    """
    return replace(file, sha256=None, source_sha256=None, outside=False)
