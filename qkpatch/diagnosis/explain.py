"""A diagnosis as plain text, wrapped to a width."""

from __future__ import annotations

from qkpatch.common.number_ranges import abbreviate, format_ranges
from qkpatch.common.text import cut, wrapped
from qkpatch.diagnosis.candidate import Candidate
from qkpatch.diagnosis.diagnose import Diagnosis
from qkpatch.diagnosis.draft import NAME
from qkpatch.errors import QKPatchError

_MOST = 5  # reasons


def explanation(diagnosis: Diagnosis, width: int) -> str:
    """What matched and what did not; the draft, where there is one, is printed by itself."""
    model_type, architectures = (cut(repr(v), 120) for v in (diagnosis.model_type, diagnosis.architectures))
    lines = [
        f"{diagnosis.source}: {diagnosis.tensors} tensors in {diagnosis.shards} file(s)",
        f"config.json: model_type {model_type}, architectures {architectures}",
    ]
    for candidate in diagnosis.fitting or diagnosis.candidates:
        lines += ["", *_candidate(candidate)]
    if len(diagnosis.fitting) != 1:
        lines += ["", f"Tensors named like query projections:{'' if diagnosis.query_like else ' none'}"]
        lines += [f"  {name}" for name in diagnosis.query_like]
    for error, recipes in diagnosis.near[:_MOST]:
        what = f"As a language model of recipe {abbreviate(recipes, 4)}, it does not fit:"
        lines += ["", what, *_reason(error)]
    lines += ["", *_conclusion(diagnosis)]
    return "\n".join(wrapped(line, width) for line in lines) + "\n"


def _candidate(candidate: Candidate) -> list[str]:
    recipe = candidate.recipe
    lines = [f"Recipe {recipe.name}, {recipe.title}: {'fits' if candidate.fits else 'does not fit'}"]
    for finding in candidate.findings:
        lines.append(f"  {'yes' if finding.fits else 'no '} {finding.about + ':':<14} {finding.found}")
        lines += [] if finding.reason is None else _reason(finding.reason)
    if candidate.skipped:
        lines.append(f"  Skipped, without a product of their own: {format_ranges(candidate.skipped)}")
    shown = {finding.reason for finding in candidate.findings}
    for refusal in candidate.refused:
        lines.append(f"  Refused: layers {format_ranges(refusal.layers)}")
        lines += [] if refusal.reason in shown else _reason(refusal.reason)
    return lines


def _reason(error: QKPatchError) -> list[str]:
    facts = (("", error.what), ("where: ", error.where), ("try: ", error.fix))
    return [f"      {label}{fact}" for label, fact in facts if fact]


def _conclusion(diagnosis: Diagnosis) -> list[str]:
    fitting = [candidate.recipe.name for candidate in diagnosis.fitting]
    if len(fitting) == 1:
        return [f"Recipe {fitting[0]} fits; next: qkpatch plan SOURCE"]
    if fitting:
        return [f"{len(fitting)} recipes fit: choose one with --recipe: {', '.join(fitting)}"]
    if diagnosis.no_draft is not None:
        is_told = any(diagnosis.no_draft is f.reason for c in diagnosis.candidates for f in c.findings)
        told = [", for the reason above."] if is_told else [":", *_reason(diagnosis.no_draft)]
        return [f"No recipe fits, and no draft of one would help{told[0]}", *told[1:]]
    if diagnosis.offers:
        return [
            "No recipe is made for this class. Layers in it have a known language model's names, norms and shapes, and "
            "config.json's numbers; if that is what it is, say so, the likeliest first:",
            *(f"  qkpatch plan SOURCE {flags}" for flags in diagnosis.offers),
        ]
    if diagnosis.draft is None:
        return ["No recipe fits, and there is nothing to draft one from."]
    return [
        f"No recipe fits. A draft of one goes to stdout: save it as {NAME}.yaml, fill in what is empty from the "
        "model's own code, then:",
        f"  qkpatch plan SOURCE --recipe ./{NAME}.yaml",
    ]
