"""The real command in a process that has imported torch before: a server that forks, and a client for shells.

python warm.py serve SOCKET          serves until its stdin ends
python warm.py call SOCKET ARGS...   as if it were `qkpatch ARGS...`
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import select
import socket
import sys
import traceback
from pathlib import Path

LONGEST = 1 << 16  # bytes of a command line


def serve(path: str) -> None:
    """Fork for each call, with the caller's directory and streams; answer with the exit code."""
    import qkpatch

    for module in pkgutil.walk_packages(qkpatch.__path__, "qkpatch."):
        if module.name != "qkpatch.__main__":
            importlib.import_module(module.name)
    from huggingface_hub import HfApi, snapshot_download  # noqa: F401 - it is lazy, too

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while server in select.select([server, 0], [], [])[0]:
            caller, _ = server.accept()
            with caller:
                message, streams, _, _ = socket.recv_fds(caller, LONGEST, 3)
                folder, *arguments = message.decode().split("\0")
                child = os.fork()
                if child == 0:
                    _become(folder, arguments, streams)
                for stream in streams:
                    os.close(stream)
                _, status = os.waitpid(child, 0)
                caller.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))


def call(path: str, arguments: list[str]) -> int:
    """The exit code of a call."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, ["\0".join([str(Path.cwd()), *arguments]).encode()], [0, 1, 2])
        return server.recv(1)[0]


def _become(folder: str, arguments: list[str], streams: list[int]) -> None:
    """Be the command, and end."""
    from qkpatch.cli import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
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
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[2]) if sys.argv[1] == "serve" else call(sys.argv[2], sys.argv[3:]))
