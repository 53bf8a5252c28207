"""The real command in a process of its own that says what it took of memory."""

from __future__ import annotations

import sys

# torch is there already: it takes seconds to be imported.
DRIVER = """
import re, sys
if sys.argv.pop(1) == "torch": import torch
from qkpatch.cli import main
try: main()
finally: print("PEAK", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def driven(*arguments: object, torch: bool = False) -> list[str]:
    """The command line of the command, which says at the end what it took of memory."""
    return [sys.executable, "-c", DRIVER, "torch" if torch else "", *map(str, arguments)]
