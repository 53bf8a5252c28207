"""``qkpatch inspect``: spectra of the products, nothing written."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

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
from qkpatch.request import Request, check_device_name

if TYPE_CHECKING:
    from qkpatch.spectra import LayerSpectra

COLUMNS = ("layer", "attention", "head", "kv_head", "mode", "singular_value")  # of --csv, whatever the model


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
    device: DeviceOpt = "cpu",
    threads: ThreadsOpt = None,
    as_json: JsonOpt = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line per singular value.")] = False,
    debug: DebugOpt = False,
) -> None:
    """Show the spectra of SOURCE's query-key products."""
    from qkpatch.budget import choose_threads, head_memory
    from qkpatch.console import bars, print_csv, print_json
    from qkpatch.errors import UsageError
    from qkpatch.locate import Access
    from qkpatch.model import open_model
    from qkpatch.settings import resolve
    from qkpatch.tables import show_spectra

    if as_json and as_csv:
        raise UsageError("one of --json and --csv", fix="drop the other")
    request = Request.of(
        recipe=recipe, attention=attention, layers=layers, heads=heads, modes=modes, fold_norm=fold_norm
    )
    check_device_name(device)
    model = open_model(source, recipe, request.attention, Access.ranges)
    chosen = resolve(request.over(Request(layers=model.editable_layers)), model)
    targets = model.targets(chosen.layers, fold_norm=chosen.fold_norm)
    per_thread = head_memory(target.layout for target in targets)
    if model.source.path is None:  # a layer that is read where it is waits in memory
        per_thread += max(target.read_bytes(chosen.heads) for target in targets)
    n_threads = choose_threads(threads, per_thread, len(model.checkpoint.tensors))

    with signals_held():
        from qkpatch.device import choose_device
        from qkpatch.spectra import layer_spectra

    def looked_at() -> Iterator[LayerSpectra]:
        # On one terminal, lines that come meanwhile would run into the bars.
        is_mixed = as_csv and sys.stdout.isatty()
        with bars(0, len(targets) * len(chosen.heads), quiet=is_mixed) as observer:
            for layer in layer_spectra(model, targets, chosen.heads, chosen.rule.modes, where, n_threads):
                observer.edited(len(layer.heads))
                yield layer

    where = choose_device(device)
    if as_csv:
        print_csv(COLUMNS, _csv_rows(looked_at()))
    elif as_json:
        spectra = list(looked_at())
        print_json(_json(model.source.name, model.recipe.name, chosen.rule.modes, spectra))
    else:
        show_spectra(model, chosen, list(looked_at()), is_folded=fold_norm)


def _csv_rows(layers: Iterable[LayerSpectra]) -> Iterator[tuple[object, ...]]:
    for layer in layers:
        for head in layer.heads:
            for mode, value in enumerate(head.singular_values):
                yield layer.layer, layer.attention, head.head, head.kv_head, mode, repr(value)


def _json(source: str, recipe: str, modes: int, layers: Sequence[LayerSpectra]) -> dict[str, Any]:
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
