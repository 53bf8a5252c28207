"""Which files are the weights, as transformers chooses them: ``model.safetensors``, an index's shards, a variant's."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath

from qkpatch.checkpoint.recognised import no_weights, refuse_folder
from qkpatch.checkpoint.tree import SourceFile, is_plain_relative
from qkpatch.common.json_text import load_json
from qkpatch.common.number_ranges import some
from qkpatch.common.text import Warned, warned
from qkpatch.errors import AmbiguousError, CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_INDEX = re.compile(r"(.+)\.safetensors\.index(\..+)?\.json", re.DOTALL)  # and of a variant, .index.fp16.json
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII | re.DOTALL)
_VARIANT = re.compile(r"(model|diffusion_pytorch_model)\.(.+)", re.DOTALL)


@dataclass(frozen=True)
class Weights:
    """The files that hold the weights."""

    shards: tuple[str, ...]
    stem: str  # what their names begin with: "model"; "model.fp16" of that variant
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)  # tensor -> shard, as the index says
    note: Warned | None = None  # what people should know of the choice

    @property
    def notes(self) -> tuple[Warned, ...]:
        """The same, and how transformers loads what it does not load by itself."""
        variant = _VARIANT.fullmatch(self.stem)
        how: Warned | None = None
        if variant is not None:
            how = warned(f"transformers loads {self.stem}* with variant={variant[2]!r} alone")
        elif self.stem != "model":
            how = warned(f"transformers loads model.safetensors, not {self.stem}*")
        return tuple(filter(None, (self.note, how)))


def is_index(name: str) -> bool:
    """Whether a name is that of an index of shards."""
    return _INDEX.fullmatch(name) is not None


def index_name(stem: str) -> str:
    """What transformers calls the index of shards whose names begin with ``stem``."""
    name, *variant = stem.split(".", 1) if _VARIANT.fullmatch(stem) else [stem]
    return ".".join([name, "safetensors", "index", *variant, "json"])


def find_weights(where: str, files: Mapping[str, SourceFile], left_out: Collection[str]) -> Weights:
    """The weights among ``files``, beside which something may be ``left_out``.

    Raises:
        UnsupportedError: there are none in a form that qkpatch reads; said is what there is, and what helps.
        AmbiguousError: more than one set of weights.
        CheckpointError: shards are missing, or the index is none.
    """
    top = [name for name in files if "/" not in name]
    singles = [name for name in top if name.endswith(".safetensors")]
    indices = [name for name in top if is_index(name)]
    if INDEX in indices or SINGLE in singles:
        indices = [INDEX] if INDEX in indices else []  # others are loaded on demand alone
    if len(indices) > 1:
        what = f"several indices: {', '.join(indices)}"
        raise AmbiguousError(what, where=where, fix="leave all but one out: --exclude NAME")
    if indices:
        return _indexed(where, files, indices[0])
    if SINGLE in singles:
        return Weights((SINGLE,), "model")
    if not singles:
        raise no_weights(where, files, left_out)
    return _unindexed(where, files, singles)


def _indexed(where: str, files: Mapping[str, SourceFile], name: str) -> Weights:
    weight_map = _read_index(files[name])
    shards = tuple(sorted(set(weight_map.values())))
    missing = [shard for shard in shards if shard not in files]
    what = f"the index names {len(missing)} file(s) that are not there: {some(missing)}"
    if SINGLE in files and SINGLE not in shards:
        if missing:
            return Weights((SINGLE,), "model", note=warned(f"{name} is stale, and {SINGLE} is taken: {what}"))
        # No twin to be listed and left: transformers looks for this name before it looks for an index.
        raise AmbiguousError(
            f"{SINGLE} beside {name}, which does not name it: transformers loads it instead of the shards, "
            "so an edit of the shards would do nothing there",
            where=where,
            fix="remove the stale one, or leave it out: --exclude NAME",
        )
    if missing:
        raise CheckpointError(what, where=name, fix="download the missing shards, and do not --exclude them")
    stem = _INDEX.sub(r"\1\2", name)
    return Weights(shards, stem, name, weight_map)


def _unindexed(where: str, files: Mapping[str, SourceFile], singles: list[str]) -> Weights:
    parts = [(part[1], part[3]) for name in singles if (part := _SHARD.fullmatch(name))]
    if parts and len(set(parts)) == 1:
        (stem, n), *_ = parts
        due = [f"{stem}-{i + 1:05}-of-{n}.safetensors" for i in range(int(n))]
        if missing := [name for name in due if name not in files]:
            what = f"{len(missing)} shard(s) are not there: {some(missing)}"
            raise CheckpointError(what, where=where, fix=f"download them and {index_name(stem)}")
        if len(parts) == len(singles):
            note = f"there is no index: it is derived from the shards' headers, and OUT gets it: {index_name(stem)}"
            return Weights(tuple(singles), stem, note=warned(note))
    if len(singles) > 1:
        raise AmbiguousError(
            f"{len(singles)} .safetensors files and no index: {some(singles)}",
            where=where,
            fix=f"restore {INDEX}, leave the others out (--exclude NAME), or point qkpatch at one file",
        )
    refuse_folder(where, files)
    return Weights((singles[0],), singles[0].removesuffix(".safetensors"))


def _read_index(file: SourceFile) -> dict[str, str]:
    document = load_json(file.read(), file.name, unique=True)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("no weight_map, or an empty one", where=file.name, fix="download it again")
    plain, name_of = {}, cache(lambda shard: str(PurePosixPath(shard)) if shard else "")  # without ./
    is_plain = cache(is_plain_relative)
    for tensor, shard in weight_map.items():
        plain[sys.intern(tensor)] = name_of(shard) if isinstance(shard, str) else ""
        if not is_plain(plain[tensor]):
            raise CheckpointError(
                f"tensor {tensor!r} is said to be in {shard!r}, not a plain path inside the checkpoint",
                where=file.name,
                fix="do not use this checkpoint: its index is broken or hostile",
            )
    return plain
