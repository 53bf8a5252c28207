"""``Parts``: what is known of each tensor, in a folder of SWEEP/ until all variants are done. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from qkpatch.checkpoint.files import os_errors, synced
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.common.json_text import canonical_json, load_json
from qkpatch.model.targets import LayerTarget
from qkpatch.planning.settings import EditSettings
from qkpatch.spectral.rule import Sums
from qkpatch.sweeps.record import Figures

if TYPE_CHECKING:
    from qkpatch.adapters.factors import LayerFactors

PARTS_NAME = "parts"


class Parts:
    """Sums, and packed factors, of the variants that edit each tensor; those of an earlier run are taken over."""

    def __init__(
        self, root: Rooted, targets: tuple[LayerTarget, ...], edits: Mapping[str, EditSettings]
    ) -> None:
        with os_errors("create a directory", root.path / PARTS_NAME):
            root.make_directory(PARTS_NAME, 0o777)
        self._root, self._sums = root, dict[LayerTarget, dict[str, Sums]]()
        self._folder = Rooted(root.path / PARTS_NAME, within=root, name=PARTS_NAME)
        self._place, names = {target: i for i, target in enumerate(targets)}, set(self._folder.names())
        wanted = {
            target: {name for name, edit in edits.items() if target.layer in edit.layers}
            for target in targets
        }
        for target, i in self._place.items():
            if f"{i}.json" in names:
                with self._folder.reading(f"{i}.json") as opened:
                    found = load_json(bytes(opened.read(opened.size, 0)), opened.where)
                if wanted[target] <= found.keys():
                    self._sums[target] = {name: Sums(*sums) for name, sums in found.items()}
        self.missing = tuple(t for t in targets if wanted[t] and t not in self._sums)
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

    def keep(self, target: LayerTarget, name: str, factors: bytes) -> None:
        """Some heads' factors of a variant, packed; from the one thread that computes this tensor."""
        file = f"{self._place[target]}.{name}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with (
            os_errors("write", self._folder.path / file),
            open(self._folder.open(file, flags), "ab") as opened,
        ):
            opened.write(factors)

    def add(self, target: LayerTarget, sums: dict[str, Sums]) -> None:
        """A tensor is done."""
        i, self._sums[target] = self._place[target], sums
        for name in sums:
            if self._folder.status(f"{i}.{name}") is not None:
                with self._folder.reading(f"{i}.{name}") as opened:
                    synced(opened.fd, opened.where)
        self._folder.replace(f"{i}.json", canonical_json(sums).encode())

    def figures(self, name: str) -> tuple[Figures, tuple[Figures, ...]]:
        """Of a variant, and of each tensor that it edits."""
        own = [(target, self._sums.get(target, {}).get(name)) for target in self._place]
        by_layer = tuple(Figures.of([sums], target.layer, target.attention) for target, sums in own if sums)
        return Figures.of(sums for _, sums in own if sums), by_layer

    def factors(self, name: str, target: LayerTarget) -> LayerFactors:
        """Of one tensor."""
        from qkpatch.adapters.factors import unpacked

        with self._folder.reading(f"{self._place[target]}.{name}") as opened:
            return unpacked(target, opened.read(opened.size, 0))
