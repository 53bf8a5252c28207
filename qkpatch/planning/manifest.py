"""``Manifest``: what was done, precisely enough to check it byte for byte. Canonical JSON, torch-free.

Everything but the ``run`` block is reproducible: same source, same edit, same stack, same bytes. Keys are
sorted, numbers finite, settings exact and measured figures of nine significant digits, paths relative and POSIX,
nothing of the machine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import distributions, version
from typing import Any, NamedTuple

from qkpatch.checkpoint.source import MANIFEST_NAME, Stored
from qkpatch.checkpoint.tree import is_plain_relative
from qkpatch.common.json_text import Json, canonical_json, load_json
from qkpatch.common.typed_json import LEFT_OUT, as_json, from_json
from qkpatch.errors import CheckpointError, UsageError, one_line
from qkpatch.model.targets import LayerTarget
from qkpatch.output.layout import Output, OutputFile
from qkpatch.planning import blocks
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.request import Request

SCHEMA = "qkpatch/1"
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HeadRecord:
    """One edited head; see the JSON Schema for each field."""

    head: int
    kv_head: int
    modes: tuple[int, ...]
    rank: int
    values_before: tuple[float, ...]
    values_after: tuple[float, ...]
    gap: float | None
    frobenius_before: float
    frobenius_after: float
    relative_change: float
    rounding_error: float
    realised_share: float | None
    gains: tuple[float, ...]


class WrittenTensor(NamedTuple):
    """A tensor that an edit wrote to, and its digests."""

    tensor: str
    shard: str
    sha256_before: str | None
    sha256_after: str | None
    may_stay: bool  # scales change only where a block overflows


@dataclass(frozen=True)
class EditRecord:
    """One edited tensor. A plan has no digests and no heads' figures yet."""

    layer: int
    tensor: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    byte_range: tuple[int, int]  # absolute in the shard, half-open
    attention: str
    num_key_value_heads: int
    head_dim: int
    key_tensor: str
    key_shard: str
    norms: tuple[str, ...] = ()  # of queries and keys; part of the product
    biases: tuple[str, ...] = ()  # of queries and keys; not part of it, unchanged
    folded_norm: str | None = None  # the gain before attention, where it is part of the product
    sha256_before: str | None = None
    sha256_after: str | None = None
    scale_tensor: str | None = None  # of FP8 by blocks or rows, edited along
    scale_shard: str | None = None
    scale_sha256_before: str | None = None
    scale_sha256_after: str | None = None
    heads: tuple[HeadRecord, ...] = ()

    @classmethod
    def planned(cls, target: LayerTarget, output: Output) -> EditRecord:
        """The record of an edit that is still to be made; places are those in OUT."""
        query, key = output.place(target.query), output.place(target.key)
        scale = None if target.grown_scale is None else output.place(target.grown_scale)
        return cls(
            layer=target.layer,
            tensor=query.name,
            shard=query.shard,
            dtype=query.dtype,
            shape=query.shape,
            byte_range=(query.begin, query.end),
            attention=target.attention,
            num_key_value_heads=target.layout.n_kv_heads,
            head_dim=target.layout.d_head,
            key_tensor=key.name,
            key_shard=key.shard,
            norms=tuple(norm.name for norm in (target.query_norm, target.key_norm) if norm is not None),
            biases=target.biases,
            folded_norm=None if target.input_norm is None else target.input_norm.name,
            scale_tensor=None if scale is None else scale.name,
            scale_shard=None if scale is None else scale.shard,
        )

    @property
    def written(self) -> tuple[WrittenTensor, ...]:
        """The edited tensor, and its scales where it has some."""
        query = WrittenTensor(self.tensor, self.shard, self.sha256_before, self.sha256_after, may_stay=False)
        if self.scale_tensor is None or self.scale_shard is None:
            return (query,)
        digests = self.scale_sha256_before, self.scale_sha256_after
        return query, WrittenTensor(self.scale_tensor, self.scale_shard, *digests, may_stay=True)

    def done(
        self, before: Sequence[str | None], after: Sequence[str | None], heads: tuple[HeadRecord, ...]
    ) -> EditRecord:
        """The record with the digests of all it wrote, in the order of :attr:`written`, and the heads' figures."""
        done = replace(self, sha256_before=before[0], sha256_after=after[0], heads=heads)
        if self.scale_tensor is None:
            return done
        return replace(done, scale_sha256_before=before[1], scale_sha256_after=after[1])

    def without_figures(self) -> EditRecord:
        """What was known before any weight was read."""
        return self.done((None, None), (None, None), ())


