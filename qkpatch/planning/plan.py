"""``EditPlan``: everything that will be done, decided from headers alone. Torch-free; reads no weight."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qkpatch.checkpoint.header import TensorRef
from qkpatch.checkpoint.names import RUBBISH, USUAL, is_secret, matching
from qkpatch.checkpoint.source import Checkpoint
from qkpatch.common.json_text import canonical_json, exact
from qkpatch.common.number_ranges import abbreviate, format_ranges, some
from qkpatch.common.observer import Observer
from qkpatch.common.text import Warned, size_text, warned
from qkpatch.common.typed_json import as_json
from qkpatch.errors import CheckpointError, HubError, UsageError
from qkpatch.model.locate import Access
from qkpatch.model.model import Model, open_model
from qkpatch.model.refusals import quantised_by_name
from qkpatch.model.targets import LayerTarget
from qkpatch.output.destination import longest_name
from qkpatch.output.layout import Output
from qkpatch.output.reshard import reshard
from qkpatch.planning.memory import head_memory
from qkpatch.planning.request import Request
from qkpatch.planning.settings import EditSettings, resolve
from qkpatch.recipes.reading import UNTESTED
from qkpatch.spectral.rule import EditRule, Select

if TYPE_CHECKING:
    from qkpatch.planning.patch_file import Patch

_UNLESS = "--exclude leaves them out"


@dataclass(frozen=True)
class EditPlan:
    """Which heads of which tensors are edited and how, and which files are only carried over."""

    model: Model
    settings: EditSettings
    edits: tuple[LayerTarget, ...]  # empty when the rule is the declared no-op
    warnings: tuple[str, ...]
    output: Output
    request: Request  # what was asked for
    is_done: bool = False  # whether the OUT that was named is that already
    patch: Patch | None = None  # whose rows are written in place of computed ones

    def __repr__(self) -> str:
        """In a line: a notebook shows it, and a plan holds every header."""
        return f"<EditPlan {self.default_name}: {len(self.edits)} tensor(s)>"

    @property
    def max_shard_size(self) -> int | None:
        """The most bytes of tensors in a shard of OUT; None where SOURCE's shards are kept."""
        return self.request.max_shard_size

    @cached_property
    def edits_by_file(self) -> dict[str, tuple[LayerTarget, ...]]:
        """The edits that write to each patched file of OUT, by layer."""
        files: dict[str, dict[LayerTarget, None]] = {}
        for edit in self.edits:
            for ref in edit.written:
                files.setdefault(self.output.place(ref).shard, {})[edit] = None
        return {name: tuple(edits) for name, edits in files.items()}

    def head_ranges(self, edit: LayerTarget, head: int) -> Iterator[tuple[TensorRef, int, int, int]]:
        """The bytes that the edit of a head may change: tensor, begin and end in SOURCE, and begin in OUT."""
        for ref, begin, end in edit.written_ranges(head):
            yield ref, begin, end, begin - ref.begin + self.output.place(ref).begin

    def written_ranges(self, name: str) -> list[tuple[int, int]]:
        """Byte ranges of the planned heads in a file of OUT, ascending; nothing else may differ from SOURCE."""
        return sorted(
            (at, at + end - begin)
            for edit in self.edits_by_file.get(name, ())
            for head in self.settings.heads
            for ref, begin, end, at in self.head_ranges(edit, head)
            if self.output.place(ref).shard == name
        )

    def writes_all_of(self, edit: LayerTarget) -> bool:
        """Whether every byte of the tensors that an edit writes is in planned rows."""
        planned = (end - begin for h in self.settings.heads for _, begin, end in edit.written_ranges(h))
        return sum(planned) == sum(ref.nbytes for ref in edit.written)

    @property
    def edited_bytes(self) -> int:
        """The size in bytes of all planned rows, which are all that is rewritten."""
        return sum(end - begin for name in self.edits_by_file for begin, end in self.written_ranges(name))

    @property
    def output_bytes(self) -> int:
        """Size of OUT without the manifest."""
        return self.output.size

    @property
    def head_memory(self) -> int:
        """Bytes that a thread takes while it edits one head."""
        return head_memory(edit.layout for edit in self.edits)

    @property
    def default_name(self) -> str:
        """What OUT is called where nobody names it: after SOURCE, which tells evaluators the family, and the edit."""
        name = self.model.source.name.rpartition("/")[2].removesuffix(".safetensors")
        most = longest_name(Path()) - len("-qkpatch-00000000")
        name = name.encode()[:most].decode("utf-8", "ignore")
        edit = as_json(self.settings.block)
        del edit["from_recipe"]
        document = {
            "recipe": self.model.recipe.name,
            "edit": edit,
            "max_shard_size": self.max_shard_size,
        }
        return f"{name}-qkpatch-{hashlib.sha256(canonical_json(document).encode()).hexdigest()[:8]}"

    @property
    def default_out(self) -> Path:
        """OUT where nobody names it: in the current directory; where that lies in SOURCE, beside SOURCE.

        A single file with a ``config.json`` beside it stands for its folder.
        """
        source, here, name = self.model.source, Path.cwd(), self.default_name
        place = here if source.path is None else source.path
        folder = place.absolute().parent if source.kind == "file" else place
        root = Path(os.path.realpath(folder))
        is_model = source.kind == "directory" or (source.kind == "file" and (root / "config.json").exists())
        is_inside = is_model and root in (here, *here.parents)
        return Path(os.path.relpath(root.parent / name)) if is_inside else Path(name)

    def action(self, rule: EditRule) -> str:
        """What is done to a head, in one line for people."""
        if rule.is_noop:
            return "alpha 1: nothing is edited"
        n = str(rule.paired_modes) if rule.energy is None else f"{rule.min_modes}-{rule.paired_modes}"
        what = {
            Select.shrink: f"W_Q shrunk by as much as {n} dominant modes would move it",
            Select.subspace: f"a random {n}-dimensional subspace of each query × {exact(rule.alpha)}",
        }.get(rule.select, f"{n} {rule.select.value} modes × {exact(rule.alpha)}")
        energy = "" if rule.energy is None else f", as hold {exact(rule.energy)} of the energy"
        folded = ", gain before attention folded" if self.settings.fold_norm else ""
        return f"{what}, {rule.channel.value} channel{energy}{folded}"


