"""The edit of a loaded transformers model: its tensors are read as a checkpoint's would be, and written in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkpatch.checkpoint.files import OpenFile
from qkpatch.checkpoint.header import Header, TensorRef
from qkpatch.checkpoint.source import Checkpoint
from qkpatch.checkpoint.tree import Repository, SourceFile
from qkpatch.common.observer import UNSEEN
from qkpatch.errors import CheckpointError, UnsupportedError, UsageError
from qkpatch.model.locate import Source
from qkpatch.model.model import understood
from qkpatch.patching.edit_heads import Editor
from qkpatch.patching.head_bytes import DTYPES
from qkpatch.patching.threads import Crew
from qkpatch.planning.manifest import HeadRecord
from qkpatch.planning.memory import choose_threads
from qkpatch.planning.plan import EditPlan, plan_of
from qkpatch.planning.request import Request

_NAMES = {dtype: name for name, dtype in DTYPES.items() if dtype is not torch.uint8}
_FILE = "memory"
_COMPILED = "_orig_mod"  # where torch.compile keeps a module, whose tensors stay its own


@dataclass(frozen=True)
class LoadedEdit:
    """What was written into a model, and what was there before."""

    plan: EditPlan
    heads: Mapping[str, tuple[HeadRecord, ...]]  # by the query tensor's name
    _before: tuple[tuple[Tensor, int, Tensor], ...]  # a tensor, an offset in its bytes, and the bytes

    def __repr__(self) -> str:
        """In a line: the former weights are part of it."""
        return f"<LoadedEdit: {len(self.heads)} tensor(s)>"

    def restore(self) -> None:
        """Put the former bits back; once more does nothing else."""
        for tensor, at, data in self._before:
            _write(tensor, at, data)


def edit_loaded(model: torch.nn.Module, request: Request) -> LoadedEdit:
    """As :func:`qkpatch.api.patch_model`."""
    check_loadable(request)
    model = getattr(model, _COMPILED, model)
    where, tensors = type(model).__name__, _tensors(model)
    refs = _refs(tensors)
    memory = _Tensors(where, refs, tensors)
    checkpoint = Checkpoint(
        where=where,
        root=None,
        headers={_FILE: Header(_FILE, 0, memory.size, refs, None)},
        files={_FILE: _Memory(_FILE, memory.size, 0o600, where, memory)},
        config=_config(model),
    )
    source = Source(_Loaded(), "memory", where)
    plan = plan_of(understood(source, checkpoint, request.recipe, request.attention, request.prefix), request)
    written: list[tuple[Tensor, int, bytes]] = []

    _refuse_shared(tensors, {ref.name for target in plan.edits for ref in target.written})

    def write(shard: str, data: bytes | bytearray, at: int) -> None:
        ref = next(ref for target in plan.edits for ref in target.written if ref.begin <= at < ref.end)
        written.append((tensors[ref.name], at - ref.begin, bytes(data)))

    heads: dict[str, tuple[HeadRecord, ...]] = {}
    with Crew(choose_threads(None, plan.head_memory, len(tensors))) as crew:
        for target, records in Editor.on("cpu").edited(plan, checkpoint.opened, crew, write, UNSEEN):
            heads[target.query.name] = records
    # Not before all heads are computed: what fails leaves the model as it was.
    before = tuple((tensor, at, _read(tensor, at, len(data))) for tensor, at, data in written)
    made = LoadedEdit(plan, heads, before)
    try:
        for tensor, at, data in written:
            _write(tensor, at, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except BaseException:
        made.restore()
        raise
    return made


def check_loadable(request: Request) -> None:
    """Raise :class:`UsageError` where it says something of files, which a loaded model has none of."""
    for what in ("max_shard_size", "exclude"):
        if getattr(request, what) is not None:
            raise UsageError("a loaded model has no files", where=what, fix="leave it out")


class _Loaded(Repository):
    """In place of a repository: a loaded model has no files."""

    where = _FILE
    files: Mapping[str, SourceFile] = {}

    def check_still(self, names: Collection[str]) -> None:
        """Nothing of it is read twice."""


@dataclass(frozen=True)
class _Tensors(OpenFile):
    """A model's tensors as if they lay one after the other in a file; no read crosses from one to the next."""

    where: str
    refs: Mapping[str, TensorRef]
    tensors: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        return max((ref.end for ref in self.refs.values()), default=0)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        ref = next(ref for ref in self.refs.values() if ref.begin <= offset < ref.end)
        data = _read(self.tensors[ref.name], offset - ref.begin, len(buffer))
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(data)