@dataclass(frozen=True)
class FileRecord:
    """One file of OUT and how it came there."""

    name: str
    size: int
    action: str  # "copied", "patched", "resharded", or "made" of an adapter
    sha256: str | None = None  # where digests of files are wanted
    source_sha256: str | None = None  # of SOURCE's file, where the Hub lists it or its cache is named by it
    outside: bool = False  # SOURCE has it, or a part of it, by a link that leads out of SOURCE


@dataclass(frozen=True)
class Manifest:
    """The content of ``qkpatch.json``."""

    tool: blocks.ToolBlock
    compute: blocks.ComputeBlock
    source: blocks.SourceBlock
    recipe: blocks.RecipeBlock
    edit: blocks.EditBlock
    model: blocks.ModelBlock
    output: blocks.OutputBlock
    edits: tuple[EditRecord, ...]
    files: tuple[FileRecord, ...]
    warnings: tuple[str, ...]
    run: blocks.RunBlock = field(compare=False)
    adapter: blocks.AdapterBlock | None = field(default=None, metadata=LEFT_OUT)
    further: Mapping[str, blocks.Plain] = field(default_factory=dict)  # of other versions, as in blocks

    def __repr__(self) -> str:
        """In a line; :meth:`dumps` tells all."""
        return f"<Manifest of {self.source.name}: {len(self.edits)} tensor(s) edited>"

    def to_json(self) -> dict[str, Json]:
        """Plain JSON values, in the schema's shape."""
        return {"schema": SCHEMA, **as_json(self)}

    def telling(self, **said: Any) -> Manifest:
        """The same, with more said of its run."""
        return replace(self, run=replace(self.run, **said))

    def dumps(self) -> str:
        """Canonical text; ``Manifest.loads(m.dumps()).dumps() == m.dumps()``."""
        return canonical_json(self.to_json())

    @classmethod
    def loads(cls, raw: bytes, where: str) -> Manifest:
        """Read a manifest of this schema version.

        Raises:
            CheckpointError: not a manifest, or of a version this qkpatch does not know.
        """
        document = load_json(raw, where, unique=True)
        found = document.pop("schema", None) if isinstance(document, dict) else None
        if found != SCHEMA:
            what = f"manifest schema {found!r}, this qkpatch reads {SCHEMA!r}"
            raise CheckpointError(what, where=where, fix="use the qkpatch version that wrote it")
        try:
            manifest: Manifest = from_json(cls, document)
            manifest._check()
        except (UsageError, ValueError) as error:
            raise CheckpointError(f"malformed manifest: {error}", where=where) from error
        return manifest

    def _check(self) -> None:
        """Refuse what ``verify`` could not work with: UsageError for no such edit, ValueError for anything else."""
        self.request()
        source, model = self.source, self.model
        if min(model.num_attention_heads, model.num_key_value_heads, model.head_dim, model.hidden_size) < 1:
            raise ValueError("a size of the model is not at least 1")
        names, files = [edit.tensor for edit in self.edits], [file.name for file in self.files]
        shards = (shard for e in self.edits for shard in (e.shard, e.key_shard, e.scale_shard or e.shard))
        # A backslash is a letter like others on this system; where it is not, publishing refuses it.
        if not all(is_plain_relative(path.replace("\\", "_")) for path in (*files, *shards)):
            raise ValueError("the name of a file is no plain path inside OUT")
        if len(set(names)) != len(names) or len({*files, MANIFEST_NAME}) != len(files) + 1:
            raise ValueError("a tensor or a file is recorded twice, or the manifest itself")
        if source.kind not in ("directory", "file", "store", "hub"):
            raise ValueError("the source is of no known kind")
        if source.kind == "hub" and not COMMIT.fullmatch(source.commit or ""):
            raise ValueError("the source is a repository, and its commit is none")

    def foreign(self, stored: Stored) -> list[str]:
        """The edited tensors that ``stored`` has not as they were before, as far as there are digests."""
        pairs = [(stored.tensors.get(each.tensor), each) for edit in self.edits for each in edit.written]
        return [each.tensor for ref, each in pairs
                if ref is None or each.sha256_before not in (None, stored.sha256(ref))]  # fmt: skip

    def request(self) -> Request:
        """The request that leads to the recorded edit on the same SOURCE."""
        edit = self.edit
        keys = ("prefix", "attention", "heads", "seed", "fold_norm")
        return Request.of(
            **{key: getattr(edit, key) for key in keys},
            **(edit.items[0] if edit.edits is None else {"edits": edit.items}),
            recipe=self.recipe.name,
            max_shard_size=self.output.max_shard_size,
            exclude=self.output.exclude,
        )


