"""What is resumed is one's own, what is published is what was written, and a source that changes is noticed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import build_tiny_folder
from typer.testing import Result

from qkpatch.errors import FileSystemError, HubError
from qkpatch.output.options import Writing
from qkpatch.patching.apply import apply_plan
from qkpatch.planning.plan import make_plan
from qkpatch.planning.request import Request

Run = Callable[..., Result]
NOBODY = 65534
EDITED = "model.safetensors"


class Moment:
    """An observer that does something once, when every file of SOURCE is noted as done and an edit is under way."""

    def __init__(self, folder: Path, action: Callable[[Path], None]) -> None:
        self.folder, self.action, self.is_over = folder, action, False

    def begins(self, what: str, n_bytes: int, n_heads: int) -> None:
        """Too early."""

    def copied(self, n_bytes: int) -> None:
        """Too early."""

    def edited(self, n_heads: int) -> None:
        if self.is_over:
            return
        self.is_over = True
        (staging,) = self.folder.glob(".out.qkpatch-*")
        deadline = time.monotonic() + 60
        while "filled" not in (staging / "journal").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.action(staging)


def apply_with(source: Path, out: Path, action: Callable[[Path], None], **how: bool) -> None:
    plan = make_plan(str(source), Request())
    apply_plan(plan, out, observer=Moment(out.parent, action), writing=Writing(**how))


def fail(staging: Path) -> None:
    raise HubError("broken off")


def left_by_a_failure(source: Path, out: Path) -> Path:
    """The staging directory of a run that ended while it edited, with all files noted."""
    with pytest.raises(HubError):
        apply_with(source, out, fail)
    (staging,) = out.parent.glob(".out.qkpatch-*")
    return staging


def contents(root: Path) -> dict[str, bytes]:
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    files.pop("qkpatch.json", None)
    return files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build_tiny_folder(tmp_path / "source")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture
def plain(source: Path, tmp_path: Path, run: Run) -> dict[str, bytes]:
    assert run("apply", source, "-o", tmp_path / "plain").exit_code == 0
    return contents(tmp_path / "plain")


def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to somebody else")


# -------- whose staging directory it is


def test_staging_of_somebody_else_is_neither_taken_over_nor_removed(
    source: Path, folder: Path, plain: dict[str, bytes], run: Run
) -> None:
    as_root()
    staging = left_by_a_failure(source, folder / "out")
    victim = folder / "victim"
    victim.write_text("mine")
    (staging / "files" / "side.bin").unlink()
    (staging / "files" / "side.bin").symlink_to(victim)
    os.chown(staging, NOBODY, NOBODY)
    assert run("apply", source, "-o", folder / "out", "--resume").exit_code == 0
    assert contents(folder / "out") == plain
    assert victim.read_text() == "mine"
    assert (staging / "journal").exists()


@pytest.mark.stress
@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o701, 0o1777])
def test_staging_that_others_may_enter_is_left_alone(
    mode: int, source: Path, folder: Path, plain: dict[str, bytes], run: Run
) -> None:
    staging = left_by_a_failure(source, folder / "out")
    staging.chmod(mode)
    assert run("apply", source, "-o", folder / "out", "--resume").exit_code == 0
    assert contents(folder / "out") == plain
    assert (staging / "journal").exists()


def test_staging_is_private_from_its_first_moment(source: Path, folder: Path) -> None:
    seen: list[int] = []
    apply_with(source, folder / "out", lambda staging: seen.append(stat.S_IMODE(staging.stat().st_mode)))
    assert seen == [0o700]


@pytest.mark.parametrize(
    "what",
    [
        "a file",
        pytest.param("a folder", marks=pytest.mark.stress),
        pytest.param("a journal of another kind", marks=pytest.mark.stress),
        pytest.param("more than a journal and files", marks=pytest.mark.stress),
        pytest.param("a link as journal", marks=pytest.mark.stress),
        pytest.param("files and no journal", marks=pytest.mark.stress),
    ],
)
def test_a_directory_that_only_bears_a_staging_name_is_kept(
    what: str, source: Path, folder: Path, run: Run
) -> None:
    mine = folder / ".out.qkpatch-0123abcd"
    mine.mkdir(mode=0o700)
    if what == "a file":
        (mine / "thesis.tex").write_text("mine")
    elif what == "a folder":
        (mine / "thesis").mkdir()
    elif what == "a journal of another kind":
        (mine / "journal").write_text("dear diary\n")
    elif what == "a link as journal":
        (folder / "elsewhere").write_text('{"fingerprint": "0"}\n')
        (mine / "journal").symlink_to(folder / "elsewhere")
    elif what == "files and no journal":
        (mine / "files").mkdir()
        (mine / "files" / "thesis.tex").write_text("mine")
    else:
        (mine / "journal").write_text('{"fingerprint": "0"}\n')
        (mine / "files").mkdir()
        (mine / "thesis.tex").write_text("mine")
    before = sorted(path.relative_to(folder) for path in mine.rglob("*"))
    assert run("apply", source, "-o", folder / "out").exit_code == 0
    assert sorted(path.relative_to(folder) for path in mine.rglob("*")) == before


def test_no_name_of_source_meets_one_of_ours(source: Path, folder: Path, run: Run) -> None:
    for name in (".qkpatch-journal", "journal", "files", "replaced"):
        (source / name).write_text(f"{name} of SOURCE")
    assert run("apply", source, "-o", folder / "out").exit_code == 0
    assert contents(folder / "out").keys() == contents(source).keys()
    assert run("verify", folder / "out", "--source", source).exit_code == 0


# -------- what is taken over


def links_out(staging: Path, victim: Path) -> None:
    (staging / "files" / "side.bin").unlink()
    (staging / "files" / "side.bin").symlink_to(victim)


def folder_links_out(staging: Path, victim: Path) -> None:
    shutil.rmtree(staging / "files" / "sub")
    (staging / "files" / "sub").symlink_to(victim.parent)


def edited_links_out(staging: Path, victim: Path) -> None:
    (staging / "files" / EDITED).unlink()
    (staging / "files" / EDITED).symlink_to(victim)


def byte_changed(staging: Path, victim: Path) -> None:
    """In a shard that is noted as filled: outside the planned rows, with its size and time as they were."""
    path = staging / "files" / EDITED
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def added(staging: Path, victim: Path) -> None:
    (staging / "files" / "evil.py").write_text("print('hello')")


def a_pipe(staging: Path, victim: Path) -> None:
    (staging / "files" / "side.bin").unlink()
    os.mkfifo(staging / "files" / "side.bin")


@pytest.mark.parametrize(
    "harm",
    [
        links_out,
        byte_changed,
        *(
            pytest.param(f, marks=pytest.mark.stress)
            for f in (folder_links_out, edited_links_out, added, a_pipe)
        ),
    ],
)
def test_what_was_touched_since_is_not_taken_over(
    harm: Callable[[Path, Path], None], source: Path, folder: Path, plain: dict[str, bytes], run: Run
) -> None:
    (folder / "victims").mkdir()
    victim = folder / "victims" / "notes.txt"
    victim.write_text("mine")
    harm(left_by_a_failure(source, folder / "out"), victim)
    result = run("apply", source, "-o", folder / "out", "--resume")
    assert result.exit_code == 0, result.output
    assert contents(folder / "out") == plain
    assert not any(path.is_symlink() for path in (folder / "out").rglob("*"))
    assert victim.read_text() == "mine"
    assert list(folder.glob(".out*")) == []


def test_what_was_not_touched_is_taken_over(
    source: Path, folder: Path, plain: dict[str, bytes], run: Run
) -> None:
    left_by_a_failure(source, folder / "out")
    assert run("apply", source, "-o", folder / "out", "--resume").exit_code == 0
    assert contents(folder / "out") == plain
    copied_by = json.loads((folder / "out" / "qkpatch.json").read_text())["run"]["copied_by"]
    assert copied_by == {"resumed": len(plain)}


# -------- what is published


def remove_all(staging: Path) -> None:
    for path in (staging / "files").rglob("*"):
        if path.is_file():
            path.unlink()


def replace_config(staging: Path) -> None:
    data = (staging / "files" / "config.json").read_bytes()
    (staging / "files" / "config.json").unlink()
    (staging / "files" / "config.json").write_bytes(data)


def change_side(staging: Path) -> None:
    path = staging / "files" / "side.bin"
    status = path.stat()
    path.write_bytes(b"SIDE" * 1000)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def link_sub(staging: Path) -> None:
    (staging / "files" / "sub").rename(staging / "elsewhere")
    (staging / "files" / "sub").symlink_to("../elsewhere")


def add_file(staging: Path) -> None:
    (staging / "files" / "evil.py").write_text("print('hello')")


@pytest.mark.parametrize(
    "harm",
    [
        remove_all,
        *(
            pytest.param(f, marks=pytest.mark.stress)
            for f in (replace_config, change_side, link_sub, add_file)
        ),
    ],
)
def test_out_is_published_only_as_it_was_written(
    harm: Callable[[Path], None], source: Path, folder: Path
) -> None:
    with pytest.raises(FileSystemError, match=r"unfinished OUT|cannot (open|sync)"):
        apply_with(source, folder / "out", harm)
    assert not (folder / "out").exists()


def test_whoever_moves_the_staging_directory_away_redirects_nothing(source: Path, folder: Path) -> None:
    """In a folder where others may rename: OUT is what was written, whatever stands under the name since."""

    def swap(staging: Path) -> None:
        staging.rename(folder / "stolen")
        staging.mkdir()
        (staging / "files").mkdir()
        (staging / "files" / "evil.py").write_text("print('hello')")

    apply_with(source, folder / "out", swap)
    assert contents(folder / "out").keys() == contents(source).keys()


def test_modes_of_folders_are_kept(source: Path, folder: Path, run: Run) -> None:
    before = os.umask(0o022)
    try:
        (source / "sub").chmod(0o711)
        source.chmod(0o700)
        assert run("apply", source, "-o", folder / "private").exit_code == 0
        assert stat.S_IMODE((folder / "private").stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "private" / "sub").stat().st_mode) == 0o711
        (source / "sub").chmod(0o700)
        source.chmod(0o755)
        assert run("apply", source, "-o", folder / "open").exit_code == 0
        assert stat.S_IMODE((folder / "open").stat().st_mode) == 0o755
        assert stat.S_IMODE((folder / "open" / "sub").stat().st_mode) == 0o700
    finally:
        os.umask(before)


# -------- a source that changes


def change_in_place(path: Path) -> None:
    """One byte, with the file's time restored."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", [EDITED, pytest.param("side.bin", marks=pytest.mark.stress)])