@dataclass(frozen=True)
class _Memory(SourceFile):
    """In place of the file."""

    tensors: _Tensors

    @property
    def content(self) -> str:
        return self.where

    def open(self, ranges: Sequence[tuple[int, int]] = ()) -> AbstractContextManager[OpenFile]:
        return nullcontext(self.tensors)


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """All of a model's tensors, by the names that it saves them under.

    Raises:
        UnsupportedError: they are not where they can be written.
    """
    stored = model.state_dict(keep_vars=True).items()
    tensors = {name.replace(f"{_COMPILED}.", ""): tensor.detach() for name, tensor in stored}
    places = sorted({str(tensor.device) for tensor in tensors.values()})
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        what = "the model was quantised when it was loaded"
        fix = "load it without quantization_config, or edit the checkpoint with `qkpatch apply`"
    elif "meta" in places:
        what = "its weights are on the meta device, where there is nothing to edit"
        fix = "load it with weights, and without offloading to disk"
    elif len(places) > 1:
        what = f"its weights are on several devices: {', '.join(places)}"
        fix = "load it on one, or edit the checkpoint with `qkpatch apply`"
    else:
        return tensors
    raise UnsupportedError(what, where=type(model).__name__, fix=fix)


def _refuse_shared(tensors: Mapping[str, Tensor], edited: Collection[str]) -> None:
    """Raise :class:`UnsupportedError` where an edit of a tensor would change another one, or itself twice."""
    spans = {name: _span(tensor) for name, tensor in tensors.items() if tensor.numel()}
    for name in edited:
        begin, end = spans[name]
        others = [n for n, (b, e) in spans.items() if n != name and b < end and begin < e]
        if others or end - begin < tensors[name].numel() * tensors[name].element_size():
            raise UnsupportedError(
                f"it shares memory with {others[0] if others else 'itself'}, which would change with it",
                where=name,
                fix="load the model anew, or give the tensor memory of its own: weight.data = weight.data.clone()",
            )


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor lies between."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _refs(tensors: Mapping[str, Tensor]) -> dict[str, TensorRef]:
    """The tensors as if they lay one after the other in a file."""
    refs, at = {}, 0
    for name, tensor in tensors.items():
        dtype = _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper())
        end = at + tensor.numel() * tensor.element_size()
        refs[name] = TensorRef(name, _FILE, dtype, tuple(tensor.shape), at, end)
        at = end
    return refs


def _config(model: torch.nn.Module) -> Mapping[str, object]:
    """The model's config.json, as ``save_pretrained`` would write it."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        what, where = "it has no config that says what it is", type(model).__name__
        raise CheckpointError(what, where=where, fix="give a model of transformers")
    return {**config.to_dict(), "architectures": [type(model).__name__]}


def _read(tensor: Tensor, at: int, size: int) -> Tensor:
    """A copy of bytes of a tensor, on the CPU."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat[at : at + size].cpu().clone()


def _write(tensor: Tensor, at: int, data: Tensor) -> None:
    """Put bytes into a tensor, whatever its strides."""
    if tensor.is_contiguous():
        tensor.view(-1).view(torch.uint8)[at : at + len(data)] = data.to(tensor.device)
        return
    whole = tensor.contiguous()
    whole.view(-1).view(torch.uint8)[at : at + len(data)] = data.to(tensor.device)
    tensor.copy_(whole)
