"""``Parts``: what is known of each tensor, in a folder of SWEEP/ until all variants are done. Torch-free."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress

from qkpatch.checkpoint.files import os_errors, synced, write_exact
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
# The sums as they are written, and the SHA-256 of each file that was kept, by what follows the variant's name.
Said = tuple[tuple[float, float, float, float, float, float, float], Mapping[str, str]]
_HEADS = ".heads"  # by itself for each variant, since a tensor's of all are more than a JSON file may hold
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
        self._sweep = maker[0]  # its digest: what is another's is made anew
        self._part, self._own = part, "" if part is None else f".{secrets.token_hex(4)}."
        self._root, self._found = root, dict[LayerTarget, dict[str, Sums]]()
        self._folder = Rooted(root.path / PARTS_NAME, within=root, name=PARTS_NAME)
        self._place = {target: i for i, target in enumerate(targets)}
        wanted = {t: {name for name, edit in edits.items() if t in edit.edits} for t in targets}
        mine = [t for t, i in self._place.items() if part is None or i % part.total == part.number - 1]
        for target in mine:
            if (found := self._whole(self._place[target])) is not None and wanted[target] <= found.keys():
                self._found[target] = found
        self.missing = tuple(t for t in mine if wanted[t] and t not in self._found)
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
            return load_json(opened.whole(), opened.where)

    def _whole(self, i: int) -> dict[str, Sums] | None:
        """What an earlier run found of a tensor; None where anything that was kept of it is not as it was left."""
        try:
            sweep, said = from_json(tuple[str, Mapping[str, Said]], self._json(f"{i}.json"))
            kept = {
                f"{i}.{name}{end}": sha for name, (_, files) in said.items() for end, sha in files.items()
            }
            is_whole = sweep == self._sweep and all(self._digest(file) == sha for file, sha in kept.items())
        except (QKPatchError, ValueError):
            return None
        return {name: Sums(*sums) for name, (sums, _) in said.items()} if is_whole else None

    def _digest(self, file: str) -> str:
        with self._folder.reading(file) as opened:
            return opened.sha256(0, opened.size)

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
        i, said = self._place[target], dict[str, Said]()
        for name, (sums, heads) in found.items():
            if heads:
                self.keep(target, name + _HEADS, canonical_json(as_json(heads)).encode())
            said[name] = sums, (digests := dict[str, str]())
            for end in ("", _HEADS):
                own, file = (f"{mine}{i}.{name}{end}" for mine in (self._own, ""))
                if self._folder.status(own) is None:
                    continue
                with self._folder.reading(own) as opened:
                    digests[end] = opened.sha256(0, opened.size)
                    synced(opened.fd, opened.where)
                with os_errors("write", self._folder.path / file):
                    os.rename(own, file, src_dir_fd=self._folder.fd, dst_dir_fd=self._folder.fd)
        self._found[target] = {name: sums for name, (sums, _) in found.items()}
        self._folder.replace(f"{i}.json", canonical_json(as_json([self._sweep, said])).encode())

    def figures(self, name: str) -> tuple[Figures, tuple[Figures, ...]]:
        """Of a variant, and of each tensor that it edits."""
        own = [(target, self._found.get(target, {}).get(name)) for target in self._place]
        by_layer = (Figures.of([found], target.layer, target.attention) for target, found in own if found)
        return Figures.of(found for _, found in own if found), tuple(by_layer)

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
        heads: tuple[HeadRecord, ...] = from_json(
            tuple[HeadRecord, ...], self._json(f"{self._place[target]}.{name}{_HEADS}")
        )
        return heads