def planned_manifest(plan: EditPlan, device: str) -> Manifest:
    """The manifest of ``plan`` as far as it is known before any weight is read."""
    model, checkpoint, layout = plan.model, plan.model.checkpoint, plan.model.tower.layout
    found = model.source
    source = blocks.SourceBlock(found.kind, one_line(found.name), found.requested_revision, found.commit)
    strays = set(checkpoint.from_outside)
    if checkpoint.previous_manifest is not None:
        previous = Manifest.loads(checkpoint.previous_manifest, "SOURCE's qkpatch.json")
        source = replace(source, previous_edit=previous.edit)
        if found.kind != "hub":  # where all can see them anyway
            strays |= {file.name for file in previous.files if file.outside}
    outside = plan.output.made_of(strays)
    prefixes = {chosen.names.attention: chosen.prefix for chosen in model.sets}
    return Manifest(
        tool=_tool(),
        compute=blocks.ComputeBlock(device, "float64"),
        source=source,
        recipe=from_json(blocks.RecipeBlock, {**model.recipe.to_json(), "prefix": prefixes}),
        edit=plan.settings.block,
        model=blocks.ModelBlock(
            model_type=checkpoint.config.get("model_type"),
            text_model_type=model.tower.text_model_type,
            num_hidden_layers=model.tower.n_layers,
            num_attention_heads=layout.n_heads,
            num_key_value_heads=layout.n_kv_heads,
            head_dim=layout.d_head,
            hidden_size=layout.d_model,
            orientation=model.recipe.tensors.orientation,
            rows=layout.rows,
            logits=model.tower.logits,
        ),
        output=blocks.OutputBlock(plan.max_shard_size, plan.request.exclude),
        edits=tuple(EditRecord.planned(target, plan.output) for target in plan.edits),
        files=tuple(_planned_file(file, plan, outside) for file in plan.output.files.values()),
        warnings=plan.warnings,
        run=blocks.RunBlock(already_done=plan.is_done or None),
    )


@cache  # each look reads files of the environment, and neither changes while a process runs
def _tool() -> blocks.ToolBlock:
    torch = next((found.version for found in distributions(name="torch")), "none")  # a plan takes none
    return blocks.ToolBlock("qkpatch", version("qkpatch"), torch)


def _planned_file(file: OutputFile, plan: EditPlan, outside: Collection[str]) -> FileRecord:
    action = "resharded" if file.original is None else "copied"
    listed = None if file.original is None else file.original.listed
    return FileRecord(
        file.name,
        file.size,
        "patched" if file.name in plan.edits_by_file else action,
        source_sha256=None if listed is None else listed.sha256,
        outside=file.name in outside,
    )
