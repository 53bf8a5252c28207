"""`--resume`: what is done stays after a signal or an error, the message says how to go on, and that goes on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import REPO, build_tiny_folder

from qkpatch.errors import FileSystemError, HubError, NumericalError, QKPatchError
from qkpatch.output.options import Writing
from qkpatch.patching.apply import apply_plan
from qkpatch.planning.plan import make_plan
from qkpatch.planning.request import Request

Run = Callable[..., Any]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
# Edits so slowly that the copies are done long before.
SLOWLY = """
import sys, time
from qkpatch.patching.copier import Copier
from qkpatch import cli
write = Copier.write
def slow(*arguments):
    time.sleep(0.5)
    write(*arguments)
Copier.write = slow
cli.main()
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build_tiny_folder(tmp_path / "source", n_layers=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "with a space").mkdir()
    return tmp_path / "with a space"


def contents(root: Path) -> dict[str, bytes]:
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    files.pop("qkpatch.json", None)
    return files


def modes(root: Path) -> dict[str, int]:
    return {path.relative_to(root).as_posix(): path.stat().st_mode for path in (root, *root.rglob("*"))}


def left(folder: Path) -> list[Path]:
    return list(folder.glob(".out.qkpatch-*"))


def heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def interrupted(source: Path, folder: Path, number: int, *flags: str) -> tuple[int, str]:
    """A run that gets a signal when all but the edits is done: its exit code and what it said."""
    command = [sys.executable, "-c", SLOWLY, "apply", str(source), "-o", str(folder / "out"), *flags]
    with subprocess.Popen(
        [*command, "--layers", "0-3"],
        env=ENVIRONMENT,
        preexec_fn=heed_signals,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if any(
                "filled" in (room / "journal").read_text()
                for room in left(folder)
                if (room / "journal").exists()
            ):
                break
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(60), process.communicate()[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.stress)]
)
def test_what_is_done_stays_after_a_signal_and_the_command_that_is_told_goes_on(
    number: signal.Signals, source: Path, folder: Path, run: Run, tmp_path: Path
) -> None:
    code, said = interrupted(source, folder, number, "--resume")
    assert code == 128 + number, said
    assert " of 5 file(s) are kept. Go on with: " in said
    (staging,) = left(folder)
    notes = [json.loads(line) for line in (staging / "journal").read_text().splitlines()[1:]]
    kept = {note["name"]: note["size"] for note in notes}
    assert contents(staging / "files").keys() == kept.keys()
    assert f"{sum(kept.values()):,} bytes in {len(kept)} of" in said
    words = shlex.split(said.partition("Go on with: ")[2])
    assert words[:2] == ["qkpatch", "apply"]
    again = warm.run(ENVIRONMENT, words[1:])
    assert again.returncode == 0, again.stderr
    assert f"; {len(kept)} of these files taken over from the run before" in " ".join(again.stdout.split())
    assert run("apply", source, "-o", tmp_path / "plain", "--layers", "0-3").exit_code == 0
    assert contents(folder / "out") == contents(tmp_path / "plain")
    assert left(folder) == []


