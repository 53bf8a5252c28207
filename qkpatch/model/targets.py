"""Which stored tensors hold the queries and keys of each layer: recipe × config × headers, no weight read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qkpatch.checkpoint.header import TensorRef
from qkpatch.common.dtypes import EDITABLE
from qkpatch.errors import CheckpointError, UnsupportedError
from qkpatch.model.block_fp8 import fp8_scale, is_shared, scale_range
from qkpatch.model.refusals import (
    is_qk_norm,
    refuse_known,
    refuse_quantised,
    suffixes_by_module,
)
from qkpatch.model.tower import LanguageTower
from qkpatch.recipes.heads import HeadLayout
from qkpatch.recipes.recipe import NormNames, NormSpan, TensorNames


@dataclass(frozen=True)
class LayerTarget:
    """The query and key weights of one layer; they may lie in different shards."""

    layer: int
    attention: str  # the recipe's set of tensors it belongs to
    layout: HeadLayout
    query: TensorRef
    key: TensorRef  # the same tensor as the query where they are fused
    query_norm: TensorRef | None = None
    key_norm: TensorRef | None = None
    norms: NormNames | None = None  # of what kind these two are
    input_norm: TensorRef | None = None  # the gain that is folded into the product
    input_norm_plus_one: bool = False
    query_scale: TensorRef | None = None  # of FP8
    key_scale: TensorRef | None = None
    biases: tuple[str, ...] = ()  # not part of the product; they stay as they are

    @property
    def written(self) -> tuple[TensorRef, ...]:
        """Every tensor that is edited: the query weight, and its scales where they may grow."""
        return (self.query,) if self.grown_scale is None else (self.query, self.grown_scale)

    @property
    def grown_scale(self) -> TensorRef | None:
        """The scales that are edited along, each of one head's rows."""
        return None if self.query_scale is None or is_shared(self.query_scale) else self.query_scale

    @property
    def names(self) -> list[str]:
        """Every tensor that the edit depends on."""
        return [*(ref.name for ref in vars(self).values() if isinstance(ref, TensorRef)), *self.biases]

    def read_rows(self, heads: Sequence[int]) -> dict[TensorRef, list[tuple[int, int]]]:
        """The bytes that products of ``heads`` are read from, by tensor: their rows, scales, and norms' gains."""
        layout = self.layout
        found: dict[TensorRef, set[tuple[int, int]]] = {}
        for head in heads:
            for ref, scale, at in (
                (self.query, self.query_scale, layout.query_range(self.query, head)),
                (self.key, self.key_scale, layout.key_range(self.key, layout.kv_head(head))),
            ):
                found.setdefault(ref, set()).add(at)
                if scale is not None:
                    found.setdefault(scale, set()).add(scale_range(ref, scale, *at))
        for norm in (self.query_norm, self.key_norm, self.input_norm):
            if norm is not None:
                found.setdefault(norm, set()).add((norm.begin, norm.end))
        return {ref: sorted(ranges) for ref, ranges in found.items()}

    def read_ranges(self, heads: Sequence[int]) -> dict[str, list[tuple[int, int]]]:
        """The same by shard."""
        shards: dict[str, list[tuple[int, int]]] = {}
        for ref, ranges in self.read_rows(heads).items():
            shards.setdefault(ref.shard, []).extend(ranges)
        return shards

    def read_bytes(self, heads: Sequence[int]) -> int:
        """The size of all :meth:`read_ranges` together in bytes."""
        return sum(end - begin for ranges in self.read_ranges(heads).values() for begin, end in ranges)

    def written_ranges(self, head: int) -> tuple[tuple[TensorRef, int, int], ...]:
        """The bytes that the edit of a head may change: tensor, begin, end in its shard."""
        begin, end = self.layout.query_range(self.query, head)
        ranges = [(self.query, begin, end)]
        if self.grown_scale is not None:
            ranges.append((self.grown_scale, *scale_range(self.query, self.grown_scale, begin, end)))
        return tuple(ranges)


