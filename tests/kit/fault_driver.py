"""Runs `qkpatch` in forks of one process, so that torch is imported once, and does them harm on request.

Requests are lines of JSON on stdin, lists of runs that go side by side; a reply is the list of how they ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

HANGS_AFTER = 180  # seconds; then a run says where its threads are, and dies
TRACED = (
    "apply",
    "threads",
    "copier",
    "sources",
    "takeover",
    "journal",
    "staged",
    "staging",
    "interrupts",
    "contextlib",
)


def harm(run: dict[str, Any]) -> None:
    """Make the faults of a request happen in this process."""
    from qkpatch.compare import overwrite

    if run.get("skip_space_check"):
        overwrite.check_space = lambda *_, **__: None
    if run.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (run["file_size"], resource.RLIM_INFINITY))
    if run.get("open_files"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (run["open_files"],) * 2)
    if run.get("address_space"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        now = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + run["address_space"],) * 2)
    os.environ.update(run.get("environment", {}))  # for the shim, which asks at every call
    for name, delay in run.get("slow", {}).items():
        slow_down(name, delay)


def slow_down(name: str, delay: float) -> None:
    """A system call by its name in ``os``, the edit's writing of ``rows``, or the copying of other bytes."""
    from qkpatch.output.passage import Passage
    from qkpatch.patching.copier import Copier

    where, name = {"rows": (Copier, "write"), "copying": (Passage, "copy")}.get(name, (os, name))
    function = getattr(where, name)

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(delay)
        return function(*args, **kwargs)

    setattr(where, name, slowed)


class Tripwire:
    """Counts what the main thread executes of the engine, opcode by opcode; sends a signal at one of them."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number, self.seen = at, number, 0

    def __call__(self, frame: Any, event: str, _: object) -> Any:
        if Path(frame.f_code.co_filename).stem not in TRACED:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.step

    def step(self, frame: Any, event: str, _: object) -> Any:
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), self.number)
        return self.step


def on_start(run: dict[str, Any], started: int) -> Tripwire:
    """Tell when the engine begins; before that nothing is written."""
    from qkpatch.patching import apply as patch

    engine = patch.apply_plan
    wire = Tripwire(run.get("trip_at", 0), run.get("trip_signal", signal.SIGINT))

    def told(*args: Any, **kwargs: Any) -> Any:
        os.write(started, b"!")
        if not run.get("trace"):
            return engine(*args, **kwargs)
        sys.settrace(wire)
        try:
            return engine(*args, **kwargs)
        finally:
            sys.settrace(None)

    patch.apply_plan = told
    return wire


def child(run: dict[str, Any], pipe: int, started: int) -> None:
    from qkpatch import cli

    os.setpgid(0, 0)
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    # As in a process of its own: what the surroundings ignore is not ignored here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wire = on_start(run, started)
    harm(run)
    text = io.StringIO()
    before = set(Path("/proc/self/fd").iterdir())
    began = time.monotonic()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            cli.app(run["arguments"])
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    seconds = time.monotonic() - began
    os.environ.pop("FAULTS", None)
    gc.collect()
    left = []
    for fd in set(Path("/proc/self/fd").iterdir()) - before:
        with contextlib.suppress(OSError):  # it was the listing's own
            left.append(str(fd.readlink()))
    end = {
        "code": code,
        "text": text.getvalue(),
        "seconds": seconds,
        "open_files": left,
        "threads": [t.name for t in threading.enumerate() if t is not threading.main_thread()],
        "opcodes": wire.seen,
    }
    with open(pipe, "wb") as stream:
        stream.write(json.dumps(end).encode())
    os._exit(0)


def watch(pid: int, run: dict[str, Any], started: int) -> None:
    """Send a run its signals: each so long after the one before; the first, after the engine began."""
    os.read(started, 1)
    os.close(started)
    for delay, number in run.get("signals", []):
        time.sleep(delay)
        os.kill(pid, number)  # it is not reaped before this thread ends
    if "meddle" in run:
        delay, change, path = run["meddle"]
        time.sleep(delay)
        meddle(change, Path(path))


def meddle(change: str, path: Path) -> None:
    """Do to a file what other programs might."""
    if change == "replaced":
        other = path.with_name(f".{path.name}.other")
        other.write_bytes(path.read_bytes()[::-1])
        other.rename(path)
    elif change == "touched":
        path.touch()
    elif change == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif change == "grown":
        with path.open("ab") as file:
            file.write(b"more")
    elif change == "written to":
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"other")
    else:
        path.unlink()


def together(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fork every run, then look after all of them."""
    ends: list[dict[str, Any]] = []
    processes = []
    for run in runs:
        reader, writer = os.pipe()
        started, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            os.close(started)
            try:
                child(run, writer, tell)
            finally:
                os._exit(128 + signal.SIGINT)  # one that came when all was done
        os.close(writer)
        os.close(tell)
        processes.append((pid, reader, run, started))
    watchers = [
        threading.Thread(target=watch, args=(pid, run, started)) for pid, _, run, started in processes
    ]
    for watcher in watchers:
        watcher.start()
    for pid, reader, _, _ in processes:
        with open(reader, "rb") as stream:
            reply = stream.read().decode()
        # Not reaped yet, so that a late signal cannot meet another process of that number.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        ends.append(json.loads(reply) if reply else {})
    for watcher in watchers:  # no thread is left when the next run is forked
        watcher.join()
    for (pid, *_), end in zip(processes, ends, strict=True):
        status = os.waitpid(pid, 0)[1]
        if not end:
            code = os.waitstatus_to_exitcode(status)
            end.update(code=code, text="", seconds=0.0, open_files=[], threads=[], opcodes=0)
    return ends


def main() -> None:
    import commands
    import torch

    from qkpatch import cli
    from qkpatch.compare import verify  # noqa: F401 - imported here, no fork has to
    from qkpatch.output import passage

    passage.PIECE = passage.LEAST_DIRECT = 1 << 17  # so that small files, too, go past the page cache
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.app(["recipes", "--json"])
    commands.ready_to_fork()
    for line in sys.stdin:
        print(json.dumps(together(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