def test_without_resume_a_signal_leaves_nothing(source: Path, folder: Path) -> None:
    code, said = interrupted(source, folder, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert said == "Terminated; nothing half done is left behind.\n"
    assert list(folder.iterdir()) == []


class Moment:
    """An observer that raises an error once everything is copied and an edit is under way."""

    def __init__(self, folder: Path, error: Exception) -> None:
        self.folder, self.error = folder, error

    def begins(self, what: str, n_bytes: int, n_heads: int) -> None:
        """Too early."""

    def copied(self, n_bytes: int) -> None:
        """Too early."""

    def edited(self, n_heads: int) -> None:
        deadline = time.monotonic() + 60
        while "filled" not in (left(self.folder)[0] / "journal").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise self.error


def fail(source: Path, out: Path, error: Exception, **how: bool) -> QKPatchError:
    plan = make_plan(str(source), Request())
    with pytest.raises(type(error)) as caught:
        apply_plan(plan, out, observer=Moment(out.parent, error), writing=Writing(**how))
    assert isinstance(caught.value, QKPatchError)
    return caught.value


def test_what_is_done_stays_after_an_error_that_another_run_may_not_meet(source: Path, folder: Path) -> None:
    error = fail(source, folder / "out", FileSystemError("full", fix="free some"), resume=True)
    assert error.fix is not None
    assert error.fix.startswith("free some; ")
    assert "--resume" in error.fix
    assert len(left(folder)) == 1


@pytest.mark.parametrize(
    ("error", "resume"), [(NumericalError("NaN"), True), (FileSystemError("full"), False)]
)
def test_what_no_other_run_would_use_goes(
    error: QKPatchError, resume: bool, source: Path, folder: Path
) -> None:
    fail(source, folder / "out", error, resume=resume)
    assert error.fix is None
    assert list(folder.iterdir()) == []


def left_by_a_failure(source: Path, out: Path) -> Path:
    fail(source, out, HubError("broken off"))
    (staging,) = left(out.parent)
    return staging


def test_of_several_the_one_with_most_in_it_is_taken_over_and_the_others_go(
    source: Path, folder: Path, run: Run
) -> None:
    aside = folder.with_name("aside")
    aside.mkdir()
    for number in (0, 9):
        staging = left_by_a_failure(source, folder / "out")
        lines = (staging / "journal").read_text().splitlines(keepends=True)
        (staging / "journal").write_text("".join(lines[:2]))
        staging.rename(aside / f".out.qkpatch-{number:08}")
    staging = left_by_a_failure(source, folder / "out")
    staging.rename(folder / ".out.qkpatch-55555555")
    for path in aside.iterdir():
        path.rename(folder / path.name)
    assert run("apply", source, "-o", folder / "out", "--resume").exit_code == 0
    copied_by = json.loads((folder / "out" / "qkpatch.json").read_text())["run"]["copied_by"]
    assert copied_by == {"resumed": len(contents(source))}
    assert left(folder) == []


def test_modes_are_those_of_a_new_output_whatever_was_done_to_what_is_taken_over(
    source: Path, folder: Path, run: Run, tmp_path: Path
) -> None:
    staging = left_by_a_failure(source, folder / "out")
    for path in (staging / "files", *(staging / "files").rglob("*")):
        path.chmod(stat.S_IMODE(path.stat().st_mode) ^ 0o072)
    assert run("apply", source, "-o", folder / "out", "--resume").exit_code == 0
    assert run("apply", source, "-o", tmp_path / "plain").exit_code == 0
    assert modes(folder / "out") == modes(tmp_path / "plain")


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "gone"])
def test_what_stands_in_place_of_the_files_goes_and_all_is_made_anew(
    kind: str, source: Path, folder: Path, run: Run, tmp_path: Path
) -> None:
    files = left_by_a_failure(source, folder / "out") / "files"
    shutil.move(files, tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    if kind == "file":
        files.write_text("mine")
    elif kind != "gone":
        files.symlink_to(tmp_path / "elsewhere" if kind == "link" else "nowhere")
    result = run("apply", source, "-o", folder / "out", "--resume")
    assert result.exit_code == 0, result.output
    assert not (folder / "out").is_symlink()
    assert contents(folder / "out").keys() == contents(source).keys()
    assert contents(tmp_path / "elsewhere") == before
    assert left(folder) == []


def test_room_that_a_dead_run_takes_counts_as_free(
    source: Path, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_a_failure(source, folder / "out")
    usage = shutil.disk_usage(folder)
    needed = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    for command in ("plan", "apply"):
        result = run(command, source, "-o", folder / "out")
        assert result.exit_code == 0, result.output
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    for command in ("plan", "apply"):
        assert run(command, source, "-o", folder / "other").exit_code == 4
