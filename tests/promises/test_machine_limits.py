"""What the machine refuses, holes that would take hours, and signals: each is told soon, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import Tiny, build_tiny
from driven import driven
from fake_hub import command
from typer.testing import Result

from qkpatch.checkpoint.files import machine_errors, open_read
from qkpatch.common.interrupts import Terminated, unwinding_on_kill
from qkpatch.errors import (
    FileSystemError,
    UnexpectedError,
)

REPO_ROOT = Path(__file__).resolve().parents[2]


# -------- holes, and signals


def checkpoint_with_a_hole(path: Path, size: int) -> Tiny:
    """A checkpoint beside a file that is one hole."""
    tiny = build_tiny(path)
    with open(tiny.path / "hole.dat", "wb") as file:
        file.truncate(size)
    return tiny


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.stress)])
@pytest.mark.parametrize(
    "arguments",
    [
        ("apply", "{source}", "-o", "{out}", "--digest", "files"),
        pytest.param(("diff", "{source}", "{source}"), marks=pytest.mark.stress),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_signal_is_heard_in_a_hole(arguments: tuple[str, ...], number: int, tmp_path: Path) -> None:
    tiny = checkpoint_with_a_hole(tmp_path / "tiny", 300 << 30)
    given = [a.format(source=tiny.path, out=tmp_path / "out") for a in arguments]
    if arguments[0] == "diff":
        other = checkpoint_with_a_hole(tmp_path / "other", 300 << 30)
        given[-1] = str(other.path)
    log = tmp_path / "log"
    with open(log, "w") as file, subprocess.Popen(
        driven(*given, torch=True), stderr=file, stdout=file, cwd=REPO_ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        try:
            wait_for_hole(process)
            begun = time.monotonic()
            process.send_signal(number)
            code = process.wait(30)
            took = time.monotonic() - begun
        finally:
            process.kill()
    assert code == 128 + number, log.read_text()
    assert took < 10  # a second, and what else the machine does
    assert not [p.name for p in tmp_path.iterdir() if "out" in p.name]


def wait_for_hole(process: subprocess.Popen[Any]) -> None:
    """Until the process has had the hole open for a while."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opened = [str(fd.readlink()) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            opened = []
        if any(name.endswith("hole.dat") for name in opened):
            time.sleep(1)
            return
        time.sleep(0.05)


def test_a_digest_over_a_hole_is_that_of_zeros(tmp_path: Path, run: Callable[..., Result]) -> None:
    import hashlib

    tiny = checkpoint_with_a_hole(tmp_path / "tiny", (9 << 20) + 5)
    assert run("apply", tiny.path, "-o", tmp_path / "out", "--digest", "files").exit_code == 0
    sums = (tmp_path / "out" / "SHA256SUMS").read_text()
    assert f"{hashlib.sha256(bytes((9 << 20) + 5)).hexdigest()}  hole.dat" in sums


# -------- the machine


def limited(limit: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = " ".join(f"'{word}'" for word in command(*arguments))
    return subprocess.run(
        ["bash", "-c", f"{limit}; exec {words}"], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("ulimit -n 12", "ulimit -n"),
        ("ulimit -v 400000", "ulimit -v"),
        pytest.param("ulimit -n 5", "ulimit -n", marks=pytest.mark.stress),
        pytest.param("ulimit -v 250000", "ulimit -v", marks=pytest.mark.stress),
    ],
)
def test_a_limit_is_told_before_anything_is_made(
    limit: str, message: str, tiny: Tiny, tmp_path: Path
) -> None:
    before = tmp_path.stat().st_mtime_ns
    result = limited(limit, "apply", tiny.path, "-o", tmp_path / "out")
    assert result.returncode == 4, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert tmp_path.stat().st_mtime_ns == before  # not even a staging directory


@pytest.mark.stress
@pytest.mark.parametrize("arguments", [("plan",), ("inspect",), ("recipes", "check"), ("diff", "{}")])
@pytest.mark.parametrize("limit", ["ulimit -n 6", "ulimit -v 150000"])  # with 4, Python does not begin
def test_no_command_answers_a_limit_with_a_traceback(
    limit: str, arguments: tuple[str, ...], tiny: Tiny
) -> None:
    result = limited(limit, *(a.format(tiny.path) for a in arguments), tiny.path)
    assert result.returncode in (0, 4), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("mode", [0o704, pytest.param(0o700, marks=pytest.mark.stress), 0o701])
