"""An adapter's files, which appear whole, by one rename: weights, PEFT's config, a card, and the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qkpatch.adapters.modules import QueryModule, Runtime
from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.common.interrupts import signals_held, signals_let_through
from qkpatch.common.json_text import canonical_json
from qkpatch.common.text import size_text
from qkpatch.common.typed_json import as_json
from qkpatch.errors import FileSystemError
from qkpatch.model.targets import LayerTarget
from qkpatch.output.destination import Replaced
from qkpatch.output.reshard import shard_header
from qkpatch.output.space import free_bytes
from qkpatch.output.staged_files import StagedFiles
from qkpatch.output.staging import Staging
from qkpatch.planning.blocks import AdapterBlock
from qkpatch.planning.manifest import FileRecord, Manifest, planned_manifest
from qkpatch.planning.plan import EditPlan
from qkpatch.publishing.card import CARD_NAME, card_text, loading, model_card, told

if TYPE_CHECKING:
    from qkpatch.adapters.factors import LayerFactors

WEIGHTS_NAME, CONFIG_NAME, DTYPE = "adapter_model.safetensors", "adapter_config.json", "F32"
# With lora_alpha = r, what PEFT and vLLM add to a weight is B A itself.
_PLAIN = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "lora_dropout": 0.0, "use_dora": False, "use_rslora": False,
}  # fmt: skip


def write_adapter(
    out: Path,
    plan: EditPlan,
    layers: Sequence[LayerFactors],
    modules: Mapping[LayerTarget, QueryModule],
    runtime: Runtime,
    device: str,
    replaced: Replaced | None,
) -> Manifest:
    """Write an adapter to ``out`` and return its manifest. OUT appears whole, by one rename, or not at all.

    Args:
        out: where, which nothing speaks against.
        plan: the edit.
        layers: its factors, which zeros bring to one rank.
        modules: what holds the queries of each layer.
        runtime: what loads it.
        device: where it was computed.
        replaced: the earlier output that is replaced.

    Raises:
        UsageError: OUT came into being meanwhile.
        FileSystemError: writing, or space; SOURCE changed meanwhile.
    """
    checkpoint, manifest = plan.model.checkpoint, planned_manifest(plan, device)
    held = [modules[layer.target] for layer in layers]
    rank, names = max(layer.rank for layer in layers), tuple(module.name for module in held)
    adapter = AdapterBlock(runtime.value, rank, DTYPE, names, runtime.max_lora_rank(rank))
    manifest = replace(manifest, adapter=adapter)
    shapes = {
        f"base_model.model.{module.name}.lora_{part}.weight": (n, m)
        for module in held
        for rows, columns in [module.layout.query_shape]
        for part, n, m in (("A", rank, columns), ("B", rows, rank))
    }
    refs = [TensorRef(name, WEIGHTS_NAME, DTYPE, (n, m), 0, 4 * n * m) for name, (n, m) in shapes.items()]
    base = {"base_model_name_or_path": manifest.source.name, "revision": manifest.source.commit}
    settings = {key: value for key, value in as_json(manifest.edit).items() if key != "from_recipe"}
    edit = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    said = {"format": "pt", "qkpatch": manifest.tool.version, "edit": edit, **base}
    header, _ = shard_header(WEIGHTS_NAME, refs, {key: value for key, value in said.items() if value})
    size, free = len(header) + sum(ref.nbytes for ref in refs), free_bytes(out)
    if free is not None and free < size:
        what = f"the adapter takes {size:,} bytes, and {free:,} are free"
        raise FileSystemError(what, where=str(out.absolute().parent), fix="free some, or choose another -o")
    classes, readme = checkpoint.config.get("architectures"), checkpoint.files.get(CARD_NAME)
    config = {**_PLAIN, **base, "r": rank, "lora_alpha": rank, "target_modules": names}
    is_text = isinstance(classes, list) and any(str(name).endswith("ForCausalLM") for name in classes)
    config["task_type"] = "CAUSAL_LM" if is_text else None
    card = model_card(manifest, out.name, None if readme is None else card_text(readme.read()), None)
    texts = {CARD_NAME: card.encode(), CONFIG_NAME: canonical_json(config).encode()}
    digest = hashlib.sha256(header)

    def tensors() -> Iterator[bytearray]:
        for layer, module in zip(layers, held, strict=True):
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
    return replace(manifest, run=replace(manifest.run, weaker=tuple(staging.lacks) or None))


def told_of(manifest: Manifest, out: str, source: str | None) -> str:
    """What people read of an adapter that was written."""
    weights, n_modules = manifest.files[0].size, len(manifest.edits)
    what = f"Wrote {out}: an adapter of {n_modules} module(s) in {DTYPE}, {size_text(weights)}"
    return f"{manifest.source.name}: {told(manifest.edit)}\n{what}\nLoad it with: {loading(manifest, out, source)}\n"
