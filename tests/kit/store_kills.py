"""Runs `apply` into a store in forks of one process, each killed before or after the n-th call that it makes.

Requests are lines of JSON on stdin: source, out, at (in half calls; 0 for never), how; replies are code and calls.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any


def child(request: dict[str, Any], pipe: int) -> None:
    import qkpatch
    from qkpatch.stores.store import Store
    from qkpatch.uploads import claim

    claim._NOTED = 1
    call, half_calls = Store.attempt, 0

    def step() -> None:
        nonlocal half_calls
        half_calls += 1
        if half_calls == request["at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self: Store, *arguments: Any, **named: Any) -> Any:
        step()
        result = call(self, *arguments, **named)
        step()
        return result

    plan = qkpatch.plan(request["source"], layers="0-1", modes=2)
    Store.attempt = counted  # type: ignore[method-assign]
    qkpatch.apply(plan, request["out"], threads=1, **request["how"])
    os.write(pipe, str(half_calls).encode())
    os._exit(0)


def main() -> None:
    for client in ("s3fs", "gcsfs", "adlfs"):  # imported here, no fork has to
        with suppress(ImportError):
            import_module(client)
    import torch

    import qkpatch.compare.overwrite
    import qkpatch.patching.edit_heads
    import qkpatch.stores.remote
    import qkpatch.uploads.apply  # noqa: F401
    from qkpatch.recipes import catalogue

    catalogue.shipped_recipes()  # what is parsed here, no fork has to
    torch.set_num_threads(1)
    for line in sys.stdin:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(json.loads(line), writer)
            finally:
                os._exit(1)
        os.close(writer)
        with open(reader, "rb") as stream:
            calls = int(stream.read() or 0)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), calls]), flush=True)


if __name__ == "__main__":
    main()
