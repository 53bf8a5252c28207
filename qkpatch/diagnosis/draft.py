"""A draft recipe for a checkpoint that none fits: guesses from names, shapes and config.json, each marked as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.diagnosis.guesses import Heads, guess_heads
from qkpatch.diagnosis.survey import LANGUAGE, QueryGroup, TextNumbers
from qkpatch.errors import UnsupportedError
from qkpatch.recipe import TOP_LEVEL
from qkpatch.refusals import refuse_known

NAME = "draft"
MODES = 4
_LIMIT = 200  # characters of a value out of config.json; more is no name of anything
_KEY_LIMIT = 90  # of a key: YAML's own is 1024, after escapes
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./{}-]*", re.ASCII)
_NOT_TEXT = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
_KEY_WORDS = {"q": "k", "query": "key", "queries": "keys"}
_QUERY_WORD = re.compile(r"query|queries|(?<![a-z])q|(?<=w)q(?![a-z])", re.IGNORECASE)
_FUSED_WORD = re.compile(r"qkv|query_key_value|c_attn|in_proj", re.IGNORECASE)
_INPUT_NORM = re.compile(
    r"input_(?:layer)?norm|(?:attention|attn)_norm|(?:pre_?)(?:attention_|attn_|self_attn_)?(?:layer)?norm|"
    r"norm_?1|ln_?1|ln_attn|operator_norm",
    re.IGNORECASE,
)

_PREAMBLE = """\
# A draft by `qkpatch recipes check`. What is marked as a guess comes from names and shapes alone: compare it with the
# model's code, above all rows, norms and their plus_one: a wrong guess there does not show.
"""


def draft_recipe(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    numbers: TextNumbers,
    groups: tuple[QueryGroup, ...],
    repo: str | None,
) -> str:
    """The YAML of a recipe to start from.

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
    heads = guess_heads(group, key, tensors, numbers)
    layer = group.layers[0]
    stored = _stored(tensors, prefix.format(layer=layer))
    is_gemma = any(
        "gemma" in text.lower() for text in (numbers.model_type, *_texts(config.get("model_type")))
    )
    return "".join(
        (
            _PREAMBLE,
            _identity(config, repo),
            _config(numbers, group, heads),
            "tensors:\n",
            f"  prefixes:\n    - {_yaml(prefix)}\n",
            f"  query: {_yaml(query)}\n  key: {_yaml(key)}\n",
            "  orientation: out_in   # guess: rows are outputs, as nn.Linear stores them\n",
            f"  rows: {heads.rows.value}   # guess: {heads.remark}\n",
            _norms(stored, query, heads, is_gemma=is_gemma),
            _layers(group, numbers),
            _input_norm(stored, query, group, is_gemma=is_gemma),
            "\ndefaults:   # ours for all families\n",
            f"  layers: middle-third\n  modes: {min(MODES, heads.d_head or MODES)}\n",
        )
    )


def _identity(config: Mapping[str, Any], repo: str | None) -> str:
    model_type = next(iter(_texts(config.get("model_type"))), "")
    named = config.get("architectures")
    architectures = [text for item in (named if isinstance(named, list) else [])[:8] for text in _texts(item)]
    known = ", ".join(_yaml(a, flow=True) for a in architectures)
    return (
        f"name: {NAME}   # always as the file is called: {NAME}.yaml\n"
        f"title: {_yaml(model_type or (architectures or [NAME])[0])}\n"
        f"default_repo: {_yaml(repo or 'org/name')}   # guess: where such a checkpoint is on the Hub\n"
        "tested: documented layout   # guess: nothing has been tested yet\n\n"
        f"match:\n  model_types: [{_yaml(model_type, flow=True)}]\n"
        f"  architectures: [{known or 'Unknown'}]"
        f"{'' if known else '   # config.json names none; it goes by model_type then'}\n\n"
    )


