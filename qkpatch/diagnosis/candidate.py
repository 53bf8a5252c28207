"""One recipe held against one checkpoint: what fits, what does not and why, layer by layer. Reads no weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkpatch.checkpoint.source import Checkpoint
from qkpatch.common.number_ranges import format_ranges
from qkpatch.common.text import cut
from qkpatch.errors import QKPatchError, UnsupportedError
from qkpatch.model.model import open_set
from qkpatch.recipes.recipe import Recipe


@dataclass(frozen=True)
class Finding:
    """Whether one thing that a recipe says is so."""

    about: str
    fits: bool
    found: str
    reason: QKPatchError | None = None  # why it does not fit


@dataclass(frozen=True)
class Refusal:
    """Layers that cannot be edited, all for one reason."""

    layers: tuple[int, ...]
    reason: QKPatchError  # of the first of them


@dataclass(frozen=True)
class Candidate:
    """A recipe held against a checkpoint."""

    recipe: Recipe
    findings: tuple[Finding, ...]
    editable: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()  # layers without a query-key product of their own, by the family's design
    refused: tuple[Refusal, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the recipe can be used as it is; some layers may still be refused."""
        return all(finding.fits for finding in self.findings)

    @property
    def is_meant(self) -> bool:
        """Whether config.json means this recipe, and its tensors are there."""
        return all(finding.fits for finding in self.findings[:3])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "recipe": self.recipe.name,
            "fits": self.fits,
            "findings": [
                {**vars(f), "reason": None if f.reason is None else f.reason.to_json()} for f in self.findings
            ],
            "editable_layers": self.editable,
            "skipped_layers": self.skipped,
            "refused_layers": [{"layers": r.layers, "reason": r.reason.to_json()} for r in self.refused],
        }


def examine(recipe: Recipe, checkpoint: Checkpoint) -> Candidate:
    """Hold one recipe against a checkpoint; every error becomes a finding."""
    config = checkpoint.config
    model_type, classes = config.get("model_type") or "", config.get("architectures")
    named = classes if isinstance(classes, list) and classes else None
    is_class = any(a in recipe.architectures for a in named or ())
    is_type = model_type in recipe.model_types or (is_class and not recipe.model_types)
    is_class = is_type if named is None else is_class
    prefixes = recipe.tensors.matching_prefixes(list(checkpoint.tensors))
    identity = (
        Finding("model_type", is_type, _against(model_type, recipe.model_types, fits=is_type)),
        Finding("architectures", is_class, _against(named or "none", recipe.architectures, fits=is_class)),
    )
    there = f"{' and '.join(prefixes) or 'none of its'} {recipe.tensors.query}, {recipe.tensors.key}"
    try:
        opened = open_set(recipe, recipe.tensors, checkpoint, insist=False)
    except QKPatchError as error:
        if len(prefixes) != 1:
            return Candidate(recipe, (*identity, Finding("tensor names", False, there, error)))
        failed = Finding("numbers", False, "a contradiction", error)
        return Candidate(recipe, (*identity, Finding("tensor names", True, there), failed))
    tower, layout = opened.tower, opened.tower.layout
    own = [n for n in range(tower.n_layers) if opened.has(n)]
    # One shard by itself holds any of the layers.
    present = [n for n in own if n in opened.layers] if checkpoint.single_file else own
    errors: dict[int, QKPatchError] = {}
    for layer in present:
        try:
            opened.target(layer)
        except QKPatchError as error:
            errors[layer] = error
    refused = _grouped(errors)
    editable = tuple(n for n in present if n not in errors)
    # Quantised layers and the like leave the others as they are; a contradiction with config.json does not.
    is_whole = all(isinstance(e, UnsupportedError) for e in errors.values())
    is_usable = is_whole and bool(editable or not present)
    numbers = (
        f"{tower.n_layers} layers, {layout.n_heads} query / {layout.n_kv_heads} key heads "
        f"of {layout.d_head}, hidden {layout.d_model}, {tower.text_model_type}"
    )
    reason = None if is_usable else refused[0].reason
    layers = Finding("layers", is_usable, format_ranges(editable) or "none", reason)
    return Candidate(
        recipe,
        (*identity, Finding("tensor names", True, there), Finding("numbers", True, numbers), layers),
        editable,
        tuple(n for n in range(tower.n_layers) if n not in own),
        refused,
    )


def _against(found: object, expected: tuple[str, ...], *, fits: bool) -> str:
    """What was found, and what the recipe expects where that is another thing."""
    known = ", ".join(expected[:3]) + ("…" if len(expected) > 3 else "")
    return cut(repr(found), 200) + ("" if fits else f" is not {known}")


def _grouped(errors: Mapping[int, QKPatchError]) -> tuple[Refusal, ...]:
    """Layers whose errors are the same but for the layer's number."""
    groups: dict[str, list[int]] = {}
    for layer, error in errors.items():
        groups.setdefault(re.sub(rf"(?<![0-9]){layer}(?![0-9])", "#", str(error)), []).append(layer)
    return tuple(Refusal(tuple(layers), errors[layers[0]]) for layers in groups.values())
