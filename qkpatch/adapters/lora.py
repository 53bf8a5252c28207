"""``lora``: the edit of SOURCE as a low-rank adapter. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkpatch.adapters.modules import VLLM_RANKS, Runtime, query_modules
from qkpatch.common.interrupts import import_torch
from qkpatch.common.number_ranges import format_ranges
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.errors import UnsupportedError, UsageError, refuse_warnings
from qkpatch.model.locate import Access, local_path
from qkpatch.model.targets import LayerTarget
from qkpatch.output.destination import check_out
from qkpatch.output.options import PLAIN, Writing
from qkpatch.planning.memory import choose_threads
from qkpatch.planning.plan import EditPlan, make_plan
from qkpatch.planning.request import Request, member
from qkpatch.spectral.rule import Channel, Select

if TYPE_CHECKING:
    from qkpatch.planning.manifest import Manifest

_Ranks = dict[LayerTarget, int]


def lora(
    source: str | Path | None,
    out: str | Path,
    request: Request | None = None,
    *,
    recorded: str | Path | None = None,
    runtime: str = "peft",
    max_rank: int = 512,
    device: str = "cpu",
    threads: int | None = None,
    observer: Observer = UNSEEN,
    writing: Writing = PLAIN,
    **edit: Any,
) -> Manifest:
    """Write the edit of SOURCE as a low-rank adapter in PEFT's layout, and return its manifest.

    ``W_Q + B A`` is the edited ``W_Q``: A (r × d_model) and B (rows × r) are the factors of the edit itself, rounded
    once, to float32. OUT appears whole, by one rename, or not at all. Of a repository, headers and rows are fetched.

    Args:
        source: as of :func:`qkpatch.plan`; None for the repository that ``recorded`` was made from.
        out: a directory.
        request: as of :func:`qkpatch.plan`, without ``max_shard_size``.
        recorded: what :func:`qkpatch.apply` wrote, whose edit is taken; beside it, only ``recipe`` may be asked for.
        runtime: what loads it, ``peft`` or ``vllm``: names of modules differ.
        max_rank: the largest r that is wanted; heads times modes is r.
        device: as of :func:`qkpatch.apply`.
        threads: how many layers are computed side by side.
        observer: hears of heads.
        writing: ``overwrite``, ``force`` and ``strict``.
        **edit: the fields of ``request``.

    Raises:
        UsageError: OUT cannot be written; r is too large; nothing is edited.
        UnsupportedError: an edit of full rank, which is shrink; a class whose modules are unknown, or without adapters.
        QKPatchError: as :func:`qkpatch.plan`; SOURCE is not that of ``recorded``; a change is zero, or beyond float32.
    """
    from qkpatch.adapters.recorded import plan_recorded
    from qkpatch.adapters.writing import adapter_record, write_adapter
    from qkpatch.compare.overwrite import standing
    from qkpatch.patching.apply import check_run
    from qkpatch.planning.manifest import Manifest

    request, loader = Request.asked(request, edit), member(runtime, Runtime, "--for")
    place, name = Path(out), None if source is None else str(source)
    if request.max_shard_size is not None:
        raise UsageError("an adapter has no shards", where="--max-shard-size", fix="leave it out")
    if name is None or local_path(name) is None:  # else in `standing`, after whether it is SOURCE
        check_out(place, overwrite=writing.overwrite, force=writing.force)
    if name is None and recorded is None:
        raise UsageError("SOURCE is not named", fix="name it, or what was made from it: --from OUT")
    from_out = None if recorded is None else plan_recorded(Path(recorded), name, request)
    plan = from_out or make_plan(str(name), request, Access.ranges)
    refuse_warnings(plan.warnings, strict=writing.strict)
    found = standing(place, plan, writing, is_whole=False)
    if isinstance(found, Manifest):
        raise UsageError("it is the edited checkpoint itself", where=str(out), fix="choose another -o")
    _check_rank(plan, max_rank, loader)
    modules = query_modules(plan.model, plan.edits, loader)
    per_thread = plan.head_memory + max(target.read_bytes(plan.settings.heads) for target in plan.edits)
    n_threads = choose_threads(threads, per_thread, len(plan.model.checkpoint.tensors))
    check_run(plan, device, n_threads)
    import_torch()
    from qkpatch.adapters.factors import edit_factors

    observer.begins("factor", 0, len(plan.edits) * len(plan.settings.heads))
    layers = [(each, modules[each.target]) for each in edit_factors(plan, device, n_threads, observer)]
    _check_rank(plan, max_rank, loader, {layer.target: layer.rank for layer, _ in layers})
    record = adapter_record(plan, device, {})
    return write_adapter(place, plan.model.checkpoint, record, loader, layers, found)


def _check_rank(plan: EditPlan, max_rank: int, runtime: Runtime, ranks: _Ranks | None = None) -> None:
    """Refuse an edit that no adapter of ``max_rank`` holds; of an ``energy``, once its ``ranks`` are known."""
    heads, most = plan.settings.heads, VLLM_RANKS[-1] if runtime is Runtime.vllm else 1 << 20
    if type(max_rank) is not int or not 1 <= max_rank <= most:
        raise UsageError(f"{max_rank!r:.80} is not between 1 and {most}", where="--max-rank")
    if not plan.edits:
        raise UsageError("alpha 1 changes nothing", where="--alpha", fix="choose a smaller one")
    for target in plan.edits:
        rule = plan.settings.rule_of(target.layer)
        if rule.select is Select.shrink:
            what = "shrink scales whole heads: its change has full rank, which no low-rank adapter holds"
            raise UnsupportedError(what, where="--select", fix="a patch file: qkpatch apply --patch-only")
        planned = 0 if rule.energy is not None else rule.paired_modes * len(heads)
        if (rank := planned if ranks is None else ranks[target]) > max_rank:
            step = 2 if rule.channel is Channel.antisymmetric else 1  # whole pairs
            fewer, some = max_rank // len(heads) // step * step, heads[: max_rank // step]
            named = "--modes {}" if plan.request.edits is None else "modes: {} in its edits"
            part = "" if fewer else f"--heads {format_ranges(some or heads)} "
            cures = [part + named.format(fewer or step)] * bool(some)
            cures += [f"--max-rank {rank}"] * (rank <= most)
            what = f"{len(heads)} heads make rank {rank} in layer {target.layer}, more than {max_rank}"
            raise UsageError(what, where="--max-rank", fix=", or ".join(cures))
