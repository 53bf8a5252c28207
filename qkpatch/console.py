"""What people see: tables and progress bars on a terminal, plain text when piped, errors with their cure.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qkpatch.errors import FileSystemError, QKPatchError
from qkpatch.selection import format_ranges

if TYPE_CHECKING:
    from qkpatch.manifest import Manifest
    from qkpatch.plan import EditPlan
    from qkpatch.spectra import LayerSpectra
    from qkpatch.verify import Verification

_LONGEST = 8000  # characters of a message
_PIPED_WIDTH = 140  # rich assumes 80 where there is no terminal, which cuts tensor names


class _Console(Console):
    """Rich's console; a reader who leaves early is an exception here, not an exit of rich's own."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return _Console(stderr=stderr, width=None if stream.isatty() else _PIPED_WIDTH, highlight=False)


def prepare_streams() -> None:
    """Make stdout and stderr take any text, whatever the locale, and be there even when they were closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _results() -> Iterator[Console]:
    """The console for stdout; output that cannot be delivered is an error, not a traceback.

    Raises:
        FileSystemError: stdout is full or broken. What the command did stays done.
    """
    try:
        yield _console()
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
        raise FileSystemError(
            f"the result cannot be printed: {error.strerror}",
            where="stdout",
            fix="the command itself was done",
        ) from error


def safe(text: str) -> str:
    """``text`` for the terminal: neither rich's markup nor control characters out of a file act in it."""
    return escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))


def print_text(text: str) -> None:
    """A result as it is, for programs."""
    with _results():
        sys.stdout.write(text)


def print_json(value: Any) -> None:
    """A result for programs."""
    print_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def show_error(error: QKPatchError) -> None:
    """What, where, what to do."""
    with suppress(OSError):
        _show_error(_console(stderr=True), error)


def _show_error(console: Console, error: QKPatchError) -> None:
    console.print(f"[bold red]Error:[/] {safe(_cut(error.what))}", soft_wrap=True)
    if error.where:
        console.print(f"  [dim]where[/]  {safe(_cut(error.where))}", soft_wrap=True)
    if error.fix:
        console.print(f"  [dim]try[/]    {safe(_cut(error.fix))}", soft_wrap=True)


def _cut(text: str) -> str:
    """What files put into a message may be of any length."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def show_warnings(warnings: Sequence[str]) -> None:
    """Each warning on a line of its own, on stderr."""
    with suppress(OSError):
        for warning in warnings:
            _console(stderr=True).print(f"[yellow]Warning:[/] {safe(warning)}", soft_wrap=True)


def note(text: str) -> None:
    """A remark on stderr."""
    with suppress(OSError):
        _console(stderr=True).print(safe(text), soft_wrap=True)


class Unseen:
    """Progress that nobody sees; implements ``patch.Observer``."""

    def copied(self, n_bytes: int) -> None:
        """Nothing to draw."""

    def edited(self, n_heads: int) -> None:
        """Nothing to draw."""


class Bars(Unseen):
    """Progress drawn on stderr: bytes copied or compared, heads edited."""

    def __init__(self, progress: Progress, total_bytes: int, total_heads: int, verb: str) -> None:
        self._progress = progress
        self._bytes = progress.add_task(
            f"{verb} {_size(total_bytes)}", total=total_bytes, visible=total_bytes > 0
        )
        self._heads = progress.add_task(f"{total_heads} heads", total=total_heads, visible=total_heads > 0)

    def copied(self, n_bytes: int) -> None:
        """Advance the bar of bytes."""
        self._progress.advance(self._bytes, n_bytes)

    def edited(self, n_heads: int) -> None:
        """Advance the bar of heads."""
        self._progress.advance(self._heads, n_heads)


@contextmanager
def bars(total_bytes: int, total_heads: int, *, quiet: bool, verb: str = "copy") -> Iterator[Unseen]:
    """Progress bars while the block runs; nothing at all when quiet or when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield Unseen()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_console(stderr=True), transient=True) as progress:
        yield Bars(progress, total_bytes, total_heads, verb)


def show_plan(plan: EditPlan, free_disk: int, memory: int, threads: int) -> None:
    """The plan as a person reads it: what, where, and what it costs."""
    with _results() as console:
        _heading(console, plan)
        if plan.edits:
            table = _table("layer", "attention", "shard", "key's shard, where another")
            for edit in plan.edits:
                other = "" if edit.key.shard == edit.query.shard else edit.key.shard
                table.add_row(str(edit.layer), edit.attention, safe(edit.query.shard), safe(other))
            console.print(table)
        dtypes = " and ".join(sorted({edit.query.dtype for edit in plan.edits})) or "no dtype"
        n_files = len(plan.model.checkpoint.files)
        console.print(
            f"{len(plan.edits)} tensor(s) in {dtypes}, {len(plan.edits) * len(plan.settings.heads)} head(s), "
            f"{_size(plan.edited_bytes)} rewritten in {len(plan.edits_by_shard)} of {n_files} file(s)"
        )
        console.print(
            f"OUT {_size(plan.output_bytes)}, free disk {_size(free_disk)}, "
            f"expected peak memory {_size(memory)} ({threads} thread(s))"
        )


