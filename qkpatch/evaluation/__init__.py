"""What a model says about pictures, before and after an edit: measured, compared, and a setting searched for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkpatch.common.interrupts import import_torch
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.common.part import Part
from qkpatch.evaluation.records import Inputs, Limits, Protocol
from qkpatch.planning.request import Request

if TYPE_CHECKING:
    from qkpatch.evaluation.bench import Evaluation

_AS_ASKED = Protocol()


def evaluate(
    model: str | Path, inputs: Inputs, protocol: Protocol = _AS_ASKED, *, against: Sequence[str | Path] = (),
    out: str | Path | None = None, part: tuple[int, int] | None = None, observer: Observer = UNSEEN, **edit: Any,
) -> Evaluation:  # fmt: skip
    """Measure what a model makes up of pictures, and compare it with others on the same ones.

    Args:
        model: a checkpoint that transformers loads with its auto classes, or an adapter of peft.
        inputs: pictures, what is in them, and where they are looked at.
        protocol: how everything is asked and counted.
        against: other models; by default ``model`` unedited, where there is an edit.
        out: a folder for the result; a run that ended early goes on there.
        part: ``(i, N)``: ask this share alone, of which nothing is told; the same without it takes all over.
        observer: hears of pictures.
        **edit: an edit of ``model`` in memory, as of :func:`qkpatch.plan`.

    Raises:
        QKPatchError: a file is not what it should be, ``out`` has a run of other settings, or a model cannot be asked.
    """
    import_torch()
    from qkpatch.evaluation.bench import run

    others, place = [str(other) for other in against], None if out is None else Path(out)
    mine = None if part is None else Part.of(part)
    return run(str(model), inputs, protocol, Request.of(**edit), others, place, mine, observer)


def tune(
    model: str | Path, inputs: Inputs, out: str | Path, protocol: Protocol = _AS_ASKED, *,
    limits: Limits | None = None, observer: Observer = UNSEEN, **edit: Any,
) -> Evaluation:  # fmt: skip
    """Search for an edit on one half of the pictures, and look at the other half once, beside its controls.

    Args:
        model: a checkpoint, as of :func:`evaluate`.
        inputs: as of :func:`evaluate`.
        out: the setting, ``edit.yaml``; the log of all trials and the evidence come into ``edit.tune/``.
        protocol: as of :func:`evaluate`.
        limits: what must be kept, and how long it may take.
        observer: hears of pictures.
        **edit: what is not searched.

    Returns:
        The held-out half: the model, the setting and its controls; ``tuned`` says what came of it.
    """
    import_torch()
    from qkpatch.evaluation.search import run

    return run(str(model), inputs, protocol, Request.of(**edit), limits or Limits(), Path(out), observer)
