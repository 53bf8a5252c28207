"""A known language model in a wrapper that no recipe knows: which stack of layers it is, and whose numbers it has."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qkpatch.checkpoint.source import Checkpoint
from qkpatch.common.text import Warned, warned
from qkpatch.errors import AmbiguousError, CheckpointError, QKPatchError, UnsupportedError
from qkpatch.model.choice import ANOTHER
from qkpatch.model.neighbours import Names, parent, says_other
from qkpatch.model.refusals import is_qk_norm, refuse_known, refuse_wrapped
from qkpatch.model.targets import check_shapes
from qkpatch.model.tower import LanguageTower, read_tower
from qkpatch.recipes.catalogue import language_models, shipped_recipes
from qkpatch.recipes.recipe import COUNT_KEYS, TOP_LEVEL, Recipe, TensorNames

_DEEPEST = 3  # keys down to a section of config.json
_PLAIN = "llama"  # no norms of queries and keys, no order of rows: its names tell all


@dataclass(frozen=True)
class Placed:
    """A recipe in its place: the layers that have its names, norms and shapes, and the numbers that agree."""

    recipe: Recipe  # with the prefix and the section that were found; itself where it finds them
    prefix: str
    section: str
    kind: str  # the model_type in that section
    tower: LanguageTower
    vocabulary: int | None
    doubt: str | None  # why these layers need not be the language model's
    rival: str | None = None  # what else may be

    @property
    def told(self) -> Warned:
        """What was taken, and why."""
        tower, section = self.tower, "" if self.section == TOP_LEVEL else f"'s {self.section}"
        return warned(
            f"as a {self.recipe.name} model were taken the layers {self.prefix} "
            f"({tower.n_layers} layers, {tower.layout.n_heads} query / {tower.layout.n_kv_heads} key heads of "
            f"{tower.layout.d_head}, hidden {tower.layout.d_model}), which agree with config.json{section}: "
            + self.reason
        )

    @property
    def reason(self) -> str:
        """Why these layers need not be the language model's, or need."""
        return self.doubt or f"a token embedding of {self.vocabulary} rows stands beside them"

    @property
    def is_likely(self) -> bool:
        """Whether they may be offered to be chosen: only what says that it is another part may be in doubt beside."""
        return not self.says_other and (self.rival is None or says_other(self.rival) is not None)

    @property
    def says_other(self) -> str | None:
        """By what word these layers, or the section of config.json that agrees with them, are another part's."""
        word = says_other(self.prefix)
        if word is None and (word := says_other(self.section)):
            return f"{word!r} in config.json's {self.section}"
        return word and f"{word!r} in {self.prefix}"


def place(recipe: Recipe, checkpoint: Checkpoint, prefix: str | None = None) -> Placed:
    """The one stack of layers that ``recipe`` describes, wherever it is; with ``prefix``, the one that is there.

    Raises:
        AmbiguousError: none that is surely the language model's, or several.
        CheckpointError: numbers that are missing or contradict the shapes; norms in some layers only.
    """
    fitting, refused = placements(recipe, checkpoint)
    sure = [p for p in fitting if p.prefix == prefix] if prefix else _sure(recipe, fitting)
    others = [] if prefix else [*refused, *(p.prefix for p in fitting if p not in sure)]
    refuse_wrapped(others if not sure else [] if prefix else [sure[0].prefix])
    if len(sure) == 1:
        return sure[0]
    refuse_known(checkpoint.tensors, checkpoint.config)
    if prefix in refused or (len(refused) == 1 and not fitting and not prefix):
        raise refused.get(prefix or "", next(iter(refused.values())))
    told = [p.prefix for p in sure]
    what = f"{len(sure)} stacks of layers are a {recipe.name} language model's"
    if not sure:
        what = f"no stack of layers is {'there' if prefix else 'surely'} a {recipe.name} language model's"
        told = [f"{p.prefix} {p.reason}" for p in fitting] + [f"{p} {e.what}" for p, e in refused.items()]
    likely = sorted(fitting, key=lambda p: not p.is_likely)
    fix = f"say which: --recipe {recipe.name} --prefix '{likely[0].prefix}'" if likely else ANOTHER
    if likely and not likely[0].is_likely:
        fix = f"{fix}, if these are the language model's all the same"
    where = f"--prefix {prefix!r}" if prefix else "tensor names"
    raise AmbiguousError(f"{what}: {'; '.join(told) or 'none has its names'}", where=where, fix=fix)