def _config(numbers: TextNumbers, group: QueryGroup, heads: Heads) -> str:
    found = (
        "the first with numbers of layers and heads" if numbers.is_found else "no section has such numbers"
    )
    lines = [f"config:\n  sections: [{_yaml(numbers.section, flow=True)}]   # guess: {found}"]
    renamed = {count: key for count, key in numbers.keys.items() if count != key}
    if renamed:
        lines.append("  keys:   # guess: these mean what transformers' names mean")
        lines += [f"    {count}: {_yaml(key)}" for count, key in renamed.items()]
    defaults = dict(heads.defaults)
    if "num_hidden_layers" not in numbers.keys:
        defaults = {"num_hidden_layers": group.layers[-1] + 1, **defaults}
    text_type = _yaml(numbers.model_type if 0 < len(numbers.model_type) <= _KEY_LIMIT else "text")
    lines.append("  class_defaults:   # what config.json leaves out")
    if not defaults:
        lines.append(f"    {text_type}: {{}}   # nothing; add its class's defaults if other checkpoints do")
    else:
        lines.append(f"    {text_type}:")
        lines += [f"      {key}: {value}   # guess: from the shapes" for key, value in defaults.items()]
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


def _norms(stored: Mapping[str, TensorRef], query: str, heads: Heads, *, is_gemma: bool) -> str:
    """Norms of queries and keys under the layer's attention, where they are stored."""
    home = query.removesuffix(".weight").rpartition(".")[0]
    names: dict[str, str] = {}
    for name, ref in stored.items():
        parent, _, word = name.removesuffix(".weight").rpartition(".")
        tokens = set(word.lower().split("_"))
        is_norm = "norm" in word.lower() or "ln" in tokens
        if not (name.endswith(".weight") and is_norm and parent == home and len(ref.shape) in (1, 2)):
            continue
        for which, words in (("query", {"q", "query"}), ("key", {"k", "key"})):
            if tokens & words or word.lower() in {f"{w}norm" for w in words}:
                names.setdefault(which, name)
    if set(names) != {"query", "key"}:
        return ""
    lines = ["  norms:   # guess: of queries and keys before RoPE; after it, this family cannot be edited"]
    lines += [f"    {which}: {_yaml(names[which])}" for which in ("query", "key")]
    if names["query"].removesuffix("weight") + "bias" in stored:
        lines.append("    kind: layer   # guess: it has a bias")
    shape = stored[names["query"]].shape
    if heads.d_head and heads.n_heads and shape == (heads.n_heads * heads.d_head,) != (heads.d_head,):
        lines.append("    over: projection   # guess: a gain for every row")
    told = "as in other Gemma models" if is_gemma else "true where the stored weight is gain - 1"
    lines.append(f"    plus_one: {'true' if is_gemma else 'false'}   # guess: {told}")
    return "\n".join(lines) + "\n"


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


def _input_norm(stored: Mapping[str, TensorRef], query: str, group: QueryGroup, *, is_gemma: bool) -> str:
    width = group.weight.shape[-1:] if group.weight is not None else ()
    for name, ref in stored.items():
        word = name.removesuffix(".weight").rpartition(".")[2]
        if name.endswith(".weight") and _INPUT_NORM.fullmatch(word) and ref.shape == width:
            if name.removesuffix("weight") + "bias" in stored:
                return f"  # No input_norm: {_yaml(name)} has a bias, so it is a LayerNorm.\n"
            plus_one = "\n    plus_one: true   # guess: as in other Gemma models" if is_gemma else ""
            return (
                "  input_norm:   # guess: the RMSNorm before attention; leave it out where it is a LayerNorm\n"
                f"    weight: {_yaml(name)}{plus_one}\n"
            )
    return ""


def _stored(tensors: Mapping[str, TensorRef], stem: str) -> dict[str, TensorRef]:
    """The tensors of one layer by the rest of their names."""
    return {name.removeprefix(stem): ref for name, ref in tensors.items() if name.startswith(stem)}


def _texts(value: object) -> list[str]:
    """A value of config.json where a name is due: none or one."""
    return [value] if isinstance(value, str) and 0 < len(value) <= _LIMIT else []


def _yaml(text: str, *, flow: bool = False) -> str:
    """``text`` as a YAML scalar on one line, plain where that is unambiguous."""
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT and not (flow and re.search("[{}]", text)):
        return text
    if text == TOP_LEVEL:
        return text
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