@dataclass(frozen=True)
class AttentionSet:
    """One of the recipe's sets of tensors as a checkpoint stores it."""

    recipe: str  # its name, for messages
    names: TensorNames
    prefix: str
    tower: LanguageTower
    tensors: Mapping[str, TensorRef]  # of the whole checkpoint
    layers: tuple[int, ...]  # those that store a query module, quantised ones included
    declared_norms: tuple[str, ...]  # of all sets of the recipe, relative to a layer

    def has(self, layer: int) -> bool:
        """Whether ``layer`` is to be edited when asked for; in some families others are skipped."""
        return self.tower.has_product(layer) and (self.names.every_layer or layer in self.layers)

    def target(self, layer: int, *, fold_norm: bool = False) -> LayerTarget:
        """Query and key of one layer, checked against the config's numbers.

        Raises:
            UnsupportedError: quantised, MLA, no key of its own; nothing to fold.
            CheckpointError: no such tensor, or a shape that contradicts config.json.
        """
        names, tensors = self.names, self.tensors
        stem = self.prefix.format(layer=layer)
        query, key = tensors.get(stem + names.query), tensors.get(stem + names.key)
        layout = self.tower.layout_of(layer)
        scales = []
        for weight, name in ((query, names.query), (key, names.key)):
            module = (stem + name).removesuffix(".weight")
            stored = {suffix: tensors[f"{module}.{suffix}"] for suffix in self._stored_under.get(module, ())}
            scales.append(fp8_scale(stored, self.tower.fp8_block, layout.d_head))
            if scales[-1] is None:
                refuse_quantised(module, weight, stored)
        if query is None:
            refuse_known(name for name in tensors if name.startswith(stem))
            if suffixes := self._stored_under.get(stem + names.query_module):
                what = f"stored as {', '.join(sorted(suffixes))}, a form that qkpatch does not know"
                fix = "patch the unquantised checkpoint, or merge what stands beside the weight into it"
                raise UnsupportedError(what, where=stem + names.query_module, fix=fix)
            what, fix = f"layer {layer} has no {stem + names.query}", "download the missing shard"
            raise CheckpointError(
                what, where=f"recipe {self.recipe}", fix=f"{fix}, or leave the layer out of --layers"
            )
        if key is None:
            refuse_known(name for name in tensors if name.startswith(stem))
            what = f"layer {layer} has a query weight and no key weight {stem + names.key}"
            fix = "if it shares another layer's keys, leave it out of --layers"
            raise UnsupportedError(what, where=query.name, fix=fix)
        check_shapes(query, key, layout)
        query_norm, key_norm = self._norms(layer, stem, layout)
        weights = (ref.name for ref in (query, key, query_norm, key_norm) if ref is not None)
        modules = dict.fromkeys(name.removesuffix(".weight") for name in weights)
        return LayerTarget(
            layer=layer,
            attention=names.attention,
            layout=layout,
            query=query,
            key=key,
            query_norm=query_norm,
            key_norm=key_norm,
            norms=names.norms if query_norm is not None else None,
            input_norm=self._input_norm(stem, layout) if fold_norm else None,
            input_norm_plus_one=names.input_norm is not None and names.input_norm.plus_one,
            query_scale=scales[0],
            key_scale=scales[1],
            biases=tuple(f"{module}.bias" for module in modules if f"{module}.bias" in tensors),
        )

    def _norms(self, layer: int, stem: str, layout: HeadLayout) -> tuple[TensorRef | None, TensorRef | None]:
        """The layer's query and key norms; stored and declared must agree, since they change the product."""
        # The product would be another one.
        if undeclared := [name for name in self._undeclared_norms if name.startswith(stem)]:
            what = f"queries or keys are normalised, which recipe {self.recipe} does not declare"
            fix = "choose a recipe for this family with --recipe"
            raise UnsupportedError(what, where=undeclared[0], fix=fix)
        norms = self.names.norms
        if norms is None or (norms.optional and not self._stores_norms):
            return None, None
        query = self._gain(layer, stem + norms.query, layout.n_heads, layout.d_head, norms.over)
        key = self._gain(layer, stem + norms.key, layout.n_kv_heads, layout.d_head, norms.over)
        return query, key

    @cached_property
    def _undeclared_norms(self) -> tuple[str, ...]:
        """Tensors in layers that look like norms of queries or keys and belong to none of the recipe's sets."""
        modules = tuple(f"{name.rpartition('.')[0]}." for name in self.declared_norms)
        head, tail = self.prefix.split("{layer}")
        found = []
        for name in self.tensors:
            if name.startswith(head) and is_qk_norm(name):
                rest = name[len(head) :]
                relative = rest.partition(tail)[2] if tail else rest.lstrip("0123456789")
                if not relative.startswith(modules):
                    found.append(name)
        return tuple(found)

    @cached_property
    def _stores_norms(self) -> bool:
        """Whether the layers have norms of queries and keys: all of them, or none.

        Raises:
            CheckpointError: only some.
        """
        norms = self.names.norms
        if norms is None:
            return False
        wanted = [
            self.prefix.format(layer=n) + name for n in self.layers for name in (norms.query, norms.key)
        ]
        missing = [name for name in wanted if name not in self.tensors]
        if missing and len(missing) < len(wanted):
            what = f"{len(wanted) - len(missing)} norms of queries and keys, and {len(missing)} are missing"
            raise CheckpointError(what, where=missing[0], fix="download the missing shard")
        return not missing

    def _gain(self, layer: int, name: str, n_heads: int, d_head: int, over: NormSpan) -> TensorRef:
        ref = self.tensors.get(name)
        if ref is None:
            raise CheckpointError(f"layer {layer} has no {name}", where=f"recipe {self.recipe}")
        shapes: list[tuple[int, ...]] = [(d_head,), (n_heads, d_head), (n_heads * d_head,)]
        shapes = {NormSpan.head: shapes[:2], NormSpan.projection: shapes[2:]}.get(over, shapes)
        if ref.shape not in shapes or ref.dtype not in EDITABLE:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(
                f"a norm of queries or keys holds {expected} numbers (head_dim {d_head}), "
                f"this is {ref.dtype} {list(ref.shape)}",
                where=f"{ref.name} in {ref.shard}",
            )
        return ref

    def _input_norm(self, stem: str, layout: HeadLayout) -> TensorRef:
        norm = self.names.input_norm
        if norm is None or not self.tower.has_input_norm:
            reason = "this model has it after attention" if norm else f"recipe {self.recipe} declares none"
            what = f"no RMSNorm before attention, so there is no gain to fold: {reason}"
            raise UnsupportedError(what, where="--fold-norm", fix="leave the flag out")
        ref = self.tensors.get(stem + norm.weight)
        if ref is None or ref.shape != (layout.d_model,) or ref.dtype not in EDITABLE:
            found = "nothing" if ref is None else f"{ref.dtype} {list(ref.shape)}"
            what = (
                f"--fold-norm needs the gain before attention, [{layout.d_model}] numbers; there is {found}"
            )
            raise CheckpointError(what, where=stem + norm.weight, fix="leave the flag out")
        return ref

    @cached_property
    def _stored_under(self) -> Mapping[str, Sequence[str]]:
        """What is stored under each query and key module; one pass, since mixtures of experts have many names."""
        modules = {
            (self.prefix.format(layer=layer) + name).removesuffix(".weight")
            for layer in self.layers
            for name in (self.names.query, self.names.key)
        }
        return suffixes_by_module(self.tensors, modules)


