"""Why a checkpoint fits a recipe or does not, what would do instead, and a draft where nothing does. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qkpatch.checkpoint.source import Checkpoint, open_checkpoint
from qkpatch.diagnosis.candidate import Candidate, examine
from qkpatch.diagnosis.draft import draft_text
from qkpatch.errors import AmbiguousError, CheckpointError, QKPatchError
from qkpatch.model.choice import query_like, refuse_unknown
from qkpatch.model.locate import Access, locate
from qkpatch.model.neighbours import Names
from qkpatch.model.stacks import offers, placements
from qkpatch.recipes.catalogue import language_models, shipped_recipes

EXIT_UNKNOWN = 3  # as for any unsupported or ambiguous checkpoint
_MOST_NAMES = 12


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a checkpoint and of the recipes that come near it."""

    source: str
    model_type: Any  # as config.json has it
    architectures: Any
    tensors: int
    shards: int
    candidates: tuple[Candidate, ...]  # recipes that config.json names, the best first
    query_like: tuple[str, ...]  # tensors that are named so, one per spelling
    offers: tuple[str, ...] = ()  # flags that would do
    near: tuple[tuple[QKPatchError, list[str]], ...] = ()  # why layers in it are no model of these recipes
    draft: str | None = None
    no_draft: QKPatchError | None = None  # why there is none, where one is due

    @property
    def fitting(self) -> tuple[Candidate, ...]:
        """The recipes that can be used as they are."""
        return tuple(candidate for candidate in self.candidates if candidate.fits)

    @property
    def exit_code(self) -> int:
        """0 where exactly one recipe fits."""
        return 0 if len(self.fitting) == 1 else EXIT_UNKNOWN

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **vars(self),
            "recipe": self.fitting[0].recipe.name if len(self.fitting) == 1 else None,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "near": [{"recipes": names, **error.to_json()} for error, names in self.near],
            "no_draft": None if self.no_draft is None else self.no_draft.to_json(),
        }


def diagnose(source: str) -> Diagnosis:
    """Hold SOURCE against every shipped recipe that comes near it.

    Raises:
        QKPatchError: as :func:`locate` and :func:`open_checkpoint`; what a recipe refuses is told, not raised.
    """
    located = locate(source, Access.ranges)
    checkpoint = open_checkpoint(located.place)
    config, tensors = checkpoint.config, checkpoint.tensors
    named = config.get("architectures")
    classes = named if isinstance(named, list) else []
    held = [
        examine(recipe, checkpoint)
        for recipe in shipped_recipes().values()
        if (config.get("model_type") or "") in recipe.model_types
        or any(a in recipe.architectures for a in classes)
    ]
    held.sort(key=lambda c: (not c.fits, -sum(f.fits for f in c.findings), c.recipe.name))
    candidates = tuple(held)
    names = tuple(query_like(tensors, _MOST_NAMES))
    further: dict[str, Any] = {}
    if not any(candidate.fits for candidate in candidates):
        try:
            refuse_unknown(tensors, config)
            # What the recipe that is meant cannot use, no other can.
            for error in (f.reason for c in candidates if c.is_meant for f in c.findings if f.reason):
                raise error
            flags = tuple(offers(checkpoint))
        except QKPatchError as error:
            further = {"no_draft": error}
        else:
            is_repo = located.kind == "hub" and located.name.count("/") == 1
            text = draft_text(config, names, located.name if is_repo else "org/name") if names else None
            further = {"offers": flags} if flags else {"near": _near(checkpoint), "draft": text}
    counts = len(tensors), len(checkpoint.headers)
    return Diagnosis(located.name, config.get("model_type"), named, *counts, candidates, names, **further)


def _near(checkpoint: Checkpoint) -> tuple[tuple[QKPatchError, list[str]], ...]:
    """Why layers with a language model's names and norms are not that language model, and whose they would be."""
    found: dict[str, tuple[QKPatchError, list[str]]] = {}
    names = Names(checkpoint.tensors)
    for recipe in language_models():
        fitting, refused = placements(recipe, checkpoint, names)
        told = [CheckpointError(f"{placed.prefix} {placed.reason}") for placed in fitting]
        for error in (*told, *(e for e in refused.values() if not isinstance(e, AmbiguousError))):
            found.setdefault(str(error), (error, []))[1].append(recipe.name)
    return tuple(found.values())
