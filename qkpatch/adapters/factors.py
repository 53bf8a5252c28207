"""``ΔW_Q = B A`` of the planned heads, from the factors of their edit: nothing is rounded but A and B, once, to F32.

Per head ``ΔW_Q = C U_rᵀ``, with ``C`` (d_head × r) and orthonormal ``U_r`` (d_model × r). The rows of A are all heads'
``U_rᵀ`` one below the other; B holds each head's ``C`` in the head's own rows, in the columns of its rows of A. Where
the gain γ before attention is folded in, ``ΔW_Q = C U_rᵀ diag(1/γ)``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkpatch.common.observer import Observer
from qkpatch.errors import NumericalError
from qkpatch.model.targets import LayerTarget
from qkpatch.patching.device import choose_device, computing, heads_together
from qkpatch.patching.edit_heads import head_generator
from qkpatch.patching.head_bytes import to_bytes
from qkpatch.patching.head_products import HeadWeights, LayerWeights, open_layer
from qkpatch.patching.threads import Crew
from qkpatch.planning.plan import EditPlan
from qkpatch.recipes.heads import HeadLayout
from qkpatch.spectral.edit import QueryEdit, edit_query

STORED = torch.float32
_HEAD = struct.Struct("<QQ")  # a head, and the rank of its change


@dataclass(frozen=True)
class HeadFactors:
    """Those of one head."""

    head: int
    A: Tensor  # (r, d_model)
    B: Tensor  # (d_head, r)

    @property
    def packed(self) -> bytes:
        """All of it, for a file of several; nothing of a head without a change."""
        head = _HEAD.pack(self.head, len(self.A))
        return head + to_bytes(self.A) + to_bytes(self.B) if len(self.A) else b""


@dataclass(frozen=True)
class LayerFactors:
    """``ΔW_Q = B A`` of the planned heads of one layer."""

    target: LayerTarget
    heads: tuple[HeadFactors, ...]
    rank: int  # rows of A

    def pieces(self, rank: int, layout: HeadLayout) -> tuple[bytearray, bytearray]:
        """A (rank, d_model) and B (rows of ``layout``, rank); what no planned head has is zero."""
        rows, columns = layout.query_shape
        A, B = torch.zeros(rank, columns, dtype=STORED), torch.zeros(rows, rank, dtype=STORED)
        blocks, at = B.view(-1, layout.d_head, rank), 0
        for head in self.heads:
            end = at + len(head.A)
            A[at:end], blocks[layout.query_block(head.head), :, at:end], at = head.A, head.B, end
        return to_bytes(A), to_bytes(B)


def unpacked(target: LayerTarget, raw: bytearray) -> LayerFactors:
    """The factors of heads that were :attr:`packed <HeadFactors.packed>` one after the other."""
    at, heads, (d_head, d_model) = 0, list[HeadFactors](), (target.layout.d_head, target.layout.d_model)
    while at < len(raw):
        head, rank = _HEAD.unpack_from(raw, at)
        values = torch.frombuffer(raw, dtype=STORED, count=rank * (d_model + d_head), offset=at + _HEAD.size)
        A, B = values[: rank * d_model], values[rank * d_model :]
        heads.append(HeadFactors(head, A.view(rank, d_model), B.view(d_head, rank)))
        at += _HEAD.size + values.nbytes
    return checked(target, heads)


def edit_factors(plan: EditPlan, device: str, threads: int, observer: Observer) -> Iterator[LayerFactors]:
    """The factors of each planned layer in turn.

    Raises:
        UsageError: there is no such device.
        NumericalError: weights hold NaN or Inf; a change that is none, or that F32 does not hold.
    """
    where, settings = choose_device(device), plan.settings
    together = heads_together(where, plan.head_memory, threads)

    def of_layer(target: LayerTarget) -> LayerFactors:
        rule, done = settings.rule_of(target.layer), list[HeadFactors]()
        opened = open_layer(plan.model.checkpoint.opened, target, where, settings.heads)
        with computing(where), opened as weights:
            for batch in weights.batches(settings.heads, together):
                crew.check()
                own = settings.seed, target.attention, target.layer
                generators = [head_generator(*own, head) for head in batch.heads]
                done += head_factors(weights, batch, edit_query(batch.product, rule, generators))
                observer.edited(len(batch.heads))
        return checked(target, done)

    with Crew(threads) as crew:
        yield from crew.map(of_layer, plan.edits)


def head_factors(weights: LayerWeights, batch: HeadWeights, edit: QueryEdit) -> list[HeadFactors]:
    """The factors of some heads' edit, as they act on what is stored; none of an edit of full rank."""
    if edit.A is None or edit.directions is None:
        return []
    A, B = weights.mapped_back(edit.directions.mT).to("cpu", STORED), edit.A.to("cpu", STORED)
    ranks = zip(batch.heads, edit.counts, strict=True)
    return [HeadFactors(head, A[i, :r].clone(), B[i, :, :r].clone()) for i, (head, r) in enumerate(ranks)]


def checked(target: LayerTarget, heads: Sequence[HeadFactors]) -> LayerFactors:
    """The factors of a layer, or :class:`NumericalError` where its change is none, or F32 does not hold it."""
    is_finite = all(bool(part.isfinite().all()) for head in heads for part in (head.A, head.B))
    if not is_finite or not any(bool(head.B.any()) for head in heads):
        zero, query = "the edit leaves every value as it is: the product is zero", target.query
        what = zero if is_finite else "float32 does not hold the change"
        fix = f"leave layer {target.layer} out"
        raise NumericalError(what, where=f"{query.name} in {query.shard}", fix=fix)
    return LayerFactors(target, tuple(heads), sum(len(head.A) for head in heads))
