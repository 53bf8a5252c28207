"""``qkpatch evaluate`` and ``qkpatch tune``: does an edit help this model, and which one does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import EditFlags, PartOpt, ShowFlags, SourceArg, expanded
from qkpatch.errors import MismatchError
from qkpatch.evaluation.records import Inputs, Limits, Protocol

if TYPE_CHECKING:
    from qkpatch.evaluation.bench import Evaluation

_AgainstOpt = Annotated[
    list[str] | None,
    typer.Option(metavar="OTHER", help="Compare with this; repeatable.", show_default="SOURCE unedited"),
]
_FolderOpt = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="The result's folder; runs go on there.", callback=expanded),
]
_SettingOpt = Annotated[
    Path, typer.Option("--out", "-o", help="The setting; evidence and log go beside it.", callback=expanded)
]


@command
def evaluate(
    model: SourceArg, inputs: Inputs, protocol: Protocol, edit: EditFlags, show: ShowFlags,
    against: _AgainstOpt = None, out: _FolderOpt = None, part: PartOpt = None,
) -> None:  # fmt: skip
    """Measure what SOURCE makes up, or SOURCE under an edit in memory: CHAIR, POPE, and what is kept.

    SOURCE is a checkpoint that transformers loads with its auto classes, or an adapter of peft.
    """
    from qkpatch import api
    from qkpatch.cli.console import end_strictly
    from qkpatch.cli.progress import bars
    from qkpatch.cli.tables import show_part
    from qkpatch.common.part import parse_part

    mine = None if part is None else parse_part(part, os.environ)
    with bars(quiet=show.is_bare) as observer:
        how = {**vars(edit.request), "against": against or (), "out": out, "part": mine}
        result = api.evaluate(model, inputs, protocol, observer=observer, **how)
    if mine is not None and out is not None and not show.is_bare:
        show_part(mine, out)
    else:
        _show(result, show)
    end_strictly(result.warnings, show)


@command
def tune(
    model: SourceArg, inputs: Inputs, protocol: Protocol, limits: Limits, edit: EditFlags, show: ShowFlags,
    out: _SettingOpt,
) -> None:  # fmt: skip
    """Search for the edit of SOURCE that makes up least, on one half of the pictures; look once at the other half.

    What a flag of the edit says is not searched. Exit code 1 where no setting is found better than its controls.
    """
    from qkpatch import api
    from qkpatch.cli.console import end_strictly, note, verdict
    from qkpatch.cli.progress import bars

    with bars(quiet=show.is_bare) as observer:
        how = {**vars(edit.request), "limits": limits}
        result = api.tune(model, inputs, out, protocol, observer=observer, **how)
    is_found = (result.tuned or {})["is_found"]
    with verdict(0 if is_found or limits.anyway else MismatchError.exit_code):
        _show(result, show)
        if (is_found or limits.anyway) and not show.is_bare:
            note(f"Wrote {out}{'' if is_found else ' (--anyway)'}")
    end_strictly(result.warnings, show)


def _show(result: Evaluation, show: ShowFlags) -> None:
    from qkpatch.cli.console import print_json, show_warnings
    from qkpatch.cli.tables import show_evaluation

    if show.as_json:
        print_json(result.to_json())
    elif not show.quiet:
        show_warnings(result.warnings)
        show_evaluation(result)
