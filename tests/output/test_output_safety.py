"""What `apply` must never do: harm SOURCE or someone's files, or leave half an OUT. In every case of failure."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny
from safetensors.torch import load_file, save_file
from typer.testing import Result

from qkpatch import api
from qkpatch.common import system
from qkpatch.errors import FileSystemError, UsageError
from qkpatch.output import staging
from qkpatch.output.options import Writing
from qkpatch.output.staging import Staging
from qkpatch.patching.apply import apply_plan
from qkpatch.planning.plan import make_plan
from qkpatch.planning.request import Request

REPO_ROOT = Path(__file__).resolve().parents[2]
CPU = "cpu"
OF_LINUX = [pytest.param(name, marks=pytest.mark.linux) for name in ("copy_file_range", "preadv")]
State = dict[str, tuple[str, int]]


def state(root: Path) -> State:
    """Every path under ``root`` with its digest (or what else it is) and time of modification."""
    return {p.relative_to(root).as_posix(): (_digest(p), p.lstat().st_mtime_ns) for p in root.rglob("*")}


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def hidden(folder: Path) -> list[str]:
    """Names of staging directories, and of whatever else begins with a dot."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def assert_refused(result: Result, code: int, said: str) -> None:
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for OUT."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


# -------- OUT and SOURCE


@pytest.mark.parametrize("out", ["tiny", "tiny/", "tiny/out", "tiny/sub/../out", ".", "tiny/../tiny"])
@pytest.mark.parametrize("base", ["absolute", "relative"])
def test_out_that_is_or_holds_or_lies_in_source_is_refused(
    tiny: Tiny, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, base: str, out: str
) -> None:
    root = tiny.path.parent
    (tiny.path / "sub").mkdir()
    monkeypatch.chdir(root)
    before = state(root)
    where = root / out if base == "absolute" else out
    assert_refused(run("apply", tiny.path, "-o", where), 2, "OUT")
    assert_refused(run("apply", "tiny", "-o", where, "--overwrite"), 2, "OUT")
    assert state(root) == before


@pytest.mark.parametrize("out", ["link", "link/out", "tiny/out", "linked_folder/tiny/out"])
def test_overlap_of_out_and_source_is_seen_through_links(
    tiny: Tiny, run: Callable[..., Result], out: str
) -> None:
    root = tiny.path.parent
    (root / "link").symlink_to("tiny")
    (root / "linked_folder").symlink_to(root)
    before = state(root)
    for source in ("tiny", "link"):
        assert_refused(run("apply", root / source, "-o", root / out, "--overwrite"), 2, "SOURCE")
    assert state(root) == before


