"""Why a checkpoint fits a recipe or does not, and a draft of a recipe where none fits. Torch-free; reads no weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.source import Checkpoint, open_checkpoint
from qkpatch.diagnosis.candidate import NAMED, Candidate, Finding, Reason, examine
from qkpatch.diagnosis.draft import NAME, Written, draft_recipe, look
from qkpatch.diagnosis.signs import Median, median_reader, norm_kind, speaks_for_plus_one
from qkpatch.diagnosis.slim import slim
from qkpatch.diagnosis.survey import LANGUAGE, QueryGroup, TextNumbers, query_groups, text_numbers
from qkpatch.errors import UnsupportedError
from qkpatch.model.locate import Access, Source, locate
from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.descriptions import specialities
from qkpatch.recipes.reading import parse_recipe
from qkpatch.recipes.recipe import NormKind, Recipe

MOST_CANDIDATES = 5
EXIT_UNKNOWN = 3  # as for any unsupported or ambiguous checkpoint


@dataclass(frozen=True)
class Draft:
    """A recipe to start from, already held against the checkpoint."""

    text: str
    candidate: Candidate


@dataclass(frozen=True)
class Signs:
    """What speaks for one recipe or another, besides what each must agree with."""

    has_qk_norms: bool
    gain: float | None  # the median of the gains of queries' and keys' norms, as stored
    kind: NormKind | None  # of norms, that config.json's keys speak of
    numbers: TextNumbers
    model_types: tuple[str, ...]

    def against(self, recipe: Recipe) -> bool:
        """Whether the recipe's norms contradict the evidence."""
        norms = recipe.tensors.norms if self.has_qk_norms else None
        if norms is None:
            return self.kind is NormKind.layer and recipe.tensors.input_norm is not None
        plus_one = speaks_for_plus_one(self.gain)
        is_other_gain = norms.kind is NormKind.rms and plus_one is not None and plus_one != norms.plus_one
        return is_other_gain or (self.kind is not None and self.kind is not norms.kind)

    def is_kin(self, recipe: Recipe) -> bool:
        """Whether a model type begins with the same word, such as gemma or qwen."""
        return bool(_words(self.model_types) & _words((*recipe.model_types, *recipe.config.class_defaults)))

    def likeness(self, recipe: Recipe) -> float:
        """How alike the names of the model types are."""
        known = (*recipe.model_types, *recipe.config.class_defaults)
        return max(
            (SequenceMatcher(None, a[:80], b).ratio() for a in self.model_types for b in known if b),
            default=0.0,
        )


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
    signs: Signs

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
    located = locate(source, Access.ranges)
    whole = open_checkpoint(located.place)
    checkpoint = slim(whole)
    config, tensors = checkpoint.config, checkpoint.tensors
    numbers = text_numbers(config)
    groups = query_groups(tensors, numbers)
    median = median_reader(checkpoint)
    signs = _signs(config, tensors, numbers, groups, median)
    named, others = _near(config, tensors)
    # Where config.json names a family, what others have in common with it is of no use.
    candidates = sorted(
        (examine(recipe, checkpoint) for recipe in named or others), key=partial(_rank, signs)
    )
    draft, no_draft = None, None
    if not any(candidate.fits for candidate in candidates):
        try:
            written = draft_recipe(config, tensors, numbers, groups, _repo(located), median)
            draft = _checked(written, checkpoint, candidates)
        except UnsupportedError as error:
            no_draft = Reason.of(error)
    return Diagnosis(
        source=located.name,
        model_type=config.get("model_type"),
        architectures=config.get("architectures"),
        text_model_type=numbers.model_type,
        n_tensors=len(whole.tensors),
        n_shards=len(checkpoint.headers),
        candidates=tuple(candidates[:MOST_CANDIDATES]),
        n_more=len(candidates[MOST_CANDIDATES:]) + (len(others) if named else 0),
        groups=groups,
        draft=draft,
        no_draft=no_draft,
        signs=signs,
    )


def _signs(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    numbers: TextNumbers,
    groups: tuple[QueryGroup, ...],
    median: Median,
) -> Signs:
    group = next((group for group in groups if group.role == LANGUAGE), None)
    layers = None if group is None else look(tensors, groups, group)
    gains = [] if layers is None or group is None else layers.gains(tensors, group)
    named = (numbers.model_type, config.get("model_type"))
    types = tuple(text for text in named if isinstance(text, str) and text)
    return Signs(bool(gains), median(gains), norm_kind(numbers.source), numbers, types)


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


def _checked(written: Written, checkpoint: Checkpoint, near: list[Candidate]) -> Draft:
    """The draft held against the checkpoint; what it only guesses is not told as known.

    Raises:
        UnsupportedError: it would not help: no layer can be edited whatever a recipe says, or the fault is not one
            of recipes.
    """
    candidate = examine(parse_recipe(written.text.encode(), f"{NAME}.yaml"), checkpoint)
    is_refused = not candidate.editable and candidate.refused and all(r.is_by_kind for r in candidate.refused)
    is_for_norms = any(f.about == "norms" and f.fits is False for f in candidate.findings)
    if is_refused and not (is_for_norms and written.undeclared):
        reason = candidate.refused[0].reason
        raise UnsupportedError(reason.what, where=reason.where, fix=reason.fix)
    known = next((c for c in near if all(f.fits for f in c.findings if f.about in NAMED)), None)
    if known is not None and not candidate.fits:
        raise UnsupportedError(
            f"recipe {known.recipe.name} is made for this model and finds its tensors; a draft would fail as it does",
            where="config.json",
            fix="repair the checkpoint, as told there",
        )
    findings = tuple(_doubted(finding, written) for finding in candidate.findings)
    return Draft(written.text, replace(candidate, findings=findings))


def _doubted(finding: Finding, written: Written) -> Finding:
    if finding.about == "counts and shapes" and finding.fits and written.doubts:
        return replace(finding, fits=None, found=f"{finding.found}; {'; '.join(written.doubts)}")
    if finding.about == "norms" and written.undeclared:
        more = len(written.undeclared) - 1
        told = f"{written.undeclared[0]} is stored and not declared" + (f", and {more} more" if more else "")
        fix = "declare them: as norms, or with a set of their own under others"
        return replace(
            finding,
            fits=None,
            found=f"{finding.found}; {told}" if finding.fits and written.has_norms else told,
            reason=None if finding.reason is None else replace(finding.reason, fix=fix),
        )
    return finding


def _repo(located: Source) -> str | None:
    """The repository a draft may name."""
    return located.name if located.kind == "hub" and located.name.count("/") == 1 else None


def _rank(
    signs: Signs, candidate: Candidate
) -> tuple[bool, int, int, int, bool, bool, int, bool, float, bool, str]:
    """The best first; among equals what the evidence is not against, then kin, the plainest, the most alike."""
    recipe, findings = candidate.recipe, candidate.findings
    return (
        not candidate.fits,
        -sum(finding.fits is True for finding in findings if finding.about in NAMED[:2]),
        -sum(finding.fits is True for finding in findings),
        -sum(finding.fits is None for finding in findings),
        signs.against(recipe),
        not signs.is_kin(recipe),
        specialities(recipe),
        signs.numbers.section not in recipe.config.sections,
        -signs.likeness(recipe),
        recipe.tested != "real weights",
        recipe.name,
    )


def _words(names: tuple[str, ...]) -> set[str]:
    """The letters that names begin with; of few letters many begin."""
    found = (re.match("[a-z]{4,}", name.lower()) for name in names)
    return {match[0] for match in found if match is not None}
