"""An adapter's files, which appear whole, by one rename: weights, PEFT's config, a card, and the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qkpatch.adapters.modules import QueryModule, Runtime
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.source import MANIFEST_NAME, Checkpoint
from qkpatch.common.interrupts import signals_held, signals_let_through
from qkpatch.common.json_text import canonical_json
from qkpatch.common.typed_json import as_json
from qkpatch.errors import FileSystemError
from qkpatch.output.destination import Replaced
from qkpatch.output.reshard import shard_header
from qkpatch.output.space import free_bytes
from qkpatch.output.staged_files import StagedFiles
from qkpatch.output.staging import Staging
from qkpatch.planning.blocks import AdapterBlock
from qkpatch.planning.manifest import FileRecord, Manifest, planned_manifest
from qkpatch.planning.plan import EditPlan
from qkpatch.publishing.card import CARD_NAME, card_text, model_card

if TYPE_CHECKING:
    from qkpatch.adapters.factors import LayerFactors

WEIGHTS_NAME, CONFIG_NAME, DTYPE = "adapter_model.safetensors", "adapter_config.json", "F32"
FILE_NAMES = (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME)  # besides the manifest
# With lora_alpha = r, what PEFT and vLLM add to a weight is B A itself.
_PLAIN = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "lora_dropout": 0.0, "task_type": None, "use_dora": False, "use_rslora": False,
}  # fmt: skip


def adapter_record(plan: EditPlan, device: str, known: dict[TensorRef, str]) -> Manifest:
    """The record of an edit, with digests of the tensors it is made from where these are on this machine.

    ``known`` are digests that were taken before, and are added to.
    """
    manifest = planned_manifest(plan, device)
    if plan.model.source.path is None:  # all of them would be fetched once more
        return manifest
    refs = [target.written for target in plan.edits]
    known |= {ref: plan.model.checkpoint.sha256(ref) for some in refs for ref in some if ref not in known}
    digests = [[known[ref] for ref in some] for some in refs]
    pairs = zip(manifest.edits, digests, strict=True)
    return replace(manifest, edits=tuple(each.done(d, (None, None), ()) for each, d in pairs))


def write_adapter(
    out: Path,
    checkpoint: Checkpoint,
    manifest: Manifest,
    runtime: Runtime,
    layers: Sequence[tuple[LayerFactors, QueryModule]],
    replaced: Replaced | None,
) -> Manifest:
    """Write an adapter to ``out`` and return its manifest. OUT appears whole, by one rename, or not at all.

    Args:
        out: where, which nothing speaks against.
        checkpoint: SOURCE.
        manifest: the edit as it is planned.
        runtime: what loads it.
        layers: the factors, which zeros bring to one rank, and what they are added to.
        replaced: the earlier output that is replaced.

    Raises:
        QKPatchError: writing, or space; OUT came into being, or SOURCE changed, meanwhile.
    """
    rank = max(layer.rank for layer, _ in layers)
    names = tuple(module.name for _, module in layers)
    adapter = AdapterBlock(runtime.value, rank, DTYPE, names, runtime.max_lora_rank(rank))
    manifest = replace(manifest, adapter=adapter)
    shapes = {
        f"base_model.model.{module.name}.lora_{part}.weight": (n, m)
        for _, module in layers
        for rows, columns in [module.layout.query_shape]
        for part, n, m in (("A", rank, columns), ("B", rows, rank))
    }
    refs = [TensorRef(name, WEIGHTS_NAME, DTYPE, (n, m), 0, 4 * n * m) for name, (n, m) in shapes.items()]
    base = {"base_model_name_or_path": manifest.source.name, "revision": manifest.source.commit}
    edit = {key: value for key, value in as_json(manifest.edit).items() if key != "from_recipe"}
    said = {"format": "pt", "qkpatch": manifest.tool.version, "edit": canonical_json(edit), **base}
    header, _ = shard_header(WEIGHTS_NAME, refs, {key: value for key, value in said.items() if value})
    size, free = len(header) + sum(ref.nbytes for ref in refs), free_bytes(out)
    if free is not None and free < size:
        what = f"the adapter takes {size:,} bytes, and {free:,} are free"
        raise FileSystemError(what, where=str(out.absolute().parent), fix="free some, or choose another -o")
    readme = checkpoint.files.get(CARD_NAME)
    config = {**_PLAIN, **base, "r": rank, "lora_alpha": rank, "target_modules": names}
    card = model_card(manifest, out.name, None if readme is None else card_text(readme.read()), None)
    texts = {CARD_NAME: card.encode(), CONFIG_NAME: canonical_json(config).encode()}
    digest = hashlib.sha256(header)

    def tensors() -> Iterator[bytearray]:
        for layer, module in layers:
            for piece in layer.pieces(rank, module.layout):
                digest.update(piece)
                yield piece

    with signals_held(), Staging(out) as staging:
        staged = StagedFiles(staging.files)
        with signals_let_through():
            staged.write_new(WEIGHTS_NAME, header, tensors())
            files = [FileRecord(WEIGHTS_NAME, size, "made", digest.hexdigest())]
            for name, data in texts.items():
                staged.write_new(name, data)
                files.append(FileRecord(name, len(data), "made", hashlib.sha256(data).hexdigest()))
            manifest = replace(manifest, files=tuple(files))
            staged.write_new(MANIFEST_NAME, manifest.dumps().encode())
            staged.check(())
            checkpoint.check_still()
            staging.publish((), None if replaced is None else replaced.check)
    return manifest.telling(weaker=tuple(staging.lacks) or None)
