"""Where a manifest is not what its own edit leads to on SOURCE; figures and digests aside."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.common.number_ranges import abbreviate
from qkpatch.common.typed_json import FURTHER, as_json, unknown_keys
from qkpatch.compare.byte_by_byte import Mismatch
from qkpatch.errors import UsageError
from qkpatch.output.options import MEANS, Digest
from qkpatch.patching.apply import numerical_warnings
from qkpatch.planning.manifest import COMMIT, FileRecord, Manifest
from qkpatch.planning.plan import EditPlan, folder_warnings
from qkpatch.planning.settings import resolve

_RECIPE_KEYS = {"name", "prefix", "config", "tensors", "others"}
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?", re.ASCII)
# What a recipe may come to know more of: which of it was taken is in `prefix` and in `model`.
_WIDENED = {"prefixes", "sections", "class_defaults"}
_STACK = {"torch", "blas", "cpu"}
_OTHER_DIGESTS = "digests are there, or missing, other than the manifest says (output.digest)"


def differences(
    manifest: Manifest, planned: Manifest, plan: EditPlan, unpublished: Collection[str]
) -> Iterator[Mismatch]:
    """Where the manifest is not the plan that its own edit leads to; figures and digests aside."""
    recipe = planned.recipe
    theirs, ours = (as_json(m.recipe) for m in (manifest, planned))
    is_of_ours = manifest.tool.version == planned.tool.version
    keys = theirs.keys() | ours.keys() if is_of_ours else theirs.keys() & ours.keys()
    if manifest.recipe.sha256 != recipe.sha256:  # another version's, or another: then by what decides an edit
        keys, theirs, ours = _RECIPE_KEYS, _deciding(theirs), _deciding(ours)
    other = [key for key in sorted(keys) if theirs.get(key) != ours.get(key)]
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
    revision = source.requested_revision or ""
    is_unproven = source.checked is False and digest is Digest.files  # for which all is hashed
    kinds = {source.kind, planned.source.kind}
    said = {
        "tool.name": manifest.tool.name == planned.tool.name,
        "tool.python": manifest.tool.python is not None,
        "compute.device": _DEVICE.fullmatch(manifest.compute.device),
        "compute.dtype": manifest.compute.dtype == planned.compute.dtype,
        "source.kind": (len(kinds) == 1 or kinds & {"hub", "store"})
        and (source.kind == "store") == ("://" in source.name),
        "source": not (source.commit or revision or source.checked)
        if source.kind != "hub"
        else not is_unproven and (not COMMIT.fullmatch(revision) or revision == source.commit),
        "run.stack": run.stack is None
        or (run.stack.keys() >= _STACK and run.stack["torch"] == manifest.tool.torch),
        # Both came with one version.
        "output.digest": (digest is None) == (run.stack is None),
        "run": run.is_over(len(planned.files) if run.copied_by is not None else 0),
        "run.already_done": run.already_done is None and run.weaker is None,  # which are in no file
        "edit.seed": not manifest.edit.seed or plan.request.draws,
        "edit.from_recipe": _is_default(plan, manifest.edit.from_recipe)
        or manifest.recipe.sha256 != planned.recipe.sha256,
    }
    for key, is_so in said.items():
        if not is_so:
            yield Mismatch(MANIFEST_NAME, f"{key} contradicts what else it says, or what qkpatch writes")
    if manifest.tool.version == planned.tool.version:
        for key in _unknown(manifest):
            yield Mismatch(MANIFEST_NAME, f"{key} is nothing that this version writes")
    listed = {file.name: file.source_sha256 for file in planned.files} if kinds == {"hub"} else {}
    for file in manifest.files:
        theirs = file.source_sha256
        if theirs != (listed.get(file.name, theirs) if source.kind == "hub" else None):
            yield Mismatch(file.name, "its digest in SOURCE is recorded, and is not what the Hub lists")
        if file.action == "copied" and len({file.sha256, theirs} - {None}) > 1:
            yield Mismatch(file.name, "was copied, and its digests in SOURCE and OUT are recorded as two")
        if digest is not None and (file.sha256 is not None) != (digest is Digest.files):
            yield Mismatch(file.name, _OTHER_DIGESTS)
    # Older ones do not say which digests they have; an edit has all of them or none.
    digests = [d for e in manifest.edits for w in e.written for d in (w.sha256_before, w.sha256_after)]
    wanted = {digest is not Digest.none} if digest is not None else {None not in digests}
    if {d is not None for d in digests} - wanted:
        yield Mismatch(MANIFEST_NAME, _OTHER_DIGESTS)


def _unknown(manifest: Manifest) -> list[str]:
    """Keys that this version does not know; those of the recipe are held against the plan's."""
    means = {*(manifest.run.copied_by or ())} - MEANS
    keys = {*unknown_keys(manifest, ""), *(f".run.copied_by.{one}" for one in means)}
    return sorted(key[1:] for key in keys if not key.startswith(".recipe."))


def _is_default(plan: EditPlan, keys: Collection[str]) -> bool:
    """Whether the recipe's defaults lead to what is said to be theirs."""
    unsaid: dict[str, Any] = {key: None for key in ("layers", "modes") if key in keys}
    request, items = plan.request, plan.request.edits
    try:
        if items is not None:
            request = replace(request, edits=tuple(replace(item, **unsaid) for item in items))
        made = resolve(request if items is not None else replace(request, **unsaid), plan.model)
    except UsageError:  # of items without layers
        return False
    return made.edits == plan.settings.edits and tuple(k for k in made.from_recipe if k in keys) == keys


def warnings_apart(manifest: Manifest, planned: Manifest, plan: EditPlan) -> tuple[list[str], list[str]]:
    """The warnings of a plan and of the figures on record: those that the manifest lacks, and where else it differs.

    Both are empty where another version chose the words. What warns of things that lie beside the model may be another:
    copies of SOURCE need not have them.
    """
    if manifest.tool.version != planned.tool.version:
        return [], []
    due = Counter((*planned.warnings, *numerical_warnings(manifest.edits, plan.settings.rule_of)))
    said, beside = Counter(manifest.warnings), Counter[str](folder_warnings(plan.model.checkpoint))
    lacking, more = due - said, said - due
    return [*(lacking - beside).elements()], [*(more + (lacking & beside)).elements()]


def open_questions(manifest: Manifest, planned: Manifest, warnings: Sequence[str]) -> Iterator[str]:
    """What a manifest says otherwise than this SOURCE would have it, and need not be wrong; ``warnings`` among it."""
    if manifest.recipe.sha256 != planned.recipe.sha256:
        yield f"made with another version of recipe {planned.recipe.name}, which decides just this edit too"
    theirs, ours = ({file.name for file in one.files if file.outside} for one in (manifest, planned))
    if outside := sorted(theirs ^ ours):
        yield f"recorded as links out of SOURCE, or not, and otherwise here: {abbreviate(outside, 5)}"
    if manifest.tool.version != planned.tool.version and (keys := _unknown(manifest)):
        yield f"keys of another version, which nothing here looks at: {abbreviate(keys, 5)}"
    if warnings:
        yield f"its warnings are not all those of this SOURCE: {abbreviate(warnings, 5)}"


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
