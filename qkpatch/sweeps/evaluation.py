"""What evaluates a sweep: lmms-eval's commands for the base and every variant, as a script and as a SLURM array."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from qkpatch.common.json_text import exact
from qkpatch.common.number_ranges import format_ranges
from qkpatch.planning.plan import EditPlan
from qkpatch.planning.request import Request
from qkpatch.recipes.catalogue import is_recipe_file

FILES = ("evaluate.sh", "evaluate.sbatch")
_DOWNLOAD = "from huggingface_hub import snapshot_download as get; print(get({!r}, revision={!r}))"


def evaluation(plan: EditPlan, requests: Mapping[str, Request]) -> dict[str, str]:
    """The text of each of :data:`FILES`."""
    source, names = plan.model.source, list(requests)
    place = f'"$("$python" -c {shlex.quote(_DOWNLOAD.format(source.name, source.commit))})"'
    if source.path is not None and source.kind != "hub":
        folder = source.path.parent if source.kind == "file" else source.path
        place = shlex.quote(os.path.realpath(folder))
    source_text = f"${{SOURCE:-{place}}}"
    if source.kind == "store":
        source_text = '"${SOURCE:?set it to a directory that has the base: it is in a store}"'
    said = {
        "NAME": names[0],
        "FAMILY": shlex.quote(str(plan.model.checkpoint.config.get("model_type"))),
        "SOURCE": source_text,
        # Some of lmms-eval's classes go by the name of the folder.
        "BASE": re.sub(r"[^\w.-]", "-", source.name.rpartition("/")[2], flags=re.ASCII),
        "VARIANTS": "\n".join(["evaluate base", *(_line(*variant) for variant in requests.items())]),
        "LAST": str(len(names)),
        "NAMES": "\n".join(f"    {name}" for name in ["base", *names]),
        "KNOWN": " ".join(["base", *names]),
    }
    texts = {name: Path(__file__).with_name(name).read_text("utf-8") for name in FILES}
    return {name: re.sub(r"@([A-Z]+)@", lambda found: said[found[1]], text) for name, text in texts.items()}


def _line(name: str, request: Request) -> str:
    """One variant, with the flags by which `qkpatch apply` makes it."""
    words = ["evaluate", name]
    for key, value in vars(request).items():
        if value is None or value is False:
            continue
        words.append(f"--{key.replace('_', '-')}")
        if isinstance(value, tuple):
            words.append(format_ranges(value) if isinstance(value[0], int) else ",".join(value))
        elif key == "recipe" and is_recipe_file(value):
            words.append(os.path.abspath(value))  # noqa: PTH100 - the script runs elsewhere
        elif value is not True:
            words.append(exact(value) if isinstance(value, float) else str(getattr(value, "value", value)))
    return shlex.join(words)