def check_shapes(query: TensorRef, key: TensorRef, layout: HeadLayout) -> None:
    """Stored shapes must be those that config.json's numbers lead to.

    Raises:
        CheckpointError: they are not; the cure names the likely cause.
    """
    for weight, expected, heads in (
        (query, layout.query_shape, layout.n_heads),
        (key, layout.key_shape, layout.n_kv_heads),
    ):
        if weight.shape == expected:
            continue
        fix = "config.json belongs to another model, or --recipe does"
        rows, blocks = weight.shape[0] if weight.shape else 0, expected[0] // layout.d_head
        if 0 in weight.shape:
            fix = "it is empty, as ZeRO-3 saves what is divided among processes: gather the weights (zero_to_fp32.py)"
        elif (
            weight.shape[1:] == expected[1:]
            and rows % blocks == 0
            and layout.n_heads * layout.d_head == layout.d_model
            and not layout.rows.is_fused
        ):
            fix += f"; {rows} rows / {blocks} heads = {rows // blocks}: is head_dim missing in config.json?"
        raise CheckpointError(
            f"stored as {list(weight.shape)}, but config.json says {list(expected)}: "
            f"{heads} heads × head_dim {layout.d_head}, hidden_size {layout.d_model}",
            where=f"{weight.name} in {weight.shard}",
            fix=fix,
        )
