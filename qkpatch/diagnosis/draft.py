"""A draft recipe for a checkpoint that none fits: guesses from names, shapes and config.json, each marked as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.diagnosis.guesses import Heads, Hints, guess_heads
from qkpatch.diagnosis.norms import NormSigns, QKNorms, find_norms, input_norm_yaml, norms_yaml
from qkpatch.diagnosis.scalars import comment, is_text, scalar
from qkpatch.diagnosis.signs import Median, beside, layer_norm_key, norm_kind, reads_nothing
from qkpatch.diagnosis.survey import LANGUAGE, PERCEPTION_WORDS, QueryGroup, TextNumbers
from qkpatch.errors import UnsupportedError
from qkpatch.model.refusals import is_qk_norm, refuse_known
from qkpatch.recipes.reading import UNTESTED

NAME = "draft"
MODES = 4
_LIMIT = 200  # characters of a value out of config.json; more is no name of anything
_KEY_LIMIT = 90  # of a key: YAML's own is 1024, after escapes
_KEY_WORDS = {"q": "k", "query": "key", "queries": "keys"}
_QUERY_WORD = re.compile(r"query|queries|(?<![a-z])q|(?<=w)q(?![a-z])", re.IGNORECASE)
_FUSED_WORD = re.compile(r"qkv|query_key_value|c_attn|in_proj", re.IGNORECASE)

_PREAMBLE = """\
# A draft by `qkpatch recipes check`. What is marked as a guess comes from names and shapes alone: compare it with the
# model's code, above all the numbers of heads, rows, norms and their plus_one: a wrong guess there does not show.
"""


@dataclass(frozen=True)
class Written:
    """A draft, and what of it would look right even where it is wrong."""

    text: str
    doubts: tuple[str, ...]  # about the numbers of heads
    has_norms: bool  # whether norms of queries and keys are declared
    undeclared: tuple[str, ...]  # names of stored norms that may be of these queries and keys


@dataclass(frozen=True)
class Layers:
    """What the layers of a group of queries store, by the rest of the name; the first that has it stands for all."""

    first: Mapping[str, TensorRef]
    norms: QKNorms
    elsewhere: tuple[str, ...]  # norms of queries or keys that are no layer's

    def gains(self, tensors: Mapping[str, TensorRef], group: QueryGroup) -> list[TensorRef]:
        """The gains of queries' and keys' norms in the first, the middle and the last layer."""
        layers = dict.fromkeys((group.layers[0], group.layers[len(group.layers) // 2], group.layers[-1]))
        names = [name for name in (self.norms.query, self.norms.key) if name is not None]
        stems = [group.split[0].replace("{layer}", str(layer)) for layer in layers]
        return [tensors[stem + name] for stem in stems for name in names if stem + name in tensors]


def look(tensors: Mapping[str, TensorRef], groups: tuple[QueryGroup, ...], group: QueryGroup) -> Layers:
    """What stands beside the queries of ``group``."""
    prefix, query = group.split
    head, tail = prefix.split("{layer}")
    in_layer = re.compile(f"{re.escape(head)}(0|[1-9][0-9]{{0,5}}){re.escape(tail)}")
    others = tuple(g.template.partition("{layer}")[0] for g in groups if g is not group)
    members = set(group.layers)
    first: dict[str, TensorRef] = {}
    elsewhere = []
    for name, ref in tensors.items():
        found = in_layer.match(name)
        if found and int(found[1]) in members:
            first.setdefault(name[found.end() :], ref)
        elif not (found or name.startswith(others) or PERCEPTION_WORDS.search(name)) and is_qk_norm(name):
            elsewhere.append(name)
    return Layers(first, find_norms(first, query), tuple(elsewhere))


def draft_recipe(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    numbers: TextNumbers,
    groups: tuple[QueryGroup, ...],
    repo: str | None,
    median: Median = reads_nothing,
) -> Written:
    """The YAML of a recipe to start from; ``median`` reads gains.

    Raises:
        UnsupportedError: there is nothing to start from, or the kind of attention cannot be edited.
    """
    refuse_known(tensors)
    group = next((group for group in groups if group.role == LANGUAGE), None)
    if group is None:
        raise UnsupportedError(
            "no tensor looks like a query projection of a language model",
            where="tensor names",
            fix="write a recipe by hand, after configs/README.md, if there is one under another name",
        )
    if "{" in group.template.replace("{layer}", "", 1) or "}" in group.template.replace("{layer}", "", 1):
        raise UnsupportedError(
            "names with braces of their own", where=group.template, fix="rename the tensors"
        )
    prefix, query = group.split
    key = _key(group, tensors)
    layers = look(tensors, groups, group)
    norms, section = layers.norms, numbers.source
    types = (numbers.model_type.lower(), *(text.lower() for text in _texts(config.get("model_type"))))
    gains = layers.first[norms.query] if norms.query is not None else None
    heads = guess_heads(group, key, tensors, numbers, Hints(beside(tensors, prefix), gains, section, types))
    signs = NormSigns(
        n_heads=heads.n_heads,
        d_head=heads.d_head,
        kind=norm_kind(section),
        kind_key=layer_norm_key(section),
        gain=median(layers.gains(tensors, group)),
        is_gemma=any("gemma" in text for text in types),
    )
    undeclared = (*norms.of_others, *layers.elsewhere)
    text = "".join(
        (
            _PREAMBLE,
            _identity(config, repo),
            _config(numbers, group, heads),
            "tensors:\n",
            f"  prefixes:\n    - {scalar(prefix)}\n",
            f"  query: {scalar(query)}\n  key: {scalar(key)}\n",
            "  orientation: out_in   # guess: rows are outputs, as nn.Linear stores them\n",
            f"  rows: {heads.rows.value}   # {'' if heads.is_certain else 'guess: '}{comment(heads.remark)}\n",
            norms_yaml(norms, layers.first, signs),
            *(f"  # Stored and not declared: {scalar(name)}\n" for name in undeclared[:4]),
            _layers(group, numbers),
            input_norm_yaml(layers.first, group.weight.shape[-1:] if group.weight is not None else (), signs),
            "\ndefaults:   # ours for all families\n",
            f"  layers: middle-third\n  modes: {min(MODES, heads.d_head or MODES)}\n",
        )
    )
    return Written(text, tuple(heads.doubts), norms.query is not None, undeclared)


def _identity(config: Mapping[str, Any], repo: str | None) -> str:
    model_type = next(iter(_texts(config.get("model_type"))), "")
    named = config.get("architectures")
    architectures = [text for item in (named if isinstance(named, list) else [])[:8] for text in _texts(item)]
    known = ", ".join(scalar(a, flow=True) for a in architectures)
    return (
        f"name: {NAME}   # always as the file is called: {NAME}.yaml\n"
        f"title: {scalar(model_type or (architectures or [NAME])[0])}\n"
        f"default_repo: {scalar(repo or 'org/name')}   # guess: where such a checkpoint is on the Hub\n"
        f"tested: {UNTESTED}   # so that plan and apply warn of it\n\n"
        f"match:\n  model_types: [{scalar(model_type, flow=True)}]\n"
        f"  architectures: [{known or 'Unknown'}]"
        f"{'' if known else '   # config.json names none; it goes by model_type then'}\n\n"
    )


def _config(numbers: TextNumbers, group: QueryGroup, heads: Heads) -> str:
    found = (
        "the first with numbers of layers and heads" if numbers.is_found else "no section has such numbers"
    )
    lines = [f"config:\n  sections: [{scalar(numbers.section, flow=True)}]   # guess: {found}"]
    renamed = {count: key for count, key in numbers.keys.items() if count != key}
    if renamed:
        lines.append("  keys:   # guess: these mean what transformers' names mean")
        lines += [f"    {count}: {scalar(key)}" for count, key in renamed.items()]
    defaults = dict(heads.defaults)
    if "num_hidden_layers" not in numbers.keys:
        defaults = {"num_hidden_layers": (group.layers[-1] + 1, "from the names"), **defaults}
    own = numbers.model_type
    text_type = scalar(own if 0 < len(own) <= _KEY_LIMIT and is_text(own) else "text")
    lines.append("  class_defaults:   # what config.json leaves out")
    if not defaults:
        lines.append(f"    {text_type}: {{}}   # nothing; add its class's defaults if other checkpoints do")
    else:
        lines.append(f"    {text_type}:")
        lines += [
            f"      {key}: {value}   # guess: {comment(told)}" for key, (value, told) in defaults.items()
        ]
    return "\n".join(lines) + "\n\n"


def _key(group: QueryGroup, tensors: Mapping[str, TensorRef]) -> str:
    """The key's name after the prefix; the query's own where one tensor holds both."""
    prefix, query = group.split
    if _FUSED_WORD.search(query):
        return query
    head, dot, word = query.removesuffix(".weight").rpartition(".")
    found = _QUERY_WORD.search(word)
    if found is None:
        return query
    other = _KEY_WORDS[found[0].lower()]
    other = other.upper() if found[0].isupper() else other.title() if found[0].istitle() else other
    key = f"{head}{dot}{word[: found.start()]}{other}{word[found.end() :]}"
    if any(name.startswith(f"{prefix.format(layer=n)}{key}.") for n in group.layers[:4] for name in tensors):
        return f"{key}.weight"
    first = prefix.format(layer=group.layers[0])
    raise UnsupportedError(
        f"there is no {first}{key} beside it, so where its keys are cannot be guessed",
        where=first + query,
        fix="queries alone, or keys fused with values, cannot be edited by qkpatch",
    )


def _layers(group: QueryGroup, numbers: TextNumbers) -> str:
    """What is said of layers that do not have these tensors, and of those past the last."""
    n_layers = numbers.values.get("num_hidden_layers", group.layers[-1] + 1)
    within = [n for n in group.layers if n < n_layers]
    text = ""
    # A first part alone would rather be a wrong count, or missing shards: that must stay an error.
    if len(within) < n_layers and within != list(range(len(within))):
        text += (
            "  every_layer: false   # guess: the other layers are of another kind, and no shard is missing\n"
        )
    if 0 < group.layers[-1] + 1 - n_layers == numbers.n_further:
        text += "  mtp_layers: true   # guess: config.json counts as many that predict further tokens\n"
    if len(group.shapes) > 1:
        text += "  # Layers differ in shape: config.layer_types may be needed.\n"
    return text


def _texts(value: object) -> list[str]:
    """A value of config.json where a name is due: none or one."""
    return [value] if isinstance(value, str) and 0 < len(value) <= _LIMIT and is_text(value) else []
