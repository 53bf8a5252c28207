"""``Parts``: what is known of each tensor, in a folder of SWEEP/ until all variants are done. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from qkpatch.checkpoint.files import os_errors, synced
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.common.json_text import canonical_json, load_json
from qkpatch.common.typed_json import as_json, from_json
from qkpatch.model.targets import LayerTarget
from qkpatch.planning.manifest import HeadRecord
from qkpatch.planning.plan import EditPlan
from qkpatch.spectral.rule import Sums
from qkpatch.sweeps.record import Figures

PARTS_NAME = "parts"
Found = tuple[
    Sums, tuple[HeadRecord, ...]
]  # of a variant, in one tensor; records of heads where rows are formed


class Parts:
    """What the variants do to each tensor, and what their forms are made of; that of an earlier run is taken over."""

    def __init__(self, root: Rooted, targets: tuple[LayerTarget, ...], edits: Mapping[str, EditPlan]) -> None:
        with os_errors("create a directory", root.path / PARTS_NAME):
            root.make_directory(PARTS_NAME, 0o777)
        self._root, self._found = root, dict[LayerTarget, dict[str, Found]]()
        self._folder = Rooted(root.path / PARTS_NAME, within=root, name=PARTS_NAME)
        self._place, names = {target: i for i, target in enumerate(targets)}, set(self._folder.names())
        wanted = {
            target: {name for name, edit in edits.items() if target in edit.edits} for target in targets
        }
        for target, i in self._place.items():
            if f"{i}.json" in names:
                with self._folder.reading(f"{i}.json") as opened:
                    said = load_json(bytes(opened.read(opened.size, 0)), opened.where)
                if wanted[target] <= said.keys():
                    self._found[target] = {name: _read(*found) for name, found in said.items()}
        self.missing = tuple(t for t in targets if wanted[t] and t not in self._found)
        begun = {str(self._place[target]) for target in self.missing}
        for name in names:
            if name.partition(".")[0] in begun and (status := self._folder.status(name)) is not None:
                self._folder.remove(name, status)

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._folder.clear()
        self._folder.close()
        if kind is None and (status := self._root.status(PARTS_NAME)) is not None:
            self._root.remove(PARTS_NAME, status)

    def keep(self, target: LayerTarget, name: str, data: bytes | bytearray) -> None:
        """Packed factors or new rows of some heads, for a variant; from the one thread that computes this tensor."""
        file = f"{self._place[target]}.{name}"
        flags, where = os.O_WRONLY | os.O_CREAT | os.O_APPEND, self._folder.path / file
        with os_errors("write", where), open(self._folder.open(file, flags), "ab") as opened:
            opened.write(data)

    def add(self, target: LayerTarget, found: dict[str, Found]) -> None:
        """A tensor is done."""
        i, self._found[target] = self._place[target], found
        for name in found:
            if self._folder.status(f"{i}.{name}") is not None:
                with self._folder.reading(f"{i}.{name}") as opened:
                    synced(opened.fd, opened.where)
        self._folder.replace(f"{i}.json", canonical_json(as_json(found)).encode())

    def figures(self, name: str) -> tuple[Figures, tuple[Figures, ...]]:
        """Of a variant, and of each tensor that it edits."""
        own = [(target, self._found.get(target, {}).get(name)) for target in self._place]
        by_layer = (Figures.of([found[0]], target.layer, target.attention) for target, found in own if found)
        return Figures.of(found[0] for _, found in own if found), tuple(by_layer)

    def kept(self, name: str, target: LayerTarget) -> bytearray:
        """What was kept of a variant for one tensor."""
        with self._folder.reading(f"{self._place[target]}.{name}") as opened:
            return opened.read(opened.size, 0)

    def records(self, name: str, target: LayerTarget) -> tuple[HeadRecord, ...]:
        """Of a variant's heads, in one tensor."""
        return self._found[target][name][1]


def _read(sums: list[float], records: list[Any]) -> Found:
    return Sums(*sums), tuple(from_json(HeadRecord, record) for record in records)
