"""One recipe held against one checkpoint: what fits, what does not and why, layer by layer. Reads no weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qkpatch.checkpoint.source import Checkpoint
from qkpatch.errors import QKPatchError, UnsupportedError
from qkpatch.model.model import open_set
from qkpatch.model.refusals import is_qk_norm
from qkpatch.model.targets import AttentionSet
from qkpatch.model.tower import read_tower
from qkpatch.recipes.recipe import Recipe


@dataclass(frozen=True)
class Reason:
    """An error's three facts."""

    what: str
    where: str | None
    fix: str | None

    @classmethod
    def of(cls, error: QKPatchError) -> Reason:
        """The facts of ``error``."""
        return cls(error.what, error.where, error.fix)


@dataclass(frozen=True)
class Finding:
    """Whether one thing that a recipe says is so."""

    about: str
    fits: bool | None  # None: it cannot be told, since something else does not fit
    found: str
    reason: Reason | None = None  # why it does not fit


@dataclass(frozen=True)
class Refusal:
    """Layers that cannot be edited, all for one reason."""

    layers: tuple[int, ...]
    reason: Reason  # of the first of them; of several, with {layer} in names in place of its number
    is_by_kind: bool  # quantised and the like; a contradiction with config.json otherwise


@dataclass(frozen=True)
class Candidate:
    """A recipe held against a checkpoint."""

    recipe: Recipe
    findings: tuple[Finding, ...]
    tensors: AttentionSet | None = None  # the recipe's first set, where it can be read
    editable: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()  # layers without a query-key product of their own, by the family's design
    refused: tuple[Refusal, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the recipe can be used as it is; some layers may still be refused."""
        return all(finding.fits for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        tower = None if self.tensors is None else self.tensors.tower
        layout = None if tower is None else tower.layout
        return {
            "recipe": self.recipe.name,
            "fits": self.fits,
            "findings": [asdict(finding) for finding in self.findings],
            "prefix": None if self.tensors is None else self.tensors.prefix,
            "num_hidden_layers": None if tower is None else tower.n_layers,
            "num_attention_heads": None if layout is None else layout.n_heads,
            "num_key_value_heads": None if layout is None else layout.n_kv_heads,
            "head_dim": None if layout is None else layout.d_head,
            "hidden_size": None if layout is None else layout.d_model,
            "editable_layers": self.editable,
            "skipped_layers": self.skipped,
            "refused_layers": [asdict(refusal) for refusal in self.refused],
        }


def examine(recipe: Recipe, checkpoint: Checkpoint) -> Candidate:
    """Hold one recipe against a checkpoint; every error becomes a finding."""
    identity = _identity(recipe, checkpoint.config)
    prefixes = recipe.tensors.matching_prefixes(list(checkpoint.tensors))
    try:
        opened = open_set(recipe, recipe.tensors, checkpoint, insist=True)
    except QKPatchError as error:
        if len(prefixes) == 1:
            names = _names(recipe, prefixes[0])
            counts = Finding("counts and shapes", False, "a contradiction", Reason.of(error))
        else:
            found = f"{len(prefixes)} prefixes" if prefixes else "none of them"
            names = Finding("tensor names", False, found, Reason.of(error))
            counts = Finding("counts and shapes", None, "no tensors to compare with")
        return Candidate(recipe, (*identity, names, counts, Finding("norms", None, "not looked at")))
    return _by_layer(recipe, opened, (*identity, _names(recipe, opened.prefix)), checkpoint)


def _by_layer(
    recipe: Recipe, opened: AttentionSet, before: tuple[Finding, ...], checkpoint: Checkpoint
) -> Candidate:
    """The same where the recipe's tensors can be read: what each layer says."""
    tower, layout = opened.tower, opened.tower.layout
    own = [n for n in range(tower.n_layers) if opened.has(n)]
    # One shard by itself holds any of the layers.
    present = [n for n in own if n in opened.layers] if checkpoint.single_file else own
    of_weights: dict[int, QKPatchError] = {}
    of_norms: dict[int, QKPatchError] = {}
    for layer in present:
        try:
            opened.target(layer)
        except QKPatchError as error:
            is_of_norms = is_qk_norm(f"{error.where} {error.what}")
            (of_norms if is_of_norms else of_weights)[layer] = error
    weights, norms = _grouped(of_weights), _grouped(of_norms)
    is_usable = all(refusal.is_by_kind for refusal in weights) and len(of_weights) < len(present)
    numbers = (
        f"{tower.n_layers} layers, {layout.n_heads} query / {layout.n_kv_heads} key heads "
        f"of {layout.d_head}, hidden {layout.d_model}"
    )
    counts = Finding("counts and shapes", True, numbers)
    if weights and not is_usable:
        counts = Finding("counts and shapes", False, numbers, weights[0].reason)
    is_seen = len(of_weights) < len(present) or not present
    return Candidate(
        recipe,
        (*before, counts, _norms(opened, norms, is_seen=is_seen)),
        opened,
        tuple(n for n in present if n not in of_weights and n not in of_norms),
        tuple(n for n in range(tower.n_layers) if n not in own),
        (*weights, *norms),
    )


def _identity(recipe: Recipe, config: Mapping[str, Any]) -> tuple[Finding, Finding, Finding]:
    """Whether config.json names the recipe's family."""
    model_type, named = config.get("model_type") or "", config.get("architectures")
    is_type = model_type in recipe.model_types
    known = _short([t or "none" for t in recipe.model_types])
    of_type = Finding("model_type", is_type, f"{_quoted(model_type)}{'' if is_type else f' is not {known}'}")
    if not isinstance(named, list) or not named:
        of_class = Finding("architectures", is_type, "none, so model_type decides")
    else:
        shared = [a for a in named if a in recipe.architectures]
        expected = f"{_short(named)} is not {_short([*recipe.architectures])}"
        of_class = Finding("architectures", bool(shared), _short(shared) if shared else expected)
    return of_type, of_class, _text_type(recipe, config)


def _text_type(recipe: Recipe, config: Mapping[str, Any]) -> Finding:
    about = "text model type"
    try:
        found = read_tower(recipe, config, insist=True).text_model_type
    except QKPatchError:
        return Finding(about, None, "the language model's numbers cannot be read")
    try:
        read_tower(recipe, config)
    except UnsupportedError as error:
        return Finding(about, False, repr(found), Reason.of(error))
    return Finding(about, True, repr(found))


def _names(recipe: Recipe, prefix: str) -> Finding:
    names = recipe.tensors
    both = f"{prefix}{names.query}" + ("" if names.rows.is_fused else f" by {names.key}")
    return Finding("tensor names", True, both)


def _norms(opened: AttentionSet, refused: tuple[Refusal, ...], *, is_seen: bool) -> Finding:
    declared = opened.names.norms
    if refused:
        found = "not as declared" if declared else "not declared"
        return Finding("norms", False, found, refused[0].reason)
    if not is_seen:
        return Finding("norms", None, "not looked at")
    if declared is None:
        return Finding("norms", True, "none of queries and keys")
    stored = any(opened.prefix.format(layer=n) + declared.query in opened.tensors for n in opened.layers)
    found = f"{declared.query}, {declared.key}" if stored else "optional, and none here"
    return Finding("norms", True, found)


def _grouped(errors: Mapping[int, QKPatchError]) -> tuple[Refusal, ...]:
    """Layers whose errors are the same but for the layer's number."""
    groups: dict[tuple[str, str], list[int]] = {}
    for layer, error in errors.items():
        what = _layered(error.what, layer).replace(f"layer {layer} ", "each layer ")
        groups.setdefault((error.kind, what), []).append(layer)
    refusals = []
    for (_, what), layers in groups.items():
        first = errors[layers[0]]
        reason = Reason.of(first)
        if len(layers) > 1:
            where = None if first.where is None else _layered(first.where, layers[0])
            reason = Reason(what, where, first.fix)
        refusals.append(Refusal(tuple(layers), reason, isinstance(first, UnsupportedError)))
    return tuple(refusals)


def _layered(name: str, layer: int) -> str:
    """``name`` with {layer} in place of that number, to say the same of many layers."""
    return re.sub(rf"(?<=[._/-]){layer}(?=[._/-])", "{layer}", name, count=1)


def _short(names: list[Any]) -> str:
    text = ", ".join(str(name) for name in names[:3])
    return text[:200] + ("…" if len(names) > 3 or len(text) > 200 else "")


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
