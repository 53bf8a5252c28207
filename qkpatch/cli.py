"""The command line: parse, call, render. No torch until a command needs it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from qkpatch import __version__
from qkpatch.boundary import command
from qkpatch.console import prepare_streams
from qkpatch.errors import FileSystemError
from qkpatch.interrupts import signals_held
from qkpatch.options import (
    AlphaOpt,
    AttentionOpt,
    ChannelOpt,
    ConfigOpt,
    DebugOpt,
    DeviceOpt,
    FoldOpt,
    HeadsOpt,
    JsonOpt,
    LayersOpt,
    ModesOpt,
    QuietOpt,
    RecipeOpt,
    SeedOpt,
    SelectOpt,
    SourceArg,
    edit_request,
    expanded,
)
from qkpatch.settings import Request, check_device_name

if TYPE_CHECKING:
    from qkpatch.plan import EditPlan

app = typer.Typer(
    name="qkpatch",
    help="Edit the query-key product of a vision-language checkpoint, straight in its safetensors files.\n\n"
    "Exit codes: 0 ok, 1 verification mismatch, 2 usage, 3 unsupported or ambiguous checkpoint, 4 I/O.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Nothing but --version."""
    if version:
        print(f"qkpatch {__version__}")
        raise typer.Exit()


@app.command()
@command
def apply(
    source: SourceArg,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory to write.", show_default=False, callback=expanded)
    ],
    layers: LayersOpt = None,
    modes: ModesOpt = None,
    alpha: AlphaOpt = None,
    channel: ChannelOpt = None,
    select: SelectOpt = None,
    seed: SeedOpt = None,
    heads: HeadsOpt = None,
    recipe: RecipeOpt = None,
    attention: AttentionOpt = None,
    fold_norm: FoldOpt = False,
    config: ConfigOpt = None,
    device: DeviceOpt = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan only; the same as `qkpatch plan`.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output of qkpatch.")
    ] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Write an edited copy of SOURCE to OUT, with a manifest of what was changed."""
    from qkpatch.console import bars, print_text, show_applied, show_warnings

    request = edit_request(
        layers, modes, alpha, channel, select, seed, heads, recipe, attention, fold_norm, config
    )
    if dry_run:
        _plan(source, request, out, device, as_json=as_json, quiet=quiet, overwrite=overwrite)
        return
    plan = _decide(source, request, out, device, overwrite=overwrite)

    with signals_held():  # torch's imports swallow what is raised in their midst
        from qkpatch.patch import apply_plan  # torch, from here on
        from qkpatch.weights import choose_device

    n_heads = len(plan.edits) * len(plan.settings.heads)
    with bars(plan.output_bytes, n_heads, quiet=quiet or as_json) as observer:
        manifest = apply_plan(plan, out, device=choose_device(device), observer=observer, overwrite=overwrite)
    if not quiet:
        show_warnings(manifest.warnings)
    if as_json:
        print_text(manifest.dumps())
    elif not quiet:
        show_applied(plan, manifest, source, out)


@app.command()
@command
def plan(
    source: SourceArg,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where OUT would be.", callback=expanded)
    ] = None,
    layers: LayersOpt = None,
    modes: ModesOpt = None,
    alpha: AlphaOpt = None,
    channel: ChannelOpt = None,
    select: SelectOpt = None,
    seed: SeedOpt = None,
    heads: HeadsOpt = None,
    recipe: RecipeOpt = None,
    attention: AttentionOpt = None,
    fold_norm: FoldOpt = False,
    config: ConfigOpt = None,
    device: DeviceOpt = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="OUT may be an earlier output.")] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show what `apply` would do, from headers alone: tensors, heads, bytes, disk and memory."""
    request = edit_request(
        layers, modes, alpha, channel, select, seed, heads, recipe, attention, fold_norm, config
    )
    _plan(source, request, out, device, as_json=as_json, quiet=quiet, overwrite=overwrite)


@app.command()
@command
def inspect(
    source: SourceArg,
    layers: Annotated[
        str | None, typer.Option(help="Inclusive list such as 10-18,20.", show_default="all")
    ] = None,
    heads: HeadsOpt = None,
    modes: Annotated[
        int | None, typer.Option(help="r of energy share and gap.", show_default="the recipe's")
    ] = None,
    recipe: RecipeOpt = None,
    attention: AttentionOpt = None,
    fold_norm: FoldOpt = False,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line per singular value.")] = False,
    debug: DebugOpt = False,
) -> None:
    """Show the spectra of SOURCE's query-key products."""
    from qkpatch.console import bars, print_json, print_spectra_csv, show_spectra, spectra_json
    from qkpatch.errors import UsageError
    from qkpatch.model import open_model
    from qkpatch.selection import format_ranges
    from qkpatch.settings import check_request

    if as_json and as_csv:
        raise UsageError("one of --json and --csv", fix="drop the other")
    request = Request(
        recipe=recipe, attention=attention, layers=layers, heads=heads, modes=modes, fold_norm=fold_norm
    )
    check_device_name(device)
    check_request(request)
    model = open_model(source, recipe, attention)
    chosen = model.settings(request.over(Request(layers=format_ranges(model.editable_layers))))
    targets = model.targets(chosen)

    with signals_held():
        from qkpatch.spectra import layer_spectra
        from qkpatch.weights import choose_device

    spectra = []
    with bars(0, len(targets) * len(chosen.heads), quiet=False) as observer:
        for layer in layer_spectra(model, targets, chosen.heads, chosen.rule.modes, choose_device(device)):
            spectra.append(layer)
            observer.edited(len(layer.heads))
    if as_json:
        print_json(spectra_json(model.source.name, model.recipe.name, chosen.rule.modes, spectra))
    elif as_csv:
        print_spectra_csv(spectra)
    else:
        show_spectra(spectra, chosen.rule.modes)


