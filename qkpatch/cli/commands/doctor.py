"""``qkpatch doctor``: what this machine has that qkpatch depends on; what a report of a fault should hold."""

from __future__ import annotations

import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from qkpatch.cli.command import command
from qkpatch.cli.flags import DebugOpt, JsonOpt

_LIBRARIES = ("qkpatch", "torch", "numpy", "safetensors", "huggingface_hub", "typer", "rich", "PyYAML")
_EXTRAS = (
    "transformers",
    "peft",
    "pillow",
    "matplotlib",
    "fsspec",
    "s3fs",
    "gcsfs",
    "adlfs",
    "aiohttp",
    "ray",
)


@command
def doctor(as_json: JsonOpt = False, debug: DebugOpt = False) -> None:
    """Show versions, devices, threads, free disk and the Hub, as a report of a fault should have them."""
    from qkpatch.cli.console import print_json, results, safe
    from qkpatch.common.system import processors
    from qkpatch.common.text import size_text
    from qkpatch.hub.health import hub_health
    from qkpatch.output.space import free_bytes

    free = free_bytes(Path("out"))
    found: dict[str, dict[str, Any]] = {
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processors": processors(),
            "free disk here": "unknown" if free is None else size_text(free),
        },
        "libraries": _versions(_LIBRARIES),
        "optional": _versions(_EXTRAS),
        "torch": _torch(),
        "hub": hub_health(),
    }
    if as_json:
        print_json(found)
        return
    with results() as console:
        for title, facts in found.items():
            console.print(f"[bold]{title}[/]")
            for name, fact in facts.items():
                console.print(f"  {safe(name):18} {safe(str(fact))}", soft_wrap=True)


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    return {name: next((one.version for one in distributions(name=name)), "not installed") for name in names}


def _torch() -> dict[str, str]:
    try:
        from qkpatch.patching.device import devices
    except (ImportError, OSError) as error:
        return {"state": f"does not load: {error}"}
    return {"devices": ", ".join(devices())}