def show_applied(plan: EditPlan, manifest: Manifest, source: str, out: Path) -> None:
    """What was done, layer by layer."""
    with _results() as console:
        _heading(console, plan)
        table = _table("layer", "heads", "‖ΔW_Q‖/‖W_Q‖ mean", "max", "‖M‖ after/before", "gap min")
        has_shares = any(head.realised_share is not None for edit in manifest.edits for head in edit.heads)
        if has_shares:
            table.add_column("realised", justify="right")
        is_coarse = any(edit.scale_tensor is not None for edit in manifest.edits)
        if is_coarse:
            table.add_column("requantisation", justify="right")
        for edit in manifest.edits:
            changes = [head.relative_change for head in edit.heads]
            gaps = [head.gap for head in edit.heads if head.gap is not None]
            shares = [head.realised_share for head in edit.heads if head.realised_share is not None]
            norms = [h.frobenius_after / h.frobenius_before for h in edit.heads if h.frobenius_before]
            table.add_row(
                str(edit.layer),
                str(len(edit.heads)),
                f"{mean(changes):.4f}",
                f"{max(changes):.4f}",
                f"{mean(norms):.4f}" if norms else "-",
                f"{min(gaps):.2g}" if gaps else "-",
                *([f"{mean(shares):.3f}" if shares else "-"] if has_shares else []),
                *([f"{mean(head.rounding_error for head in edit.heads):.3f}"] if is_coarse else []),
            )
        if manifest.edits:
            console.print(table)
        patched = sum(file.action == "patched" for file in manifest.files)
        console.print(
            f"Wrote {safe(str(out))}: {len(manifest.edits)} tensor(s) edited in {patched} file(s), "
            f"{len(manifest.files) - patched} file(s) copied, {_size(plan.output_bytes)}"
        )
        own = ["--recipe", plan.model.recipe_file] if plan.model.recipe_file else []
        command = shlex.join(["qkpatch", "verify", str(out), "--source", source, *own])
        console.print(f"Prove it with: {safe(command)}", soft_wrap=True)


def _heading(console: Console, plan: EditPlan) -> None:
    model, layout, settings = plan.model, plan.model.tower.layout, plan.settings
    own = f" ({safe(model.recipe_file)})" if model.recipe_file else ""
    chosen = f" (recipe's default: {', '.join(settings.from_recipe)})" if settings.from_recipe else ""
    console.print(
        f"[bold]{safe(model.source.name)}[/]: recipe {safe(model.recipe.name)}{own}, {model.tower.n_layers} layers, "
        f"{layout.n_heads} query / {layout.n_kv_heads} key heads of {layout.d_head}, hidden {layout.d_model}"
    )
    for other in sorted(set(model.tower.exceptions.values()) - {layout}, key=lambda other: other.d_head):
        where = format_ranges([n for n, of in model.tower.exceptions.items() if of == other])
        console.print(
            f"Layers {where}: {other.n_heads} / {other.n_kv_heads} heads of {other.d_head}", soft_wrap=True
        )
    for one in model.sets:
        names = one.names
        which = f" ({names.attention})" if model.recipe.others else ""
        console.print(
            f"Tensors{which}: {safe(one.prefix + names.query)} by {safe(names.key)}", soft_wrap=True
        )
    console.print(
        f"Edit: {plan.action}; layers {format_ranges(settings.layers)}, heads {format_ranges(settings.heads)}{chosen}"
    )


def show_spectra(layers: Sequence[LayerSpectra], modes: int) -> None:
    """One row per layer, means over heads."""
    table = _table(
        "layer", "σ₁ mean", "σ₁ max", f"energy in top {modes}", "effective rank", "symmetric share", "gap min"
    )
    for layer in layers:
        heads = layer.heads
        gaps = [head.gap for head in heads if head.gap is not None]
        table.add_row(
            str(layer.layer),
            f"{mean(head.singular_values[0] for head in heads):.4g}",
            f"{max(head.singular_values[0] for head in heads):.4g}",
            f"{mean(head.energy_share for head in heads):.3f}",
            f"{mean(head.effective_rank for head in heads):.1f}",
            f"{mean(head.symmetric_share for head in heads):.3f}",
            f"{min(gaps):.2g}" if gaps else "-",
        )
    with _results() as console:
        console.print(table)


def spectra_json(source: str, recipe: str, modes: int, layers: Sequence[LayerSpectra]) -> dict[str, Any]:
    """The spectra with all singular values, for programs."""
    return {
        "source": source,
        "recipe": recipe,
        "modes": modes,
        "layers": [
            {
                "layer": layer.layer,
                "attention": layer.attention,
                "heads": [vars(head) for head in layer.heads],
            }
            for layer in layers
        ],
    }


def print_spectra_csv(layers: Sequence[LayerSpectra]) -> None:
    """One line per singular value."""
    with _results():
        rows = csv.writer(sys.stdout, lineterminator="\n")
        rows.writerow(["layer", "head", "kv_head", "mode", "singular_value"])
        rows.writerows(
            [layer.layer, head.head, head.kv_head, mode, repr(value)]
            for layer in layers
            for head in layer.heads
            for mode, value in enumerate(head.singular_values)
        )


def output_width() -> int:
    """Columns of stdout, for text that is wrapped elsewhere."""
    return _console().width


def show_verification(result: Verification, out: Path) -> None:
    """The verdict, and every mismatch."""
    with _results() as console:
        for mismatch in result.mismatches:
            console.print(f"[red]mismatch[/] {safe(mismatch.where)}: {safe(mismatch.what)}", soft_wrap=True)
        if result.ok:
            console.print(
                f"[green]ok[/] {safe(str(out))}: {result.files} files, {_size(result.compared_bytes)} compared; "
                f"{result.edited_tensors} edited tensors as recorded, every byte outside their planned rows equal"
            )
        else:
            console.print(f"[red]{len(result.mismatches)} mismatch(es)[/] in {safe(str(out))}")


def _table(*columns: str) -> Table:
    """Plain columns, no frame: fits 80 characters, survives copying; numbers to the right, names folded, not cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_text = column.startswith(
            ("recipe", "rows", "default", "tested", "dtype", "shard", "key", "attention")
        )
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    return table


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError
