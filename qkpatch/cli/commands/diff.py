"""``qkpatch diff``: two checkpoints, tensor by tensor and file by file."""

from __future__ import annotations

from typing import Annotated

import typer

from qkpatch.cli.command import command
from qkpatch.cli.flags import DebugOpt, JsonOpt, MarkdownOpt, QuietOpt

_HELP = "Checkpoint directory, .safetensors file, URL in a store, Hub id or recipe name."


@command
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_HELP, show_default=False)],
    b: Annotated[
        str, typer.Argument(metavar="B", help="What it is compared with; likewise.", show_default=False)
    ],
    as_json: JsonOpt = False,
    markdown: MarkdownOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Compare two checkpoints by tensors and files, however they are divided into shards.

    Numbers are compared in the stored dtype; no config.json is needed. Exit codes: 0 all tensors, their metadata and
    all other files are equal, 1 something differs, 2 usage, 3 not a checkpoint that can be read, 4 I/O.
    """
    from qkpatch.cli.console import output_width, print_json, print_markdown, print_told, verdict
    from qkpatch.cli.diff_text import text
    from qkpatch.cli.progress import bars
    from qkpatch.compare.diff import compare
    from qkpatch.compare.diff_types import to_json
    from qkpatch.model.locate import locate

    sources = locate(a), locate(b)
    with bars(quiet=quiet or as_json) as observer:
        result = compare(*sources, observer)
    said = {
        side: {"source": given, "kind": found.kind, "name": found.name, "commit": found.commit}
        for side, given, found in zip("ab", (a, b), sources, strict=True)
    }
    with verdict(0 if result.equal else 1):
        if as_json:
            print_json({**to_json(result), **said})
        elif markdown:
            print_markdown(f"qkpatch diff {a} {b}", text(result, a, b, 100))
        elif not quiet:
            print_told(text(result, a, b, output_width()))
