"""Norms for a draft: of queries and keys, found by name, and the RMSNorm before attention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qkpatch.checkpoint.header import TensorRef
from qkpatch.diagnosis.scalars import comment, scalar
from qkpatch.diagnosis.signs import speaks_for_plus_one
from qkpatch.errors import UnsupportedError
from qkpatch.model.refusals import is_qk_norm
from qkpatch.recipes.recipe import NormKind

_GAINS, _BIASES = ("weight", "scale", "gamma"), ("bias", "beta")
_WORD = r"(?P<{}>qk|query|q|key|k)"
_NORM = r"(?:layer_?|rms_?)?(?:norms?|ln)"
_WHOSE = re.compile(
    rf"(?:^|_){_WORD.format('before')}_?{_NORM}(?:_|$)|(?:^|_){_NORM}_?{_WORD.format('after')}(?:_|$)",
    re.IGNORECASE,
)
_INPUT_NORM = re.compile(
    r"input_(?:layer)?norm|(?:attention|attn)_norm|(?:pre_?)(?:attention_|attn_|self_attn_)?(?:layer)?norm|"
    r"norm_?1|ln_?1|ln_attn|operator_norm",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class QKNorms:
    """The norms of queries and keys that a layer stores; names relative to the layer."""

    query: str | None = None  # both or neither
    key: str | None = None
    has_bias: bool = False
    of_others: tuple[str, ...] = ()  # not beside these queries: another attention's, as it seems
    unusable: str | None = None  # beside these queries, in a form that a recipe cannot declare


def find_norms(stored: Mapping[str, TensorRef], query: str) -> QKNorms:
    """All tensors of a layer that are named like norms of queries or keys, sorted by what can be said of them."""
    names = [name for name in stored if is_qk_norm(name)]
    pairs: dict[str, dict[str, str]] = {}  # module around the norms -> whose -> tensor
    for name in names:
        around, whose, rest = _parsed(name)
        if rest in ("", *_GAINS) and whose:
            for which in ("query", "key") if whose == "qk" else (whose,):
                pairs.setdefault(around, {}).setdefault(which, name)
    complete = {around: pair for around, pair in pairs.items() if set(pair) == {"query", "key"}}
    home = query.removesuffix(".weight").rpartition(".")[0]
    chosen = next((complete[around] for around in _outwards(home) if around in complete), {})
    modules = tuple(_module(name) for name in chosen.values())
    left = [name for name in names if _module(name) not in modules]
    close = {_within(name) for name in left} & {*_outwards(home)}
    return QKNorms(
        chosen.get("query"),
        chosen.get("key"),
        any(f"{module}.{bias}" in stored for module in modules for bias in _BIASES),
        tuple(name for name in left if _within(name) not in close),
        next((name for name in left if _within(name) in close), None),
    )


@dataclass(frozen=True)
class NormSigns:
    """What else speaks of the norms."""

    n_heads: int | None
    d_head: int | None
    kind: NormKind | None  # that config.json's keys speak of
    kind_key: str  # which of them
    gain: float | None  # the median of what is stored
    is_gemma: bool


def norms_yaml(norms: QKNorms, stored: Mapping[str, TensorRef], signs: NormSigns) -> str:
    """The lines under ``tensors``; none where a layer stores no such norms.

    Raises:
        UnsupportedError: norms that a recipe cannot declare.
    """
    if norms.unusable is not None:
        raise UnsupportedError(
            "queries or keys are normalised in a form that a recipe cannot declare: it names one tensor of gains "
            "for the queries and one for the keys",
            where=norms.unusable,
            fix="this family cannot be edited by qkpatch",
        )
    if norms.query is None or norms.key is None:
        return ""
    is_layer = norms.has_bias or signs.kind is NormKind.layer
    shape, d_head = stored[norms.query].shape, signs.d_head
    is_projection = bool(d_head and signs.n_heads and shape == (signs.n_heads * d_head,) != (d_head,))
    if is_layer and is_projection:
        seem = "are" if norms.has_bias else f"seem to be ({signs.kind_key} in config.json)"
        raise UnsupportedError(
            f"the norms of queries and keys {seem} LayerNorms over all heads: editing one head would move the others",
            where=norms.query,
            fix="this family cannot be edited by qkpatch",
        )
    lines = ["  norms:   # guess: of queries and keys before RoPE; after it, this family cannot be edited"]
    lines += [f"    query: {scalar(norms.query)}", f"    key: {scalar(norms.key)}"]
    if is_layer:
        told = "it has a bias" if norms.has_bias else f"{signs.kind_key} in config.json speaks of LayerNorm"
        lines.append(f"    kind: layer   # guess: {comment(told)}")
    if is_projection:
        lines.append("    over: projection   # guess: a gain for every row")
    lines.append(_plus_one(signs))
    return "\n".join(lines) + "\n"


def _plus_one(signs: NormSigns) -> str:
    verdict = speaks_for_plus_one(signs.gain)
    value = signs.is_gemma or verdict is True
    told = "as in other Gemma models" if signs.is_gemma else "true where the stored weight is gain - 1"
    if signs.gain is not None:
        speaks = {True: "speaks for true", False: "speaks for false", None: "tells nothing"}[verdict]
        told += f"; the median of what is stored is {signs.gain:.2g}, which {speaks}"
    return f"    plus_one: {'true' if value else 'false'}   # guess: {told}"


def input_norm_yaml(stored: Mapping[str, TensorRef], width: tuple[int, ...], signs: NormSigns) -> str:
    """The lines for the gain before attention, or a comment where it is, or may be, a LayerNorm's."""
    for name, ref in stored.items():
        module, _, gain = name.rpartition(".")
        if gain not in _GAINS or ref.shape != width or not _INPUT_NORM.fullmatch(module.rpartition(".")[2]):
            continue
        if any(f"{module}.{bias}" in stored for bias in _BIASES):
            return f"  # No input_norm: {scalar(name)} has a bias, so it is a LayerNorm.\n"
        if signs.kind is NormKind.layer:
            return (
                f"  # No input_norm: {scalar(name)} may be a LayerNorm without bias, since config.json has\n"
                f"  # {comment(signs.kind_key)} and nothing of RMSNorm. Declare it where it is an RMSNorm.\n"
            )
        plus_one = "\n    plus_one: true   # guess: as in other Gemma models" if signs.is_gemma else ""
        return (
            "  input_norm:   # guess: the RMSNorm before attention; leave it out where it is a LayerNorm\n"
            f"    weight: {scalar(name)}{plus_one}\n"
        )
    return ""


def _parsed(name: str) -> tuple[str, str, str]:
    """The module around a norm, whose norm it is (query, key, qk; empty: cannot be told), and what follows it."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if is_qk_norm(part)), len(parts) - 1)
    found = _WHOSE.search(parts[at])
    word = "" if found is None else (found["before"] or found["after"]).lower()
    whose = {"q": "query", "k": "key"}.get(word, word)
    return ".".join(parts[:at]), whose, ".".join(parts[at + 1 :])


def _within(name: str) -> str:
    return _parsed(name)[0]


def _module(name: str) -> str:
    """A norm's module; gains that are no module's are themselves one."""
    module, dot, last = name.rpartition(".")
    return module if dot and last in (*_GAINS, *_BIASES) else name


def _outwards(module: str) -> list[str]:
    """A module and those around it, up to the layer itself."""
    parts = module.split(".") if module else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
