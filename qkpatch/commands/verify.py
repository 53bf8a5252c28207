"""``qkpatch verify``: OUT against SOURCE and its own manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkpatch.boundary import command
from qkpatch.errors import FileSystemError
from qkpatch.options import (
    DebugOpt,
    JsonOpt,
    QuietOpt,
)


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
    from qkpatch.checkpoint.present import Present
    from qkpatch.checkpoint.rooted import Rooted
    from qkpatch.console import bars, print_json
    from qkpatch.tables import show_verification
    from qkpatch.verify import check

    if not out.is_dir():
        raise FileSystemError("no such directory", where=str(out), fix="check the path")
    with Rooted(out) as root:
        present = Present(root)
        with bars(present.size, 0, quiet=quiet or as_json, verb="compare") as observer:
            result = check(present, source, observer.copied, recipe)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        show_verification(result, out)
    if not result.ok:
        raise typer.Exit(1)
