"""The blocks of a manifest as values; fields are the keys, and the JSON Schema says what each means."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Annotated, Any

from qkpatch.common.json_text import Json, canonical_json, exact
from qkpatch.common.number_ranges import format_ranges
from qkpatch.common.typed_json import LEFT_OUT, Only, as_json
from qkpatch.errors import UsageError, one_line
from qkpatch.output.options import Digest
from qkpatch.planning.request import ITEM_KEYS
from qkpatch.recipes.heads import RowLayout
from qkpatch.recipes.recipe import ConfigValue
from qkpatch.spectral.rule import Channel, EditRule, Select


def _is_time(text: str) -> bool:
    with suppress(ValueError):
        return text.endswith("+00:00") and datetime.fromisoformat(text).isoformat() == text
    return False


Count = Annotated[int, Only("count", lambda n: n >= 0)]
Line = Annotated[str, Only("text of one line", lambda text: one_line(text) == text)]
Time = Annotated[str, Only("time in UTC, to the second", _is_time)]
# Finite numbers, and no lists in lists without end: it raises ValueError itself.
Plain = Annotated[Json, Only("JSON that is written", canonical_json)]


@dataclass(frozen=True)
class Block:
    """What all blocks have: keys of other versions are kept."""

    further: Mapping[str, Plain] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class ToolBlock(Block):
    """What made the edit."""

    name: Line
    version: Line
    torch: Line
    python: Line | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class ComputeBlock(Block):
    """Where heads were computed, and in what."""

    device: Line
    dtype: Line


# None, where the items of an edit say it, each for its layers.
_IN_ITEMS: Any = None


@dataclass(frozen=True, kw_only=True)
class LayersBlock(Block):
    """What is done to every head of some layers."""

    layers: tuple[int, ...]
    modes: int = field(default=_IN_ITEMS, metadata=LEFT_OUT)
    modes_edited: int = field(default=_IN_ITEMS, metadata=LEFT_OUT)
    alpha: float = field(default=_IN_ITEMS, metadata=LEFT_OUT)
    channel: Channel = field(default=_IN_ITEMS, metadata=LEFT_OUT)
    select: Select = field(default=_IN_ITEMS, metadata=LEFT_OUT)
    energy: float | None = field(default=None, metadata=LEFT_OUT)
    min_modes: int | None = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        keys = ("modes", "modes_edited", "alpha", "channel", "select")
        if {getattr(self, key) is None for key in keys} != {getattr(self, "edits", None) is not None}:
            raise ValueError(f"$.edit: {', '.join(keys)} are said for all layers, or in edits")

    @property
    def counted(self) -> str:
        """How many modes of a head are edited, for people; of a shrink, how many would change it as much."""
        if self.select is Select.shrink:
            return f"as much as {self.modes} dominant"
        n = self.modes_edited
        return str(n) if self.energy is None else f"≤ {n} (energy {exact(self.energy)})"

    @property
    def chosen(self) -> str:
        """Which modes of a head are edited, likewise."""
        is_all = self.select is Select.shrink
        return f"shrunk {self.counted}" if is_all else f"{self.counted} {self.select.value}"


@dataclass(frozen=True, kw_only=True)
class EditBlock(LayersBlock):
    """The settings of an edit, with nothing left open."""

    attention: tuple[str, ...]
    skipped_layers: tuple[int, ...]
    heads: tuple[int, ...]
    seed: int
    fold_norm: bool
    from_recipe: tuple[str, ...]
    prefix: str | None = field(default=None, metadata=LEFT_OUT)
    edits: tuple[LayersBlock, ...] | None = field(default=None, metadata=LEFT_OUT)

    @property
    def parts(self) -> tuple[LayersBlock, ...]:
        """What is done, by layers: one part where it is the same everywhere."""
        return self.edits or (self,)

    def rule_of(self, layer: int) -> EditRule:
        """What is done to every head of a layer."""
        part = next(part for part in self.parts if layer in part.layers)
        return EditRule(**{field.name: getattr(part, field.name) for field in fields(EditRule)})

    @property
    def items(self) -> list[dict[str, Json]]:
        """What leads to this edit, as ``edits`` of an EDIT.yaml say it."""
        items = [{k: v for k, v in as_json(part).items() if k in ITEM_KEYS} for part in self.parts]
        items[0]["layers"] += self.skipped_layers
        return [{**item, "layers": format_ranges(sorted(item["layers"]))} for item in items]


@dataclass(frozen=True)
class SourceBlock(Block):
    """What was edited."""

    kind: Line
    name: Line
    requested_revision: Line | None
    commit: Line | None
    checked: bool | None = None
    previous_edit: EditBlock | None = field(default=None, metadata=LEFT_OUT)

    @property
    def address(self) -> str | None:
        """``org/name@commit`` of a repository, None where it was none."""
        return f"{self.name}@{self.commit}" if self.kind == "hub" else None

    def found_at(self, named: str | None, where: str, fix: str = "name it: --source SOURCE") -> str:
        """Where SOURCE is: as somebody named it, else where the manifest ``where`` says.

        Raises:
            UsageError: it was on some machine, and nobody says where.
        """
        recorded = self.name if self.kind == "store" else self.address
        found = recorded if named is None else named
        if found is None:
            what = f"it was made from the {self.kind} {self.name!r}, and nothing records where that is"
            raise UsageError(what, where=where, fix=fix)
        return found


@dataclass(frozen=True)
class RecipeBlock(Block):
    """What of a recipe decides an edit; the rest of it is for people, and may change from version to version."""

    name: str
    sha256: str
    prefix: Mapping[str, str]
    config: Plain
    tensors: Plain
    others: Plain


@dataclass(frozen=True)
class ModelBlock(Block):
    """The language model's numbers."""

    model_type: str | None
    text_model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    orientation: str
    rows: RowLayout
    logits: Mapping[str, ConfigValue]


@dataclass(frozen=True)
class OutputBlock(Block):
    """How OUT is sharded, what was left out of it on demand, and of what there are digests."""

    max_shard_size: int | None
    exclude: tuple[str, ...] | None = field(default=None, metadata=LEFT_OUT)
    digest: Digest | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class AdapterBlock(Block):
    """What an adapter is: it stands for OUT's weights, and its files for OUT's files."""

    runtime: str
    rank: int
    dtype: str
    modules: tuple[str, ...]
    max_lora_rank: int | None = field(default=None, metadata=LEFT_OUT)  # that vLLM is to be started with


@dataclass(frozen=True)
class RunBlock(Block):
    """When and how the run went; nothing in a plan. The last two are told, and in no file."""

    started: Time | None = field(default=None, metadata=LEFT_OUT)
    finished: Time | None = field(default=None, metadata=LEFT_OUT)
    copied_by: Mapping[str, Count] | None = field(default=None, metadata=LEFT_OUT)
    # What the bits depend on: torch, BLAS and CPU.
    stack: Mapping[str, Line] | None = field(default=None, metadata=LEFT_OUT)
    already_done: bool | None = field(default=None, metadata=LEFT_OUT)
    weaker: tuple[str, ...] | None = field(default=None, metadata=LEFT_OUT)

    def is_over(self, n_files: int) -> bool:
        """Whether it is what a run that is over says of itself, and of so many files."""
        times, n_copied = [self.started or "", self.finished or ""], sum((self.copied_by or {}).values())
        return "" not in times and times == sorted(times) and n_copied == n_files
