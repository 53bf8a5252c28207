"""``Parts``: what is known of each tensor, in a folder of SWEEP/ until all variants are done. Torch-free."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress

from qkpatch.checkpoint.files import MAX_JSON_BYTES, os_errors, synced, write_exact
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.common.json_text import Json, canonical_json, load_json
from qkpatch.common.part import Part
from qkpatch.common.typed_json import as_json, from_json
from qkpatch.errors import QKPatchError, UsageError
from qkpatch.model.targets import LayerTarget
from qkpatch.planning.blocks import Line, ToolBlock
from qkpatch.planning.manifest import HeadRecord
from qkpatch.planning.plan import EditPlan
from qkpatch.spectral.rule import Sums
from qkpatch.sweeps.record import Figures

PARTS_NAME, _AGREED = "parts", "agreed"
Found = tuple[Sums, tuple[HeadRecord, ...]]  # of a variant, in one tensor; heads where rows are formed
# The same as it is written, and the size of the file that was kept.
Said = tuple[tuple[float, float, float, float, float, float, float], tuple[HeadRecord, ...], int]
# The digest of a sweep, and what its bytes depend on besides: as an editor has it.
Maker = tuple[Line, ToolBlock, Mapping[str, Line], Line]


class Parts:
    """What the variants do to each tensor, and what their forms are made of; that of an earlier run is taken over.

    Of N machines that share the work each takes every N-th tensor. It keeps what it makes under names of its own until
    a tensor is done, and leaves all that is there: of two runs of one part, the last to end has made it.
    """

    def __init__(
        self,
        root: Rooted,
        targets: tuple[LayerTarget, ...],
        edits: Mapping[str, EditPlan],
        maker: Maker,
        part: Part | None = None,
    ) -> None:
        """``maker`` is what all that add to it must have in common.

        Raises:
            UsageError: what is there has another.
        """
        with (
            os_errors("create a directory", root.path / PARTS_NAME),
            suppress(FileExistsError),
        ):  # another part's
            root.make_directory(PARTS_NAME, 0o777)
        self._part, self._own = part, "" if part is None else f".{secrets.token_hex(4)}."
        self._root, self._found = root, dict[LayerTarget, dict[str, Found]]()
        self._folder = Rooted(root.path / PARTS_NAME, within=root, name=PARTS_NAME)
        self._place = {target: i for i, target in enumerate(targets)}
        wanted = {t: {name for name, edit in edits.items() if t in edit.edits} for t in targets}
        for target, i in self._place.items():
            if (found := self._whole(i)) is not None and wanted[target] <= found.keys():
                self._found[target] = found
        missing = [t for t in targets if wanted[t] and t not in self._found]
        self.missing = tuple(
            t for t in missing if part is None or self._place[t] % part.total == part.number - 1
        )
        if part is None:
            done = {_AGREED, *(str(self._place[target]) for target in self._found)}
            self._remove(name for name in self._folder.names() if name.partition(".")[0] not in done)
        self.maker = self._agreed(maker) if edits else maker

    def _agreed(self, maker: Maker) -> Maker:
        """Who makes all that is kept: whoever comes first says it, whole, and others find it.

        A run of the whole to which nothing is left to add takes their word, if they are of its sweep.
        """
        if self._folder.status(_AGREED) is None:
            ours = canonical_json(as_json(maker)).encode()
            with suppress(UsageError):  # somebody was faster
                self._folder.create(_AGREED, lambda file: write_exact(file.fd, ours, 0, file.where))
        with suppress(QKPatchError, ValueError):
            made: Maker = from_json(Maker, self._json(_AGREED))
            if made == maker or (made[0] == maker[0] and self._part is None and not self.missing):
                return made
        self._folder.close()
        what = "its parts are of another grid, or of machines with another CPU, card, BLAS, torch or qkpatch"
        fix = (
            f"use machines of one kind, or choose another -o; to look at all layers anew, remove {PARTS_NAME}"
        )
        raise UsageError(what, where=str(self._root.path), fix=fix)

    def _json(self, name: str) -> Json:
        with self._folder.reading(name) as opened:
            return load_json(opened.whole(4 * MAX_JSON_BYTES), opened.where)

    def _whole(self, i: int) -> dict[str, Found] | None:
        """What an earlier run found of a tensor, with all that was kept of it; None where anything is missing."""
        try:
            said: dict[str, Said] = from_json(Mapping[str, Said], self._json(f"{i}.json"))
        except (QKPatchError, ValueError):
            return None
        is_whole = all(self._size(f"{i}.{name}") == size for name, (_, _, size) in said.items())
        return {name: (Sums(*sums), heads) for name, (sums, heads, _) in said.items()} if is_whole else None

    def _size(self, file: str) -> int:
        return 0 if (status := self._folder.status(file)) is None else status.st_size

    def _remove(self, names: Iterable[str]) -> None:
        # First what says that a tensor is done: a kill between the two leaves nothing that is believed.
        for name in sorted(names, key=lambda name: not name.endswith(".json")):
            self._folder.discard(name)

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._part is not None:
            self._remove(name for name in self._folder.names() if name.startswith(self._own))
        elif kind is None:
            self._remove(self._folder.names())
            self._root.discard(PARTS_NAME)
        self._folder.close()

    def keep(self, target: LayerTarget, name: str, data: bytes | bytearray) -> None:
        """Packed factors or new rows of some heads, for a variant; from the one thread that computes this tensor."""
        file = f"{self._own}{self._place[target]}.{name}"
        flags, where = os.O_WRONLY | os.O_CREAT | os.O_APPEND, self._folder.path / file
        with os_errors("write", where), open(self._folder.open(file, flags), "ab") as opened:
            opened.write(data)

    def add(self, target: LayerTarget, found: dict[str, Found]) -> None:
        """A tensor is done."""
        i, self._found[target], said = self._place[target], found, dict[str, Said]()
        for name, one in found.items():
            file = f"{i}.{name}"
            said[name] = (*one, self._size(self._own + file))
            if said[name][2]:
                with self._folder.reading(self._own + file) as opened:
                    synced(opened.fd, opened.where)
                with os_errors("write", self._folder.path / file):
                    os.rename(self._own + file, file, src_dir_fd=self._folder.fd, dst_dir_fd=self._folder.fd)
        self._folder.replace(f"{i}.json", canonical_json(as_json(said)).encode())

    def figures(self, name: str) -> tuple[Figures, tuple[Figures, ...]]:
        """Of a variant, and of each tensor that it edits."""
        own = [(target, self._found.get(target, {}).get(name)) for target in self._place]
        by_layer = (Figures.of([found[0]], target.layer, target.attention) for target, found in own if found)
        return Figures.of(found[0] for _, found in own if found), tuple(by_layer)

    def kept(self, name: str, target: LayerTarget) -> bytearray:
        """What was kept of a variant for one tensor."""
        with self._folder.reading(f"{self._place[target]}.{name}") as opened:
            return opened.read(opened.size, 0)

    def publish(self, file: str) -> None:
        """Move what was made whole in this folder to its place in SWEEP/, over what is there."""
        with os_errors("write", self._root.path / file):
            os.rename(file, file, src_dir_fd=self._folder.fd, dst_dir_fd=self._root.fd)

    def records(self, name: str, target: LayerTarget) -> tuple[HeadRecord, ...]:
        """Of a variant's heads, in one tensor."""
        return self._found[target][name][1]
