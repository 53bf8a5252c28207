"""Edits and controls in memory, by the package's own plan and maths; proven equal to ``qkpatch apply`` in the tests.

Two controls are not in the tool:

    equal-norm  random modes outside the dominant ones, as many (the last one in part) as make ‖ΔW_Q‖ of each head
                equal to that of the dominant edit, each by the same α
    noise       a Gaussian ΔW_Q of that size
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qkpatch.common.json_text import exact
from qkpatch.common.number_ranges import format_ranges
from qkpatch.patching.edit_heads import head_generator
from qkpatch.patching.head_products import open_layer
from qkpatch.planning.plan import EditPlan, make_plan
from qkpatch.planning.request import Request
from qkpatch.spectral.edit import edit_query
from qkpatch.spectral.product import QKProduct
from qkpatch.spectral.rounding import round_once
from qkpatch.spectral.rule import Channel, EditRule, Select

How = Literal["dominant", "random", "bottom", "subspace", "shrink", "equal-norm", "noise"]
DRAWN: tuple[How, ...] = ("random", "subspace", "equal-norm", "noise")


@dataclass(frozen=True)
class Edit:
    """One setting; ``sized_like`` rescales each head's ΔW_Q to that of another channel's dominant edit."""

    layers: tuple[int, ...]
    modes: int
    alpha: float
    how: How = "dominant"
    channel: Channel = Channel.full
    draw: int = 0
    sized_like: Channel | None = None

    @property
    def key(self) -> str:
        """A name that tells this setting from every other."""
        parts = [
            f"layers {format_ranges(self.layers)}",
            f"r {self.modes}",
            f"alpha {exact(self.alpha)}",
            self.kind,
        ]
        return ", ".join([*parts, f"draw {self.draw}"] if self.how in DRAWN else parts)

    @property
    def kind(self) -> str:
        """Selection and channel, without layers, modes, α and draw."""
        name = self.channel.value if self.how == "dominant" and self.channel is not Channel.full else self.how
        return name if self.sized_like is None else f"{name} sized like {self.sized_like.value}"

    @property
    def rule(self) -> EditRule:
        """What the package is to do; for the controls that it does not have, the dominant edit they refer to."""
        select = Select.dominant if self.how in ("equal-norm", "noise") else Select(self.how)
        return EditRule(self.channel, select, self.modes, self.alpha)


@dataclass(frozen=True)
class Edited:
    """Query weights by layer, rounded as stored, and how far they are from what they were."""

    weights: Mapping[int, Tensor]  # (n_heads · d_head, d_model)
    change: float  # ‖ΔW_Q‖ / ‖W_Q‖ over all layers of the model, edited or not


class Editor:
    """All heads of one checkpoint, read once."""

    def __init__(self, path: Path) -> None:
        everything = make_plan(str(path), Request.of(layers="0-0", modes=1, alpha=0.5))
        n_layers = everything.model.tower.n_layers
        self._plan: EditPlan = make_plan(
            str(path), Request.of(layers=f"0-{n_layers - 1}", modes=1, alpha=0.5)
        )
        self.n_layers = n_layers
        self._heads: dict[int, list[QKProduct]] = {}
        (self._attention,) = {target.attention for target in self._plan.edits}
        for target in self._plan.edits:
            heads = self._plan.settings.heads
            opened = self._plan.model.checkpoint.opened
            with open_layer(opened, target, torch.device("cpu"), heads) as weights:
                self._heads[target.layer] = [batch.product for batch in weights.batches(heads, 1)]
        products = [product for of_layer in self._heads.values() for product in of_layer]
        self._size = math.sqrt(sum(float(product.query.W.square().sum()) for product in products))

    def edit(self, edit: Edit, dtype: torch.dtype = torch.bfloat16) -> Edited:
        """Every head of the edit's layers, edited in float64 and rounded once to ``dtype``."""
        weights, squares = {}, 0.0
        for layer in edit.layers:
            heads = []
            for head, product in enumerate(self._heads[layer]):
                generator = head_generator(edit.draw, self._attention, layer, head)
                stored = round_once(_edited(product, edit, generator), dtype)
                squares += float((stored.double() - product.query.W[0]).square().sum())
                heads.append(stored)
            weights[layer] = torch.cat(heads)
        return Edited(weights, math.sqrt(squares) / self._size)


@contextmanager
def applied(layers: Sequence[Any], edited: Edited) -> Iterator[None]:
    """Decoder ``layers`` of a transformers model with the edited weights; as they were afterwards."""
    before = {}
    try:
        for layer, weight in edited.weights.items():
            parameter = layers[layer].self_attn.q_proj.weight.data
            before[layer] = parameter.clone()
            parameter.copy_(weight)
        yield
    finally:
        for layer, weight in before.items():
            layers[layer].self_attn.q_proj.weight.data.copy_(weight)


def _edited(product: QKProduct, edit: Edit, generator: torch.Generator) -> Tensor:
    """The edited weight (d_head, d_model) of the one head that ``product`` holds."""
    W_Q = product.query.W[0]
    if edit.how == "equal-norm":
        return _equal_norm(product, edit, generator)
    W_Q_edited = edit_query(product, edit.rule, [generator]).W_Q[0]
    if edit.how == "noise":
        direction = torch.randn(W_Q.shape, generator=generator, dtype=W_Q.dtype)
        return W_Q + _resized(direction, _norm(W_Q_edited - W_Q))
    if edit.sized_like is not None:
        like = replace(edit, channel=edit.sized_like, sized_like=None)
        return W_Q + _resized(W_Q_edited - W_Q, _norm(_edited(product, like, generator) - W_Q))
    return W_Q_edited


def _equal_norm(product: QKProduct, edit: Edit, generator: torch.Generator) -> Tensor:
    """``W_Q (I − (1 − α) Σ f_j u_j u_jᵀ)`` over modes outside the dominant ones, ``f_j`` = 1 but for the last."""
    W_Q, ((spectrum,), modes) = product.query.W[0], product.decompose(Channel.full)
    dominant = modes.modes([range(min(edit.modes, spectrum.rank))]).U[0]
    rest = [
        edit.modes + int(i) for i in torch.randperm(max(0, spectrum.rank - edit.modes), generator=generator)
    ]
    if not rest:
        return W_Q
    others = modes.modes([rest]).U[0]
    wanted = float((W_Q @ dominant).square().sum())
    energy = (W_Q @ others).square().sum(0)
    before = energy.cumsum(0) - energy
    share = ((wanted - before) / energy).clamp(0, 1).sqrt()  # of a mode, so that energies add up to `wanted`
    return W_Q - (1 - edit.alpha) * ((W_Q @ others) * share) @ others.mT


def _norm(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x))


def _resized(delta: Tensor, size: float) -> Tensor:
    norm = _norm(delta)
    return delta * (size / norm) if norm else delta


@functools.cache
def thirds(n_layers: int) -> dict[str, tuple[int, ...]]:
    """Layer ranges by name: the first, middle and last third, and all."""
    first, second = n_layers // 3, 2 * n_layers // 3
    return {
        "early": tuple(range(first)),
        "middle": tuple(range(first, second)),
        "late": tuple(range(second, n_layers)),
        "all": tuple(range(n_layers)),
    }
