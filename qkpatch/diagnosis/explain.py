"""A diagnosis as plain text, wrapped to a width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qkpatch.common.number_ranges import abbreviate, format_ranges
from qkpatch.common.text import wrapped
from qkpatch.diagnosis.candidate import Candidate, Finding, Reason
from qkpatch.diagnosis.diagnose import Diagnosis
from qkpatch.diagnosis.draft import NAME
from qkpatch.diagnosis.signs import speaks_for_plus_one
from qkpatch.diagnosis.survey import QueryGroup
from qkpatch.recipes.descriptions import assumed
from qkpatch.recipes.recipe import NormKind

_ANSWER = {True: "yes", False: "no ", None: " ? "}
_MOST_GROUPS = 12


def explanation(diagnosis: Diagnosis, width: int) -> str:
    """What matched and what did not; the draft, where there is one, is printed by itself."""
    lines = _heading(diagnosis)
    fitting = diagnosis.fitting
    for candidate in fitting or diagnosis.candidates:
        lines += ["", *_candidate(candidate)]
    if diagnosis.n_more and not fitting:
        lines += ["", f"{diagnosis.n_more} more recipe(s) have the same tensor names or model type."]
    if len(fitting) != 1:
        lines += ["", *_groups(diagnosis.groups)]
    lines += ["", *_conclusion(diagnosis)]
    return "\n".join(wrapped(line, width) for line in lines) + "\n"


def _heading(diagnosis: Diagnosis) -> list[str]:
    text_type = diagnosis.text_model_type
    return [
        f"{diagnosis.source}: {diagnosis.n_tensors} tensors in {diagnosis.n_shards} file(s)",
        f"config.json: model_type {_value(diagnosis.model_type)}, architectures {_value(diagnosis.architectures)}, "
        f"text model type {_value(text_type) if text_type else 'none'}",
    ]


def _candidate(candidate: Candidate) -> list[str]:
    recipe = candidate.recipe
    lines = [f"Recipe {recipe.name}, {recipe.title}: {'fits' if candidate.fits else 'does not fit'}"]
    for finding in candidate.findings:
        lines += _finding(finding)
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


def _finding(finding: Finding) -> list[str]:
    lines = [f"  {_ANSWER[finding.fits]} {finding.about + ':':<18} {finding.found}"]
    return lines if finding.reason is None else lines + _reason(finding.reason)


def _reason(reason: Reason) -> list[str]:
    facts = (("", reason.what), ("where: ", reason.where), ("try: ", reason.fix))
    return [f"      {label}{fact}" for label, fact in facts if fact]


def _groups(groups: Sequence[QueryGroup]) -> list[str]:
    if not groups:
        return ["No tensor is named like a query projection."]
    lines = ["Tensors named like query projections; what each is for is a guess:"]
    for group in groups[:_MOST_GROUPS]:
        shapes = abbreviate([str(list(shape)) for shape in group.shapes], 2) or "no weight"
        lines.append(f"  {group.template}")
        lines.append(
            f"      {len(group.layers)} layer(s) {_short(format_ranges(group.layers))}, {shapes} "
            f"{abbreviate(group.dtypes, 2)}, stored as {abbreviate(group.suffixes, 6)}: {group.role}"
        )
    if len(groups) > _MOST_GROUPS:
        lines.append(f"  and {len(groups) - _MOST_GROUPS} more names")
    return lines


def _conclusion(diagnosis: Diagnosis) -> list[str]:
    fitting = [candidate.recipe.name for candidate in diagnosis.fitting]
    if len(fitting) == 1:
        return [f"Recipe {fitting[0]} fits; next: qkpatch plan SOURCE"]
    if fitting:
        return [f"{len(fitting)} recipes fit: choose one with --recipe: {', '.join(fitting)}"]
    lines = ["No recipe fits."]
    lines += _near(diagnosis)
    if diagnosis.no_draft is not None:
        return [*lines, "No draft of a recipe:", *_reason(diagnosis.no_draft)]
    if diagnosis.draft is not None:
        checked = diagnosis.draft.candidate
        lines.append(
            f"A draft of a recipe goes to stdout. Save it as {NAME}.yaml, compare it with the model's code, then:"
        )
        lines.append(f"  qkpatch plan SOURCE --recipe ./{NAME}.yaml")
        lines.append("The draft as it stands:")
        for finding in checked.findings[3:]:
            lines += _finding(finding)
        if checked.tensors is not None:
            lines.append(f"  Layers that can be edited: {format_ranges(checked.editable) or 'none'}")
    return lines


def _near(diagnosis: Diagnosis) -> list[str]:
    """Recipes for other models that agree, each with what it assumes, and what speaks for one or another."""
    near, signs = [c.recipe for c in diagnosis.candidates if c.fits_but_for_identity], diagnosis.signs
    if not near:
        return []
    lines = [
        "Tensors and numbers agree with a recipe for another model. If the attention is the same "
        "(RoPE, norms, the order of rows), name it, the likeliest first:"
    ]
    for recipe in near:
        against = "; the evidence is against it" if signs.against(recipe) else ""
        lines.append(f"  --recipe {recipe.name} ({assumed(recipe, with_norms=signs.has_qk_norms)}{against})")
    if signs.gain is not None:
        verdict = speaks_for_plus_one(signs.gain)
        about = {True: "for gain + 1", False: "against gain + 1", None: "neither way"}[verdict]
        median = f"the median of the stored gains of queries and keys is {signs.gain:.2g}"
        lines.append(f"  Evidence, no proof: {median}, which speaks {about}.")
    if signs.kind is not None:
        kind = {NormKind.rms: "RMSNorm", NormKind.layer: "LayerNorm"}[signs.kind]
        lines.append(f"  Evidence, no proof: config.json's keys speak of {kind}.")
    return lines


def _value(value: Any) -> str:
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:120]}…"