def test_overlap_is_seen_where_a_directory_has_two_names(
    tiny: Tiny, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where upper case is lower case, and no link is resolved."""
    root = tiny.path.parent
    (root / "TINY").symlink_to("tiny")
    monkeypatch.setattr(os.path, "realpath", lambda path, **_: str(Path(path).absolute()))
    assert_refused(run("apply", tiny.path, "-o", root / "TINY" / "out"), 2, "OUT lies in SOURCE")
    assert_refused(run("apply", root / "TINY", "-o", tiny.path, "--overwrite"), 2, "SOURCE")
    assert {path.name for path in root.iterdir()} == {"TINY", "tiny"}


def test_out_that_holds_the_files_source_links_to_is_refused(
    tiny: Tiny, folder: Path, run: Callable[..., Result]
) -> None:
    earlier, source = folder / "earlier", folder / "source"
    assert run("apply", tiny.path, "-o", earlier).exit_code == 0
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).symlink_to(earlier / name)
    before = state(folder)
    assert_refused(run("apply", source, "-o", earlier, "--overwrite"), 2, "SOURCE")
    assert state(folder) == before


def test_out_beside_a_single_file_source_may_be_in_its_directory(
    tiny: Tiny, run: Callable[..., Result]
) -> None:
    assert run("apply", tiny.path / "model.safetensors", "-o", tiny.path / "out").exit_code == 0
    assert_refused(run("apply", tiny.path / "model.safetensors", "-o", tiny.path, "--overwrite"), 2, "SOURCE")


# -------- OUT and what is there already


def test_a_directory_with_content_is_refused_without_overwrite(
    tiny: Tiny, folder: Path, run: Callable[..., Result]
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    before = state(folder)
    assert_refused(run("apply", tiny.path, "-o", folder / "out"), 2, "not empty")
    assert state(folder) == before


def test_an_empty_directory_is_taken(tiny: Tiny, folder: Path, run: Callable[..., Result]) -> None:
    (folder / "out").mkdir()
    assert run("apply", tiny.path, "-o", folder / "out").exit_code == 0
    assert (folder / "out" / "qkpatch.json").is_file()
    assert hidden(folder) == []


def test_overwrite_replaces_an_earlier_output(tiny: Tiny, folder: Path, run: Callable[..., Result]) -> None:
    out = folder / "out"
    assert run("apply", tiny.path, "-o", out, "--digest", "files").exit_code == 0
    assert_refused(run("apply", tiny.path, "-o", out, "--alpha", "0"), 2, "--overwrite")
    (tiny.path / "tokenizer.json").rename(tiny.path / "renamed.json")
    assert run("apply", tiny.path, "-o", out, "--overwrite", "--alpha", "0").exit_code == 0
    assert (out / "renamed.json").is_file()
    assert not (out / "tokenizer.json").exists()
    assert json.loads((out / "qkpatch.json").read_bytes())["edit"]["alpha"] == 0
    assert hidden(folder) == []


@pytest.mark.parametrize("foreign", ["mine.txt", "sub/mine.txt", ".hidden", "dangling"])
def test_overwrite_refuses_a_directory_with_foreign_files(
    tiny: Tiny, folder: Path, run: Callable[..., Result], foreign: str
) -> None:
    out = folder / "out"
    assert run("apply", tiny.path, "-o", out).exit_code == 0
    (out / foreign).parent.mkdir(exist_ok=True)
    if foreign == "dangling":
        (out / foreign).symlink_to("nowhere")
    else:
        (out / foreign).write_text("mine")
    before = state(folder)
    assert_refused(run("apply", tiny.path, "-o", out, "--overwrite"), 2, foreign.partition("/")[0])
    assert state(folder) == before


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": [1]}', '{"files": {"name": 1}}', "\xff"])
def test_overwrite_refuses_a_directory_whose_manifest_says_nothing(
    tiny: Tiny, folder: Path, run: Callable[..., Result], manifest: str
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    (folder / "out" / "qkpatch.json").write_bytes(manifest.encode("latin-1"))
    before = state(folder)
    assert_refused(run("apply", tiny.path, "-o", folder / "out", "--overwrite"), 2, "not as qkpatch left it")
    assert state(folder) == before


@pytest.mark.parametrize("kind", ["file", "link to a directory", "dangling link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_out_that_is_no_directory_is_refused(
    tiny: Tiny, folder: Path, run: Callable[..., Result], kind: str, overwrite: bool
) -> None:
    out = folder / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("real")
    if kind == "link to a directory":
        (folder / "real").mkdir()
    before = state(folder)
    result = run("apply", tiny.path, "-o", out, *(["--overwrite"] if overwrite else []))
    assert_refused(result, 2, "not a directory")
    assert state(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", [".", "", "./", "../here", ".."])
def test_the_working_directory_as_out_harms_nothing_around_it(
    tiny: Tiny,
    folder: Path,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    overwrite: bool,
) -> None:
    (folder / "beside").write_text("precious")
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    result = run("apply", tiny.path, "-o", out, *(["--overwrite"] if overwrite else []))
    assert (folder / "beside").read_text() == "precious"
    assert not (folder / "qkpatch.json").exists()
    assert hidden(folder) == []
    if result.exit_code == 0:
        assert (folder / "here" / "qkpatch.json").is_file()
    else:
        assert result.exit_code in (2, 4), result.output
        assert list((folder / "here").iterdir()) == []


@pytest.mark.parametrize("parent", ["file", "dangling", "file/deeper"])
@pytest.mark.parametrize("command", ["apply", "plan"])
def test_a_parent_that_is_no_directory_is_refused(
    tiny: Tiny, folder: Path, run: Callable[..., Result], command: str, parent: str
) -> None:
    (folder / "file").write_text("")
    (folder / "dangling").symlink_to("nowhere")
    before = state(folder)
    assert_refused(run(command, tiny.path, "-o", folder / parent / "out"), 4, "not a directory")
    assert state(folder) == before


def test_missing_parents_are_made_and_go_again_where_out_does_not_come(
    tiny: Tiny, folder: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "here").mkdir()
    out = folder / "here" / "a" / "b" / "out"
    assert run("plan", tiny.path, "-o", out).exit_code == 0
    assert list((folder / "here").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", lambda *_: (_ for _ in ()).throw(FileSystemError("broken")))
        assert_refused(run("apply", tiny.path, "-o", out), 4, "broken")
    assert list((folder / "here").iterdir()) == []
    monkeypatch.chdir(folder / "here")
    assert run("apply", tiny.path, "-o", "a/../c/b/out").exit_code == 0
    assert (folder / "here" / "c" / "b" / "out" / "qkpatch.json").is_file()
    assert [path.name for path in folder.glob("here/c/b/*")] == ["out"]


# -------- permissions: in processes that have none to spare, even where tests run as root


def _drop_privilege() -> None:
    """Before exec: leave out what lets root read and write where it may not (CAP_DAC_*)."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        if libc.prctl(24, capability, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot drop the capability")


