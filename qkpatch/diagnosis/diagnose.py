"""Why a checkpoint fits a recipe or does not, what would do instead, and a draft where nothing does. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qkpatch.checkpoint.source import Checkpoint, open_checkpoint
from qkpatch.diagnosis.candidate import Candidate, Reason, examine
from qkpatch.diagnosis.draft import draft_text
from qkpatch.errors import QKPatchError
from qkpatch.model.choice import query_like
from qkpatch.model.locate import Access, locate
from qkpatch.model.refusals import refuse_known, refuse_wrapped
from qkpatch.model.stacks import offers, placements, sections
from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.recipe import Recipe, is_backbone

EXIT_UNKNOWN = 3  # as for any unsupported or ambiguous checkpoint
_MOST_NAMES = 12


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a checkpoint and of the recipes that come near it."""

    source: str
    model_type: Any  # as config.json has it
    architectures: Any
    n_tensors: int
    n_shards: int
    candidates: tuple[Candidate, ...]  # recipes that config.json names, the best first
    backbones: Mapping[
        str, Mapping[str, Reason]
    ]  # language models' recipes: why layers are none of theirs, by prefix
    query_like: tuple[str, ...]  # tensors that are named so, one per spelling
    offers: tuple[str, ...]  # flags that would do
    draft: str | None
    no_draft: Reason | None  # why there is none, where one is due

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
            "source": self.source,
            "model_type": self.model_type,
            "architectures": self.architectures,
            "tensors": self.n_tensors,
            "shards": self.n_shards,
            "recipe": self.fitting[0].recipe.name if len(self.fitting) == 1 else None,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "backbones": {
                n: {p: asdict(why) for p, why in told.items()} for n, told in self.backbones.items()
            },
            "query_like": self.query_like,
            "offers": self.offers,
            "draft": self.draft,
            "no_draft": None if self.no_draft is None else asdict(self.no_draft),
        }


def diagnose(source: str) -> Diagnosis:
    """Hold SOURCE against every shipped recipe that comes near it.

    Raises:
        QKPatchError: as :func:`locate` and :func:`open_checkpoint`; what a recipe refuses is told, not raised.
    """
    located = locate(source, Access.ranges)
    checkpoint = open_checkpoint(located.place)
    config = checkpoint.config
    candidates = tuple(sorted((examine(recipe, checkpoint) for recipe in _named(config)), key=_rank))
    names = tuple(query_like(checkpoint.tensors, _MOST_NAMES))
    flags: list[str] = []
    backbones: dict[str, dict[str, Reason]] = {}
    draft, no_draft = None, None
    if not any(candidate.fits for candidate in candidates):
        no_draft = _refusal(checkpoint, candidates)
        if no_draft is None:
            flags = offers(checkpoint)
            backbones = {} if flags else _backbones(checkpoint)
            if not flags and names:
                is_repo = located.kind == "hub" and located.name.count("/") == 1
                draft = draft_text(config, sections(config), names, located.name if is_repo else "org/name")
    return Diagnosis(
        source=located.name,
        model_type=config.get("model_type"),
        architectures=config.get("architectures"),
        n_tensors=len(checkpoint.tensors),
        n_shards=len(checkpoint.headers),
        candidates=candidates,
        backbones=backbones,
        query_like=names,
        offers=tuple(flags),
        draft=draft,
        no_draft=no_draft,
    )


def _named(config: Mapping[str, Any]) -> list[Recipe]:
    """Shipped recipes whose model type or architecture config.json names."""
    model_type, named = config.get("model_type") or "", config.get("architectures")
    classes = named if isinstance(named, list) else []
    return [
        recipe
        for recipe in shipped_recipes().values()
        if model_type in recipe.model_types or any(a in recipe.architectures for a in classes)
    ]


def _refusal(checkpoint: Checkpoint, candidates: tuple[Candidate, ...]) -> Reason | None:
    """Why no recipe whatever would help."""
    try:
        refuse_known(checkpoint.tensors, checkpoint.config)
        refuse_wrapped(checkpoint.tensors)
    except QKPatchError as error:
        return Reason.of(error)
    for candidate in candidates:
        if all(finding.fits for finding in candidate.findings[:4:3]) and candidate.findings[1].fits:
            return Reason(
                f"recipe {candidate.recipe.name} is made for this model and finds its tensors: others would fail too",
                "config.json",
                "repair the checkpoint, as told there",
            )
    return None


def _backbones(checkpoint: Checkpoint) -> dict[str, dict[str, Reason]]:
    """Why the layers that have a language model's names are not that language model."""
    found = {}
    for recipe in filter(is_backbone, shipped_recipes().values()):
        fitting, refused = placements(recipe, checkpoint)
        told = {placed.prefix: Reason(placed.doubt or "", None, None) for placed in fitting}
        told |= {prefix: Reason.of(error) for prefix, error in refused.items()}
        if told:
            found[recipe.name] = told
    return found


def _rank(candidate: Candidate) -> tuple[bool, int, str]:
    """The best first."""
    return not candidate.fits, -sum(f.fits is True for f in candidate.findings), candidate.recipe.name
