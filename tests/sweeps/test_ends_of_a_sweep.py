"""A sweep that ends while it cleans up, or is found with parts or a record that are not whole: it is gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny
from test_sweep import Ending, Killed, files, record

import qkpatch
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.errors import FileSystemError, UsageError

GRID: dict[str, Any] = {"modes": [1, 2], "layers": ["0-1"], "select": ["dominant", "shrink"]}
FORMS = pytest.mark.parametrize("form", ["lora", "patch", "none"])


def times(out: Path) -> dict[str, int]:
    """Of what variants are made of."""
    made = [p for p in out.rglob("*") if p.suffix in (".safetensors", ".qkpatch")]
    return {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in made}


@pytest.mark.long
@FORMS
def test_a_kill_during_the_clean_up_costs_nothing(
    form: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkpatch.sweep(tiny.path, GRID, tmp_path / "whole", form=form)
    remove, n_killed = Rooted.remove, 0
    for at in range(50):
        calls = 0

        def killing(self: Rooted, name: str, status: Any, at: int = at) -> None:
            nonlocal calls
            calls += self.path.name == "parts" or name == "parts"
            if calls > at:
                raise Killed
            remove(self, name, status)

        out = tmp_path / str(at)
        with monkeypatch.context() as patch:
            patch.setattr(Rooted, "remove", killing)
            try:
                qkpatch.sweep(tiny.path, GRID, out, form=form, threads=1)
                break
            except Killed:
                n_killed += 1
        before, seen = times(out), Ending(10**9)
        qkpatch.sweep(tiny.path, GRID, out, form=form, observer=seen)
        assert files(out) == files(tmp_path / "whole"), at
        assert (times(out), seen.seen) == (before, 0)
    assert (
        n_killed == {"lora": 2 + 2 * 2, "patch": 2 + 2 * 4, "none": 2}[form] + 2
    )  # who made it, and the folder


@FORMS
def test_a_record_that_cannot_be_written_at_the_end_is_written_by_the_next_run(
    form: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkpatch.sweep(tiny.path, GRID, tmp_path / "whole", form=form)
    replace, out = Rooted.replace, tmp_path / "sweep"

    def full(self: Rooted, name: str, *given: Any) -> None:
        if name == "sweep.json" and (self.path / name).exists():
            raise FileSystemError("no space left", where=name)
        replace(self, name, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Rooted, "replace", full)
        with pytest.raises(FileSystemError):
            qkpatch.sweep(tiny.path, GRID, out, form=form)
    made = set(times(out))
    with monkeypatch.context() as patch:  # once more: what is there already is not lost by it
        patch.setattr(Rooted, "replace", full)
        with pytest.raises(FileSystemError):
            qkpatch.sweep(tiny.path, GRID, out, form=form)
    assert set(times(out)) == made
    qkpatch.sweep(tiny.path, GRID, out, form=form)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("damage", ["gone", "cut", "[]", "{}", "{", "short", "no lists", "half done"])
@pytest.mark.parametrize("form", ["lora", "patch"])
def test_parts_that_are_not_whole_are_made_again(damage: str, form: str, tiny: Tiny, tmp_path: Path) -> None:
    qkpatch.sweep(tiny.path, GRID, tmp_path / "whole", form=form)
    out = tmp_path / "sweep"
    with pytest.raises(KeyboardInterrupt):
        qkpatch.sweep(tiny.path, GRID, out, form=form, threads=1, observer=Ending(tiny.n_heads + 1))
    said = out / "parts" / "0.json"
    document, kept = json.loads(said.read_text()), out / "parts" / "0.L0-1-m1"
    if damage == "gone":
        kept.unlink()
    elif damage == "cut":
        kept.write_bytes(kept.read_bytes()[:-1])
    elif damage == "short":
        said.write_text(json.dumps({name: found[:1] for name, found in document.items()}))
    elif damage == "no lists":
        said.write_text(json.dumps(dict.fromkeys(document, 3)))
    elif damage == "half done":
        (out / "parts" / "L0-1-m1.qkpatch").write_bytes(b"half of it")
        (out / "parts" / ".1.json.0123abcd").write_bytes(b"{")
    else:
        said.write_text(damage)
    qkpatch.sweep(tiny.path, GRID, out, form=form)
    assert files(out) == files(tmp_path / "whole")


@FORMS
@pytest.mark.parametrize("change", ["removed", "renamed", "no files", "other files"])
def test_a_variant_that_the_record_lost_is_made_again(
    change: str, form: str, tiny: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    qkpatch.sweep(tiny.path, GRID, out, form=form)
    whole, document = files(out), record(out)
    first = document["variants"][0]
    if change == "removed":
        del document["variants"][0]
    elif change == "renamed":
        first["name"] = "mine"
    else:
        first["files"] = {} if change == "no files" else {"evaluate.sh": "0" * 64}
        for path in [*out.glob(f"{first['name']}/*"), *out.glob(f"{first['name']}.qkpatch")]:
            path.unlink()
    (out / "sweep.json").write_text(json.dumps(document))
    qkpatch.sweep(tiny.path, GRID, out, form=form)
    assert files(out) == whole


@pytest.mark.parametrize("form", ["lora", "patch"])
def test_what_another_edit_made_stays_where_a_variant_belongs(form: str, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    qkpatch.sweep(tiny.path, {"modes": [1, 2], "layers": ["0-1"]}, out, form=form)
    whole, name = files(out), "L0-1-m2.qkpatch" if form == "patch" else "L0-1-m2"
    place = out / name
    kept = place.rename(tmp_path / name)
    for edit in ({"modes": 3, "layers": "0-1"}, {"modes": 2, "layers": "0-1", "heads": 0}):
        if form == "patch":
            qkpatch.make_patch(qkpatch.plan(tiny.path, **edit), place)
        else:
            qkpatch.lora(tiny.path, place, **edit)
        before = files(out)
        with pytest.raises(UsageError, match="another edit") as error:
            qkpatch.sweep(tiny.path, {"modes": [1, 2], "layers": ["0-1"]}, out, form=form)
        assert (error.value.where, files(out)) == (str(place), before)
        place.rename(tmp_path / f"{len(list(tmp_path.iterdir()))}-{name}")
    # Of this edit, it is what a kill left.
    kept.rename(place)
    document = record(out)
    document["variants"][1] |= {"figures": None, "layers": [], "files": {}}
    (out / "sweep.json").write_text(json.dumps(document))
    qkpatch.sweep(tiny.path, {"modes": [1, 2], "layers": ["0-1"]}, out, form=form)
    assert files(out) == whole
