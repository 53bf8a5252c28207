"""``Model``: a checkpoint that a recipe understands, its chosen sets of tensors, and what may be asked of it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from qkpatch.checkpoint.names import USUAL
from qkpatch.checkpoint.source import Checkpoint, open_checkpoint
from qkpatch.common.text import Warned
from qkpatch.errors import AmbiguousError, CheckpointError, UsageError
from qkpatch.model.choice import ANOTHER, choose_recipe, query_like
from qkpatch.model.locate import Access, Source, locate
from qkpatch.model.refusals import refuse_known, refuse_wrapped
from qkpatch.model.stacks import offers, place
from qkpatch.model.targets import AttentionSet, LayerTarget
from qkpatch.model.tower import LanguageTower, read_tower
from qkpatch.recipes.catalogue import get_recipe, is_recipe_file, language_models, shipped_recipes
from qkpatch.recipes.recipe import Recipe, TensorNames


@dataclass(frozen=True)
class Model:
    """A checkpoint, the recipe that fits it, and the sets of tensors that are chosen."""

    source: Source
    checkpoint: Checkpoint
    recipe: Recipe
    sets: tuple[AttentionSet, ...]  # at least one; all with the same numbers of layers and query heads
    recipe_file: str | None = None  # where the recipe is one of the user's own
    notes: tuple[Warned, ...] = ()  # what was taken for what, where the class is unknown

    @property
    def tower(self) -> LanguageTower:
        """Numbers of layers and heads, and sizes, of the language model."""
        return self.sets[0].tower

    @property
    def editable_layers(self) -> tuple[int, ...]:
        """Layers with a query-key product of the chosen kinds."""
        return tuple(
            n for n in range(self.tower.n_layers) if any(n in s.layers and s.has(n) for s in self.sets)
        )

    def targets(self, layers: Iterable[int], *, fold_norm: bool) -> tuple[LayerTarget, ...]:
        """The tensors of some layers, each checked.

        Raises:
            QKPatchError: as :meth:`AttentionSet.target`.
        """
        return tuple(
            chosen.target(layer, fold_norm=fold_norm)
            for layer in layers
            for chosen in self.sets
            if chosen.has(layer)
        )

    def check_skipped(self, layers: Iterable[int]) -> None:
        """A layer that is skipped must be there in another form; one of which nothing is stored is a lost shard.

        Raises:
            CheckpointError: nothing is stored of one.
        """
        for layer in layers:
            stems, stored = tuple(s.prefix.format(layer=layer) for s in self.sets), self.checkpoint.tensors
            if not self.checkpoint.single_file and not any(name.startswith(stems) for name in stored):
                fix = "download the missing shard, or leave the layer out of --layers"
                raise CheckpointError(f"nothing is stored of layer {layer}", where=stems[0], fix=fix)


def open_model(
    source: str,
    recipe_name: str | None = None,
    attention: Sequence[str] | None = None,
    access: Access = Access.download,
    exclude: Collection[str] = USUAL,
    prefix: str | None = None,
) -> Model:
    """Locate SOURCE, read its headers, find the recipe that fits and the sets of tensors named by ``attention``.

    Args:
        source: SOURCE, as the user wrote it.
        recipe_name: a shipped recipe, or a file of the user's; None for the one that fits.
        attention: names of sets of the recipe; None for its first.
        access: how a repository is read.
        exclude: what of SOURCE is not looked at, as of :func:`open_checkpoint`.
        prefix: what the names of the language model's layers begin with; None for where the recipe fits.

    Raises:
        AmbiguousError: no recipe or several; the recipe's names match nothing, or twice over.
        CheckpointError: config.json and the stored layers contradict each other.
        UsageError: no such recipe or attention, or two that cannot be edited together.
        QKPatchError: as :func:`locate`, :func:`open_checkpoint` and :func:`read_tower`.
    """
    if recipe_name is not None:
        get_recipe(recipe_name)  # a wrong name does not wait for anything
    located = locate(source, access)
    return understood(located, open_checkpoint(located.place, exclude), recipe_name, attention, prefix)


def understood(
    located: Source,
    checkpoint: Checkpoint,
    recipe_name: str | None,
    attention: Sequence[str] | None,
    prefix: str | None = None,
) -> Model:
    """As :func:`open_model`, of a checkpoint whose headers are read."""
    named = get_recipe(recipe_name) if recipe_name is not None else None
    if prefix is not None and named is None:
        fix = "say which recipe the layers there fit"
        raise UsageError("it goes with --recipe", where="--prefix", fix=fix)
    recipe = named or located.recipe or _chosen(located, checkpoint)
    notes: tuple[Warned, ...] = ()
    is_foreign = not recipe.matches(checkpoint.config) and recipe in language_models()
    try:
        if named is not None and (prefix is not None or is_foreign):
            placed = place(named, checkpoint, prefix)
            recipe, notes = placed.recipe, (placed.told,)
        wanted = [recipe.tensors.attention] if attention is None else attention
        sets = tuple(
            open_set(recipe, recipe.set_named(name), checkpoint, insist=named is not None)
            for name in dict.fromkeys(wanted)
        )
    except AmbiguousError as error:
        claimed = (r for r in shipped_recipes().values() if r.matches(checkpoint.config))
        fits = [r.name for r in claimed if r.tensors.matching_prefixes([*checkpoint.tensors])]
        if error.fix != ANOTHER or not fits or recipe.name in fits:
            raise
        fix = f"recipe {fits[0]} fits: name that one, or none"
        raise AmbiguousError(error.what, where=error.where, fix=fix) from error
    _check_together(sets)
    recipe_file = recipe_name if recipe_name is not None and is_recipe_file(recipe_name) else None
    return Model(located, checkpoint, recipe, sets, recipe_file, notes)


def _chosen(located: Source, checkpoint: Checkpoint) -> Recipe:
    command = f"qkpatch plan {shlex.quote(located.text or located.name)} "
    return choose_recipe(
        checkpoint.config, checkpoint.tensors, lambda: [command + flags for flags in offers(checkpoint)]
    )


def open_set(recipe: Recipe, names: TensorNames, checkpoint: Checkpoint, *, insist: bool) -> AttentionSet:
    """One set of tensors as the checkpoint stores it; ``insist`` as in :func:`read_tower`.

    Raises:
        AmbiguousError: the names match nothing, or twice over.
        CheckpointError: config.json and the stored layers contradict each other.
        QKPatchError: as :func:`read_tower`.
    """
    stored = list(checkpoint.tensors)
    prefixes = names.matching_prefixes(stored)
    if len(prefixes) != 1:
        raise _prefix_error(recipe, names, prefixes, checkpoint)
    tower = read_tower(recipe, checkpoint.config, names, insist=insist)
    pattern = names.pattern(prefixes[0], names.query_module + ".")
    layers = sorted({int(found["layer"]) for name in stored if (found := pattern.match(name))})
    _check_count(recipe, names, tower, layers, checkpoint)
    within = tuple(n for n in layers if n < tower.n_layers)
    norms = (s.norms for s in (recipe.tensors, *recipe.others))
    declared = tuple(name for norm in norms if norm is not None for name in (norm.query, norm.key))
    # Where only some layers have these tensors, the others may have attention of any kind.
    own = prefixes[0].partition("{layer}")[0]
    stems = (own,) if names.every_layer else tuple(prefixes[0].format(layer=n) for n in within)
    refuse_known((name for name in stored if name.startswith(stems)), checkpoint.config)
    return AttentionSet(recipe.name, names, prefixes[0], tower, checkpoint.tensors, within, declared)


def _check_count(
    recipe: Recipe, names: TensorNames, tower: LanguageTower, layers: list[int], checkpoint: Checkpoint
) -> None:
    """The layers that are stored must be those that config.json, or the class default, counts."""
    where = f"config.json: {tower.section}{names.keys.get('num_hidden_layers', 'num_hidden_layers')}"
    last, why = max(layers), ""
    if last >= tower.n_layers and not names.mtp_layers:
        why = f"recipe {recipe.name} does not fit"
    # One shard by itself may hold any of the layers.
    elif not checkpoint.single_file and names.every_layer and last + 1 < tower.n_layers:
        why = "the last shards are missing" if layers == [*range(last + 1)] else ""
    if why:
        what = f"{tower.n_layers} layers, but queries are stored for {last + 1} (0-{last})"
        raise CheckpointError(what, where=where, fix=f"config.json belongs to another model, or {why}")


def _check_together(sets: tuple[AttentionSet, ...]) -> None:
    """Sets that are edited in one run must agree on what a layer and a head is, and not share a query tensor."""
    sizes = {(s.tower.n_layers, s.tower.layout.n_heads) for s in sets}
    queries = [s.prefix + s.names.query for s in sets]
    keys = {s.prefix + s.names.key for s in sets if s.names.key != s.names.query}
    is_shared = len({*queries}) < len(queries) or not keys.isdisjoint(queries)
    if len(sizes) > 1 or is_shared:
        reason = "they differ in layers or heads" if len(sizes) > 1 else "they share a query tensor"
        what = f"{' and '.join(s.names.attention for s in sets)} cannot be edited together: {reason}"
        raise UsageError(what, where="--attention", fix="edit one, then the other on top of it")


def _prefix_error(
    recipe: Recipe, names: TensorNames, prefixes: tuple[str, ...], checkpoint: Checkpoint
) -> AmbiguousError:
    if prefixes:
        return AmbiguousError(
            f"query tensors under {len(prefixes)} prefixes: {', '.join(prefixes)}",
            where=f"recipe {recipe.name}",
            fix=f"choose one: --recipe {recipe.name} --prefix '{prefixes[0]}'",
        )
    refuse_known(checkpoint.tensors, checkpoint.config)
    refuse_wrapped(checkpoint.tensors)
    expected = ", ".join(p + names.query for p in names.prefixes)
    like = ", ".join(query_like(checkpoint.tensors)) or "nothing like a query projection"
    what = f"recipe {recipe.name} matches no tensor: it expects {expected}; the checkpoint has {like}"
    return AmbiguousError(what, where=checkpoint.where.rpartition("/")[2], fix=ANOTHER)
