"""``qkpatch inspect``: spectra of the products, nothing written."""

from __future__ import annotations

from typing import Annotated

import typer

from qkpatch.boundary import command
from qkpatch.interrupts import signals_held
from qkpatch.options import (
    AttentionOpt,
    DebugOpt,
    DeviceOpt,
    FoldOpt,
    HeadsOpt,
    JsonOpt,
    RecipeOpt,
    SourceArg,
    ThreadsOpt,
)
from qkpatch.settings import Request, check_device_name


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
    threads: ThreadsOpt = None,
    as_json: JsonOpt = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line per singular value.")] = False,
    debug: DebugOpt = False,
) -> None:
    """Show the spectra of SOURCE's query-key products."""
    from qkpatch.budget import choose_threads, head_memory
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
    per_head = head_memory(target.layout for target in targets)
    n_threads = choose_threads(threads, per_head, len(model.checkpoint.tensors))

    with signals_held():
        from qkpatch.spectra import layer_spectra
        from qkpatch.weights import choose_device

    spectra = []
    with bars(0, len(targets) * len(chosen.heads), quiet=False) as observer:
        for layer in layer_spectra(
            model, targets, chosen.heads, chosen.rule.modes, choose_device(device), n_threads
        ):
            spectra.append(layer)
            observer.edited(len(layer.heads))
    if as_json:
        print_json(spectra_json(model.source.name, model.recipe.name, chosen.rule.modes, spectra))
    elif as_csv:
        print_spectra_csv(spectra)
    else:
        show_spectra(spectra, chosen.rule.modes)
