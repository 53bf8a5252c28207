"""The options that commands share, and the edit request they add up to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qkpatch.checkpoint.tree import source_file
from qkpatch.request import Request, parse_request
from qkpatch.spectral.rule import Channel, Select

SourceArg = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoint directory, .safetensors file, Hub id (org/name or org/name@revision) or recipe name.",
        show_default=False,
    ),
]
LayersOpt = Annotated[
    str | None, typer.Option(help="Inclusive list such as 10-18,20.", show_default="the recipe's")
]
AttentionOpt = Annotated[
    str | None,
    typer.Option(help="Sets of tensors, such as self,cross.", show_default="the recipe's first"),
]
FoldOpt = Annotated[
    bool,
    typer.Option("--fold-norm", help="Take the gain of the RMSNorm before attention into the product."),
]
HeadsOpt = Annotated[str | None, typer.Option(help="Query heads, such as 0-3,7.", show_default="all")]
ModesOpt = Annotated[int | None, typer.Option(help="Modes per head.", show_default="the recipe's")]
AlphaOpt = Annotated[
    float | None,
    typer.Option(
        help="Factor of the selected modes, 0 to 1: 0 removes them, 1 changes nothing.", show_default="0.8"
    ),
]
ChannelOpt = Annotated[Channel | None, typer.Option(help="Part of the product to edit.", show_default="full")]
SelectOpt = Annotated[
    Select | None,
    typer.Option(help="Modes to edit; all but dominant are controls.", show_default="dominant"),
]
SeedOpt = Annotated[int | None, typer.Option(help="For --select random and subspace.", show_default="0")]
RecipeOpt = Annotated[
    str | None,
    typer.Option(help="Use this recipe, or this YAML file, instead of the recipe that fits.", metavar="NAME"),
]
ConfigOpt = Annotated[
    Path | None, typer.Option(help="The same settings as a YAML file; flags win.", metavar="EDIT.yaml")
]
DeviceOpt = Annotated[str, typer.Option(help="cpu, cuda, cuda:i, or auto: cuda where there is one.")]
ThreadsOpt = Annotated[
    int | None,
    typer.Option(help="Heads that are computed side by side.", show_default="processors, within 450 MiB"),
]
ShardOpt = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Shard OUT anew, in at most 5GB, 512MiB, ... each.",
        show_default="as SOURCE",
    ),
]
PushOpt = Annotated[
    str | None,
    typer.Option("--push", metavar="ORG/NAME", help="Publish OUT there, in one commit.", show_default=False),
]
PrivateOpt = Annotated[bool, typer.Option("--private", help="With --push: a new repository is private.")]
CreatePrOpt = Annotated[
    bool, typer.Option("--create-pr", help="With --push: a pull request instead of a commit.")
]
IncludeOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="NAME",
        help="With --push: also this file, or glob, that SOURCE has by a link to elsewhere; repeatable.",
        show_default=False,
    ),
]
IncludeHiddenOpt = Annotated[
    bool, typer.Option("--include-hidden", help="With --push: also files that are private by name.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="QKPATCH_DEBUG")]


def expanded(path: Path | None) -> Path | None:
    """``~`` as the shell would have it, had it seen it."""
    return None if path is None else Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises for ~nobody


def edit_request(
    layers: str | None,
    modes: int | None,
    alpha: float | None,
    channel: Channel | None,
    select: Select | None,
    seed: int | None,
    heads: str | None,
    recipe: str | None,
    attention: str | None,
    fold_norm: bool,
    config: Path | None,
    max_shard_size: str | None = None,
) -> Request:
    """The flags over ``--config``; None where neither says anything."""
    # A flag that is not given says nothing, so that --config may say it.
    flags = Request.of(
        recipe=recipe,
        attention=attention,
        layers=layers,
        heads=heads,
        modes=modes,
        alpha=alpha,
        channel=channel,
        select=select,
        seed=seed,
        fold_norm=fold_norm or None,
        max_shard_size=max_shard_size,
    )
    if config is None:
        return flags
    file = source_file(config, config.name)  # a regular one: a pipe or a device would never end
    return flags.over(parse_request(file.read(), str(config)))