def placements(
    recipe: Recipe, checkpoint: Checkpoint, names: Names | None = None
) -> tuple[list[Placed], dict[str, QKPatchError]]:
    """Every stack of layers with the recipe's query modules: those that agree in all, and why others do not."""
    fitting, refused = [], {}
    names = names or Names(checkpoint.tensors)
    stacks = names.stacks(recipe.tensors.query_module)
    own = [prefix for prefix in stacks if prefix in recipe.tensors.prefixes]
    for prefix, layers in stacks.items():
        try:
            is_own = own == [prefix]  # the recipe finds it by itself
            _check_names(recipe, prefix, layers, checkpoint, names, is_own=is_own)
            fitting.append(_placed(recipe, prefix, layers, checkpoint, is_own=is_own))
        except QKPatchError as error:
            refused[prefix] = error
    whole = frozenset(placed.prefix.partition("{layer}")[0] for placed in fitting)
    gaps = (p for p, n in stacks.items() if p in refused and len(n) <= n[-1] and not says_other(p))
    # One shard by itself may hold any of the layers.
    cut = None if checkpoint.single_file else next(gaps, None)
    placed = []
    for p in fitting:
        told, rival = names.rival(p.prefix.partition("{layer}")[0], p.vocabulary or 0, whole)
        if not rival and cut:
            told, rival = f"{cut} lacks layers, and may be the language model", cut
        placed.append(replace(p, doubt=_doubt(p, checkpoint, names) or told or None, rival=rival or None))
    return placed, refused


def offers(checkpoint: Checkpoint) -> list[str]:
    """The flags under which a checkpoint of an unknown class can be edited, the likeliest first.

    Raises:
        UnsupportedError: it is of a known class, whose norms another program may have stored otherwise.
    """
    config = checkpoint.config
    named = f"{config.get('model_type')} {config.get('architectures')}".lower()
    found: list[tuple[int, int, str]] = []
    names = Names(checkpoint.tensors)
    families = [r for r in shipped_recipes().values() if config.get("model_type") in r.model_types]
    for recipe in (*language_models(), *(r for r in families if r not in language_models())):
        fitting, refused = placements(recipe, checkpoint, names)
        fitting = [p for p in fitting if p.recipe is recipe or p.is_likely]
        for error in refused.values():
            if isinstance(error, UnsupportedError) and recipe.matches(config):
                raise error
        sure, at = _sure(recipe, fitting), named.rfind(recipe.name)
        for placed in sure or fitting:
            is_said = recipe in families or placed.kind in recipe.config.class_defaults
            rank = 0 if is_said else 1 if at >= 0 else 2
            if (rank < 2 or recipe.name == _PLAIN) and (
                sure or (len(fitting) == 1 and (is_said or placed.vocabulary))
            ):
                flags = f"--recipe {recipe.name}" + ("" if len(sure) == 1 else f" --prefix '{placed.prefix}'")
                found.append((rank, -at, flags))
    # Where config.json says which language model it is, others with the same names are of no use.
    return [flags for rank, _, flags in sorted(found) if rank == min(found)[0]]


