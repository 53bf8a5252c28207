"""A directory by descriptor: what the system says of what lies in it is an error that can be explained."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.errors import FileSystemError


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_look_that_fails_is_an_error_that_says_at_what(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "name").write_text("")

    def fail(*_: object, **__: object) -> os.stat_result:
        raise OSError(number, os.strerror(number))

    with Rooted(tmp_path) as root:
        monkeypatch.setattr(os, "stat", fail)
        for look in (lambda: root.status("name"), lambda: list(root.walk())):
            with pytest.raises(FileSystemError) as caught:
                look()
            assert (caught.value.where or "").startswith(str(tmp_path))
            assert os.strerror(number) in caught.value.what


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP])
def test_what_is_not_there_is_no_error(number: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("elsewhere")
    name = {errno.ENOENT: "none", errno.ENOTDIR: "file/x", errno.ELOOP: "link/x"}[number]
    with Rooted(tmp_path) as root:
        assert root.status(name) is None


def test_a_directory_that_is_made_once_more_has_the_mode_that_it_would_have(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with Rooted(tmp_path) as root:
            (tmp_path / "file").write_text("")
            for name in ("new", "file", "old"):
                if name == "old":
                    (tmp_path / "old").mkdir(mode=0o700)
                    (tmp_path / "old").chmod(0o2707)
                root.make_directory(name, 0o755)
                status = (tmp_path / name).stat()
                assert stat.S_ISDIR(status.st_mode)
                assert status.st_mode & 0o777 == 0o750
            assert (tmp_path / "old").stat().st_mode & 0o7000 == 0o2000
    finally:
        os.umask(before)


def test_a_directory_is_listed_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """btrfs goes on listing what was there when the descriptor was opened, until it is rewound."""
    real_listdir, real_lseek, real_open = os.listdir, os.lseek, os.open
    seen: dict[int, list[str]] = {}

    def opened(*args: Any, **more: Any) -> int:
        fd = real_open(*args, **more)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            seen[fd] = real_listdir(fd)
        return fd

    def rewound(fd: int, at: int, how: int) -> int:
        found = real_lseek(fd, at, how)
        seen[fd] = real_listdir(fd)
        return found

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "lseek", rewound)
    monkeypatch.setattr(os, "listdir", lambda fd: seen[fd])
    with Rooted(tmp_path) as root:
        for name in ("a", "b"):
            os.close(root.open(name, os.O_WRONLY | os.O_CREAT))
            assert name in root.names()
            assert name in dict(root.walk())
