"""Which share of a plan's files a part is; from the plan alone, so that all machines decide the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qkpatch.common.part import Part
from qkpatch.errors import UsageError
from qkpatch.output.options import Writing
from qkpatch.planning.plan import EditPlan


def check_part(part: tuple[int, int], writing: Writing, *, straight: str | None) -> Part:
    """The part that is meant; raises :class:`UsageError` where there is none, or it cannot be written so.

    ``straight`` is what SOURCE is of which no file comes to this machine before it is edited, such as ``store``.
    """
    if writing.overwrite:
        fix = "leave it out; an OUT that is there you may remove yourself"
        raise UsageError("parts are of an OUT that is not there yet", where="--overwrite", fix=fix)
    if straight == "hub":
        what = "a part reads heads of files that others carry, so SOURCE must be in a store, or on a disk"
        raise UsageError(what, where="--no-cache", fix="leave it out")
    return Part.of(part)


@dataclass
class _Load:
    """What a part has to do so far."""

    files: set[str]
    edits: int = 0
    size: int = 0


def share_of(plan: EditPlan, part: Part | None) -> EditPlan:
    """What of ``plan`` is a part's: some files of OUT, and the edits that write to them; all where there are no parts.

    Files that one edit writes to stay together. Edited ones are dealt out first, those with most edits before others,
    each to whoever has fewest to make; then the rest by bytes, each to whoever has fewest to write.
    """
    if part is None:
        return plan
    groups: list[tuple[int, set[str]]] = []
    for edit in plan.edits:
        names, n = {plan.output.place(ref).shard for ref in edit.written}, 1
        for group in [group for group in groups if group[1] & names]:
            groups.remove(group)
            n, names = n + group[0], names | group[1]
        groups.append((n, names))
    sizes = {name: file.size for name, file in plan.output.files.items()}
    groups += [(0, {name}) for name in sizes.keys() - plan.edits_by_file.keys()]
    # Less than nothing, so that what is most comes first.
    dealt = sorted((-n, -sum(sizes[name] for name in names), sorted(names)) for n, names in groups)
    loads = [_Load(set()) for _ in range(part.total)]
    for n, size, together in dealt:
        least = min(
            loads, key=(lambda load: (load.edits, load.size)) if n else (lambda load: (load.size, load.edits))
        )
        least.files.update(together)
        least.edits, least.size = least.edits - n, least.size - size
    mine = loads[part.number - 1].files
    files = {name: file for name, file in plan.output.files.items() if name in mine}
    edits = tuple(edit for edit in plan.edits if plan.output.place(edit.query).shard in mine)
    return replace(plan, edits=edits, output=replace(plan.output, files=files))
