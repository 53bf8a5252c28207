"""What a hostile file must not do to a command: end it with a traceback, reach the terminal, take memory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is a Linux figure")


def calm(result: Result, *codes: int) -> str:
    """The output, of a command that ended by itself with one of these exit codes."""
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert result.exit_code in codes, result.output
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", result.output)
    return result.output


MEASURE = """
import re, sys
from pathlib import Path
from qkpatch.checkpoint.files import open_read
from qkpatch.checkpoint.header import read_header
from qkpatch.errors import HeaderError
from qkpatch.cli import app
before = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
try:
    if sys.argv[1] == "header":
        with open_read(Path(sys.argv[2])) as opened:
            read_header(opened, "m")
    else:
        app(sys.argv[1:])
except HeaderError:
    pass
except SystemExit as stop:
    print(stop.code, end=" ", file=sys.stderr)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) - before, file=sys.stderr)
"""


def grown_mib(*arguments: object) -> float:
    """By how much a fresh process grows while it reads a header, or runs a command."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stderr.split()[-1]) / 1024
