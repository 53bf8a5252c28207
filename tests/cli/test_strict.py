"""`--strict`: a warning is an error with a code of its own, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny
from safetensors.torch import load_file, save_file

from qkpatch.errors import WarnedError

Run = Callable[..., Any]
CODE = 6


def twin(tiny: Tiny) -> Tiny:
    """With a file that every plan warns of."""
    (tiny.path / "pytorch_model.bin").write_bytes(b"x")
    return tiny


def even(tiny: Tiny) -> Tiny:
    """With a layer whose spectra are flat, which only whoever computes them sees."""
    path = tiny.path / "model.safetensors"
    tensors = load_file(path)
    eye = torch.eye(tiny.d_head, tiny.d_model)
    tensors[tiny.name(1, "q")] = eye.repeat(tiny.n_heads, 1).to(torch.bfloat16)
    tensors[tiny.name(1, "k")] = eye.repeat(tiny.n_kv_heads, 1).to(torch.bfloat16)
    save_file(tensors, path, {"format": "pt"})
    return tiny


def test_the_code_is_no_other_errors() -> None:
    def below(kind: type[Any]) -> list[type[Any]]:
        return [kind, *(each for one in kind.__subclasses__() for each in below(one))]

    from qkpatch.errors import QKPatchError

    assert [kind for kind in below(QKPatchError) if kind.exit_code == CODE] == [WarnedError]


def test_a_plan_is_shown_with_its_warnings_and_fails(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    assert run("plan", tiny.path, "--strict").exit_code == 0
    twin(tiny)
    for arguments in (("plan", tiny.path), ("apply", tiny.path, "--dry-run", "-o", tmp_path / "out")):
        shown = run(*arguments, "--strict")
        assert (shown.exit_code, run(*arguments).exit_code) == (CODE, 0)
        assert "rewritten in 1 of" in shown.stdout
        assert "1 warning(s), and none are allowed" in shown.stderr
        document = run(*arguments, "--strict", "--json")
        assert document.exit_code == CODE
        assert json.loads(document.stdout)["warnings"]
    assert run("plan", tiny.path, "--strict", "--quiet").exit_code == CODE
    markdown = run("plan", tiny.path, "--strict", "--markdown")
    assert markdown.exit_code == CODE
    assert "Warning: 1 other weight file(s)" in markdown.stdout


@pytest.mark.parametrize("how", [(), ("--patch-only",), ("--in-place",)])
def test_nothing_is_written_where_a_plan_warns(
    how: tuple[str, ...], tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    twin(tiny)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = () if how == ("--in-place",) else ("-o", tmp_path / "out")
    result = run("apply", tiny.path, "--strict", "--json", *out, *how)
    assert result.exit_code == CODE, result.output
    assert json.loads(result.stdout)["error"]["kind"] == "warning"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("how", [(), ("--patch-only",), ("--in-place",)])
def test_what_only_spectra_tell_leaves_nothing_either(
    how: tuple[str, ...], tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    even(tiny)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = () if how == ("--in-place",) else ("-o", tmp_path / "out")
    edit = ("--layers", "1", "--modes", "2")
    result = run("apply", tiny.path, "--strict", *edit, *out, *how)
    assert result.exit_code == CODE, result.output
    assert "relative gap under 0.001" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_adapters_and_sweeps_are_strict_too(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    twin(tiny)
    assert run("lora", tiny.path, "--strict", "-o", tmp_path / "adapter").exit_code == CODE
    grid = tmp_path / "grid.yaml"
    grid.write_text("alpha: [0.5]\n")
    assert run("sweep", tiny.path, "--strict", "--grid", grid, "-o", tmp_path / "swept").exit_code == CODE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.yaml", "tiny"]
