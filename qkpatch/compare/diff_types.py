"""What :mod:`qkpatch.compare.diff` finds: the difference between two checkpoints, and how programs read it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.common.typed_json import as_json

if TYPE_CHECKING:
    from qkpatch.compare.values import Change, Values

SCHEMA = "qkpatch-diff/1"


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that both have, in two versions."""

    a: TensorRef
    b: TensorRef
    change: Change | None  # None where there is nothing to compare: another shape, or a dtype without values

    @property
    def name(self) -> str:
        """The name of the tensor."""
        return self.a.name

    @property
    def elements(self) -> int:
        """How many numbers the tensor has in A."""
        return math.prod(self.a.shape)


@dataclass(frozen=True)
class FileDifference:
    """One file beside the weights, in two versions."""

    name: str
    size_a: int
    size_b: int
    first: int  # the first byte that differs, or that only one side has


@dataclass(frozen=True)
class MetadataDifference:
    """One key of the shards' ``__metadata__``: all its values on each side, None where a shard lacks it."""

    key: str
    a: tuple[str | None, ...]
    b: tuple[str | None, ...]


@dataclass(frozen=True)
class Files:
    """How the files that are no weights differ."""

    equal: int
    changed: tuple[FileDifference, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]


@dataclass(frozen=True)
class Uncompared:
    """A file or directory that says how weights are stored or where they come from, not what they are."""

    name: str
    in_a: bool
    in_b: bool
    why: str


@dataclass(frozen=True)
class Layout:
    """How the tensors are divided into shards. It makes no difference, but is told."""

    equal: bool  # the same shards, with the same tensors at the same bytes
    shards_a: int
    shards_b: int
    # Shards whose headers say the same in other words: spaces, order, undefined fields.
    rewritten: tuple[str, ...]


@dataclass(frozen=True)
class Renaming:
    """Tensors whose names begin otherwise in B, and are compared under A's."""

    a: str
    b: str
    tensors: int


@dataclass(frozen=True)
class Difference:
    """All that differs between A and B; tensors and files in natural order of their names."""

    equal_tensors: int
    changed: tuple[TensorDifference, ...]
    retyped: tuple[TensorDifference, ...]  # of another dtype or shape
    only_in_a: tuple[TensorRef, ...]
    only_in_b: tuple[TensorRef, ...]
    metadata: tuple[MetadataDifference, ...]
    files: Files | None  # None where a side is a single file
    layout: Layout
    uncompared: tuple[Uncompared, ...]
    compared_bytes: int
    renamed: tuple[Renaming, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether a loader finds the same in both: tensors, by their names, metadata and, of directories, files."""
        tensors = self.changed or self.retyped or self.only_in_a or self.only_in_b
        files = self.files and (self.files.changed or self.files.only_in_a or self.files.only_in_b)
        return not (tensors or self.renamed or self.metadata or files)


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that puts layer 2 before layer 10, however long the numbers in a name are."""
    parts = re.split(r"([0-9]+)", name)
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return (*((len(part) if place % 2 else 0, part) for place, part in enumerate(parts)), (0, name))


def to_json(result: Difference) -> dict[str, Any]:
    """The whole difference for programs, as ``diff.schema.json`` has it."""
    return {
        "schema": SCHEMA,
        "equal": result.equal,
        "compared_bytes": result.compared_bytes,
        "tensors": {
            "equal": result.equal_tensors,
            "changed": [_tensor(d) for d in result.changed],
            "retyped": [_tensor(d) for d in result.retyped],
            "only_in_a": [{"name": ref.name, **_stored(ref)} for ref in result.only_in_a],
            "only_in_b": [{"name": ref.name, **_stored(ref)} for ref in result.only_in_b],
            "renamed": as_json(result.renamed),
        },
        **{key: as_json(getattr(result, key)) for key in ("metadata", "files", "layout", "uncompared")},
    }


def _stored(ref: TensorRef) -> dict[str, Any]:
    return {"dtype": ref.dtype, "shape": list(ref.shape), "shard": ref.shard, "bytes": ref.nbytes}


def _tensor(d: TensorDifference) -> dict[str, Any]:
    change = d.change
    return {
        "name": d.name,
        "a": _stored(d.a),
        "b": _stored(d.b),
        "compared": change is not None,
        "elements": d.elements,
        "differing_elements": None if change is None else change.elements,
        "differing_bytes": None if change is None else change.n_bytes,
        "values": None if change is None or change.values is None else _values(change.values),
    }


def _values(values: Values) -> dict[str, Any]:
    said = {**vars(values), "relative": values.relative, "ulps": as_json(values.buckets)}
    if values.ulps is None:
        said["max_ulps"] = None
    # JSON has no infinity.
    return {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in said.items()}
