"""What stored tensors beside the weights, and config.json's other keys, tell of heads and norms. Evidence, no proof."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.source import Checkpoint
from qkpatch.diagnosis.survey import PERCEPTION_WORDS
from qkpatch.recipes.recipe import NormKind

Median = Callable[[Iterable[TensorRef]], float | None]  # of all numbers that some small tensors hold

_SINKS = re.compile(r"(?:^|[._])(?:attn_|attention_)?sinks?(?:_bias)?$", re.IGNORECASE)
_ROTARY = re.compile(r"(?:^|[._])(?:rotary|rope)[a-z_]*\.inv_freq$", re.IGNORECASE)
_CROSS = re.compile("cross|encoder_attn", re.IGNORECASE)
_PARTIAL = ("partial_rotary_factor", "rotary_pct", "rotary_percent", "rotary_dim", "rotary_percentage")
_LAYER_NORM = re.compile(r"layer_?norm_?eps", re.IGNORECASE)
_RMS_NORM = re.compile(r"(?:^|_)rms(?:_|norm|$)", re.IGNORECASE)
_MOST_BYTES = 1 << 20  # of a tensor that is read; gains have a few thousand numbers
_NEAR_ZERO, _NEAR_ONE = 0.25, (0.5, 2.0)


@dataclass(frozen=True)
class Beside:
    """Tensors beside the weights that tell of heads."""

    sinks: tuple[tuple[int, TensorRef], ...]  # a number per query head; by layer
    rotary: tuple[
        tuple[int | None, TensorRef], ...
    ]  # a frequency per two rotated dims; no layer: of them all


def beside(tensors: Mapping[str, TensorRef], prefix: str) -> Beside:
    """Sinks and rotary frequencies of the layers that ``prefix`` names."""
    head = prefix.partition("{layer}")[0]
    layer = re.compile(re.escape(head) + r"(0|[1-9][0-9]{0,5})[._/-]")
    above = head.rstrip("._/-").rpartition(".")[0]
    sinks: list[tuple[int, TensorRef]] = []
    rotary: list[tuple[int | None, TensorRef]] = []
    for name, ref in tensors.items():
        if not name.endswith(("sink", "sinks", "sink_bias", "sinks_bias", "inv_freq")) or _CROSS.search(name):
            continue
        found = layer.match(name)
        if found and _SINKS.search(name) and size(ref) == max(ref.shape, default=0):
            sinks.append((int(found[1]), ref))
        elif _ROTARY.search(name) and len(ref.shape) == 1:
            if found:
                rotary.append((int(found[1]), ref))
            elif name.rpartition(".")[0].rpartition(".")[0] == above and not PERCEPTION_WORDS.search(name):
                rotary.append((None, ref))
    return Beside(tuple(sinks), tuple(rotary))


def size(ref: TensorRef) -> int:
    """How many numbers a tensor holds."""
    return math.prod(ref.shape)


def rotates_in_part(section: Mapping[str, Any]) -> bool:
    """Whether config.json tells that only part of a head is rotated, or that it may be."""
    nested = [
        value for key in ("rope_parameters", "rope_scaling") if isinstance(value := section.get(key), dict)
    ]
    return any(key in table for table in (section, *nested) for key in _PARTIAL)


def norm_kind(section: Mapping[str, Any]) -> NormKind | None:
    """The kind of norm that config.json's keys speak of, where they speak of one only."""
    words = [key for key, value in section.items() if isinstance(key, str) and value not in (None, False)]
    words += [
        f"{text}_eps"
        for key in ("norm_type", "normalization_type")
        if isinstance(text := section.get(key), str)
    ]
    is_rms = any(_RMS_NORM.search(word) for word in words)
    is_layer = any(_LAYER_NORM.search(word) for word in words)
    if is_rms == is_layer:
        return None
    return NormKind.rms if is_rms else NormKind.layer


def layer_norm_key(section: Mapping[str, Any]) -> str:
    """The key that speaks of LayerNorm, for messages."""
    return next((key for key in section if isinstance(key, str) and _LAYER_NORM.search(key)), "norm_type")


def median_reader(checkpoint: Checkpoint) -> Median:
    """Reads small tensors of floats; the median, since gains have outliers."""

    def of(refs: Iterable[TensorRef]) -> float | None:
        found = [value for ref in refs for value in _numbers(checkpoint, ref) if math.isfinite(value)]
        return median(found) if found else None

    return of


def reads_nothing(refs: Iterable[TensorRef]) -> float | None:
    """In place of a reader, where there are headers only."""
    return None


def speaks_for_plus_one(gain: float | None) -> bool | None:
    """Whether stored numbers look like gain − 1 (around 0) or like gains (around 1); None where neither."""
    if gain is None:
        return None
    if abs(gain) <= _NEAR_ZERO:
        return True
    return False if _NEAR_ONE[0] <= gain <= _NEAR_ONE[1] else None


def _numbers(checkpoint: Checkpoint, ref: TensorRef) -> Iterator[float]:
    code = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}.get(ref.dtype)
    file = checkpoint.files.get(ref.shard)
    if code is None or file is None or not 0 < ref.nbytes <= _MOST_BYTES:
        return
    with file.open([(ref.begin, ref.end)]) as opened:
        raw = bytes(opened.read(ref.nbytes, ref.begin))
    if ref.dtype == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        code = "f"
    for (value,) in struct.iter_unpack(f"<{code}", raw):
        yield value