@app.command()
@command
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What `apply` wrote.", show_default=False)],
    source: Annotated[str, typer.Option("--source", help="What it was made from.", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option(help="The YAML file, where it was made by one of yours.", metavar="FILE")
    ] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Prove that OUT is SOURCE with only the planned rows changed, as its manifest says. Exit 1 if not."""
    from qkpatch.console import bars, print_json, show_verification
    from qkpatch.verify import verify as run

    if not out.is_dir():
        raise FileSystemError("no such directory", where=str(out), fix="check the path")
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    with bars(total, 0, quiet=quiet or as_json, verb="compare") as observer:
        result = run(out, source, observer.copied, recipe)
    if as_json:
        print_json({**vars(result), "ok": result.ok, "mismatches": [vars(m) for m in result.mismatches]})
    elif not quiet:
        show_verification(result, out)
    if not result.ok:
        raise typer.Exit(1)


@app.command()
@command
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show this one; or `check`, with a SOURCE.", show_default=False)
    ] = None,
    source: Annotated[
        str | None,
        typer.Argument(help="After `check`: the checkpoint to explain.", show_default=False),
    ] = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """List the model families qkpatch knows, show one, or explain which of them SOURCE is: `recipes check SOURCE`.

    `check` tells what matched and what did not, and prints a draft recipe for a family it does not know.
    Exit 0 where exactly one recipe fits, else 3.
    """
    from qkpatch.catalogue import CHECK, get_recipe, recipe_text, shipped_recipes
    from qkpatch.console import output_width, print_json, print_text
    from qkpatch.describe import recipe_table
    from qkpatch.errors import UsageError

    if name == CHECK and source is not None:
        _check(source, as_json=as_json)
    if source is not None or name == CHECK:
        raise UsageError("SOURCE goes with `check`", fix="qkpatch recipes check SOURCE")
    chosen = [get_recipe(name)] if name else list(shipped_recipes().values())
    if as_json:
        print_json([recipe.to_json() for recipe in chosen])
    elif name:
        print_text(recipe_text(name))
    else:
        print_text(recipe_table(chosen, output_width()))


def main() -> NoReturn:
    """Entry point of the ``qkpatch`` command."""
    prepare_streams()
    try:
        app()
    except OSError as error:
        # What the library prints itself, such as --help, to a device that is full.
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FileSystemError.exit_code)
    sys.exit(0)


def _decide(source: str, request: Request, out: Path | None, device: str, *, overwrite: bool) -> EditPlan:
    """The plan, with everything refused that can be; what is wrong already does not wait for a download."""
    from qkpatch.checkpoint.target import check_apart, check_out
    from qkpatch.locate import local_path
    from qkpatch.plan import make_plan

    check_device_name(device)
    if out is not None:
        check_out(out, local_path(source), overwrite=overwrite)
    plan = make_plan(source, request)
    if out is not None:
        check_apart(out, plan.model.checkpoint)
    return plan


def _check(source: str, *, as_json: bool) -> NoReturn:
    from qkpatch.console import output_width, print_json, print_text
    from qkpatch.diagnosis.diagnose import diagnose
    from qkpatch.diagnosis.explain import explanation

    diagnosis = diagnose(source)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        print_text(explanation(diagnosis, output_width()))
    raise typer.Exit(diagnosis.exit_code)


def _plan(
    source: str,
    request: Request,
    out: Path | None,
    device: str,
    *,
    as_json: bool,
    quiet: bool,
    overwrite: bool,
) -> None:
    from qkpatch.checkpoint.space import free_bytes
    from qkpatch.console import print_text, show_plan, show_warnings
    from qkpatch.manifest import canonical_json, planned_manifest

    plan = _decide(source, request, out, device, overwrite=overwrite)
    free_disk = free_bytes(out if out is not None else Path("out"))
    if not quiet:
        show_warnings(plan.warnings)
    if as_json:
        costs = {
            "output_bytes": plan.output_bytes,
            "edited_bytes": plan.edited_bytes,
            "free_disk_bytes": free_disk,
            "expected_peak_memory_bytes": plan.peak_memory,
        }
        print_text(canonical_json({**planned_manifest(plan, device).to_json(), "costs": costs}))
    elif not quiet:
        show_plan(plan, free_disk)
