"""A known language model in a wrapper that no recipe knows: which stack of layers it is, and whose numbers it has."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.source import Checkpoint
from qkpatch.errors import AmbiguousError, CheckpointError, QKPatchError
from qkpatch.model.refusals import is_qk_norm, refuse_wrapped
from qkpatch.model.targets import check_shapes
from qkpatch.model.tower import LanguageTower, read_tower
from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.recipe import COUNT_KEYS, TOP_LEVEL, Recipe, TensorNames, is_backbone

_NUMBER = re.compile(r"(?:(?<=\.)|^)(?:0|[1-9][0-9]{0,5})(?=\.)")
_EMBEDDING = re.compile(r"[^.]*(?:embed|emb|wte)[^.]*(?:\.[^.0-9]+)?\.weight", re.IGNORECASE)
_DEEPEST = 3  # keys of a section of config.json


@dataclass(frozen=True)
class Placed:
    """A recipe in its place: the layers that have its names, norms and shapes, and the numbers that agree."""

    recipe: Recipe  # with the prefix and the section that were found
    prefix: str
    section: str
    tower: LanguageTower
    embedding: TensorRef | None  # the token embedding beside the layers
    doubt: str | None  # why these layers need not be the language model's
    vocabulary: int | None

    @property
    def told(self) -> str:
        """What was taken, and why."""
        layout = self.tower.layout
        where = "config.json" if self.section == TOP_LEVEL else f"config.json's {self.section}"
        beside = (
            self.doubt
            or f"{self.embedding.name if self.embedding else ''} of {self.vocabulary} rows beside them"
        )
        return (
            f"no recipe knows this class; as a {self.recipe.name} model were taken the layers {self.prefix} "
            f"({self.tower.n_layers} layers, {layout.n_heads} query / {layout.n_kv_heads} key heads of "
            f"{layout.d_head}, hidden {layout.d_model}), which agree with {where}: {beside}"
        )


def place(recipe: Recipe, checkpoint: Checkpoint, prefix: str | None = None) -> Placed:
    """The one stack of layers that ``recipe`` describes, wherever it is; with ``prefix``, the one that is there.

    Raises:
        AmbiguousError: none that is surely the language model's, or several.
        CheckpointError: numbers that are missing or contradict the shapes; norms in some layers only.
    """
    fitting, refused = placements(recipe, checkpoint)
    if prefix is not None:
        known = {p.prefix: p for p in fitting}
        if prefix in known:
            return known[prefix]
        if prefix in refused:
            raise refused[prefix]
        raise AmbiguousError(
            f"no {recipe.tensors.query_module} there; it is under {', '.join([*known, *refused]) or 'nothing'}",
            where=f"--prefix {prefix!r}",
            fix="choose one of these, or another recipe with --recipe",
        )
    sure = [p for p in fitting if p.doubt is None]
    # Where the recipe itself says that they are, nothing is guessed.
    sure = sure or [p for p in fitting if p.recipe is recipe]
    if len(sure) == 1:
        refuse_wrapped([sure[0].prefix])
        return sure[0]
    if len(sure) > 1:
        raise AmbiguousError(
            f"{len(sure)} stacks of layers are {recipe.name} models: {', '.join(p.prefix for p in sure)}",
            where="tensor names",
            fix=f"choose one: --recipe {recipe.name} --prefix '{sure[0].prefix}'",
        )
    refuse_wrapped([*refused, *(p.prefix for p in fitting)])
    if len(refused) == 1 and not fitting:
        raise next(iter(refused.values()))
    told = [f"{p.prefix}: {p.doubt}" for p in fitting] + [f"{p}: {e.what}" for p, e in refused.items()]
    fix = "choose another recipe with --recipe"
    if fitting:
        fix = (
            f"if they are the language model's, say so: --recipe {recipe.name} --prefix '{fitting[0].prefix}'"
        )
    raise AmbiguousError(
        f"no stack of layers is surely a {recipe.name} language model: {'; '.join(told) or 'none has its names'}",
        where="tensor names",
        fix=fix,
    )


def placements(recipe: Recipe, checkpoint: Checkpoint) -> tuple[list[Placed], dict[str, QKPatchError]]:
    """Every stack of layers with the recipe's query modules: those that agree in all, and why others do not."""
    fitting, refused = [], {}
    for prefix, layers in _stacks(checkpoint.tensors, recipe.tensors.query_module).items():
        try:
            _check_names(recipe, prefix, layers, checkpoint.tensors)
            fitting.append(_placed(recipe, prefix, layers, checkpoint))
        except QKPatchError as error:
            refused[prefix] = error
    return fitting, refused


def offers(checkpoint: Checkpoint) -> list[str]:
    """The flags under which a checkpoint of an unknown class can be edited, the likeliest first."""
    config = checkpoint.config
    named = f"{config.get('model_type')} {config.get('architectures')}".lower()
    found = []
    for recipe in filter(is_backbone, shipped_recipes().values()):
        fitting, _ = placements(recipe, checkpoint)
        sure = [p for p in fitting if p.doubt is None]
        for placed in sure or (fitting if len(fitting) == 1 and fitting[0].vocabulary else []):
            flags = f"--recipe {recipe.name}" + ("" if len(sure) == 1 else f" --prefix '{placed.prefix}'")
            is_named = _kind(config, placed.section) in recipe.config.class_defaults
            found.append((not is_named, recipe.name not in named, flags))
    # Where config.json says which language model it is, others with the same names are of no use.
    return [flags for is_other, _, flags in sorted(found) if is_other == min(found)[0]]


def sections(config: Mapping[str, Any], keys: Collection[str] = COUNT_KEYS) -> Iterator[str]:
    """The sections of config.json that hold counts, the topmost first; dots descend."""
    level = {TOP_LEVEL: config}
    for _ in range(_DEEPEST + 1):
        yield from (name for name, section in level.items() if any(key in section for key in keys))
        level = {
            key if name == TOP_LEVEL else f"{name}.{key}": inner
            for name, section in level.items()
            for key, inner in section.items()
            if isinstance(inner, dict) and isinstance(key, str) and "." not in key
        }


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    for part in name.split(".") if name != TOP_LEVEL else ():
        config = config[part]
    return config


def _kind(config: Mapping[str, Any], name: str) -> str:
    return str(_section(config, name).get("model_type") or "")


def _stacks(tensors: Mapping[str, TensorRef], module: str) -> dict[str, tuple[int, ...]]:
    """Layers that hold ``module``, by what their names begin with."""
    found: dict[str, set[int]] = {}
    for name in tensors:
        stem, dot, _ = name.rpartition(f".{module}.")
        numbers = list(_NUMBER.finditer(f"{stem}.")) if dot else []
        if numbers and not set(stem) & set("{}"):
            begin, end = numbers[-1].span()
            found.setdefault(f"{stem[:begin]}{{layer}}{stem[end:]}.", set()).add(int(stem[begin:end]))
    return {prefix: tuple(sorted(layers)) for prefix, layers in found.items()}


def _check_names(
    recipe: Recipe, prefix: str, layers: tuple[int, ...], tensors: Mapping[str, TensorRef]
) -> None:
    """Each layer has the recipe's keys and norms, and no other norms of queries and keys.

    Raises:
        AmbiguousError: it is another language model's.
        CheckpointError: some layers have them, and others do not.
    """
    names = recipe.tensors
    stems = [prefix.format(layer=n) for n in layers]
    norms = () if names.norms is None else (names.norms.query, names.norms.key)
    before = () if names.input_norm is None else (names.input_norm.weight,)
    for part in (*norms, *before):
        missing = [stem + part for stem in stems if stem + part not in tensors]
        if missing and len(missing) < len(stems):
            raise CheckpointError(
                f"{part} is stored in {len(stems) - len(missing)} of {len(stems)} layers",
                where=missing[0],
                fix="download the missing shard; where the model is built so, no recipe can describe it",
            )
        is_optional = names.norms is not None and names.norms.optional and part in norms
        if missing and not is_optional:
            raise _another(recipe, prefix, f"they have no {part}")
    modules = tuple(f"{stem}{part.removesuffix('.weight')}" for stem in stems for part in norms)
    for name in tensors:
        if name.startswith(stems[0]) and is_qk_norm(name) and not name.startswith(modules):
            raise _another(recipe, prefix, f"they have {name.removeprefix(stems[0])}")


def _another(recipe: Recipe, prefix: str, why: str) -> AmbiguousError:
    return AmbiguousError(
        f"the layers {prefix} are no {recipe.name} model's: {why}",
        where="tensor names",
        fix="choose another recipe with --recipe",
    )


def _placed(recipe: Recipe, prefix: str, layers: tuple[int, ...], checkpoint: Checkpoint) -> Placed:
    """The recipe with the section of config.json whose numbers agree with what the layers store."""
    config, agreeing, contradictions = checkpoint.config, [], []
    keys = [recipe.tensors.keys.get(key, key) for key in COUNT_KEYS]
    for name in sections(config, keys):
        moved = _moved(recipe, prefix, name, _kind(config, name))
        try:
            tower = read_tower(moved, config, insist=True)
            _check_stored(moved.tensors, tower, prefix, layers, checkpoint)
        except QKPatchError as error:
            contradictions.append(error)
            continue
        agreeing.append((name, moved, tower))
    if not agreeing:
        raise _no_section(prefix, layers, contradictions)
    name, moved, tower = min(
        agreeing, key=lambda each: _kind(config, each[0]) not in recipe.config.class_defaults
    )
    other = next((each for each in agreeing if each[2].layout != tower.layout), None)
    if other is not None:
        said = [
            f"{n}: {t.layout.n_heads} heads × {t.layout.d_head}" for n, _, t in ((name, moved, tower), other)
        ]
        raise AmbiguousError(
            f"two sections agree with the layers {prefix} and contradict each other: {'; '.join(said)}",
            where="config.json",
            fix="remove the section that is not the language model's",
        )
    _check_kind(recipe, _kind(config, name), name)
    vocabulary = _section(config, name).get("vocab_size")
    vocabulary = vocabulary if type(vocabulary) is int else None
    embedding, doubt = _embedding(prefix, vocabulary, tower.layout.d_model, checkpoint)
    return Placed(moved, prefix, name, tower, embedding, doubt, vocabulary)


def _moved(recipe: Recipe, prefix: str, section: str, kind: str) -> Recipe:
    """The recipe at another place; the class defaults of the model that the section names, and of no other."""
    if recipe.tensors.prefixes == (prefix,) and recipe.config.sections == (section,):
        return recipe
    known = recipe.config.class_defaults
    defaults = known if kind in known else {kind or next(iter(known)): {}}
    return replace(
        recipe,
        config=replace(recipe.config, sections=(section,), class_defaults=defaults),
        tensors=replace(recipe.tensors, prefixes=(prefix,)),
        others=tuple(replace(names, prefixes=(prefix,)) for names in recipe.others),
    )


def _check_stored(
    names: TensorNames, tower: LanguageTower, prefix: str, layers: tuple[int, ...], checkpoint: Checkpoint
) -> None:
    n_layers = tower.n_layers
    is_some = checkpoint.single_file or not names.every_layer
    fits = layers[-1] < n_layers if is_some else [n for n in layers if n < n_layers] == [*range(n_layers)]
    if not fits or (layers[-1] >= n_layers and not names.mtp_layers):
        where = f"config.json: {tower.section}{names.keys.get('num_hidden_layers', 'num_hidden_layers')}"
        raise CheckpointError(f"{n_layers} layers, and {len(layers)} of them are stored", where=where)
    for layer in layers:
        stem = prefix.format(layer=layer)
        query, key = (checkpoint.tensors.get(stem + name) for name in (names.query, names.key))
        # A quantised one is refused by name later.
        if layer < n_layers and query is not None and key is not None and query.dtype[0] in "BF":
            check_shapes(query, key, tower.layout_of(layer))


def _no_section(prefix: str, layers: tuple[int, ...], errors: list[QKPatchError]) -> CheckpointError:
    told = [f"{(e.where or '').removeprefix('config.json: ')}: {e.what}" for e in errors[:3]]
    # What is wrong with the shapes says more than a number that is not there.
    cures = [e.fix for e in errors if re.search("head_dim|ZeRO", e.fix or "")]
    return CheckpointError(
        f"no section of config.json agrees with the {len(layers)} layers {prefix}: "
        f"{'; '.join(told) or 'none has numbers of layers and heads'}",
        where="config.json",
        fix=cures[0]
        if cures
        else "config.json is another model's, or lacks these numbers: restore this one's",
    )


def _check_kind(recipe: Recipe, kind: str, section: str) -> None:
    """Refuse a section that names another backbone, whose tensors mean something else."""
    ours = recipe.tensors
    others = [r for r in shipped_recipes().values() if is_backbone(r) and kind in r.config.class_defaults]
    same = [
        r
        for r in others
        if (r.tensors.rows, r.tensors.norms, r.tensors.input_norm) == (ours.rows, ours.norms, ours.input_norm)
    ]
    if others and not same and kind not in recipe.config.class_defaults:
        raise AmbiguousError(
            f"{section} names {kind!r}, which recipe {others[0].name} describes with other norms than {recipe.name}",
            where="config.json",
            fix=f"choose it: --recipe {others[0].name}",
        )


def _embedding(
    prefix: str, vocabulary: int | None, d_model: int, checkpoint: Checkpoint
) -> tuple[TensorRef | None, str | None]:
    """The token embedding beside the layers; and why they need not be the language model's."""
    above = prefix.partition("{layer}")[0].rstrip(".").rpartition(".")
    near = [
        ref
        for name, ref in checkpoint.tensors.items()
        if name.startswith(above[0] + above[1])
        and _EMBEDDING.fullmatch(name.removeprefix(above[0] + above[1]))
    ]
    if vocabulary is None:
        return None, "the section that agrees has no vocab_size, so that no token embedding can be told"
    found = next((ref for ref in near if ref.shape == (vocabulary, d_model)), None)
    if found is None:
        seen = ", ".join(f"{ref.name} is {list(ref.shape)}" for ref in near) or "there is none"
        return None, f"no token embedding of vocab_size {vocabulary} rows stands beside them ({seen})"
    sizes = {
        name: _section(checkpoint.config, name).get("vocab_size")
        for name in sections(checkpoint.config, ("vocab_size",))
    }
    larger = next((n for n, size in sizes.items() if type(size) is int and size > vocabulary), None)
    if larger is not None:
        return found, f"they know {vocabulary} tokens, and config.json's {larger} says {sizes[larger]}"
    return found, None
