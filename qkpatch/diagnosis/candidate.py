"""One recipe held against one checkpoint: what fits, what does not and why, layer by layer. Reads no weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qkpatch.checkpoint.source import Checkpoint
from qkpatch.diagnosis.signs import beside, size
from qkpatch.diagnosis.survey import layered
from qkpatch.errors import QKPatchError, UnsupportedError
from qkpatch.model.model import open_set
from qkpatch.model.refusals import is_qk_norm
from qkpatch.model.targets import AttentionSet
from qkpatch.model.tower import read_tower
from qkpatch.recipes.recipe import Recipe

_IDENTITY = ("model_type", "architectures", "text model type")
NAMED = ("model_type", "architectures", "tensor names")


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

    @property
    def fits_but_for_identity(self) -> bool:
        """Whether ``--recipe`` would do: tensors and numbers fit, config.json names another family."""
        return all(f.fits for f in self.findings if f.about not in _IDENTITY)

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
        failed = Reason.of(error)
        if len(prefixes) != 1:
            found = f"{len(prefixes)} prefixes" if prefixes else "none of them"
            names = Finding("tensor names", False, found, failed)
            counts = Finding("counts and shapes", None, "no tensors to compare with")
        else:
            names = _names(recipe, prefixes[0])
            counts = Finding("counts and shapes", False, "a contradiction", failed)
        return Candidate(recipe, (*identity, names, counts, Finding("norms", None, "not looked at")))
    return _by_layer(recipe, opened, (*identity, _names(recipe, opened.prefix)), checkpoint.single_file)


def _by_layer(
    recipe: Recipe, opened: AttentionSet, before: tuple[Finding, ...], is_single: bool
) -> Candidate:
    """The same where the recipe's tensors can be read: what each layer says."""
    plain = _without_norms(opened)
    own = [n for n in range(opened.tower.n_layers) if opened.has(n)]
    present = (
        [n for n in own if n in opened.layers] if is_single else own
    )  # one shard holds any of the layers
    weights: dict[int, QKPatchError] = {}
    norms: dict[int, QKPatchError] = {}
    for layer in present:
        error = _error(opened, layer)
        if error is not None:
            of_weights = _error(plain, layer)
            (norms if of_weights is None else weights)[layer] = of_weights or error
    editable = tuple(n for n in present if n not in weights and n not in norms)
    refused = (*_grouped(weights), *_grouped(norms))
    layout = opened.tower.layout
    numbers = (
        f"{opened.tower.n_layers} layers, {layout.n_heads} query / {layout.n_kv_heads} key heads "
        f"of {layout.d_head}, hidden {layout.d_model}"
    )
    first = next(iter(_grouped(weights)), None)
    is_contradiction = any(not refusal.is_by_kind for refusal in _grouped(weights))
    return Candidate(
        recipe,
        (
            *before,
            Finding("counts and shapes", True, numbers)
            if first is None or (not is_contradiction and len(weights) < len(present))
            else Finding("counts and shapes", False, numbers, first.reason),
            *_beside(opened),
            _norms(opened, norms, len(weights) < len(present) or not present),
        ),
        opened,
        editable,
        tuple(n for n in range(opened.tower.n_layers) if n not in own),
        refused,
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
        return Finding(about, True, repr(read_tower(recipe, config).text_model_type))
    except QKPatchError as error:
        refused = error
    try:
        found = read_tower(recipe, config, insist=True).text_model_type
    except QKPatchError:
        return Finding(about, None, "the language model's numbers cannot be read")
    return Finding(about, False, repr(found), Reason.of(refused))


def _names(recipe: Recipe, prefix: str) -> Finding:
    names = recipe.tensors
    both = f"{prefix}{names.query}" + ("" if names.rows.is_fused else f" by {names.key}")
    return Finding("tensor names", True, both)


def _norms(opened: AttentionSet, errors: Mapping[int, QKPatchError], is_known: bool) -> Finding:
    declared = opened.names.norms
    if errors:
        found = "not as declared" if declared else "not declared"
        return Finding("norms", False, found, _grouped(errors)[0].reason)
    if not is_known:
        return Finding("norms", None, "not looked at")
    if declared is None:
        return Finding("norms", True, "none of queries and keys")
    stored = any(
        opened.prefix.format(layer=layer) + declared.query in opened.tensors for layer in opened.layers
    )
    return Finding(
        "norms", True, f"{declared.query}, {declared.key}" if stored else "optional, and none here"
    )


def _beside(opened: AttentionSet) -> list[Finding]:
    """Whether stored sinks and rotary frequencies agree with the numbers of heads; nothing where there are none."""
    stored, tower = beside(opened.tensors, opened.prefix), opened.tower
    findings = []
    sinks = [(n, ref) for n, ref in stored.sinks if n in opened.layers]
    if sinks:
        odd = next((ref for n, ref in sinks if size(ref) != tower.layout_of(n).n_heads), None)
        what = f"a sink for each of {size(sinks[0][1])} query heads"
        reason = None
        if odd is not None:
            what = "another number than of query heads"
            reason = Reason(
                f"{odd.name} holds {size(odd)} numbers, one per query head, and there are {tower.layout.n_heads}",
                f"config.json: {tower.section}{opened.names.keys.get('num_attention_heads', 'num_attention_heads')}",
                "config.json belongs to another model, or the recipe counts other heads",
            )
        findings.append(Finding("attention sinks", odd is None, what, reason))
    rotary = [(n, ref) for n, ref in stored.rotary if n is None or n in opened.layers]
    if rotary:
        found = [
            (ref, 2 * size(ref), (tower.layout if n is None else tower.layout_of(n)).d_head)
            for n, ref in rotary
        ]
        too_many = next((each for each in found if each[1] > each[2]), None)
        _, dims, d_head = too_many or found[0]
        reason = None
        if too_many is not None:
            reason = Reason(
                f"{too_many[0].name} rotates {dims} dims of a head, and a head has {d_head}",
                f"config.json: {tower.section}{opened.names.keys.get('head_dim', 'head_dim')}",
                "config.json belongs to another model, or the recipe counts other heads",
            )
        findings.append(Finding("rotary dims", reason is None, f"{dims} of head_dim {d_head}", reason))
    return findings


def _without_norms(opened: AttentionSet) -> AttentionSet:
    """The same set as if queries and keys were not normalised."""
    tensors = {name: ref for name, ref in opened.tensors.items() if not is_qk_norm(name)}
    return replace(opened, names=replace(opened.names, norms=None), tensors=tensors)


def _error(opened: AttentionSet, layer: int) -> QKPatchError | None:
    try:
        opened.target(layer)
    except QKPatchError as error:
        return error
    return None


def _grouped(errors: Mapping[int, QKPatchError]) -> tuple[Refusal, ...]:
    """Layers whose errors are the same but for the layer's number."""
    groups: dict[tuple[str, str], list[int]] = {}
    for layer, error in errors.items():
        what = layered(error.what, layer).replace(f"layer {layer} ", "each layer ")
        groups.setdefault((error.kind, what), []).append(layer)
    refusals = []
    for (_, what), layers in groups.items():
        first = errors[layers[0]]
        if len(layers) == 1:
            reason = Reason.of(first)
        else:
            where = None if first.where is None else layered(first.where, layers[0])
            reason = Reason(what, where, first.fix)
        refusals.append(Refusal(tuple(layers), reason, isinstance(first, UnsupportedError)))
    return tuple(refusals)


def _short(names: list[Any]) -> str:
    text = ", ".join(str(name) for name in names[:3])
    return text[:200] + ("…" if len(names) > 3 or len(text) > 200 else "")


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
