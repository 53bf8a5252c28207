"""``Recipe``: what qkpatch must know about one model family, as data that :mod:`qkpatch.recipes.reading` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from qkpatch.common.typed_json import LEFT_OUT, as_json
from qkpatch.errors import UsageError
from qkpatch.recipes.heads import RowLayout

TOP_LEVEL = "."  # the config section that stands for config.json itself
COUNT_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
# These rescale or clip logits and leave the product's modes as they are: recorded, not used.
LOGIT_KEYS = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "attention_multiplier",
    "use_qk_norm",
    "attn_temperature_tuning",
    "clip_qkv",
)

# The text model_type of `class_defaults` that stands for whichever config.json names.
ANY = "*"

ConfigValue = int | float | bool


class NormKind(str, Enum):
    """What normalises queries and keys."""

    rms = "rms"
    layer = "layer"  # LayerNorm: subtracts the mean first


class NormSpan(str, Enum):
    """The numbers that a norm's mean square is taken over."""

    head = "head"
    projection = "projection"  # all heads at once, before the split
    stored = "stored"  # either, by what is stored: gains of one head are a head's


@dataclass(frozen=True)
class NormNames:
    """Norms of queries and keys before RoPE, ``q̂ = g_q ⊙ norm(W_Q x)``, likewise for keys."""

    query: str
    key: str
    kind: NormKind
    over: NormSpan
    plus_one: bool  # the stored weight is g − 1, as in Gemma
    optional: bool  # only some language models of the family have them


@dataclass(frozen=True)
class InputNorm:
    """RMSNorm before attention, whose gain ``--fold-norm`` takes into the product."""

    weight: str
    plus_one: bool
    unless: str | None  # a config key; where it is true, the norm comes after attention


@dataclass(frozen=True)
class TensorNames:
    """One set of query and key tensors and its names: ``prefix.format(layer=i) + query``."""

    attention: str  # the set's name, for --attention
    prefixes: tuple[str, ...]  # each holds {layer} once; a checkpoint uses exactly one of them
    query: str
    key: str
    orientation: str  # "out_in": rows are outputs, as nn.Linear stores them. Declared, never guessed
    rows: RowLayout
    norms: NormNames | None
    input_norm: InputNorm | None
    every_layer: bool  # whether each layer has these tensors; others are skipped and listed where not
    mtp_layers: bool  # layers past num_hidden_layers are multi-token prediction layers, to be ignored
    keys: Mapping[str, str] = field(default_factory=dict)  # this set's names of config's count keys

    @property
    def query_module(self) -> str:
        """The module that holds the query weight: ``self_attn.q_proj``."""
        return self.query.removesuffix(".weight")

    def pattern(self, prefix: str, suffix: str) -> re.Pattern[str]:
        """Anchored pattern of one tensor's name, so that look-alikes in a vision tower never match."""
        head, tail = prefix.split("{layer}")
        return re.compile(f"{re.escape(head)}(?P<layer>0|[1-9][0-9]{{0,5}}){re.escape(tail + suffix)}")

    def matching_prefixes(self, names: list[str]) -> tuple[str, ...]:
        """The prefixes under which there is a query module, quantised ones included."""
        module = self.query_module + "."
        patterns = {p: self.pattern(p, module) for p in self.prefixes}
        return tuple(p for p, pattern in patterns.items() if any(pattern.match(name) for name in names))


@dataclass(frozen=True)
class KeyOverride:
    """Where a number comes from: a config key, a default where it is absent."""

    key: str
    default: int | None
    condition: str | None = None  # a config key that must be true for it to hold


@dataclass(frozen=True)
class LayerType:
    """Layers whose heads have another geometry."""

    counts: Mapping[str, KeyOverride]  # count key -> source
    every: int | None  # where config.json has no `layer_types`: each n-th layer and the last are of this type


@dataclass(frozen=True)
class ConfigReading:
    """Where config.json keeps the language model's numbers, and what it leaves out."""

    sections: tuple[str, ...]
    class_defaults: Mapping[str, Mapping[str, ConfigValue]]  # text model_type -> config key -> value
    layer_types: Mapping[str, LayerType]  # by entry of config.json's `layer_types`
    shared_kv: KeyOverride | None  # counts the last layers, which use an earlier layer's keys


@dataclass(frozen=True)
class Recipe:
    """One model family: how to recognise it, where its numbers and tensors are, what to edit by default."""

    name: str
    title: str
    default_repo: str | None  # a repository that it reads, `org/name[@revision]`; None where none is known
    tested: str  # on what
    model_types: tuple[str, ...]  # "" stands for a config without one; none: the class alone decides
    architectures: tuple[str, ...]
    config: ConfigReading
    tensors: TensorNames
    others: tuple[TensorNames, ...]  # further sets, edited only when asked for by name
    default_layers: str
    default_modes: int
    sha256: str  # of the YAML file and those of its backbones
    gated: bool | None = field(default=None, metadata=LEFT_OUT)  # whether default_repo has terms to accept
    source: tuple[str, ...] | None = field(
        default=None, metadata=LEFT_OUT
    )  # the code that it was written from

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return dict(as_json(self))

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json names this family; a config without ``architectures`` goes by its model_type."""
        named = config.get("architectures")
        if isinstance(named, list) and named:
            is_class = any(a in self.architectures for a in named)
            return is_class and (not self.model_types or (config.get("model_type") or "") in self.model_types)
        return (config.get("model_type") or "") in self.model_types

    def set_named(self, attention: str) -> TensorNames:
        """The set of tensors called ``attention``.

        Raises:
            UsageError: the recipe has none of that name.
        """
        sets = {names.attention: names for names in (self.tensors, *self.others)}
        if attention not in sets:
            what = f"recipe {self.name} has no attention {attention!r}"
            raise UsageError(what, where="--attention", fix=f"choose from: {', '.join(sets)}")
        return sets[attention]


def is_prefix(text: str) -> bool:
    """Whether names of layers can begin so: with ``{layer}`` once, and no other brace."""
    return text.count("{layer}") == 1 and not set(text.replace("{layer}", "")) & set("{}")
