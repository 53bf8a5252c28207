"""Which stored tensors hold the queries and keys of each layer: recipe × config × headers, no weight read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from qkpatch.catalogue import choose_recipe, get_recipe, matching_prefixes, query_like
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.source import Checkpoint, open_checkpoint
from qkpatch.errors import AmbiguousError, CheckpointError, UsageError
from qkpatch.heads import LanguageTower, read_tower
from qkpatch.locate import Source, locate
from qkpatch.recipe import Recipe
from qkpatch.refusals import (
    EDITABLE_DTYPES,
    KNOWN_NORMS,
    missing_key,
    refuse_known,
    refuse_quantised,
    suffixes_by_module,
    undeclared_norm,
)
from qkpatch.selection import format_ranges
from qkpatch.settings import EditSettings, Request, resolve


@dataclass(frozen=True)
class LayerTarget:
    """The query and key weights of one layer; they may lie in different shards."""

    layer: int
    query: TensorRef
    key: TensorRef  # the same tensor as the query where they are fused
    query_norm: TensorRef | None = None
    key_norm: TensorRef | None = None
    biases: tuple[str, ...] = ()  # not part of the product; they stay as they are


@dataclass(frozen=True)
class Model:
    """A checkpoint that a recipe understands, and its editable layers."""

    source: Source
    checkpoint: Checkpoint
    recipe: Recipe
    tower: LanguageTower
    prefix: str
    query_layers: tuple[int, ...]  # layers that store a query module, quantised ones included

    def target(self, layer: int) -> LayerTarget:
        """Query and key of one layer, checked against the config's numbers.

        Raises:
            UnsupportedError: quantised, MLA, no key of its own.
            CheckpointError: no such tensor, or a shape that contradicts config.json.
        """
        names, tensors = self.recipe.tensors, self.checkpoint.tensors
        stem = self.prefix.format(layer=layer)
        query, key = tensors.get(stem + names.query), tensors.get(stem + names.key)
        for weight, name in ((query, names.query), (key, names.key)):
            module = (stem + name).removesuffix(".weight")
            refuse_quantised(module, weight, self._stored_under.get(module, ()))
        if query is None:
            refuse_known(name for name in tensors if name.startswith(stem))
            raise CheckpointError(
                f"layer {layer} has no {stem + names.query}",
                where=f"recipe {self.recipe.name}",
                fix="leave the layer out of --layers, or download the missing shard",
            )
        if key is None:
            refuse_known(name for name in tensors if name.startswith(stem))
            raise missing_key(layer, query.name, stem + names.key)
        self._check_shapes(query, key)
        query_norm, key_norm = self._norms(layer, stem)
        modules = dict.fromkeys(name.removesuffix(".weight") for name in (query.name, key.name))
        biases = tuple(f"{module}.bias" for module in modules if f"{module}.bias" in tensors)
        return LayerTarget(layer, query, key, query_norm, key_norm, biases)

    def _check_shapes(self, query: TensorRef, key: TensorRef) -> None:
        layout = self.tower.layout
        for weight, expected, heads in (
            (query, layout.query_shape, layout.n_heads),
            (key, layout.key_shape, layout.n_kv_heads),
        ):
            if weight.shape != expected:
                raise CheckpointError(
                    f"stored as {list(weight.shape)}, but config.json says {list(expected)}: "
                    f"{heads} heads × head_dim {layout.d_head}, hidden_size {layout.d_model}",
                    where=f"{weight.name} in {weight.shard}",
                    fix="config.json belongs to another model, or --recipe does",
                )

    def _norms(self, layer: int, stem: str) -> tuple[TensorRef | None, TensorRef | None]:
        """The layer's query and key norms; stored and declared must agree, since they change the product."""
        norms, tensors = self.recipe.tensors.norms, self.checkpoint.tensors
        if norms is None:
            undeclared = [stem + name for name in KNOWN_NORMS if stem + name in tensors]
            if undeclared:
                raise undeclared_norm(undeclared[0], self.recipe.name)
            return None, None
        found = []
        for name in (norms.query, norms.key):
            ref = tensors.get(stem + name)
            if ref is None:
                raise CheckpointError(
                    f"layer {layer} has no {stem + name}", where=f"recipe {self.recipe.name}"
                )
            if ref.shape != (self.tower.layout.d_head,) or ref.dtype not in EDITABLE_DTYPES:
                raise CheckpointError(
                    f"a norm per head holds head_dim = {self.tower.layout.d_head} numbers, "
                    f"this is {ref.dtype} {list(ref.shape)}",
                    where=f"{ref.name} in {ref.shard}",
                )
            found.append(ref)
        return found[0], found[1]

    def settings(self, request: Request) -> EditSettings:
        """``request`` with the recipe's defaults, checked against this model's size.

        In a family where only some layers have a query-key product, the others are skipped and listed.

        Raises:
            UsageError: a layer, head or mode that the model does not have, or no layer left to edit.
        """
        layout = self.tower.layout
        settings = resolve(
            request,
            self.recipe,
            n_layers=self.tower.n_layers,
            n_heads=layout.n_heads,
            d_head=layout.d_head,
            d_model=layout.d_model,
        )
        if self.recipe.tensors.every_layer:
            return settings
        present = tuple(layer for layer in settings.layers if layer in self.query_layers)
        if not present:
            raise UsageError(
                f"none of layers {format_ranges(settings.layers)} has a query-key product",
                where="--layers",
                fix=f"choose from {format_ranges(self.query_layers)}",
            )
        skipped = tuple(layer for layer in settings.layers if layer not in present)
        return replace(settings, layers=present, skipped_layers=skipped)

    @cached_property
    def _stored_under(self) -> Mapping[str, Sequence[str]]:
        """What is stored under each query and key module; one pass, since mixtures of experts have many names."""
        names = self.recipe.tensors
        modules = {
            (self.prefix.format(layer=layer) + name).removesuffix(".weight")
            for layer in self.query_layers
            for name in (names.query, names.key)
        }
        return suffixes_by_module(self.checkpoint.tensors, modules)