def run_unprivileged(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qkpatch", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        preexec_fn=_drop_privilege if os.geteuid() == 0 else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.long
def test_a_read_only_source_is_enough_and_stays_as_it_was(tiny: Tiny, folder: Path) -> None:
    (tiny.path / "sub").mkdir()
    (tiny.path / "sub" / "file").write_text("x")
    for path in [*tiny.path.rglob("*"), tiny.path]:
        path.chmod(path.stat().st_mode & ~0o222)
    before = state(tiny.path)
    result = run_unprivileged("apply", tiny.path, "-o", folder / "out")
    try:
        assert result.returncode == 0, result.stderr
        assert state(tiny.path) == before
        assert (folder / "out" / "sub" / "file").read_text() == "x"
        assert all(path.stat().st_mode & 0o200 for path in (folder / "out").rglob("*"))
    finally:
        for path in [tiny.path, *tiny.path.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.parametrize("mode", [0o555, 0o333, 0o000], ids=["read-only", "unlistable", "closed"])
def test_a_parent_without_permission_is_refused(tiny: Tiny, folder: Path, mode: int) -> None:
    folder.chmod(mode)
    try:
        result = run_unprivileged("apply", tiny.path, "-o", folder / "out", "--quiet")
    finally:
        folder.chmod(0o755)
    assert "Traceback" not in result.stderr
    if mode == 0o333 and result.returncode == 0:  # nothing hinders writing where one cannot look
        assert (folder / "out" / "qkpatch.json").is_file()
        return
    assert result.returncode == 4
    assert "permission" in result.stderr.lower()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["apply", "plan"])
def test_somebody_elses_out_in_a_sticky_directory_is_refused_before_the_edit(
    tiny: Tiny, folder: Path, run: Callable[..., Result], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "out").mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    result = run(command, tiny.path, "-o", folder / "out")
    assert result.exit_code == 4, result.stderr
    assert "somebody else's" in result.stderr
    assert list(folder.iterdir()) == [folder / "out"]
    folder.chmod(0o777)
    assert run("plan", tiny.path, "-o", folder / "out").exit_code == 0


@pytest.mark.linux
def test_an_append_only_parent_is_refused_before_anything_is_left_there(
    tiny: Tiny, folder: Path, run: Callable[..., Result]
) -> None:
    if subprocess.run(["chattr", "+a", folder], capture_output=True, check=False).returncode:
        pytest.skip("this file system, or this user, cannot make directories append-only")
    try:
        result = run("apply", tiny.path, "-o", folder / "out")
        assert result.exit_code == 4, result.stderr
        assert "append-only" in result.stderr
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["chattr", "-a", folder], check=True)
    assert run("apply", tiny.path, "-o", folder / "out").exit_code == 0


@pytest.mark.parametrize("what", ["file", "folder", "parent"])
def test_a_source_that_cannot_be_read_is_refused(tiny: Tiny, folder: Path, what: str) -> None:
    (tiny.path / "sub").mkdir()
    closed = {"file": tiny.path / "tokenizer.json", "folder": tiny.path / "sub", "parent": tiny.path}[what]
    closed.chmod(0)
    source = tiny.path / "model.safetensors" if what == "parent" else tiny.path
    try:
        result = run_unprivileged("apply", source, "-o", folder / "out")
    finally:
        closed.chmod(0o755)
    assert "Traceback" not in result.stderr
    assert result.returncode == 4
    assert "permission" in result.stderr.lower()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("source", ["~no-such-user/model", "x" * 300], ids=["unknown home", "long name"])
def test_a_source_name_that_no_file_can_have_is_an_error_without_a_traceback(
    run: Callable[..., Result], source: str
) -> None:
    assert_refused(run("plan", source), 2, "no such file")


# -------- errors on the way


