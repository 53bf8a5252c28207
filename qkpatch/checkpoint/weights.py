"""Which files are the weights, as transformers chooses them: ``model.safetensors``, an index's shards, a variant's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from qkpatch.checkpoint.recognised import FOLDERS, no_weights, recognise
from qkpatch.checkpoint.tree import SourceFile, is_plain_relative
from qkpatch.common.json_text import load_json
from qkpatch.common.number_ranges import some
from qkpatch.errors import AmbiguousError, CheckpointError

PREFERRED_INDEX = "model.safetensors.index.json"
PREFERRED_SINGLE = "model.safetensors"
_DOWNLOAD = "download what is missing"

# model.safetensors.index.json; of the variant fp16, model.safetensors.index.fp16.json
_INDEX = re.compile(r"(.+)\.safetensors\.index(\..+)?\.json", re.DOTALL)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII | re.DOTALL)
_VARIANT = re.compile(r"(model|diffusion_pytorch_model)(\..+)", re.DOTALL)


@dataclass(frozen=True)
class Weights:
    """The files that hold the weights."""

    shards: tuple[str, ...]
    stem: str  # what their names begin with: "model"; "model.fp16" of that variant
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)  # tensor -> shard, as the index says
    notes: tuple[str, ...] = ()  # what people should know of the choice


def is_index(name: str) -> bool:
    """Whether a name is that of an index of shards."""
    return _INDEX.fullmatch(name) is not None


def index_name(stem: str) -> str:
    """What transformers calls the index of shards whose names begin with ``stem``."""
    variant = _VARIANT.fullmatch(stem)
    return f"{variant[1]}.safetensors.index{variant[2]}.json" if variant else f"{stem}.safetensors.index.json"


def find_weights(where: str, files: Mapping[str, SourceFile], left_out: Collection[str]) -> Weights:
    """The weights among ``files``.

    Args:
        where: what messages call the place.
        files: all files there but what is left out.
        left_out: what is.

    Raises:
        UnsupportedError: there are none in a form that qkpatch reads; said is what there is, and what helps.
        AmbiguousError: more than one set of weights.
        CheckpointError: shards are missing, or the index is none.
    """
    top = [name for name in files if "/" not in name]
    singles = [name for name in top if name.endswith(".safetensors")]
    indices = [name for name in top if is_index(name)]
    if PREFERRED_INDEX in indices or PREFERRED_SINGLE in singles:
        indices = (
            [PREFERRED_INDEX] if PREFERRED_INDEX in indices else []
        )  # variants are loaded on demand alone
    if len(indices) > 1:
        raise AmbiguousError(
            f"several indices: {', '.join(indices)}", where=where, fix="leave all but one out: --exclude NAME"
        )
    if indices:
        return _indexed(where, files, indices[0], singles, left_out)
    if PREFERRED_SINGLE in singles:
        return Weights((PREFERRED_SINGLE,), "model")
    return _unindexed(where, files, singles, left_out)


def _indexed(
    where: str,
    files: Mapping[str, SourceFile],
    name: str,
    singles: Collection[str],
    left_out: Collection[str],
) -> Weights:
    weight_map = _read_index(files[name])
    shards = tuple(sorted(set(weight_map.values())))
    missing = [shard for shard in shards if shard not in files]
    if PREFERRED_SINGLE in singles and PREFERRED_SINGLE not in shards:
        # No twin to be listed and left: transformers looks for this name before it looks for an index.
        if missing:
            note = f"{name} is stale: it names {len(missing)} file(s) that are not there ({some(missing)}); taken is "
            return Weights(
                (PREFERRED_SINGLE,), "model", notes=(f"{note}{PREFERRED_SINGLE}, as transformers does",)
            )
        raise AmbiguousError(
            f"{PREFERRED_SINGLE} beside {name}, which does not name it: transformers loads it instead of "
            "the shards, so an edit of the shards would do nothing there",
            where=where,
            fix="remove the stale one, or leave it out: --exclude NAME",
        )
    if missing:
        excluded = [shard for shard in missing if shard in left_out]
        raise CheckpointError(
            f"the index names {len(missing)} file(s) that are not there: {some(missing)}",
            where=name,
            fix="do not --exclude them" if excluded else "download the missing shards",
        )
    found = _INDEX.fullmatch(name)
    variant = (found and found[2]) or ""
    stem = f"{found[1] if found else name}{variant}"
    return Weights(shards, stem, name, weight_map, _on_demand(stem))


def _unindexed(
    where: str, files: Mapping[str, SourceFile], singles: list[str], left_out: Collection[str]
) -> Weights:
    sets: dict[tuple[str, int], set[int]] = {}
    for name in singles:
        if shard := _SHARD.fullmatch(name):
            sets.setdefault((shard[1], int(shard[3])), set()).add(int(shard[2]))
    lost = {
        (stem, n): [f"{stem}-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1) if i not in there]
        for (stem, n), there in sets.items()
    }
    whole = [found for found, missing in lost.items() if not missing and found[1] > 0]
    if len(whole) == 1 and len(singles) == whole[0][1]:
        stem = whole[0][0]
        note = (
            f"there is no index: it is derived from the shards' headers, and OUT gets it: {index_name(stem)}"
        )
        return Weights(tuple(singles), stem, notes=(note, *_on_demand(stem)))
    if len(sets) == 1 and not whole:
        ((_, missing),) = lost.items()
        raise CheckpointError(
            f"{len(missing)} shard(s) are not there: {some(missing)}",
            where=where,
            fix=f"download them and {PREFERRED_INDEX}, or point qkpatch at one file",
        )
    if len(singles) == 1:
        stem = singles[0].removesuffix(".safetensors")
        error = recognise(FOLDERS, where, files)
        if error is not None:
            raise error
        return Weights((singles[0],), stem, notes=_on_demand(stem))
    if singles:
        raise AmbiguousError(
            f"{len(singles)} .safetensors files and no index: {some(singles)}",
            where=where,
            fix=f"restore {PREFERRED_INDEX}, leave the others out (--exclude NAME), or point qkpatch at one file",
        )
    raise no_weights(where, files, left_out)


def _on_demand(stem: str) -> tuple[str, ...]:
    """What must be said of weights that transformers does not load by itself."""
    variant = _VARIANT.fullmatch(stem)
    if variant:
        return (
            f"these are weights of a variant, which transformers loads with variant={variant[2][1:]!r} alone",
        )
    return () if stem == "model" else (f"transformers loads weights called model.safetensors, not {stem}",)


def _read_index(file: SourceFile) -> dict[str, str]:
    document = load_json(file.read(), file.name, unique=True)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("no weight_map, or an empty one", where=file.name)
    plain = {
        t: str(PurePosixPath(s)) if isinstance(s, str) and s else s for t, s in weight_map.items()
    }  # no ./
    for tensor, shard in plain.items():
        if not isinstance(shard, str) or not is_plain_relative(shard):
            raise CheckpointError(
                f"tensor {tensor!r} is said to be in {weight_map[tensor]!r}, not a plain path inside the checkpoint",
                where=file.name,
                fix="do not use this checkpoint: its index is broken or hostile",
            )
    return plain
