"""`qkpatch inspect`: what it says it looked at, and tables that tell the sets apart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm
from conftest import Tiny, build_tiny
from typer.testing import Result

from qkpatch.recipes.catalogue import recipe_text

Run = Callable[..., Result]
COLUMNS = ["layer", "attention", "head", "kv_head", "mode", "singular_value"]


@pytest.fixture
def two_sets(tmp_path: Path) -> tuple[Tiny, Path]:
    """A llama with queries of a second kind beside the first, and a recipe for it."""
    extra = {f"model.layers.{n}.cross.q_proj.weight": torch.rand(32, 24) for n in range(3)}
    extra |= {f"model.layers.{n}.cross.k_proj.weight": torch.rand(16, 24) for n in range(3)}
    recipe = tmp_path / "two.yaml"
    others = "  others:\n    cross: {query: cross.q_proj.weight, key: cross.k_proj.weight}\n"
    recipe.write_text(recipe_text("llama").replace("name: llama", "name: two") + others)
    return build_tiny(tmp_path / "tiny", extra=extra), recipe


def rows(result: Result) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(result.stdout)))


def test_the_heading_is_that_of_plan_but_for_the_edit(tiny: Tiny, run: Run) -> None:
    shown = run("inspect", tiny.path, "--layers", "0-1", "--heads", 2, "--modes", 2).stdout.splitlines()
    planned = run("plan", tiny.path, "--layers", "0-1", "--modes", 2).stdout.splitlines()
    assert shown[:2] == planned[:2]
    assert shown[0] == "tiny: recipe llama, 3 layers, 4 query / 2 key heads of 8, hidden 24"
    assert shown[2] == "Spectra: layers 0-1, heads 2"


def test_a_folded_norm_is_told(tmp_path: Path, run: Run) -> None:
    extra = {f"model.layers.{n}.input_layernorm.weight": torch.ones(24) for n in range(3)}
    tiny = build_tiny(tmp_path / "tiny", extra=extra)
    assert "folded" not in run("inspect", tiny.path, "--modes", 2).stdout
    shown = run("inspect", tiny.path, "--modes", 2, "--fold-norm").stdout
    assert "Spectra: layers 0-2, heads 0-3, the gain of the norm before attention folded in" in shown


def test_sets_have_a_column_and_a_line_each(two_sets: tuple[Tiny, Path], run: Run) -> None:
    tiny, recipe = two_sets
    options = ("--recipe", recipe, "--attention", "self,cross", "--layers", 1, "--modes", 2)
    shown = run("inspect", tiny.path, *options).stdout
    assert "Tensors (self): model.layers.{layer}.self_attn.q_proj.weight by self_attn.k_proj.weight" in shown
    assert "Tensors (cross): model.layers.{layer}.cross.q_proj.weight by cross.k_proj.weight" in shown
    lines = [line.split()[:2] for line in shown.splitlines() if line.startswith((" layer", "     1"))]
    assert lines == [["layer", "attention"], ["1", "self"], ["1", "cross"]]
    assert "attention" not in run("inspect", tiny.path, "--layers", 1, "--modes", 2).stdout
    found = rows(run("inspect", tiny.path, *options, "--csv"))
    assert [row["attention"] for row in found] == ["self"] * 32 + ["cross"] * 32


def test_the_columns_of_csv_are_always_the_same_and_nothing_else_is_printed(tiny: Tiny, run: Run) -> None:
    result = run("inspect", tiny.path, "--modes", 2, "--csv")
    assert result.stdout.splitlines()[0].split(",") == COLUMNS
    assert {row["attention"] for row in rows(result)} == {"self"}
    document = json.loads(run("inspect", tiny.path, "--modes", 2, "--json").stdout)
    values = [v for layer in document["layers"] for head in layer["heads"] for v in head["singular_values"]]
    assert [float(row["singular_value"]) for row in rows(result)] == values


def test_csv_comes_layer_by_layer(tiny: Tiny, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from qkpatch.errors import FileSystemError
    from qkpatch.patching import spectra

    found = spectra.layer_spectra

    def broken(*arguments: object) -> object:
        layers = found(*arguments)
        yield next(layers)
        layers.close()
        raise FileSystemError("the disk is gone")

    monkeypatch.setattr(spectra, "layer_spectra", broken)
    result = run("inspect", tiny.path, "--modes", 2, "--csv")
    assert result.exit_code == 4
    assert {row["layer"] for row in rows(result)} == {"0"}


def test_bars_on_stderr_do_not_take_csv_from_stdout(tiny: Tiny, tmp_path: Path) -> None:
    """A progress bar on a terminal puts itself in the place of sys.stdout."""
    import os
    import pty

    master, slave = pty.openpty()
    out = tmp_path / "out.csv"
    with out.open("w") as stdout:
        arguments = ["inspect", str(tiny.path), "--modes", "2", "--csv"]
        streams = [slave, stdout.fileno(), slave]
        code = warm.call(warm.started(), arguments, os.environ, Path.cwd(), streams)
    os.close(slave)
    os.close(master)
    assert code == 0
    assert len(out.read_text().splitlines()) == 1 + 3 * 4 * 8
