"""The real command in a process of its own, forked off one that has imported torch: what is not tested is its start.

python warm.py serve SOCKET          serves until its stdin ends
python warm.py call SOCKET ARGS...   as if it were `qkpatch ARGS...`
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pkgutil
import select
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = (
    "httpx",
    "httpx2",
    "tqdm.auto",
    "filelock",
    "fsspec",
)  # huggingface_hub's, which itself reads the environment


def serve(path: str) -> None:
    """Fork for each call, with the caller's environment, directory and streams; answer with the exit code."""
    import commands

    import qkpatch
    from qkpatch.recipes import catalogue

    for module in pkgutil.walk_packages(qkpatch.__path__, "qkpatch."):
        if module.name != "qkpatch.__main__":
            importlib.import_module(module.name)
    for name in LIBRARIES:
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    catalogue.shipped_recipes()  # what is parsed and built here, no fork has to
    commands.ready_to_fork()
    assert "huggingface_hub" not in sys.modules
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while server in select.select([server, 0], [], [])[0]:
            caller, _ = server.accept()
            with caller:
                if os.fork() == 0:
                    server.close()
                    _answer(caller)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _answer(caller: socket.socket) -> None:
    """Run one call, and end."""
    size, streams, _, _ = socket.recv_fds(caller, 8, 3)
    message = b""
    while len(message) < int.from_bytes(size, "little"):
        message += caller.recv(1 << 16)
    child = os.fork()
    if child == 0:
        caller.close()
        _become(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(child, 0)
    caller.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))
    os._exit(0)


def call(
    path: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, streams: Sequence[int]
) -> int:
    """The exit code of a call; raises :class:`TimeoutError` where there is none in two minutes."""
    message = json.dumps([[*arguments], dict(environment), str(folder)]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(120)
        server.connect(path)
        socket.send_fds(server, [len(message).to_bytes(8, "little")], streams)
        server.sendall(message)
        return int.from_bytes(server.recv(4), "little", signed=True)


def _become(call: Any, streams: Sequence[int]) -> None:
    """Be the command, and end."""
    from qkpatch.cli import main

    arguments, environment, folder = call
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["qkpatch", *arguments]
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - for good
    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


@cache
def started() -> str:
    """The socket of a server that lives as long as this process."""
    folder = tempfile.TemporaryDirectory()  # which goes when this process does
    atexit.register(folder.cleanup)
    path = f"{folder.name}/socket"
    command = [sys.executable, __file__, "serve", path]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # type: ignore[union-attr]
    return path


def run(
    environment: Mapping[str, str], arguments: Sequence[str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As :func:`subprocess.run` of the command, with what it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        streams = [nothing.fileno(), out.fileno(), err.fileno()]
        code = call(started(), arguments, environment, folder or Path.cwd(), streams)
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode())
    return subprocess.CompletedProcess(["qkpatch", *arguments], code, *said)


def shell(*arguments: object) -> str:
    """The command line of a call, for a shell."""
    return shlex.join([sys.executable, __file__, "call", started(), *map(str, arguments)])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[2], sys.argv[3:], os.environ, Path.cwd(), [0, 1, 2]))