def make_plan(
    source: str, request: Request, access: Access = Access.download, usual: Collection[str] = USUAL
) -> EditPlan:
    """Decide everything and refuse everything that can be refused, before the first byte is written.

    OUT is without what ``usual`` and ``request.exclude`` mean.

    Raises:
        UsageError: the model has no such layer, head or mode.
        QKPatchError: as :func:`open_model`, :meth:`Model.target` and :func:`reshard`.
    """
    exclude = (*usual, *(request.exclude or ()))
    model = open_model(source, request.recipe, request.attention, access, exclude, request.prefix)
    return plan_of(model, request)


def downloaded(plan: EditPlan, observer: Observer) -> EditPlan:
    """The same plan, of the snapshot in the Hub cache, which is made complete."""
    observer.begins("fetch", 0, 0)
    source = plan.model.source
    anew = make_plan(source.text, plan.request)
    if plan.patch is not None:
        of_patch = replace(anew.settings, from_recipe=plan.settings.from_recipe)
        anew = replace(anew, patch=plan.patch, settings=of_patch)
    if (anew.settings, anew.model.recipe) != (plan.settings, plan.model.recipe):
        what = "the recipe changed after the edit was planned"
        raise UsageError(what, where=plan.request.recipe, fix="plan again")
    if anew.model.source.commit != source.commit:
        what = f"it moved from commit {source.commit} to {anew.model.source.commit} after it was planned"
        raise HubError(what, where=source.name, fix="plan again, or name a commit: org/name@commit")
    return anew


def plan_of(model: Model, request: Request) -> EditPlan:
    """As :func:`make_plan`, for a model that is open."""
    settings = resolve(request, model)
    targets = model.targets(settings.layers, fold_norm=settings.fold_norm)
    edits = tuple(target for target in targets if not settings.rule_of(target.layer).is_noop)
    checkpoint = model.checkpoint
    most = request.max_shard_size
    output = Output.copy_of(checkpoint) if most is None else reshard(checkpoint, most)
    _refuse_disputed(model, settings, targets)
    return EditPlan(model, settings, edits, tuple(_warnings(model, settings, targets)), output, request)


def _refuse_disputed(model: Model, settings: EditSettings, targets: tuple[LayerTarget, ...]) -> None:
    """The index may be wrong, but not about what is edited, what that depends on, or what should be there for it."""
    layers = (*settings.layers, *settings.skipped_layers)
    used = [
        s.prefix.format(layer=n) + name
        for s in model.sets
        for n in layers
        for name in (s.names.query, s.names.key)
    ]
    for name in (*used, *(name for target in targets for name in target.names)):
        if (what := model.checkpoint.disputed.get(name)) is not None:
            what = f"the index disagrees with the shards' headers: {what}"
            raise CheckpointError(what, where=name, fix="download the checkpoint again, or re-save it")


