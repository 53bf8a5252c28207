"""Norms for a draft: of queries and keys, found by name, and the RMSNorm before attention."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qkpatch.checkpoint.header import TensorRef
from qkpatch.diagnosis.evidence import Median, speaks_for_plus_one
from qkpatch.errors import UnsupportedError
from qkpatch.recipe import NormKind
from qkpatch.refusals import is_qk_norm

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
    around = next((a for a in _outwards(home) if a in complete), None)
    chosen = {} if around is None else complete[around]
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


def norms_yaml(
    norms: QKNorms,
    stored: Mapping[str, TensorRef],
    gains: Iterable[TensorRef],
    read: Median,
    heads: tuple[int | None, int | None],
    kind: tuple[NormKind | None, str],
    *,
    is_gemma: bool,
) -> tuple[list[str], str | None]:
    """The lines under ``tensors`` without their names' quotes: ``{query}`` and ``{key}`` stand for them.

    ``heads`` are query heads and head_dim, ``kind`` what config.json speaks of and where; the second result tells
    why the kind is in doubt.

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
    if norms.query is None:
        return [], None
    n_heads, d_head = heads
    is_layer = norms.has_bias or kind[0] is NormKind.layer
    shape = stored[norms.query].shape
    is_projection = d_head is not None and n_heads is not None and shape == (n_heads * d_head,) != (d_head,)
    if is_layer and is_projection:
        seem = "are" if norms.has_bias else f"seem to be ({kind[1]} in config.json)"
        raise UnsupportedError(
            f"the norms of queries and keys {seem} LayerNorms over all heads: editing one head would move the others",
            where=norms.query,
            fix="this family cannot be edited by qkpatch",
        )
    lines = ["  norms:   # guess: of queries and keys before RoPE; after it, this family cannot be edited"]
    lines += ["    query: {query}", "    key: {key}"]
    doubt = None
    if is_layer:
        told = "it has a bias" if norms.has_bias else f"{kind[1]} in config.json speaks of LayerNorm"
        lines.append(f"    kind: layer   # guess: {told}")
        doubt = None if norms.has_bias else "LayerNorm is a guess from config.json"
    if is_projection:
        lines.append("    over: projection   # guess: a gain for every row")
    lines.append(_plus_one(read(gains), is_gemma=is_gemma))
    return lines, doubt


def _plus_one(gain: float | None, *, is_gemma: bool) -> str:
    verdict = speaks_for_plus_one(gain)
    value = is_gemma or verdict is True
    told = "as in other Gemma models" if is_gemma else "true where the stored weight is gain - 1"
    if gain is not None:
        speaks = {True: "speaks for true", False: "speaks for false", None: "tells nothing"}[verdict]
        told += f"; the stored numbers have the median {gain:.2g}, which {speaks}"
    return f"    plus_one: {'true' if value else 'false'}   # guess: {told}"


def input_norm_of(
    stored: Mapping[str, TensorRef], width: tuple[int, ...], kind: NormKind | None
) -> tuple[str | None, str]:
    """The gain before attention, and why it may be, or is, none of an RMSNorm."""
    for name, ref in stored.items():
        module, _, gain = name.rpartition(".")
        if gain not in _GAINS or ref.shape != width or not _INPUT_NORM.fullmatch(module.rpartition(".")[2]):
            continue
        if any(f"{module}.{bias}" in stored for bias in _BIASES):
            return name, "has a bias, so it is a LayerNorm"
        return name, "" if kind is not NormKind.layer else "may be a LayerNorm"
    return None, ""


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
