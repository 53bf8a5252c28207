"""A recipe to start from, for a checkpoint that none fits: what cannot be told is left empty, and refused as such."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qkpatch.model.stacks import sections
from qkpatch.recipes.reading import UNTESTED

NAME = "draft"
_MOST = 12  # sections, classes
_LIMIT = 200  # characters of a value out of config.json; more is no name of anything

_TEXT = """\
# A draft by `qkpatch recipes check`. What is empty cannot be told from names and shapes: fill it in from the model's
# own code, as configs/README.md says. Until then `--recipe ./{name}.yaml` is refused.
name: {name}   # always as the file is called: {name}.yaml
title: {title}
default_repo: {repo}
tested: {untested}   # so that plan and apply warn of it

match:
  model_types: [{model_type}]
  architectures: [{architectures}]

config:
  sections:   # [where config.json has the language model's numbers]{sections}
  class_defaults:
    text:   # the model_type in that section
      head_dim:   # leave this line out where config.json says it, or where it is hidden_size / heads

tensors:
  prefixes:   # [what a layer of the language model begins with, such as "model.layers.{{layer}}."]{names}
  query:   # the rest of the name: self_attn.q_proj.weight
  key:
  orientation: out_in   # rows are outputs, as nn.Linear stores them; nothing else can be edited
  rows:   # separate, gated, qkv, grouped_qkv or per_head_qkv: no shape tells
  norms:   # of queries and keys before RoPE, {{query: ..., key: ...}}; after RoPE: the family cannot be edited
  input_norm:   # {{weight: ...}} where it is an RMSNorm, for --fold-norm; leave out a line that is not needed
"""


def draft_text(config: Mapping[str, Any], names: Iterable[str], repo: str) -> str:
    """The YAML of a draft; ``names`` are tensors that look like query projections."""
    classes = _texts(named if isinstance(named := config.get("architectures"), list) else [])
    model_type = (*_texts([config.get("model_type")]), "")[0]
    return _TEXT.format(
        name=NAME,
        untested=UNTESTED,
        repo=_scalar(repo),
        title=_scalar((model_type, *classes, NAME)[0] or NAME),
        model_type=_scalar(model_type),
        architectures=", ".join(map(_scalar, classes)) or "Unknown",
        sections="".join(f"\n    # {_scalar(section)}" for section, _ in list(sections(config))[:_MOST]),
        names="".join(f"\n    # {_scalar(name)}" for name in names),
    )


def _texts(values: Iterable[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str) and 0 < len(value) <= _LIMIT][:_MOST]


def _scalar(text: str) -> str:
    """``text`` as a YAML scalar on one line; characters that no recipe can hold are left out."""
    held = (c for c in text if c != "\0" and not "\ud800" <= c <= "\udfff")
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in held) + '"'