def test_a_source_changed_before_resume_is_another_source(
    name: str, source: Path, folder: Path, run: Run, tmp_path: Path
) -> None:
    left_by_a_failure(source, folder / "out")
    change_in_place(source / name)
    assert run("apply", source, "-o", folder / "out", "--resume").exit_code == 0
    assert run("verify", folder / "out", "--source", source).exit_code == 0
    assert run("apply", source, "-o", tmp_path / "anew").exit_code == 0
    assert contents(folder / "out") == contents(tmp_path / "anew")


def test_a_source_changed_in_place_while_it_is_read_is_an_error(source: Path, folder: Path) -> None:
    with pytest.raises(FileSystemError, match="the source changed"):
        apply_with(source, folder / "out", lambda _: change_in_place(source / EDITED))
    assert list(folder.iterdir()) == []


@pytest.mark.stress
def test_hard_links_made_to_source_meanwhile_are_no_change(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    def link(_: Path) -> None:
        for path in source.glob("*.*"):
            os.link(path, tmp_path / f"link-{path.name}")

    apply_with(source, folder / "out", link)
    assert contents(folder / "out").keys() == contents(source).keys()


def test_linked_files_of_a_killed_run_are_taken_over(source: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError):
        apply_with(source, folder / "out", fail, link=True)
    apply_with(source, folder / "out", lambda _: None, link=True, resume=True)
    assert (folder / "out" / "side.bin").samefile(source / "side.bin")
    assert list(folder.glob(".out*")) == []
