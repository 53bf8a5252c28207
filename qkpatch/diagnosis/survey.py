"""What an unknown checkpoint seems to hold: numbers under known names, tensors that look like queries. Guesses all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.model.tower import MAX_COUNT
from qkpatch.recipes.recipe import TOP_LEVEL

SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config.text_config", TOP_LEVEL)
FURTHER_TOKENS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")  # counts of layers
# transformers' name of a count, then what other families call it.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "layers", "decoder_layers"),
    "hidden_size": ("d_model", "n_embd", "embed_dim", "hidden_dim", "dim", "model_dim"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_query_groups"),
    "head_dim": ("kv_channels", "attention_head_dim", "d_head", "dim_head", "head_size"),
}  # fmt: skip

LANGUAGE, PERCEPTION, CROSS, OTHER = "language tower", "vision or audio", "cross-attention", "other"

_NUMBER = re.compile(r"(?<=[._/-])(?:0|[1-9][0-9]{0,5})(?=[._/-])")
_MOST_NUMBERS = 6  # of one name that are tried as the layer
_QUERY = re.compile(
    r"(?:^|_)w?_?(?:q(?:kv)?|query|queries)(?:_|proj|$)|^(?:w?_?qkv|c_attn|in_proj)$", re.IGNORECASE
)
_NO_QUERY = re.compile(r"norm|(?:^|_)ln(?:_|$)|token|embed|position", re.IGNORECASE)
PERCEPTION_WORDS = re.compile(
    r"vision|visual|image|audio|speech|whisper|siglip|clip|qformer|perceiver|resampler|projector|connector|"
    r"merger|pixel|talker|token2wav|code2wav|(?:^|[._])(?:vit|vpm|apm|sam|img|dit|eva|dino|davit)[0-9]*[._]",
    re.IGNORECASE,
)
_CROSS = re.compile(r"cross|encoder_attn", re.IGNORECASE)


@dataclass(frozen=True)
class TextNumbers:
    """The language model's counts as config.json seems to hold them."""

    section: str  # dots descend
    is_found: bool  # whether that section holds numbers of layers and heads at all
    model_type: str  # of the section
    keys: Mapping[str, str]  # count -> config key, of those that are there
    values: Mapping[str, int]  # count -> value, of those that are positive numbers
    n_further: int  # layers past the last, which predict further tokens
    source: Mapping[str, Any]  # the section itself


@dataclass(frozen=True)
class QueryGroup:
    """Modules of several layers that look like query projections."""

    template: str  # the module's name with {layer} in place of the number
    layers: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]  # that differ, of the weights
    dtypes: tuple[str, ...]
    suffixes: tuple[str, ...]  # what is stored under the modules: weight, bias, scales...
    weight: TensorRef | None  # of the first layer that has one
    weight_layer: int
    role: str = OTHER

    @property
    def split(self) -> tuple[str, str]:
        """A recipe's prefix and query: the name up to what follows the layer's number, and the rest."""
        head, _, tail = self.template.partition("{layer}")
        return f"{head}{{layer}}{tail[:1]}", f"{tail[1:]}.weight"


def text_numbers(config: Mapping[str, Any]) -> TextNumbers:
    """The first section that holds numbers of layers and heads, under whatever known names."""
    found = [_read(name, section) for name in SECTIONS if (section := _section(config, name)) is not None]
    return next((numbers for numbers in found if numbers.is_found), found[-1])


