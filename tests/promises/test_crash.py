"""Death at any moment: OUT is whole or absent, and the next run clears up and succeeds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, build_tiny

REPO_ROOT = Path(__file__).resolve().parents[2]
LAYERS = "0-3"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}

# Runs the command line in a fork per request, so that torch is imported once. Before the n-th change or
# opening of a file, the fork sends itself a signal.
DRIVER = """
import contextlib, io, json, os, sys, traceback
import commands, portable, torch
from qkpatch import cli
from qkpatch.patching import apply as patch
from qkpatch.compare import verify
from qkpatch.common import system

portable.taken_away_where_asked()
OPERATIONS = ("open", "mkdir", "copy_file_range", "pwrite", "fsync", "link", "rename", "unlink", "rmdir")

def send_signal_before(n, number):
    left = n
    def wrap(module, name):
        function = getattr(module, name)
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)
        setattr(module, name, counted)
    for name in OPERATIONS:
        wrap(os, name)
    wrap(system, "renameat2")

def child(request, pipe):
    os.setpgid(0, 0)
    text = io.StringIO()
    if request["at"]:
        send_signal_before(request["at"], request["signal"])
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            cli.app(request["arguments"])
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    os.write(pipe, json.dumps({"code": code, "text": text.getvalue()}).encode())
    os._exit(0)