def open_model(source: str, recipe_name: str | None = None) -> Model:
    """Locate SOURCE, read its headers and find the recipe that fits.

    Raises:
        AmbiguousError: no recipe or several; the recipe's names match nothing, or twice over.
        QKPatchError: as :func:`locate`, :func:`open_checkpoint` and :func:`read_tower`.
    """
    named = get_recipe(recipe_name) if recipe_name is not None else None
    located = locate(source)
    checkpoint = open_checkpoint(located.path)
    recipe = named or located.recipe or choose_recipe(checkpoint.config, checkpoint.tensors)
    prefixes = matching_prefixes(recipe, checkpoint.tensors)
    if len(prefixes) != 1:
        raise _prefix_error(recipe, prefixes, checkpoint)
    tower = read_tower(recipe, checkpoint.config, insist=named is not None)
    pattern = recipe.tensors.pattern(prefixes[0], recipe.tensors.query_module + ".")
    layers = {int(found["layer"]) for name in checkpoint.tensors if (found := pattern.match(name))}
    # Layers past num_hidden_layers (multi-token prediction heads) are not part of the language model.
    return Model(
        located,
        checkpoint,
        recipe,
        tower,
        prefixes[0],
        tuple(sorted(n for n in layers if n < tower.n_layers)),
    )


def _prefix_error(recipe: Recipe, prefixes: tuple[str, ...], checkpoint: Checkpoint) -> AmbiguousError:
    if prefixes:
        return AmbiguousError(
            f"query tensors under {len(prefixes)} prefixes: {', '.join(prefixes)}",
            where=f"recipe {recipe.name}",
            fix="the checkpoint holds two language models; split it first",
        )
    refuse_known(checkpoint.tensors)
    expected = ", ".join(p + recipe.tensors.query for p in recipe.tensors.prefixes)
    like = ", ".join(query_like(checkpoint.tensors)) or "nothing like a query projection"
    return AmbiguousError(
        f"recipe {recipe.name} matches no tensor: it expects {expected}; the checkpoint has {like}",
        where=str(checkpoint.root.name),
        fix="choose another recipe with --recipe",
    )
