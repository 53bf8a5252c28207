"""What an adapter is loaded with: the largest rank, and what the class that runs a model calls its query modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

from qkpatch.common.strict_yaml import load_yaml
from qkpatch.errors import UnsupportedError
from qkpatch.model.model import Model
from qkpatch.model.targets import LayerTarget
from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.heads import HeadLayout, RowLayout

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be
# What belongs to a stack of layers, and not to the path of the language model that it lies in.
_STACK = re.compile(r"(?:(?:en|de)coder\.)?\w+\.\{layer\}\.$")


class Runtime(str, Enum):
    """What loads an adapter."""

    peft = "peft"
    vllm = "vllm"

    def max_lora_rank(self, rank: int) -> int | None:
        """What vLLM's ``--max-lora-rank`` must be; None for PEFT, which takes any."""
        return next((most for most in VLLM_RANKS if most >= rank), None) if self is Runtime.vllm else None


class QueryModule(NamedTuple):
    """The linear module that holds a layer's queries."""

    name: str  # its full path
    layout: HeadLayout  # of its weight, in whose rows may be keys and values too


def query_modules(
    model: Model, targets: tuple[LayerTarget, ...], runtime: Runtime
) -> dict[LayerTarget, QueryModule]:
    """The module of each target, in the class that config.json names.

    Raises:
        UnsupportedError: it is not known what that class calls its modules, or it takes no adapters.
    """
    named = model.checkpoint.config.get("architectures")
    classes = tuple(map(str, named)) if isinstance(named, list) and named else model.recipe.architectures
    paths, prefixes = {_paths(runtime).get(name, "") for name in classes}, set[tuple[str, str]]()
    for recipe in (each for name in classes for each in shipped_recipes(name).values()):
        if set(classes) & set(recipe.architectures):
            sets = (recipe.tensors, *recipe.others)
            prefixes |= {(prefix, each.query) for each in sets for prefix in each.prefixes}
    path = paths.pop()
    # Of another stack of layers than those that the class is known to have there, the path says nothing.
    is_known = path and not paths and all((each.prefix, each.names.query) in prefixes for each in model.sets)
    if not is_known or path == "without":
        what = f"what {' and '.join(classes)} calls its query modules is not known here, and is not guessed"
        if path == "without":
            what = f"vLLM's table of supported models has {classes[0]} without LoRA"
        raise UnsupportedError(what, where=f"--for {runtime.value}", fix="edit the checkpoint: qkpatch apply")
    modules = {}
    for target in targets:
        chosen = next(each for each in model.sets if each.names.attention == target.attention)
        name, layout = chosen.prefix + chosen.names.query_module, target.layout
        stack = _STACK.search(chosen.prefix)
        if "{layer}" in path:
            name, layout = path, replace(layout, rows=RowLayout.separate)
        elif path != "stored" and stack is not None:
            name = path + stack[0] + chosen.names.query_module
        modules[target] = QueryModule(name.format(layer=target.layer), layout)
    return modules


@cache
def _paths(runtime: Runtime) -> Mapping[str, str]:
    """What ``modules.yaml`` says of each class."""
    table = Path(__file__).with_suffix(".yaml")
    said = load_yaml(table.read_bytes(), table.name)[runtime.value]
    return {name: path for path, names in said.items() for name in names}
