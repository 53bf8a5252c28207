"""``EditPlan``: everything that will be done, decided from headers alone. Torch-free; reads no weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qkpatch.budget import head_memory
from qkpatch.model import Model, open_model
from qkpatch.recipe_file import UNTESTED
from qkpatch.selection import abbreviate, format_ranges
from qkpatch.settings import EditSettings, Request, check_request
from qkpatch.spectral.rule import EditRule, Select
from qkpatch.targets import LayerTarget


@dataclass(frozen=True)
class EditPlan:
    """Which heads of which tensors are edited and how, and which files are only carried over."""

    model: Model
    settings: EditSettings
    edits: tuple[LayerTarget, ...]  # empty when the rule is the declared no-op
    warnings: tuple[str, ...]

    @cached_property
    def edits_by_shard(self) -> dict[str, tuple[LayerTarget, ...]]:
        """The edits that write to each patched shard, by layer."""
        shards = dict.fromkeys(ref.shard for edit in self.edits for ref in edit.written)
        return {
            shard: tuple(e for e in self.edits if any(ref.shard == shard for ref in e.written))
            for shard in shards
        }

    def written_ranges(self, shard: str) -> list[tuple[int, int]]:
        """Byte ranges of the planned heads in a shard, ascending; nothing else may differ."""
        return sorted(
            (begin, end)
            for edit in self.edits_by_shard.get(shard, ())
            for head in self.settings.heads
            for ref, begin, end in edit.written_ranges(head)
            if ref.shard == shard
        )

    @property
    def edited_bytes(self) -> int:
        """Bytes that will be rewritten."""
        return sum(end - begin for shard in self.edits_by_shard for begin, end in self.written_ranges(shard))

    @property
    def output_bytes(self) -> int:
        """Size of OUT without the manifest."""
        return self.model.checkpoint.total_bytes

    @property
    def head_memory(self) -> int:
        """Bytes that a thread takes while it edits one head."""
        return head_memory(edit.layout for edit in self.edits)

    @property
    def action(self) -> str:
        """The edit in one line for people."""
        rule = self.settings.rule
        if rule.is_noop:
            return "alpha 1: nothing is edited"
        what = {
            Select.shrink: f"W_Q shrunk by as much as {rule.paired_modes} dominant modes would move it",
            Select.subspace: f"a random {rule.modes}-dimensional subspace of each query × {rule.alpha:g}",
        }.get(rule.select, f"{rule.paired_modes} {rule.select.value} modes × {rule.alpha:g}")
        folded = ", gain before attention folded" if self.settings.fold_norm else ""
        return f"{what}, {rule.channel.value} channel{folded}"


def make_plan(source: str, request: Request) -> EditPlan:
    """Decide everything and refuse everything that can be refused, before the first byte is written.

    Raises:
        UsageError: the request is malformed, or the model has no such layer, head or mode.
        QKPatchError: as :func:`open_model` and :meth:`Model.target`.
    """
    check_request(request)
    model = open_model(source, request.recipe, request.attention)
    settings = model.settings(request)
    targets = model.targets(settings)
    edits = () if settings.rule.is_noop else targets
    return EditPlan(model, settings, edits, tuple(_warnings(model, settings, targets)))


def _warnings(model: Model, settings: EditSettings, targets: tuple[LayerTarget, ...]) -> list[str]:
    rule, checkpoint = settings.rule, model.checkpoint
    warnings = []
    if rule.is_noop:
        warnings.append("alpha 1 is a declared no-op: OUT will be a byte-identical copy of SOURCE")
    if rule.paired_modes != rule.modes and rule.select is not Select.subspace:
        warnings.append(
            f"antisymmetric modes come in equal pairs: {rule.modes} rounded up to {rule.paired_modes}"
        )
    warnings += _norm_warnings(model, rule, targets)
    shared = [layer for layer in settings.skipped_layers if not model.tower.has_own_keys(layer)]
    other = [layer for layer in settings.skipped_layers if layer not in shared]
    if shared:
        warnings.append(
            f"layers {format_ranges(shared)} use an earlier layer's keys and are skipped; "
            "a key weight stored there is dead"
        )
    if other:
        warnings.append(
            f"layers {format_ranges(other)} have no query-key product of this kind "
            "(linear attention, or another set of tensors) and are skipped"
        )
    adapters = [
        name for name in checkpoint.tensors if ".lora_" in name
    ]  # a mixture of experts has 10^5 names
    adapted = [target for target in targets if _has_adapter(target, adapters)]
    if adapted:
        warnings.append(
            f"adapters (lora) add to the queries of {len(adapted)} layer(s), such as {adapted[0].query.name}; "
            "the edit acts on the base weight alone"
        )
    if model.recipe.tested == UNTESTED:
        warnings.append(
            f"recipe {model.recipe.name} says that it is untested: compare it with the model's own code"
        )
    root = checkpoint.root.resolve()
    strays = [name for name, file in checkpoint.files.items() if _leads_out(file.path, root)]
    if strays:
        warnings.append(
            f"{len(strays)} file(s) are links that lead out of SOURCE, and what they lead to is copied: "
            f"{abbreviate(strays, 5)}"
        )
    if checkpoint.twins:
        warnings.append(
            f"{len(checkpoint.twins)} other weight file(s) stay unpatched: {abbreviate(checkpoint.twins, 5)}"
        )
    if checkpoint.single_file:
        warnings.append("SOURCE is one file: nothing beside it (tokenizer, config) is copied")
    if checkpoint.previous_manifest is not None:
        warnings.append("SOURCE was written by qkpatch: this edit comes on top of that one")
    return warnings


def _norm_warnings(model: Model, rule: EditRule, targets: tuple[LayerTarget, ...]) -> list[str]:
    if rule.select is not Select.shrink:
        return []
    normed = [target for target in targets if target.norms is not None]
    is_l2_normed = bool(model.tower.logits.get("use_qk_norm"))  # Llama 4: a norm without weights
    if not normed and not is_l2_normed:
        return []
    if any(_is_over_projection(target) for target in normed):
        return ["queries are normalised over all heads, so shrinking W_Q only shifts weight between heads"]
    if any(target.query.name.removesuffix("weight") + "bias" in target.biases for target in targets):
        return ["queries are normalised per head, so shrinking W_Q only gives their bias more weight"]
    return ["queries are normalised per head, so shrinking W_Q changes nothing in the model's output"]


def _leads_out(path: Path, root: Path) -> bool:
    """Whether a file of SOURCE is a link out of its resolved ``root``, other than to the Hub cache's own blobs."""
    real = path.resolve()
    return root not in real.parents and real.parent.name != "blobs"


def _has_adapter(target: LayerTarget, adapters: Iterable[str]) -> bool:
    module = target.query.name.removesuffix(".weight").removesuffix(".base_layer")
    return any(name.startswith(f"{module}.lora_") for name in adapters)


def _is_over_projection(target: LayerTarget) -> bool:
    norm, layout = target.query_norm, target.layout
    return norm is not None and layout.n_heads > 1 and norm.shape == (layout.n_heads * layout.d_head,)