def _warnings(model: Model, settings: EditSettings, targets: tuple[LayerTarget, ...]) -> Iterator[Warned]:
    checkpoint = model.checkpoint
    yield from model.notes
    if idle := [layer for layer in settings.layers if settings.rule_of(layer).is_noop]:
        stay = f"layers {format_ranges(idle)} stay as they are"
        what = stay if len(idle) < len(settings.layers) else "OUT will be a byte-identical copy of SOURCE"
        yield warned(f"alpha 1 is a declared no-op: {what}")
    yield from dict.fromkeys(
        warned(f"antisymmetric modes come in equal pairs: {rule.modes} rounded up to {rule.paired_modes}")
        for _, rule in settings.edits
        if rule.paired_modes != rule.modes
    )
    yield from _norm_warnings(
        model, [t for t in targets if settings.rule_of(t.layer).select is Select.shrink]
    )
    shared = [layer for layer in settings.skipped_layers if not model.tower.has_own_keys(layer)]
    uneven = [n for n in settings.skipped_layers if n not in shared and not model.tower.has_product(n)]
    other = [layer for layer in settings.skipped_layers if layer not in (*shared, *uneven)]
    skipped = {
        "use an earlier layer's keys and are skipped; a key weight stored there is dead": shared,
        "have another number of query heads than the model and are skipped": uneven,
        "have no query-key product of this kind (linear attention, or another set of tensors) and are skipped": other,
    }
    for what, layers in skipped.items():
        if layers:
            yield warned(f"layers {format_ranges(layers)} {what}")
    # Once for all targets: a mixture of experts has 10^5 names.
    adapters = [name for name in checkpoint.tensors if ".lora_" in name]
    if adapted := [target for target in targets if _has_adapter(target, adapters)]:
        where = f"{len(adapted)} layer(s), such as {adapted[0].query.name}"
        yield warned(f"adapters (lora) add to the queries of {where}; the edit acts on the base weight alone")
    if model.recipe.tested == UNTESTED:
        what = f"recipe {model.recipe.name} says that it is untested: compare it with the model's own code"
        yield warned(what)
    yield from checkpoint.notes
    if (method := quantised_by_name(checkpoint.config, checkpoint.tensors.values())) is not None:
        what = f"config.json says that weights are quantised ({method}), and none are"
        cure = "take quantization_config out of it"
        yield warned(f"{what}: loaders refuse them, or quantise what was edited; {cure}")
    if empty := [name for name, ref in checkpoint.tensors.items() if ref.shape == (0,)]:
        what = "tensor(s) are empty, as a ZeRO-3 save without gathering leaves them"
        yield warned(f"{len(empty)} {what}: {abbreviate(empty, 3)}")
    if disputed := [f"{name}: {what}" for name, what in checkpoint.disputed.items()]:
        about = f"{len(disputed)} tensor(s), none of them edited"
        yield warned(f"the index is wrong about {about}: {some(disputed, 1)}")
    twins = {name: checkpoint.files[name].size for name in checkpoint.twins}
    yield from _listed("other weight file(s)", twins, f"stay unpatched ({_UNLESS})")
    yield from folder_warnings(checkpoint)
    if checkpoint.single_file:
        yield warned("SOURCE is one file: nothing beside it (tokenizer, config) is copied")
    if checkpoint.previous_manifest is not None:
        yield warned("SOURCE was written by qkpatch: this edit comes on top of that one")


def folder_warnings(checkpoint: Checkpoint) -> Iterator[Warned]:
    """What a user should know of things beside the model, which copies of SOURCE need not have."""
    secret = {name: file.size for name, file in checkpoint.files.items() if is_secret(name)}
    yield from _listed("file(s) named like secrets", secret, f"are copied into OUT ({_UNLESS})")
    if strays := checkpoint.from_outside:
        what = "file(s) are links that lead out of SOURCE, and what they lead to is copied"
        yield warned(f"{len(strays)} {what}: {abbreviate(strays, 5)}")
    asked = [pattern for pattern in checkpoint.exclude if pattern not in USUAL]
    if unused := [p for p in asked if not any(matching(name, (p,)) for name in checkpoint.left_out)]:
        yield warned(f"nothing in SOURCE is called as --exclude says: {some(unused)}")
    left = {name: n for name, n in checkpoint.left_out.items() if not matching(name, tuple(RUBBISH))}
    yield from _listed("file(s) or folder(s)", left, "are left out of OUT")


def _listed(kind: str, sizes: Mapping[str, int], what: str) -> Iterator[Warned]:
    """A warning of files, if there are any."""
    if sizes:
        shown = abbreviate([f"{name} ({size_text(n)})" for name, n in sizes.items()], 5)
        yield warned(f"{len(sizes)} {kind}, {size_text(sum(sizes.values()))}, {what}: {shown}")


def _norm_warnings(model: Model, targets: Sequence[LayerTarget]) -> Iterator[Warned]:
    """What becomes of queries that are shrunk."""
    normed = [target for target in targets if target.norms is not None]
    is_l2_normed = bool(model.tower.logits.get("use_qk_norm"))  # Llama 4: a norm without weights
    if not targets or (not normed and not is_l2_normed):
        return
    if any(_is_over_projection(target) for target in normed):
        what = "queries are normalised over all heads, so shrinking W_Q only shifts weight between heads"
    elif any(target.query.name.removesuffix("weight") + "bias" in target.biases for target in targets):
        what = "queries are normalised per head, so shrinking W_Q only gives their bias more weight"
    else:
        what = "queries are normalised per head, so shrinking W_Q changes nothing in the model's output"
    yield warned(what)


def _has_adapter(target: LayerTarget, adapters: Iterable[str]) -> bool:
    module = target.query.name.removesuffix(".weight").removesuffix(".base_layer")
    return any(name.startswith(f"{module}.lora_") for name in adapters)


def _is_over_projection(target: LayerTarget) -> bool:
    norm, layout = target.query_norm, target.layout
    return norm is not None and layout.n_heads > 1 and norm.shape == (layout.n_heads * layout.d_head,)
