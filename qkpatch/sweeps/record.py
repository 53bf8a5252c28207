"""``Sweep``: the content of ``SWEEP/sweep.json``, which says what was asked for and what is done of it. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from qkpatch.common.json_text import canonical_json, load_json, measured
from qkpatch.common.typed_json import LEFT_OUT, as_json, from_json
from qkpatch.errors import CheckpointError
from qkpatch.planning.blocks import EditBlock, SourceBlock, ToolBlock
from qkpatch.spectral.rule import Sums
from qkpatch.sweeps.grid import Form

SWEEP_NAME = "sweep.json"
SCHEMA = "qkpatch-sweep/1"


@dataclass(frozen=True)
class Figures:
    """The size of an edit, of all its heads together or of those of one tensor; of exact weights, but for the last."""

    relative_change: float  # ‖ΔW_Q‖ / ‖W_Q‖
    energy_removed: float  # 1 − ‖M'‖² / ‖M‖²
    realised_share: float | None  # ‖ΔM P_K‖² / ‖ΔM‖²
    rounding_error: float | None = field(default=None, metadata=LEFT_OUT)  # ‖stored − edited W_Q‖ / ‖ΔW_Q‖
    layer: int | None = field(default=None, metadata=LEFT_OUT)
    attention: str | None = field(default=None, metadata=LEFT_OUT)

    @classmethod
    def of(cls, parts: Iterable[Sums], *place: int | str) -> Figures:
        """Ratios of sums, to nine significant digits; of nothing it is 0."""
        total = Sums(*map(sum, zip(*parts, strict=True)))
        change = math.sqrt(total.moved / (total.query or 1.0))
        share = total.reached / total.wanted if total.wanted else None
        noise = math.sqrt(total.noise / total.moved) if total.noise else None
        return cls(*map(measured, (change, total.removed / (total.product or 1.0), share, noise)), *place)


@dataclass(frozen=True)
class VariantRecord:
    """One variant, which is done where it has figures."""

    name: str
    edit: EditBlock
    figures: Figures | None = None
    layers: tuple[Figures, ...] = ()
    files: Mapping[str, str | None] = field(default_factory=dict)  # what lies in SWEEP/ of it, with SHA-256


@dataclass(frozen=True)
class Sweep:
    """All variants of a grid, on one SOURCE."""

    tool: ToolBlock
    source: SourceBlock
    recipe: str
    form: Form
    digest: str  # of SOURCE's files and of all that is asked for: what two runs for one SWEEP/ have in common
    variants: tuple[VariantRecord, ...]
    warnings: tuple[str, ...]
    already_done: bool | None = field(default=None, metadata=LEFT_OUT)  # by an earlier run; not in the file

    def dumps(self) -> str:
        """Canonical text."""
        return canonical_json({"schema": SCHEMA, **as_json(replace(self, already_done=None))})

    @classmethod
    def loads(cls, raw: bytes, where: str) -> Sweep:
        """Read a record of this schema version, or raise :class:`CheckpointError`."""
        document = load_json(raw, where, unique=True)
        try:
            if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA!r}")
            sweep: Sweep = from_json(cls, document)
            return sweep
        except ValueError as error:
            fix = "choose another -o, or remove it"
            raise CheckpointError(f"no record of a sweep: {error}", where=where, fix=fix) from error
