"""The edit that the manifest of an edited checkpoint records, to be made of the same SOURCE once more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import PresentHere
from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.compare.recorded import origin_mismatches
from qkpatch.compare.verify import recorded
from qkpatch.errors import CheckpointError, UsageError
from qkpatch.model.locate import Access
from qkpatch.planning.plan import EditPlan, make_plan
from qkpatch.planning.request import Request


def plan_recorded(out: Path, source: str | None, asked: Request) -> EditPlan:
    """The plan of the edit that ``out`` records, on ``source``, or on the repository that it names.

    Raises:
        UsageError: ``asked`` is more than a recipe; nothing says where SOURCE is.
        CheckpointError: there is no manifest that can be read, or SOURCE is another.
    """
    if replace(asked, recipe=None) != Request():
        raise UsageError("it takes the recorded edit", where="--from", fix="leave out the flags of an edit")
    with Rooted(out) as root:
        manifest = recorded(PresentHere(root))
    where = f"{out.name}/{MANIFEST_NAME}"
    source = manifest.source.found_at(source, where, "name SOURCE too")
    recipe = asked.recipe or manifest.recipe.name
    plan = make_plan(source, replace(manifest.request(), recipe=recipe, max_shard_size=None), Access.ranges)
    others = [mismatch.what for mismatch in origin_mismatches(manifest, plan.model.source)]
    foreign = [] if others else manifest.foreign(plan.model.checkpoint)
    if others := others + [f"{name} is another tensor than was edited" for name in foreign]:
        raise CheckpointError(others[0], where=where, fix="name the SOURCE that it was made from")
    return plan
