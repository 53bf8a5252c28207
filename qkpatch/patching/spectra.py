"""Spectra of the query-key products of a checkpoint, layer by layer, for ``qkpatch inspect``. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from qkpatch.model.targets import LayerTarget
from qkpatch.patching.device import computing, heads_together
from qkpatch.patching.head_products import HeadWeights, LayerWeights, open_layer
from qkpatch.patching.inspection import Inspection
from qkpatch.patching.threads import Crew
from qkpatch.planning.memory import head_memory
from qkpatch.spectral.product import effective_rank, energy_share
from qkpatch.spectral.rule import Channel, EditRule


@dataclass(frozen=True)
class HeadSpectrum:
    """The spectrum of one head's ``M = W_Qᵀ W_K``, or of a channel of it."""

    head: int
    kv_head: int
    singular_values: tuple[float, ...]  # of the channel, strongest first
    frobenius: float  # ‖M‖_F
    symmetric_share: float  # ‖(M + Mᵀ)/2‖² / ‖M‖²
    energy_share: float  # of the r strongest modes in the channel's Σ s²
    effective_rank: float  # exp of the entropy of the normalised singular values
    gap: float | None  # (s_r − s_r+1) / s_r
    modes: int  # r


@dataclass(frozen=True)
class HeadChannels:
    """The spectra of all channels of one head, each with its cut."""

    layer: int
    attention: str
    head: int
    values: Mapping[str, tuple[float, ...]]  # by channel, strongest first
    modes: Mapping[str, int]  # r: what an edit of that channel would take


@dataclass(frozen=True)
class LayerSpectra:
    """All heads of one layer."""

    layer: int
    attention: str
    heads: tuple[HeadSpectrum, ...]


def layer_spectra(looked_at: Inspection, device: torch.device, threads: int) -> Iterator[LayerSpectra]:
    """The spectra of each layer in turn; ``threads`` layers are read and decomposed side by side."""
    targets, heads, settings = looked_at.targets, looked_at.settings.heads, looked_at.settings

    def opened() -> Iterator[tuple[LayerWeights, ExitStack]]:
        for target in targets:
            layer = ExitStack()
            everything.callback(layer.close)
            yield layer.enter_context(open_layer(shards, target, device, heads)), layer

    def of_layer(item: tuple[LayerWeights, ExitStack]) -> LayerSpectra:
        weights, target, found = item[0], item[0].target, list[HeadSpectrum]()
        rule = settings.rule_of(target.layer)  # says the channel, and the r of energy share and gap
        with computing(device), item[1]:
            for batch in weights.batches(heads, together):
                crew.check()
                found += _head_spectra(target, batch, rule)
        return LayerSpectra(target.layer, target.attention, tuple(found))

    shards = looked_at.model.checkpoint.opened
    together = heads_together(device, head_memory(target.layout for target in targets), threads)
    # Layers are opened here, one ahead of the crew: what is elsewhere arrives while the one before is computed.
    with ExitStack() as everything, Crew(threads) as crew:
        yield from crew.map(of_layer, opened())


def head_channels(
    looked_at: Inspection, heads: Sequence[tuple[int, int]], device: torch.device
) -> list[HeadChannels]:
    """All channels of some heads, ``(layer, head)``, of each set of tensors that the layer has."""
    found = []
    for layer, head in heads:
        rule = looked_at.settings.rule_of(layer)
        rules = {channel: replace(rule, channel=channel) for channel in Channel}
        for target in (target for target in looked_at.targets if target.layer == layer):
            opened = open_layer(looked_at.model.checkpoint.opened, target, device, (head,))
            with computing(device), opened as weights:
                (batch,) = weights.batches((head,), 1)
                spectra = {channel: batch.product.spectra(channel)[0] for channel in Channel}
            values = {channel.value: tuple(one.S.abs().tolist()) for channel, one in spectra.items()}
            modes = {channel.value: rules[channel].count(values[channel.value]) for channel in Channel}
            found.append(HeadChannels(layer, target.attention, head, values, modes))
    return found


def _head_spectra(target: LayerTarget, batch: HeadWeights, rule: EditRule) -> Iterator[HeadSpectrum]:
    both = zip(batch.product.spectra(rule.channel), batch.product.symmetric_shares(), strict=True)
    for head, (spectrum, share) in zip(batch.heads, both, strict=True):
        sizes = spectrum.S.abs()  # eigenvalues of the symmetric channel have signs
        values = tuple(sizes.tolist())
        modes = rule.count(values)
        edge = values[modes - 1 : modes + 1]
        yield HeadSpectrum(
            head=head,
            kv_head=target.layout.kv_head(head),
            singular_values=values,
            frobenius=spectrum.frobenius,
            symmetric_share=share,
            energy_share=energy_share(sizes, modes),
            effective_rank=effective_rank(sizes),
            gap=(edge[0] - edge[1]) / edge[0] if len(edge) == 2 and edge[0] else None,
            modes=modes,
        )
