"""A diagnosis as plain text, wrapped to a width."""

from __future__ import annotations

from typing import Any

from qkpatch.common.number_ranges import format_ranges
from qkpatch.common.text import cut, wrapped
from qkpatch.diagnosis.candidate import Candidate, Reason
from qkpatch.diagnosis.diagnose import Diagnosis
from qkpatch.diagnosis.draft import NAME

_ANSWER = {True: "yes", False: "no ", None: " ? "}


def explanation(diagnosis: Diagnosis, width: int) -> str:
    """What matched and what did not; the draft, where there is one, is printed by itself."""
    lines = [
        f"{diagnosis.source}: {diagnosis.n_tensors} tensors in {diagnosis.n_shards} file(s)",
        f"config.json: model_type {_value(diagnosis.model_type)}, architectures {_value(diagnosis.architectures)}",
    ]
    for candidate in diagnosis.fitting or diagnosis.candidates:
        lines += ["", *_candidate(candidate)]
    if len(diagnosis.fitting) != 1:
        lines += ["", "Tensors named like query projections:" if diagnosis.query_like else _NONE]
        lines += [f"  {name}" for name in diagnosis.query_like]
    for recipe, told in diagnosis.backbones.items():
        lines += ["", f"As a language model of recipe {recipe}, it does not fit:"]
        for prefix, reason in told.items():
            lines += [f"  {prefix}", *_reason(reason)]
    lines += ["", *_conclusion(diagnosis)]
    return "\n".join(wrapped(line, width) for line in lines) + "\n"


_NONE = "No tensor is named like a query projection."


def _candidate(candidate: Candidate) -> list[str]:
    recipe = candidate.recipe
    lines = [f"Recipe {recipe.name}, {recipe.title}: {'fits' if candidate.fits else 'does not fit'}"]
    for finding in candidate.findings:
        lines.append(f"  {_ANSWER[finding.fits]} {finding.about + ':':<18} {finding.found}")
        lines += [] if finding.reason is None else _reason(finding.reason)
    if candidate.tensors is not None:
        lines.append(f"  Layers that can be edited: {format_ranges(candidate.editable) or 'none'}")
        if candidate.skipped:
            lines.append(f"  Skipped, without a product of their own: {format_ranges(candidate.skipped)}")
    shown = {finding.reason for finding in candidate.findings}
    for refusal in candidate.refused:
        if refusal.reason in shown and len(candidate.refused) == 1:
            lines.append(f"  Refused for that reason: layers {format_ranges(refusal.layers)}")
        else:
            lines.append(f"  Refused: layers {format_ranges(refusal.layers)}")
            lines += _reason(refusal.reason)
    return lines


def _reason(reason: Reason) -> list[str]:
    facts = (("", reason.what), ("where: ", reason.where), ("try: ", reason.fix))
    return [f"      {label}{fact}" for label, fact in facts if fact]


def _conclusion(diagnosis: Diagnosis) -> list[str]:
    fitting = [candidate.recipe.name for candidate in diagnosis.fitting]
    if len(fitting) == 1:
        return [f"Recipe {fitting[0]} fits; next: qkpatch plan SOURCE"]
    if fitting:
        return [f"{len(fitting)} recipes fit: choose one with --recipe: {', '.join(fitting)}"]
    if diagnosis.no_draft is not None:
        return ["No recipe fits, and none would help:", *_reason(diagnosis.no_draft)]
    if diagnosis.offers:
        return [
            "No recipe is made for this class. Layers in it have a known language model's names, norms and shapes, and "
            "config.json's numbers; if that is what it is, say so, the likeliest first:",
            *(f"  qkpatch plan SOURCE {flags}" for flags in diagnosis.offers),
        ]
    if diagnosis.draft is None:
        return ["No recipe fits, and there is nothing to draft one from."]
    return [
        "No recipe fits. A draft of one goes to stdout: save it as draft.yaml, and fill in what is empty from the",
        "model's own code, then:",
        f"  qkpatch plan SOURCE --recipe ./{NAME}.yaml",
    ]


def _value(value: Any) -> str:
    return cut(repr(value), 120)
