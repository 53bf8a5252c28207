"""Patch files of a sweep: those that a direct run writes, whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from test_sweep import Ending, files, record

import qkpatch
from qkpatch.errors import CheckpointError, NumericalError, QKPatchError

GRID: dict[str, Any] = {
    "layers": ["0-1"], "modes": [3], "alpha": [0.5], "channel": ["full", "symmetric", "antisymmetric"],
    "select": ["dominant", "bottom"], "matched": True, "seed": [3],
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("threads", "dtype"), [(1, torch.bfloat16), (3, torch.float32)])
def test_each_is_byte_for_byte_what_a_direct_run_writes(
    threads: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny = build_tiny(tmp_path / "tiny", dtype=dtype)
    for i, grid in enumerate(
        (GRID, {"modes": [2], "select": ["subspace"], "heads": "1-2", "layers": [0, "1,2"]})
    ):
        out = tmp_path / f"sweep{i}"
        qkpatch.sweep(tiny.path, grid, out, form="patch", threads=threads)
        for variant in record(out)["variants"]:
            edit, name = variant["edit"], f"{variant['name']}.qkpatch"
            keys = ("layers", "heads", "modes", "alpha", "channel", "select")
            seed = {"seed": edit["seed"]} if edit["select"] in ("random", "subspace") else {}
            plan = qkpatch.plan(tiny.path, **{key: edit[key] for key in keys}, **seed)
            direct = qkpatch.make_patch(plan, tmp_path / name)
            assert direct.read_bytes() == (out / name).read_bytes(), name
            assert list(variant["files"]) == [name]
            direct.unlink()
            manifest = qkpatch.apply(plan, tmp_path / "out")
            for layer, made in zip(variant["layers"], manifest.edits, strict=True):
                errors = [head.rounding_error for head in made.heads]
                assert min(errors) <= layer["rounding_error"] <= max(errors)
            plan = qkpatch.plan(tiny.path, patch=out / name)
            qkpatch.apply(plan, tmp_path / "patched")
            weights = "model.safetensors"
            assert (tmp_path / "patched" / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()
            for made_here in ("out", "patched"):
                for path in (tmp_path / made_here).iterdir():
                    path.unlink()


def test_a_run_that_ended_early_is_gone_on_with(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, out = {"modes": [1, 2], "layers": ["0-2"]}, tmp_path / "sweep"
    qkpatch.sweep(tiny.path, grid, tmp_path / "whole", form="patch")
    with pytest.raises(KeyboardInterrupt):
        qkpatch.sweep(tiny.path, grid, out, form="patch", threads=1, observer=Ending(tiny.n_heads + 1))
    qkpatch.sweep(tiny.path, grid, out, form="patch")
    assert files(out) == files(tmp_path / "whole")
    # One was written, and the run killed before that was recorded.
    document = (out / "sweep.json").read_text()
    (out / "L0-2-m2.qkpatch").unlink()
    qkpatch.sweep(tiny.path, grid, out, form="patch")
    assert files(out) == files(tmp_path / "whole")
    (out / "L0-2-m2.qkpatch").write_bytes(b"mine")
    with pytest.raises(QKPatchError, match="no patch file"):
        qkpatch.sweep(tiny.path, grid, out, form="patch")
    assert (out / "L0-2-m2.qkpatch").read_bytes() == b"mine"
    assert (out / "sweep.json").read_text() == document


def test_an_edit_that_rounds_away_is_named(tiny: Tiny, tmp_path: Path) -> None:
    grid = {"modes": [1], "alpha": [0.5, 1 - 1e-9], "layers": [1]}
    assert qkpatch.sweep(tiny.path, grid, tmp_path / "figures", form="none").variants
    with pytest.raises(NumericalError, match="rounds away") as error:
        qkpatch.sweep(tiny.path, grid, tmp_path / "sweep", form="patch")
    assert "a0.999999999" in error.value.what


def test_a_broken_patch_that_a_kill_left_is_named(tiny: Tiny, tmp_path: Path) -> None:
    grid, out = {"modes": [1, 2], "layers": ["0-2"]}, tmp_path / "sweep"
    with pytest.raises(KeyboardInterrupt):
        qkpatch.sweep(tiny.path, grid, out, form="patch", threads=1, observer=Ending(tiny.n_heads + 1))
    broken = out / f"{record(out)['variants'][0]['name']}.qkpatch"
    broken.write_bytes(b"{}")
    with pytest.raises(CheckpointError) as caught:
        qkpatch.sweep(tiny.path, grid, out, form="patch")
    assert caught.value.fix == f"remove {broken}, and it is made anew"
    broken.unlink()
    qkpatch.sweep(tiny.path, grid, out, form="patch")
