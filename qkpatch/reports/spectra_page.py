"""The page of ``qkpatch inspect --report``: spectra one can look at, in one HTML file."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qkpatch.errors import UsageError
from qkpatch.reports.page import page

if TYPE_CHECKING:
    from qkpatch.patching.spectra import LayerSpectra


class Side(NamedTuple):
    """A checkpoint's spectra, and what it is called."""

    name: str
    layers: Sequence[LayerSpectra]


def is_ours(start: bytes) -> bool:
    """Whether a file begins as a page of spectra does."""
    return b"<title>Query-key spectra</title>" in start


def check_alike(a: Side, b: Side) -> None:
    """Refuse to hold spectra of different layers or heads against each other.

    Raises:
        UsageError: they are not of the same layers, heads and lengths.
    """
    shapes = [
        [
            (layer.layer, layer.attention, [(head.head, len(head.singular_values)) for head in layer.heads])
            for layer in side.layers
        ]
        for side in (a, b)
    ]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"{a.name} and {b.name} have not the same layers and heads",
            where="--against",
            fix="name a patched copy of SOURCE, or choose --layers and --heads that both have",
        )


def spectra_page(model: str, modes: int, sides: Sequence[Side]) -> str:
    """The page of one checkpoint, or of two that are alike: HTML that holds all it needs.

    Args:
        model: what it is, in a line.
        modes: the r that it begins with.
        sides: one or two.
    """
    document = {
        "title": " against ".join(f"Query-key spectra of {side.name}" if not i else side.name
                                  for i, side in enumerate(sides)),
        "model": model,
        "modes": modes,
        "sides": [_side(side) for side in sides],
    }  # fmt: skip
    return page("spectra.html", document)


def _side(side: Side) -> dict[str, Any]:
    values = [value for layer in side.layers for head in layer.heads for value in head.singular_values]
    return {
        "name": side.name,
        "values": base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode(),
        "layers": [
            {
                "layer": layer.layer,
                "attention": layer.attention,
                "heads": [
                    (
                        h.head,
                        h.kv_head,
                        len(h.singular_values),
                        _short(h.frobenius),
                        _short(h.symmetric_share),
                    )
                    for h in layer.heads
                ],
            }
            for layer in side.layers
        ],
    }


def _short(value: float) -> float:
    """As exact as a picture needs."""
    return float(f"{value:.7g}")
