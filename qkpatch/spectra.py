"""Spectra of the query-key products of a checkpoint, layer by layer, for ``qkpatch inspect``. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qkpatch.crew import Crew
from qkpatch.model import Model
from qkpatch.spectral.product import QKProduct, effective_rank, energy_share
from qkpatch.spectral.rule import Channel
from qkpatch.targets import LayerTarget
from qkpatch.weights import open_layer, use_one_blas_thread


@dataclass(frozen=True)
class HeadSpectrum:
    """The spectrum of one head's ``M = W_Qᵀ W_K``."""

    head: int
    kv_head: int
    singular_values: tuple[float, ...]  # strongest first, min(head_dim, hidden_size) of them
    frobenius: float  # ‖M‖_F
    symmetric_share: float  # ‖(M + Mᵀ)/2‖² / ‖M‖²
    energy_share: float  # of the strongest `modes` modes in ‖M‖²
    effective_rank: float  # exp of the entropy of the normalised singular values
    gap: float | None  # (s_r − s_r+1) / s_r at r = modes


@dataclass(frozen=True)
class LayerSpectra:
    """All heads of one layer."""

    layer: int
    attention: str
    heads: tuple[HeadSpectrum, ...]


def layer_spectra(
    model: Model,
    targets: tuple[LayerTarget, ...],
    heads: tuple[int, ...],
    modes: int,
    device: torch.device,
    threads: int = 1,
) -> Iterator[LayerSpectra]:
    """The spectra of each target in turn; ``modes`` is the r of energy share and gap."""

    def of_target(target: LayerTarget) -> LayerSpectra:
        use_one_blas_thread()
        found = []
        with open_layer(model, target, device, heads) as weights:
            for of in weights.heads(heads):
                crew.check()
                found.append(_head_spectrum(of.head, target.layout.kv_head(of.head), of.product, modes))
        return LayerSpectra(target.layer, target.attention, tuple(found))

    with Crew(threads) as crew:
        yield from crew.map(of_target, targets)


def _head_spectrum(head: int, kv_head: int, product: QKProduct, modes: int) -> HeadSpectrum:
    spectrum = product.spectrum(Channel.full)
    S = spectrum.S
    values = tuple(S.tolist())
    gap = (
        (values[modes - 1] - values[modes]) / values[modes - 1]
        if modes < len(values) and values[modes - 1]
        else None
    )
    return HeadSpectrum(
        head=head,
        kv_head=kv_head,
        singular_values=values,
        frobenius=spectrum.frobenius,
        symmetric_share=product.symmetric_share,
        energy_share=energy_share(S, modes),
        effective_rank=effective_rank(S),
        gap=gap,
    )