def test_too_little_disk_is_refused_before_anything_is_written(
    tiny: Tiny, folder: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(staging, "Staging", None)  # cannot be reached
    before = state(folder)
    assert_refused(run("apply", tiny.path, "-o", folder / "out"), 4, "1,000 are free")
    assert state(folder) == before


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_in_queries_or_keys_leaves_no_trace(
    tiny: Tiny, folder: Path, run: Callable[..., Result], which: str, value: float
) -> None:
    path = tiny.path / "model.safetensors"
    tensors = load_file(path)
    tensors[tiny.name(1, which)][-1, -1] = value
    save_file(tensors, path, {"format": "pt"})
    assert_refused(run("apply", tiny.path, "-o", folder / "out"), 3, tiny.name(1, which))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("function", ["pwrite", "sync", "mkdir", *OF_LINUX])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_file_system_leaves_no_trace(
    tiny: Tiny,
    folder: Path,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    code: int,
) -> None:
    (tiny.path / "sub").mkdir()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(system if function == "sync" else os, function, fail)
    result = run("apply", tiny.path, "-o", folder / "out")
    monkeypatch.undo()
    assert_refused(result, 4, os.strerror(code))
    assert list(folder.iterdir()) == []


class Meddler:
    """An observer that does something at the n-th report of a kind."""

    def __init__(self, kind: str, count: int, action: Callable[[], object]) -> None:
        self.kind, self.left, self.action = kind, count, action

    def begins(self, what: str, n_bytes: int, n_heads: int) -> None:
        """No moment to meddle at."""

    def _count(self, kind: str) -> None:
        self.left -= kind == self.kind
        if kind == self.kind and self.left == 0:
            self.action()

    def copied(self, n_bytes: int) -> None:
        self._count("copied")

    def edited(self, n_heads: int) -> None:
        self._count("edited")


@pytest.mark.parametrize("change", ["written to", "truncated", "touched", "grown", "replaced"])
@pytest.mark.parametrize("moment", ["copied", "edited"])
def test_a_source_that_changes_meanwhile_is_an_error(
    tiny: Tiny, folder: Path, change: str, moment: str
) -> None:
    shard = tiny.path / "model.safetensors"
    size = shard.stat().st_size

    def meddle() -> None:
        if change == "replaced":
            shutil.copy(shard, folder.parent / "other")
            (folder.parent / "other").rename(shard)
        elif change == "touched":
            os.utime(shard, ns=(0, 0))
        elif change == "truncated":
            os.truncate(shard, size - 1)
        else:
            with open(shard, "r+b") as file:
                file.seek(size if change == "grown" else size - 1)
                file.write(b"!")

    plan = make_plan(str(tiny.path), Request.of(layers="0-2"))
    # config.json is copied first, the shard second; heads of layer 0 are edited first.
    observer = Meddler(moment, 2 if moment == "copied" else 1, meddle)
    with pytest.raises(FileSystemError, match=r"changed|ends 1 bytes early"):
        apply_plan(plan, folder / "out", device=CPU, observer=observer)
    assert list(folder.iterdir()) == []


def test_a_source_that_changes_between_plan_and_copy_is_an_error(tiny: Tiny, folder: Path) -> None:
    plan = make_plan(str(tiny.path), Request())
    (tiny.path / "tokenizer.json").write_text("[]")
    with pytest.raises(FileSystemError, match="changed"):
        apply_plan(plan, folder / "out", device=CPU, observer=Meddler("", 0, list))
    assert list(folder.iterdir()) == []


def test_an_exception_nobody_expected_leaves_no_trace(tiny: Tiny, folder: Path) -> None:
    def stumble() -> None:
        raise RuntimeError("stumbled")

    plan = make_plan(str(tiny.path), Request())
    with pytest.raises(RuntimeError, match="stumbled"):
        apply_plan(plan, folder / "out", device=CPU, observer=Meddler("edited", 2, stumble))
    assert list(folder.iterdir()) == []


def test_an_out_that_appears_meanwhile_is_left_alone(tiny: Tiny, folder: Path) -> None:
    def appear() -> None:
        (folder / "out").mkdir()
        (folder / "out" / "mine.txt").write_text("mine")

    plan = make_plan(str(tiny.path), Request())
    with pytest.raises(UsageError, match="came into being"):
        apply_plan(plan, folder / "out", device=CPU, observer=Meddler("edited", 1, appear))
    assert (folder / "out" / "mine.txt").read_text() == "mine"
    assert [p.name for p in folder.iterdir()] == ["out"]


def test_a_foreign_file_that_appears_in_out_meanwhile_survives_overwrite(
    tiny: Tiny, folder: Path, run: Callable[..., Result]
) -> None:
    assert run("apply", tiny.path, "-o", folder / "out").exit_code == 0
    mine = folder / "out" / "mine.txt"
    plan = make_plan(str(tiny.path), Request())
    observer = Meddler("edited", 1, lambda: mine.write_text("mine"))
    with pytest.raises(UsageError):
        api.apply(plan, folder / "out", device=CPU, observer=observer, writing=Writing(overwrite=True))
    assert mine.read_text() == "mine"
    assert hidden(folder) == []


# -------- publishing where renameat2 is not to be had


@pytest.fixture
def no_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(system, "renameat2", unsupported)


@pytest.mark.usefixtures("no_renameat2")
def test_without_renameat2_outputs_are_still_published_and_replaced(
    tiny: Tiny, folder: Path, run: Callable[..., Result]
) -> None:
    out = folder / "out"
    assert run("apply", tiny.path, "-o", out).exit_code == 0
    assert run("apply", tiny.path, "-o", out, "--alpha", "0", "--overwrite").exit_code == 0
    assert json.loads((out / "qkpatch.json").read_bytes())["edit"]["alpha"] == 0
    assert [p.name for p in folder.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_renameat2")
def test_without_renameat2_an_old_output_comes_back_when_it_cannot_be_replaced(
    tiny: Tiny, folder: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "out"
    assert run("apply", tiny.path, "-o", out).exit_code == 0
    before = state(out)
    rename = os.rename

    def fail_to_publish(old: Any, new: Any, **kwargs: Any) -> None:
        if str(old) == "files" and Path(new).name == out.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new, **kwargs)

    monkeypatch.setattr(os, "rename", fail_to_publish)
    result = run("apply", tiny.path, "-o", out, "--overwrite")
    monkeypatch.undo()
    assert_refused(result, 4, os.strerror(errno.EIO))
    assert state(out) == before
    assert hidden(folder) == []


@pytest.mark.usefixtures("no_renameat2")
def test_without_renameat2_an_out_that_appears_at_the_last_moment_is_left_alone(
    tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = folder / "out", os.rename

    def be_late(old: Any, new: Any, **kwargs: Any) -> None:
        if str(old) == "files":
            out.mkdir()
            (out / "mine.txt").write_text("mine")
        rename(old, new, **kwargs)

    monkeypatch.setattr(os, "rename", be_late)
    with pytest.raises(UsageError, match="came into being"):
        apply_plan(make_plan(str(tiny.path), Request()), out, device=CPU, observer=Meddler("", 0, list))
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert hidden(folder) == []


# -------- staging


def orphan_of(folder: Path, name: str = ".out.qkpatch-0123abcd") -> Path:
    """What a run that was killed leaves."""
    orphan = folder / name
    orphan.mkdir(mode=0o700)
    (orphan / "journal").write_text('{"fingerprint": "0"}\n')
    (orphan / "files").mkdir()
    (orphan / "files" / "half").write_text("half")
    return orphan


def test_staging_whose_owner_lives_is_kept_and_an_orphan_is_removed(folder: Path) -> None:
    orphan = orphan_of(folder)
    with Staging(folder / "out") as first:
        assert not orphan.exists()
        with Staging(folder / "out") as second:
            assert first.path.is_dir()
        assert not second.path.exists()
        assert first.path.is_dir()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "name", [".out.qkpatch-12", ".other.qkpatch-0123abcd", "out.qkpatch-0123abcd", ".outX"]
)
def test_what_only_looks_like_staging_is_kept(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / ".out.qkpatch-aaaaaaaa").write_text("a file")
    (folder / ".out.qkpatch-bbbbbbbb").symlink_to(folder)
    before = state(folder)
    with Staging(folder / "out"):
        pass
    assert state(folder) == before


def test_fresh_staging_survives_another_run_that_cleans_up_before_it_is_locked(
    tiny: Tiny, folder: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, out = os.mkdir, folder / "out"

    def be_looked_at(path: Any, *args: Any, **kwargs: Any) -> None:
        mkdir(path, *args, **kwargs)
        if ".qkpatch-" in str(path):
            monkeypatch.setattr(os, "mkdir", mkdir)
            with Staging(out):  # takes the first one for stale
                pass

    monkeypatch.setattr(os, "mkdir", be_looked_at)
    result = run("apply", tiny.path, "-o", out)
    assert result.exit_code == 0, result.output
    assert [p.name for p in folder.iterdir()] == ["out"]


def test_a_link_to_outs_parent_leads_to_the_same_place(
    tiny: Tiny, folder: Path, run: Callable[..., Result]
) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert run("apply", tiny.path, "-o", link / "out").exit_code == 0
    assert [p.name for p in folder.iterdir()] == ["out"]
