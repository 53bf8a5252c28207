"""A sweep by several machines: what one would have written, whatever they do and in whatever order, or a refusal."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, build_tiny
from failing import interrupt
from test_sweep import Ending, files
from typer.testing import Result

import qkpatch
from qkpatch.checkpoint.files import FileId
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.common import json_text
from qkpatch.common.json_text import count_values
from qkpatch.errors import QKPatchError, UsageError
from qkpatch.patching.edit_heads import Editor
from qkpatch.planning.patch_file import read_patch

GRID: dict[str, Any] = {
    "layers": ["0-2", 1], "modes": [2], "channel": ["full", "symmetric"], "select": ["dominant", "shrink"],
}  # fmt: skip


def seen_by(source: Path, out: Path, most: int = 10**9, **how: Any) -> int:
    """How many heads a run looks at, which may end early."""
    seen = Ending(most)
    try:
        qkpatch.sweep(source, GRID, out, threads=1, observer=seen, **how)
    except KeyboardInterrupt:
        assert most < 10**9
    return seen.seen


@pytest.mark.parametrize("form", ["lora", "patch", "none"])
def test_parts_in_any_order_give_what_one_machine_writes(form: str, tiny: Tiny, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "sweep"
    qkpatch.sweep(tiny.path, GRID, whole, form=form)
    for number, n_layers in ((3, 1), (1, 1), (4, 0), (2, 1)):
        assert seen_by(tiny.path, out, form=form, part=(number, 4)) == n_layers * tiny.n_heads
    assert qkpatch.sweep(tiny.path, GRID, out, form=form, part=(1, 4)).already_done
    assert seen_by(tiny.path, out, form=form) == 0
    assert files(out) == files(whole)
    assert qkpatch.sweep(tiny.path, GRID, out, form=form, part=(1, 4)).already_done


def test_a_patch_names_the_machine_that_made_its_rows_wherever_it_is_joined(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(out: str, **how: Any) -> None:
        qkpatch.sweep(tiny.path, {"modes": [1], "layers": ["0-1"]}, tmp_path / out, form="patch", **how)

    elsewhere = {"torch": "1", "blas": "another", "cpu": "another"}
    with monkeypatch.context() as patched:
        patched.setattr(Editor, "stack", elsewhere)
        sweep("whole", part=(1, 2)), sweep("whole", part=(2, 2)), sweep("half", part=(1, 2))
    sweep("whole")
    (made,) = (tmp_path / "whole").glob("*.qkpatch")
    assert read_patch(made).manifest.run.stack == elsewhere
    with pytest.raises(UsageError, match="another CPU"):  # half of its rows would be this one's
        sweep("half")
    mark = tmp_path / "half" / "parts" / "agreed"
    for said in (b"", b"[]", mark.read_bytes().replace(b'"another"', b"1")):
        mark.write_bytes(said)
        with pytest.raises(UsageError, match="another CPU"):
            sweep("half")


@pytest.mark.parametrize(("form", "end"), [("lora", ""), ("patch", ""), ("patch", ".heads")])
def test_what_a_part_left_and_is_damaged_is_made_anew(
    form: str, end: str, tiny: Tiny, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "sweep"
    qkpatch.sweep(tiny.path, GRID, whole, form=form)
    qkpatch.sweep(tiny.path, GRID, out, form=form, part=(1, 1))
    for i, sums in enumerate(([float("nan")] * 7, [0.5] * 6)):
        file = out / "parts" / f"{i}.json"
        sweep, said = json.loads(file.read_bytes())
        (name, one), *others = said.items()
        file.write_text(json.dumps([sweep, {name: [sums, *one[1:]], **dict(others)}]))
    kept = out / "parts" / f"2.{name}{end}"
    kept.write_bytes(kept.read_bytes()[::-1])  # of the same size
    assert seen_by(tiny.path, out, form=form) == 3 * tiny.n_heads
    assert files(out) == files(whole)


def test_what_a_part_of_another_sweep_left_is_made_anew(tiny: Tiny, tmp_path: Path) -> None:
    other, whole, out = build_tiny(tmp_path / "other", seed=1), tmp_path / "whole", tmp_path / "sweep"
    for source, place in ((tiny.path, whole), (other.path, tmp_path / "theirs"), (tiny.path, out)):
        qkpatch.sweep(source, GRID, place, part=None if place == whole else (1, 1))
    for file in (tmp_path / "theirs" / "parts").glob("1.*"):
        file.replace(out / "parts" / file.name)
    assert seen_by(tiny.path, out) == tiny.n_heads
    assert files(out) == files(whole)


def test_more_heads_than_one_file_may_hold_are_taken_over(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, most = tmp_path / "sweep", 1000
    qkpatch.sweep(tiny.path, GRID, out, form="patch", part=(1, 1))
    assert sum(count_values(kept.read_bytes()) for kept in (out / "parts").glob("1.*.heads")) > most
    monkeypatch.setattr(json_text, "MAX_VALUES", most)
    assert seen_by(tiny.path, out, form="patch") == 0


def test_a_part_that_was_killed_goes_on_and_a_missing_one_is_made_up_for(tiny: Tiny, tmp_path: Path) -> None:
    whole, out, n = tmp_path / "whole", tmp_path / "sweep", tiny.n_heads
    qkpatch.sweep(tiny.path, GRID, whole)
    seen_by(tiny.path, out, n + 1, part=(1, 2))
    assert [name for name in os.listdir(out / "parts") if name.startswith(".")] == []
    (out / "parts" / ".0123abcd.2.L1-m2").write_bytes(b"what a kill left")
    assert seen_by(tiny.path, out, part=(1, 2)) == n
    assert seen_by(tiny.path, out) == n  # of the one layer that is the other part's
    assert files(out) == files(whole)


def test_runs_of_all_parts_at_once_end_as_one(tiny: Tiny, tmp_path: Path) -> None:
    whole, out, ends = tmp_path / "whole", tmp_path / "sweep", list[Any]()
    qkpatch.sweep(tiny.path, GRID, whole)

    def run(number: int) -> None:
        try:
            ends.append(qkpatch.sweep(tiny.path, GRID, out, part=(number, 2), threads=1))
        except QKPatchError as error:
            ends.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in (1, 1, 2, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [end for end in ends if isinstance(end, Exception)] == []
    assert seen_by(tiny.path, out) == 0
    assert files(out) == files(whole)


def test_a_machine_that_mounts_source_elsewhere_takes_part(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkpatch.sweep(tiny.path, GRID, tmp_path / "sweep", part=(1, 2))
    known = FileId.of
    monkeypatch.setattr(
        FileId, "of", lambda status: replace(known(status), device=99, inode=status.st_ino + 1)
    )
    assert not qkpatch.sweep(tiny.path, GRID, tmp_path / "sweep", part=(2, 2)).already_done


# -------- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [({"grid": {**GRID, "modes": [1]}}, "another grid"), ({"form": "none"}, "another --as"),
     ({"stack": {"cpu": "another"}}, "another CPU"), ({"part": (3, 2)}, "no part 3 of 2")],
    ids=["grid", "form", "machine", "no part"],
)  # fmt: skip
def test_parts_of_different_sweeps_in_one_place_are_refused(
    change: dict[str, Any], said: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, grid = tmp_path / "sweep", change.pop("grid", GRID)
    qkpatch.sweep(tiny.path, GRID, out, part=(1, 2))
    before = files(out)
    with monkeypatch.context() as other:
        if is_other := "stack" in change:
            other.setattr(Editor, "stack", change.pop("stack"))
        for part in ((2, 2), None)[: 1 + is_other]:  # for the whole says what machine made it
            with pytest.raises(UsageError, match=said):
                qkpatch.sweep(tiny.path, grid, out, **{"part": part, **change})
        assert files(out) == before
        if is_other:  # and dies of it
            interrupt(other, Rooted, "reading", 1)  # the record
            with pytest.raises(KeyboardInterrupt):
                qkpatch.sweep(tiny.path, grid, out, part=(2, 2))
    qkpatch.sweep(tiny.path, GRID, out, part=(2, 2))


@pytest.mark.parametrize(("held", "part"), [(fcntl.LOCK_EX, (1, 2)), (fcntl.LOCK_SH, None)])
def test_a_part_and_the_whole_do_not_write_at_once(
    held: int, part: tuple[int, int] | None, tiny: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    out.mkdir()
    fd = os.open(out, os.O_RDONLY)
    fcntl.flock(fd, held)
    with pytest.raises(UsageError, match="another run is writing"):
        qkpatch.sweep(tiny.path, GRID, out, part=part)
    os.close(fd)


def test_the_command_says_what_is_left_to_do(tiny: Tiny, tmp_path: Path, run: Callable[..., Result]) -> None:
    (tmp_path / "grid.yaml").write_text("modes: [1]\nlayers: [0-1]\n")
    said = ("sweep", tiny.path, "--grid", tmp_path / "grid.yaml", "-o", tmp_path / "sweep", "--as", "none")
    assert run(*said, "--part", "").exit_code == 2
    assert not (tmp_path / "sweep").exists()
    done = run(*said, "--part", "1/2")
    assert done.exit_code == 0, done.output
    assert "Part 1/2 of" in done.stdout
    assert "the same command without --part" in done.stdout
    assert "1 variant(s); evaluate them" in run(*said).stdout