def sections(
    config: Mapping[str, Any], keys: Collection[str] = COUNT_KEYS
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The sections of config.json that hold such keys, the topmost first; in their names dots descend."""
    level = {TOP_LEVEL: config}
    for _ in range(_DEEPEST + 1):
        yield from ((name, section) for name, section in level.items() if any(key in section for key in keys))
        level = {
            key if name == TOP_LEVEL else f"{name}.{key}": inner
            for name, section in level.items()
            for key, inner in section.items()
            if isinstance(inner, dict) and isinstance(key, str) and "." not in key
        }


def _sure(recipe: Recipe, fitting: list[Placed]) -> list[Placed]:
    """Those that are surely the language model; where the recipe itself says that it is there, nothing is guessed."""
    return [p for p in fitting if p.doubt is None] or [p for p in fitting if p.recipe is recipe]


def _check_names(
    recipe: Recipe,
    prefix: str,
    layers: tuple[int, ...],
    checkpoint: Checkpoint,
    stored: Names,
    *,
    is_own: bool,
) -> None:
    """Each layer has the recipe's norms, in the class's own form, and no other norms of queries and keys.

    Raises:
        AmbiguousError: it is another language model's.
        CheckpointError: some layers have them, and others do not.
        UnsupportedError: the recipe's own class under names that it never has, where the stored gain is one less.
    """
    names, tensors, other = recipe.tensors, checkpoint.tensors, ""
    stems = [prefix.format(layer=n) for n in layers]
    norms = () if names.norms is None else (names.norms.query, names.norms.key)
    before = [] if is_own or names.input_norm is None else [names.input_norm.weight]
    for part in (*norms, *before):
        missing = [stem + part for stem in stems if stem + part not in tensors]
        if missing and len(missing) < len(stems):
            raise CheckpointError(
                f"{part} is stored in {len(stems) - len(missing)} of {len(stems)} layers {prefix}",
                where=missing[0],
                fix="download the missing shard; where the model is built so, no recipe can describe it",
            )
        is_optional = names.norms is not None and names.norms.optional and part in norms
        other = other or (part if missing and not is_optional else "")
    modules = tuple(f"{stems[0]}{part.removesuffix('.weight')}" for part in norms)
    bias = "" if names.input_norm is None else names.input_norm.weight.removesuffix("weight") + "bias"
    # With a bias, the norm before attention is a LayerNorm.
    under, bias = reversed(stored.under(stems[0])), stems[0] + bias
    odd = (n for n in under if n == bias or (is_qk_norm(n) and not n.startswith(modules)))
    found = next(odd, "").removeprefix(stems[0])
    if other or found:
        why = f"have no {other}" if other else f"have {found}"
        what = f"the layers {prefix} {why}, unlike {recipe.name}"
        raise AmbiguousError(what, where="tensor names", fix=ANOTHER)
    is_renamed = recipe.matches(checkpoint.config) and prefix not in recipe.tensors.prefixes
    if is_renamed and names.norms is not None and names.norms.plus_one:
        raise UnsupportedError(
            f"the layers {prefix} have other names than this class has in transformers, as MLX saves them, and MLX "
            f"stores the gain of a norm where recipe {recipe.name} expects the gain - 1",
            where=prefix + names.norms.query,
            fix="patch the original checkpoint, or declare plus_one: false in a recipe of your own",
        )


def _placed(
    recipe: Recipe, prefix: str, layers: tuple[int, ...], checkpoint: Checkpoint, *, is_own: bool
) -> Placed:
    """The recipe with the section of config.json whose numbers agree with what the layers store."""
    known, told, cure = recipe.config.class_defaults, [], ""
    agreeing, keys = [], [recipe.tensors.keys.get(key, key) for key in COUNT_KEYS]
    for name, section in sections(checkpoint.config, keys):
        kind = str(section.get("model_type") or "")
        is_found = is_own and name in recipe.config.sections
        moved = recipe if is_found else _moved(recipe, prefix, name, kind)
        try:
            tower = read_tower(moved, checkpoint.config, insist=True)
            _check_stored(moved.tensors, tower, prefix, layers, checkpoint)
        except QKPatchError as error:
            told.append(f"{(error.where or '').removeprefix('config.json: ')}: {error.what}")
            # What is wrong with the shapes says more than a number that is not there.
            cure = cure or (error.fix if error.fix and re.search("head_dim|ZeRO", error.fix) else "")
            continue
        vocabulary = section.get("vocab_size", checkpoint.config.get("vocab_size"))
        size = vocabulary if type(vocabulary) is int else None
        agreeing.append(Placed(moved, prefix, name, kind, tower, size, None))
    if not agreeing:
        raise CheckpointError(
            f"no section of config.json agrees with the {len(layers)} layers {prefix}: "
            f"{'; '.join(told[:3]) or 'none has numbers of layers and heads'}",
            where="config.json",
            fix=cure or "config.json is another model's, or lacks these numbers: restore this one's",
        )
    own = recipe.config.sections
    best, *others = sorted(
        agreeing, key=lambda p: (p.kind not in known, p.section not in own, not p.vocabulary)
    )
    # A section without tokens is no language model's where another has some.
    tokens = [p for p in others if p.vocabulary or not best.vocabulary]
    if rivals := [p for p in tokens if p.tower.layout != best.tower.layout]:
        layouts = ((p.section, p.tower.layout) for p in (best, rivals[0]))
        said = [f"{section}: {layout.n_heads} heads × {layout.d_head}" for section, layout in layouts]
        raise AmbiguousError(
            f"two sections agree with the layers {prefix} and contradict each other: {'; '.join(said)}",
            where="config.json",
            fix="remove the section that is not the language model's",
        )
    _check_kind(recipe, best)
    return best


def _moved(recipe: Recipe, prefix: str, section: str, kind: str) -> Recipe:
    """The recipe at another place; the class defaults of the model that the section names, and of no other."""
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
    """Number of layers and shapes of weights are those of config.json."""
    n_layers = tower.n_layers
    within = [n for n in layers if n < n_layers]
    is_whole = checkpoint.single_file or not names.every_layer or within == [*range(n_layers)]
    if not is_whole or not within or (len(within) < len(layers) and not names.mtp_layers):
        where = f"config.json: {tower.section}{names.keys.get('num_hidden_layers', 'num_hidden_layers')}"
        raise CheckpointError(f"{n_layers} layers, and {len(layers)} are stored", where=where)
    for layer in within:
        stem = prefix.format(layer=layer)
        query, key = (checkpoint.tensors.get(stem + name) for name in (names.query, names.key))
        # A quantised one is refused by name later.
        if query is not None and key is not None and query.dtype[0] in "BF":
            check_shapes(query, key, tower.layout_of(layer))


def _check_kind(recipe: Recipe, placed: Placed) -> None:
    """Refuse a section that names another language model, whose tensors of the same names mean something else."""
    query, kind = recipe.tensors.query, placed.kind
    named = [r for r in language_models() if kind in r.config.class_defaults and r.tensors.query == query]
    meaning = {r.name: (r.tensors.rows, r.tensors.norms, r.tensors.input_norm) for r in (*named, recipe)}
    is_known = kind in recipe.config.class_defaults
    if named and not is_known and meaning[recipe.name] not in [meaning[r.name] for r in named]:
        other = named[0].name
        raise AmbiguousError(
            f"{placed.section} names {kind!r}, which is recipe {other}'s, with other norms or rows than {recipe.name}",
            where="config.json",
            fix=f"choose it: --recipe {other}",
        )


def _doubt(placed: Placed, checkpoint: Checkpoint, names: Names) -> str | None:
    """Why layers need not be the language model's: it has its token embedding beside it, and the most tokens."""
    size, wanted = placed.vocabulary, (placed.vocabulary, placed.tower.layout.d_model)
    if size is None:
        return "it has no vocab_size, so that no token embedding can be told"
    above = parent(placed.prefix.partition("{layer}")[0])
    if all(ref.shape != wanted for ref in names.homes.get(above, ([], set()))[0]):
        seen = ", ".join(f"{ref.name} is {list(ref.shape)}" for ref in names.embeddings(above))
        return f"no token embedding of vocab_size {size} rows stands beside them ({seen or 'there is none'})"
    for name, section in sections(checkpoint.config, ("vocab_size",)):
        larger = section["vocab_size"]
        if type(larger) is int and larger > size:
            return f"they know {size} tokens, and config.json's {name} says {larger}"
    if placed.says_other:
        return f"{placed.says_other} is no language model's name"
    return None