torch.set_num_threads(1)
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli.app(["recipes", "--json"])  # what is imported and parsed here, no fork has to
commands.ready_to_fork()
for line in sys.stdin:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child(json.loads(line), writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        reply = pipe.read().decode()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        reply = json.dumps({"code": -os.WTERMSIG(status), "text": ""})
    print(reply, flush=True)
"""


# Runs the command line and sends itself a signal when a module is imported.
SIGNAL_ON_IMPORT = """
import os, sys
from qkpatch import cli

number, module, sent = int(sys.argv.pop(1)), sys.argv.pop(1), []

def hook(event, arguments):
    if event == "import" and arguments[0] == module and not sent:
        sent.append(module)
        os.kill(os.getpid(), number)

sys.addaudithook(hook)
cli.app()
"""


# Runs the command line; while torch is imported, or a host looked up, it stands still, and says so by a file.
SLOW = """
import ctypes, socket, sys, time
from pathlib import Path
from qkpatch.cli import main

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.types":
            marker.touch()
            time.sleep(60)

def stuck(*_):
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    marker.touch()
    libc.pthread_mutex_lock(mutex)  # in C, as resolvers are, and for good

marker = Path(sys.argv.pop(1))
sys.meta_path.insert(0, Slow())
socket.getaddrinfo = stuck
main()
"""


def heed_signals() -> None:
    """In a child: what the tests' own process ignores (under nohup, in the background) is not ignored there."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True)
class Death:
    """How one run of the command ended; a negative code is the signal that killed it."""

    code: int
    text: str


class Driver:
    """The driver process, as a function."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, *arguments: object, at: int = 0, send: int = signal.SIGKILL) -> Death:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": [str(a) for a in arguments], "at": at, "signal": int(send)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Death(**json.loads(self._process.stdout.readline()))


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        preexec_fn=heed_signals,
        env={**ENVIRONMENT, "PYTHONPATH": f"{REPO_ROOT}:{REPO_ROOT / 'tests' / 'kit'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Driver(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def whole(out: Path) -> dict[str, Any]:
    """All files of a finished output; of its manifest, all but the run block."""
    files: dict[str, Any] = {
        p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()
    }
    files["qkpatch.json"] = {**json.loads(files["qkpatch.json"]), "run": None}
    return files


def staging_of(folder: Path) -> list[Path]:
    return list(folder.glob(".out.*"))


# -------- at each file operation


@pytest.mark.long
def test_killed_before_any_file_operation_out_is_absent_or_whole_and_the_next_run_succeeds(
    driver: Driver, tiny: Tiny, folder: Path
) -> None:
    (tiny.path / "sub").mkdir()
    out = folder / "out"
    apply = ("apply", tiny.path, "-o", out, "--heads", "0,3", "--quiet")
    assert driver(*apply).code == 0
    expected = whole(out)
    orphans, publications, n = 0, 0, 0
    while True:
        n += 1
        shutil.rmtree(out, ignore_errors=True)
        death = driver(*apply, at=n)
        if death.code == 0:
            break
        assert death.code == -signal.SIGKILL, death.text
        orphans += bool(staging_of(folder))
        if out.exists():
            publications += 1
            assert whole(out) == expected
            left = [path for staging in staging_of(folder) for path in staging.iterdir()]
            assert [path.name for path in left] in ([], ["journal"])  # the next run removes it
        elif n % 3 == 0:
            assert driver(*apply).code == 0
            assert whole(out) == expected
            assert staging_of(folder) == []
    assert n > 20
    assert orphans > 10
    assert publications > 0


@pytest.mark.long
def test_links_that_a_killed_run_left_are_no_change_of_source(
    driver: Driver, tiny: Tiny, folder: Path
) -> None:
    """The next run removes them, and makes others: as many as before, at another time."""
    apply = ("apply", tiny.path, "-o", folder / "out", "--link", "--heads", "0", "--quiet")
    n = 0
    while (tiny.path / "tokenizer.json").stat().st_nlink == 1:
        n += 1
        assert driver(*apply, at=n).code == -signal.SIGKILL
    assert driver(*apply).code == 0
    assert staging_of(folder) == []


@pytest.mark.long
@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.stress)])
def test_killed_before_any_file_operation_a_part_or_finish_is_gone_on_with(
    driver: Driver, folder: Path, step: int
) -> None:
    source = build_tiny(folder / "source", shards=[["layers.0."], ["layers.1."], [""]]).path
    (source / "sub").mkdir()
    out, place, spare = folder / "out", folder / ".out.qkpatch-parts", folder / "spare"
    apply, edit = ("apply", source, "-o"), ("--layers", "0-1", "--heads", "0", "--quiet")
    assert driver(*apply, folder / "one", *edit).code == 0
    expected = whole(folder / "one")
    n, deaths = 1, 0
    while (death := driver(*apply, out, *edit, "--part", "1/2", at=n)).code != 0:
        assert death.code == -signal.SIGKILL, death.text
        assert not out.exists()
        assert not (place / "1").exists() or (place / "1" / "qkpatch.json").exists()
        n, deaths = n + step, deaths + 1
    assert deaths > 20 / step
    assert driver(*apply, out, *edit, "--part", "2/2").code == 0
    shutil.copytree(place, spare)
    n, seen = 1, set()
    while (death := driver("finish", out, "--quiet", at=n)).code != 0:
        assert death.code == -signal.SIGKILL, death.text
        seen.add(out.exists())
        assert not out.exists() or whole(out) == expected
        assert driver("finish", out, "--quiet").code == 0
        assert whole(out) == expected
        assert staging_of(folder) == []
        shutil.rmtree(out)
        shutil.copytree(spare, place)
        n += step
    assert n > 20
    assert seen == {False, True}


@pytest.mark.long
def test_killed_before_any_file_operation_overwrite_leaves_the_old_output_or_the_new(
    driver: Driver, tiny: Tiny, folder: Path
) -> None:
    out, spare = folder / "out", folder / "spare"
    apply = ("apply", tiny.path, "-o", out, "--heads", "0", "--overwrite", "--quiet")
    assert driver(*apply, "--alpha", "0").code == 0
    new = whole(out)
    assert driver(*apply).code == 0
    old = whole(out)
    out.rename(spare)
    seen, n = set(), 0
    while True:
        n += 1
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(spare, out)
        death = driver(*apply, "--alpha", "0", at=n)
        found = whole(out)
        assert found in (old, new)
        if death.code == 0:
            break
        assert death.code == -signal.SIGKILL, death.text
        seen.add("new" if found == new else "old")
    assert whole(out) == new
    assert staging_of(folder) == []
    assert seen == {"old", "new"}


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_before_any_file_operation_nothing_is_left_and_the_message_is_true(
    driver: Driver, tiny: Tiny, folder: Path, number: signal.Signals
) -> None:
    out = folder / "out"
    apply = ("apply", tiny.path, "-o", out, "--heads", "0", "--quiet")
    n = 0
    wrong = []
    while True:
        n += 1
        death = driver(*apply, at=n, send=number)
        if staging_of(folder):
            wrong.append(f"staging is left by {number.name} at operation {n}")
        if out.exists():
            if death.code != 0 and "nothing was written" in death.text:
                wrong.append(
                    f"OUT is there, and {number.name} at operation {n} says that nothing was written"
                )
            whole(out)
        elif death.code != 128 + number:
            wrong.append(f"exit code {death.code} after {number.name} at operation {n}: {death.text}")
        if death.code == 0 or n > 500:
            break
        for path in [out, *staging_of(folder)]:
            shutil.rmtree(path, ignore_errors=True)
    assert not wrong, "\n".join(wrong)
    assert 20 < n <= 500


# -------- the real command, in time


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A checkpoint of a few megabytes whose edit takes long enough to be met in the middle of it."""
    path = tmp_path_factory.mktemp("slow") / "slow"
    return build_tiny(path, n_layers=4, n_heads=32, n_kv_heads=8, d_head=32, d_model=256)


@pytest.fixture(scope="module")
def undisturbed(driver: Driver, slow: Tiny) -> dict[str, Any]:
    """What becomes of ``slow`` when nothing interferes."""
    out = slow.path.with_name("undisturbed")
    assert driver("apply", slow.path, "-o", out, "--layers", LAYERS, "--quiet").code == 0
    return whole(out)


def start(source: Tiny, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qkpatch", "apply", str(source.path), "-o", str(out), "--layers", LAYERS]
    return subprocess.Popen(
        [*command, *arguments],
        preexec_fn=heed_signals,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_staging(process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not staging_of(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.long
def test_killed_in_the_middle_the_command_leaves_no_out_and_the_next_run_succeeds(
    slow: Tiny, folder: Path, undisturbed: dict[str, Any]
) -> None:
    for delay in (0.0, 0.02, 0.1):
        with start(slow, folder / "out") as process:
            wait_for_staging(process, folder)
            time.sleep(delay)
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
        assert not (folder / "out").exists()
        assert len(staging_of(folder)) == 1
    with start(slow, folder / "out", "--quiet") as process:
        assert process.wait(60) == 0
    assert whole(folder / "out") == undisturbed
    assert staging_of(folder) == []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupted_in_the_middle_the_command_clears_up_and_says_so(
    slow: Tiny, folder: Path, number: signal.Signals
) -> None:
    with start(slow, folder / "out") as process:
        wait_for_staging(process, folder)
        time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stdout == ""
    assert len(stderr.strip().splitlines()) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_torch_swallows_while_it_is_imported_is_not_lost(
    tiny: Tiny, folder: Path, number: signal.Signals
) -> None:
    pytest.importorskip("numpy")  # torch tries to import it from C and takes any exception for its absence
    arguments = [str(int(number)), "numpy", "apply", str(tiny.path), "-o", str(folder / "out"), "--quiet"]
    result = subprocess.run(
        [sys.executable, "-c", SIGNAL_ON_IMPORT, *arguments],
        preexec_fn=heed_signals,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in result.stderr
    assert result.returncode == 128 + number
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        pytest.param("apply {source} -o {new}", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("verify {out} --source {source}", signal.SIGINT, marks=pytest.mark.long),
        ("inspect {source}", signal.SIGTERM),
        pytest.param("diff {source} {out}", signal.SIGHUP, marks=pytest.mark.long),
        pytest.param("lora {source} -o {new}", signal.SIGINT, marks=pytest.mark.long),
        ("plan org/nowhere", signal.SIGINT),
        ("http_proxy=http://proxy.invalid:3128 plan org/nowhere", signal.SIGTERM),
        pytest.param("apply org/nowhere -o {new}", signal.SIGTERM, marks=pytest.mark.stress),
        pytest.param("apply {source} -o {new} --json", signal.SIGTERM, marks=pytest.mark.stress),
        pytest.param("apply {source} -o {out} --overwrite", signal.SIGHUP, marks=pytest.mark.stress),
        pytest.param("inspect {source} --csv", signal.SIGINT, marks=pytest.mark.stress),
    ],
)
def test_a_signal_is_heard_within_a_second_while_torch_is_imported_or_a_host_looked_up(
    arguments: str, number: signal.Signals, tiny: Tiny, folder: Path, driver: Driver
) -> None:
    out, marker = folder / "out", folder / "marker"
    assert driver("apply", tiny.path, "-o", out, "--quiet").code == 0
    before = whole(out)
    words = arguments.format(source=tiny.path, out=out, new=folder / "new").split()
    more = dict([words.pop(0).split("=")] if "=" in words[0] else [])
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(marker), *words], preexec_fn=heed_signals,
        env={**ENVIRONMENT, "HF_ENDPOINT": "http://nowhere.invalid", "HF_HUB_OFFLINE": "0", **more},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while not marker.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        begun = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        took = time.monotonic() - begun
    assert process.returncode == 128 + number, said
    assert took < 5  # a second, and what else the machine does
    assert len(said.strip().splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["marker", "out"]
    assert whole(out) == before


def test_a_thread_of_a_library_that_is_stuck_does_not_hold_the_process() -> None:
    code = """
import os, signal, threading, time
from concurrent.futures import ThreadPoolExecutor
from qkpatch.common.interrupts import Terminated, aside, end_at_once, unwinding_on_kill

with unwinding_on_kill():
    try:
        with ThreadPoolExecutor(1) as pool:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            pool.submit(aside, time.sleep, 60).result()
    except Terminated as end:
        end_at_once(128 + end.number)
"""
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, preexec_fn=heed_signals, timeout=30)
    assert ended.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 5


def test_a_signal_that_comes_when_the_command_is_over_ends_nothing() -> None:
    """Handlers are given back, one after the other; whoever would be told of the signal is gone by then."""
    code = """
import os, signal
from qkpatch.common.interrupts import unwinding_on_kill

given_back, give = [], signal.signal

def late(number, handler):
    if is_over:
        given_back.append(number)
        os.kill(os.getpid(), signal.SIGINT)
    return give(number, handler)

is_over, signal.signal = False, late
with unwinding_on_kill():
    is_over = True
assert given_back[-1] == signal.SIGINT and len(given_back) == 3, given_back
"""
    ended = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, preexec_fn=heed_signals, timeout=30)
    assert ended.returncode == 0


@pytest.mark.long
def test_of_two_runs_for_one_out_one_wins_and_the_other_is_refused_or_finds_it_done(
    slow: Tiny, folder: Path, undisturbed: dict[str, Any]
) -> None:
    with start(slow, folder / "out") as first, start(slow, folder / "out") as second:
        ends = [(p.communicate(timeout=60), p.returncode) for p in (first, second)]
    said = [
        "Wrote " in out or "Already done" in out if code == 0 else "Error:" in err
        for (out, err), code in ends
    ]
    assert all(said), ends
    assert sum("Wrote " in out for (out, _), _ in ends) == 1, ends
    assert {code for _, code in ends} <= {0, 2}
    assert staging_of(folder) == []
    assert whole(folder / "out") == undisturbed