@pytest.mark.parametrize(
    "words", [("apply", "{source}", "-o", "{out}"), ("verify", "{out}", "--source", "{source}")]
)
def test_an_out_that_cannot_be_entered(mode: int, words: tuple[str, ...], run: Callable[..., Result]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        source, out = build_tiny(Path(folder) / "source").path, Path(folder) / "out"
        arguments = [word.format(source=source, out=out) for word in words]
        for good in (("apply", source, "-o", out), ("verify", out, "--source", source)):
            assert run(*good).exit_code == 0  # and all is imported, which nobody may not do
        out.chmod(mode)
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                result = run(*arguments)
                code = result.exit_code if isinstance(result.exception, SystemExit) else 98
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = sorted(entry.name for entry in Path(folder).iterdir())
        out.chmod(0o700)
    assert code == 4 or (code == 2 and mode != 0o704)  # what it may not list, the command line refuses
    assert left == ["out", "source"]


STARVED = [
    (MemoryError(), "not enough memory"),
    (OSError(24, "Too many open files", "x"), "ulimit -n"),
    (RuntimeError("can't start new thread"), "not enough memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "not enough memory"),
]


@pytest.mark.parametrize(("raised", "message"), STARVED)
def test_what_the_machine_refuses_is_an_error_of_ours(raised: Exception, message: str) -> None:
    with pytest.raises(FileSystemError) as caught, machine_errors():
        raise raised
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (MemoryError(), 4, "not enough memory"),
        (KeyError("a fault of ours"), UnexpectedError.exit_code, "Please report it"),
        *(pytest.param(raised, 4, said, marks=pytest.mark.stress) for raised, said in STARVED[1:]),
        pytest.param(
            RuntimeError("a fault of ours"),
            UnexpectedError.exit_code,
            "Please report it",
            marks=pytest.mark.stress,
        ),
    ],
)
def test_what_no_command_expects_has_a_code_of_its_own(
    raised: Exception, code: int, message: str, tmp_path: Path
) -> None:
    script = (
        "import sys; from qkpatch import api, cli\n"
        f"def plan(*a, **k): raise {type(raised).__name__}(*{raised.args!r})\n"
        "api.plan = plan; sys.argv = ['qkpatch', 'plan', 'x\\x1by']; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert ("Traceback" in done.stderr) == (code == UnexpectedError.exit_code)


def test_tracebacks_that_were_asked_for_keep_the_exit_code(tiny: Tiny) -> None:
    done = subprocess.run(
        command("plan", tiny.path, "--layers", "99", "--debug"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("to", [">/dev/full", pytest.param("| head -c 0; exit ${PIPESTATUS[0]}")])
@pytest.mark.parametrize("flags", ["", pytest.param("--json", marks=pytest.mark.stress)])
def test_a_mismatch_is_not_hidden_where_nothing_can_be_printed(
    to: str, flags: str, tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    assert run("apply", tiny.path, "-o", out).exit_code == 0
    words = warm.shell("verify", out, "--source", tiny.path)
    shell = ["bash", "-c", f"{words} {flags} {to}"]
    assert subprocess.run(shell, capture_output=True, check=False).returncode in (4, 141, 0)
    (out / "tokenizer.json").write_text("{ }")
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_ends_what_other_threads_read(tmp_path: Path) -> None:
    """Of a library's pool too, for whose threads the main one waits."""
    hole = tmp_path / "hole"
    with open(hole, "wb") as file:
        file.truncate(100 << 30)

    def read() -> None:
        with open_read(hole) as opened:
            opened.sha256(0, opened.size)

    begun = time.monotonic()

    def interrupted() -> None:
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(read) for _ in range(2)]
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
            for one in running:
                one.result()

    with unwinding_on_kill(), pytest.raises(Terminated):
        interrupted()
    assert time.monotonic() - begun < 10