def query_groups(tensors: Mapping[str, TensorRef], numbers: TextNumbers) -> tuple[QueryGroup, ...]:
    """All modules that look like query projections, by name without the layer's number; the largest group first."""
    modules: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        parts = name.split(".")
        at = next((i for i in range(len(parts) - 2, 0, -1) if _is_query(parts[i])), None)
        if at is not None:
            modules.setdefault(".".join(parts[: at + 1]), {})[".".join(parts[at + 1 :])] = ref
    options = {module: list(_templates(module)) for module in modules}
    sizes = Counter(template for choices in options.values() for template, _ in choices)
    members: dict[str, dict[int, Mapping[str, TensorRef]]] = {}
    for module, choices in options.items():
        if choices:
            template, layer = max(choices, key=lambda choice: sizes[choice[0]])
            members.setdefault(template, {})[layer] = modules[module]
    groups = [_group(template, layers) for template, layers in members.items()]
    chosen = max((g for g in groups if g.role == OTHER), key=lambda g: _rank(g, numbers), default=None)
    return tuple(
        replace(group, role=LANGUAGE) if group is chosen else group
        for group in sorted(groups, key=lambda g: (-len(g.layers), g.template))
    )


def layered(name: str, layer: int) -> str:
    """``name`` with {layer} in place of that number, for messages that say the same of many layers."""
    return re.sub(rf"(?<=[._/-]){layer}(?=[._/-])", "{layer}", name, count=1)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    section: Any = config
    for part in name.split(".") if name != TOP_LEVEL else ():
        section = section.get(part) if isinstance(section, dict) else None
    return section if isinstance(section, Mapping) else None


def _read(name: str, section: Mapping[str, Any]) -> TextNumbers:
    keys = {}
    for count, spellings in SPELLINGS.items():
        # null is "derive it" under transformers' name, nothing under another
        there = [
            key for key in (count, *spellings) if key in section and (key == count or _is_count(section[key]))
        ]
        if there:
            keys[count] = there[0]
    values = {count: section[key] for count, key in keys.items() if _is_count(section[key])}
    is_multi_query = (
        section.get("multi_query") is True and section.get("new_decoder_architecture") is not True
    )
    if is_multi_query and keys.get("num_key_value_heads") != "num_key_value_heads":
        # Falcon 7B: one key head, whatever another key says, which transformers fills in and does not use.
        keys.pop("num_key_value_heads", None)
        values["num_key_value_heads"] = 1
    model_type = section.get("model_type")
    return TextNumbers(
        section=name,
        is_found="num_hidden_layers" in keys and "num_attention_heads" in keys,
        model_type=model_type if isinstance(model_type, str) else "",
        keys=keys,
        values=values,
        n_further=next((section[key] for key in FURTHER_TOKENS if _is_count(section.get(key))), 0),
        source=section,
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_COUNT


def _is_query(part: str) -> bool:
    return bool(_QUERY.search(part)) and not _NO_QUERY.search(part)


def _templates(module: str) -> Iterable[tuple[str, int]]:
    """Each way to take one number of the name as the layer's, the last first."""
    for found in list(_NUMBER.finditer(module))[: -_MOST_NUMBERS - 1 : -1]:
        yield f"{module[: found.start()]}{{layer}}{module[found.end() :]}", int(found[0])


def _group(template: str, layers: Mapping[int, Mapping[str, TensorRef]]) -> QueryGroup:
    weights = {n: layers[n]["weight"] for n in sorted(layers) if "weight" in layers[n]}
    first = next(iter(weights), None)
    role = PERCEPTION if PERCEPTION_WORDS.search(template) else CROSS if _CROSS.search(template) else OTHER
    return QueryGroup(
        template=template,
        layers=tuple(sorted(layers)),
        shapes=tuple(dict.fromkeys(ref.shape for ref in weights.values())),
        dtypes=tuple(dict.fromkeys(ref.dtype for ref in weights.values())),
        suffixes=tuple(sorted({suffix for stored in layers.values() for suffix in stored})),
        weight=None if first is None else weights[first],
        weight_layer=min(layers) if first is None else first,
        role=role,
    )


def _rank(group: QueryGroup, numbers: TextNumbers) -> tuple[bool, bool, int]:
    """How well a group agrees with config.json, and how large it is."""
    width = group.weight.shape[-1:] if group.weight is not None else ()
    return (
        len(group.layers) == numbers.values.get("num_hidden_layers"),
        width == (numbers.values.get("hidden_size"),),
        len(group.layers),
    )
