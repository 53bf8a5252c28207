"""Why a checkpoint fits a recipe or does not, and a draft of a recipe where none fits. Torch-free; reads no weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qkpatch.catalogue import shipped_recipes
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.source import Checkpoint, open_checkpoint
from qkpatch.describe import attention
from qkpatch.diagnosis.candidate import NAMED, Candidate, Reason, examine
from qkpatch.diagnosis.draft import NAME, draft_recipe
from qkpatch.diagnosis.survey import QueryGroup, query_groups, text_numbers
from qkpatch.errors import UnsupportedError
from qkpatch.locate import Source, locate
from qkpatch.recipe import TOP_LEVEL, Recipe
from qkpatch.recipe_file import parse_recipe

MOST_CANDIDATES = 5
EXIT_UNKNOWN = 3  # as for any unsupported or ambiguous checkpoint


@dataclass(frozen=True)
class Draft:
    """A recipe to start from, already held against the checkpoint."""

    text: str
    candidate: Candidate


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a checkpoint and of the recipes that come near it."""

    source: str
    model_type: Any  # as config.json has it
    architectures: Any
    text_model_type: str
    n_tensors: int
    n_shards: int
    candidates: tuple[Candidate, ...]  # the best first
    n_more: int  # further recipes whose tensor names or model type fit
    groups: tuple[QueryGroup, ...]
    draft: Draft | None
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
            "text_model_type": self.text_model_type,
            "tensors": self.n_tensors,
            "shards": self.n_shards,
            "recipe": self.fitting[0].recipe.name if len(self.fitting) == 1 else None,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "more_candidates": self.n_more,
            "query_like": [
                {
                    "name": group.template,
                    "layers": group.layers,
                    "shapes": group.shapes,
                    "dtypes": group.dtypes,
                    "stored": group.suffixes,
                    "role": group.role,
                }
                for group in self.groups
            ],
            "draft": None if self.draft is None else self.draft.text,
            "draft_check": None if self.draft is None else self.draft.candidate.to_json(),
            "no_draft": None if self.no_draft is None else asdict(self.no_draft),
        }


def diagnose(source: str) -> Diagnosis:
    """Hold SOURCE against every shipped recipe that comes near it.

    Raises:
        QKPatchError: as :func:`locate` and :func:`open_checkpoint`; what a recipe refuses is told, not raised.
    """
    located = locate(source)
    checkpoint = open_checkpoint(located.path)
    config, tensors = checkpoint.config, checkpoint.tensors
    numbers = text_numbers(config)
    groups = query_groups(tensors, numbers)
    named, others = _near(config, tensors)
    # Where config.json names a family, what others have in common with it is of no use.
    near = sorted((examine(recipe, checkpoint) for recipe in named or others), key=_rank)
    draft, no_draft = None, None
    if not any(candidate.fits for candidate in near):
        try:
            draft = _checked(draft_recipe(config, tensors, numbers, groups, _repo(located)), checkpoint, near)
        except UnsupportedError as error:
            no_draft = Reason.of(error)
    return Diagnosis(
        source=located.name,
        model_type=config.get("model_type"),
        architectures=config.get("architectures"),
        text_model_type=numbers.model_type,
        n_tensors=len(tensors),
        n_shards=len(checkpoint.headers),
        candidates=tuple(near[:MOST_CANDIDATES]),
        n_more=len(near[MOST_CANDIDATES:]) + (len(others) if named else 0),
        groups=groups,
        draft=draft,
        no_draft=no_draft,
    )


def _near(config: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> tuple[list[Recipe], list[Recipe]]:
    """Shipped recipes whose model type or architecture config.json names, and others whose tensor names fit."""
    recipes = shipped_recipes().values()
    model_type, architectures = config.get("model_type") or "", config.get("architectures")
    classes = architectures if isinstance(architectures, list) else []
    named = [r for r in recipes if model_type in r.model_types or any(a in r.architectures for a in classes)]
    modules = {recipe.tensors.query_module + "." for recipe in recipes}
    alike = {module: [name for name in tensors if module in name] for module in modules}
    others = [
        recipe
        for recipe in recipes
        if recipe not in named and recipe.tensors.matching_prefixes(alike[recipe.tensors.query_module + "."])
    ]
    return named, others


def _checked(text: str, checkpoint: Checkpoint, near: list[Candidate]) -> Draft:
    """The draft held against the checkpoint.

    Raises:
        UnsupportedError: it would not help: no layer can be edited whatever a recipe says, or the fault is not one
            of recipes.
    """
    candidate = examine(parse_recipe(text.encode(), f"{NAME}.yaml"), checkpoint)
    if not candidate.editable and candidate.refused and all(r.is_by_kind for r in candidate.refused):
        reason = candidate.refused[0].reason
        raise UnsupportedError(reason.what, where=reason.where, fix=reason.fix)
    known = next((c for c in near if all(f.fits for f in c.findings if f.about in NAMED)), None)
    if known is not None and not candidate.fits:
        raise UnsupportedError(
            f"recipe {known.recipe.name} is made for this model and finds its tensors; a draft would fail as it does",
            where="config.json",
            fix="repair the checkpoint, as told there",
        )
    return Draft(text, candidate)


def _repo(located: Source) -> str | None:
    """The repository a draft may name."""
    return located.name if located.kind == "hub" and located.name.count("/") == 1 else None


def _rank(candidate: Candidate) -> tuple[bool, int, int, int, int, bool, bool, str]:
    """The best first; among equals the plainest, since of a special one more than shapes would have to agree."""
    recipe, findings = candidate.recipe, candidate.findings
    return (
        not candidate.fits,
        -sum(finding.fits is True for finding in findings if finding.about in NAMED[:2]),
        -sum(finding.fits is True for finding in findings),
        -sum(finding.fits is None for finding in findings),
        len(attention(recipe)),
        recipe.tested != "real weights",
        recipe.config.sections != (TOP_LEVEL,),
        recipe.name,
    )
