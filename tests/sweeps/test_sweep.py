"""A sweep: its figures beside those of direct runs, and SWEEP/ however a run ends."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from conftest import REPO, Tiny, build_tiny
from safetensors.torch import load_file
from typer.testing import Result

import qkpatch
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.common.observer import Unseen
from qkpatch.errors import NumericalError, QKPatchError, UsageError
from qkpatch.sweeps import sweep as module
from qkpatch.sweeps.record import Sweep

Run = Callable[..., Result]
SCHEMA = json.loads((REPO / "qkpatch" / "sweeps" / "sweep.schema.json").read_text())
GRID: dict[str, Any] = {
    "layers": ["0-1", 2], "modes": [1, 2], "alpha": [0, 0.5], "channel": ["full", "symmetric", "antisymmetric"],
    "select": ["dominant", "bottom"], "matched": True, "seed": [3, 4],
}  # fmt: skip


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def record(out: Path) -> dict[str, Any]:
    document = json.loads((out / "sweep.json").read_text())
    jsonschema.validate(document, SCHEMA)
    return dict(document)


# -------- figures


def dense(source: Path, out: Path, tiny: Tiny, layer: int) -> tuple[float, float]:
    """``‖ΔW_Q‖ / ‖W_Q‖`` and ``1 − ‖M'‖² / ‖M‖²`` of one layer, from the tensors of two checkpoints."""
    before, after = (load_file(root / "model.safetensors") for root in (source, out))
    old, new, keys = (
        before[tiny.name(layer, "q")],
        after[tiny.name(layer, "q")],
        before[tiny.name(layer, "k")],
    )
    old, new, keys = (W.double().view(-1, tiny.d_head, tiny.d_model) for W in (old, new, keys))
    keys = keys.repeat_interleave(tiny.n_heads // tiny.n_kv_heads, 0)
    energy = [float((W.mT @ keys).square().sum()) for W in (old, new)]
    return float((new - old).norm() / old.norm()), 1 - energy[1] / energy[0]


@pytest.mark.parametrize("select", ["dominant", "random", "bottom", "shrink", "subspace"])
@pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])
def test_figures_are_those_of_direct_runs(channel: str, select: str, tmp_path: Path) -> None:
    if select == "subspace" and channel != "full":
        pytest.skip("which is refused")
    tiny = build_tiny(tmp_path / "tiny", dtype=torch.float64)
    seeds = {"seed": [5]} if select in ("random", "subspace") else {}
    grid = {
        "layers": ["1-2"],
        "modes": [2],
        "alpha": [0.25],
        "channel": [channel],
        "select": [select],
        **seeds,
    }
    (variant,) = qkpatch.sweep(tiny.path, grid, tmp_path / "sweep", form="none").variants
    edit = {key: values[0] for key, values in grid.items()}
    manifest = qkpatch.apply(qkpatch.plan(tiny.path, **edit), tmp_path / "out")
    assert variant.edit == manifest.edit
    assert [(layer.layer, layer.attention) for layer in variant.layers] == [(1, "self"), (2, "self")]
    for layer, made in zip(variant.layers, manifest.edits, strict=True):
        change, removed = dense(tiny.path, tmp_path / "out", tiny, layer.layer or 0)
        assert layer.relative_change == pytest.approx(change, rel=1e-8)
        assert layer.energy_removed == pytest.approx(removed, rel=1e-8)
        shares = [head.realised_share for head in made.heads if head.realised_share is not None]
        assert (layer.realised_share is None) == (not shares)
        if shares:
            assert min(shares) <= (layer.realised_share or 0) <= max(shares)
    single = {**grid, "heads": 2}
    (variant,) = qkpatch.sweep(tiny.path, single, tmp_path / "one head", form="none").variants
    manifest = qkpatch.apply(qkpatch.plan(tiny.path, **edit, heads=2), tmp_path / "edited")
    for layer, made in zip(variant.layers, manifest.edits, strict=True):
        (head,) = made.heads
        assert layer.relative_change == pytest.approx(head.relative_change, rel=1e-8)
        assert layer.energy_removed == pytest.approx(
            1 - (head.frobenius_after / head.frobenius_before) ** 2, abs=1e-8
        )
        assert layer.realised_share == (
            None if head.realised_share is None else pytest.approx(head.realised_share, rel=1e-8)
        )


def test_stored_dtypes_differ_by_their_rounding(tiny: Tiny, tmp_path: Path) -> None:
    """The manifest's change is that of rounded weights: the two are no further apart than it says of rounding."""
    grid = {"modes": [1, 4], "alpha": [0, 0.8], "heads": 1, "layers": [1]}
    for variant in qkpatch.sweep(tiny.path, grid, tmp_path / "sweep", form="none").variants:
        edit = {"modes": variant.edit.modes, "alpha": variant.edit.alpha}
        manifest = qkpatch.apply(qkpatch.plan(tiny.path, **edit, heads=1, layers=1), tmp_path / variant.name)
        (head,) = manifest.edits[0].heads
        assert variant.figures is not None
        off = abs(variant.figures.relative_change - head.relative_change)
        assert off <= head.rounding_error * variant.figures.relative_change
        assert head.rounding_error < 0.2


def test_controls_have_the_size_that_they_are_matched_with(tiny: Tiny, tmp_path: Path) -> None:
    sweep = qkpatch.sweep(tiny.path, GRID, tmp_path / "sweep", form="none")
    by_name = {variant.name: variant for variant in sweep.variants}
    dominant = [v for v in sweep.variants if v.edit.select.value == "dominant"]
    assert len(dominant) == 2 * 2 * 2 * 3
    assert len(sweep.variants) == len(dominant) * 5  # itself, the weakest modes, two random draws, a shrink
    for variant in dominant:
        shrunk = by_name[f"{variant.name}-shrink"]
        assert variant.figures is not None
        assert shrunk.figures is not None
        assert shrunk.figures.relative_change == pytest.approx(variant.figures.relative_change, rel=1e-8)
        for one, other in zip(variant.layers, shrunk.layers, strict=True):
            assert one.relative_change == pytest.approx(other.relative_change, rel=1e-8)
        drawn = [by_name[f"{variant.name}-random-s{seed}"] for seed in (3, 4)]
        for control in drawn:
            assert (control.edit.modes_edited, control.edit.alpha) == (
                variant.edit.modes_edited,
                variant.edit.alpha,
            )
        assert drawn[0].figures != drawn[1].figures
    order = [variant.name for variant in sweep.variants]
    assert order[:4] == ["L0-1-m1-a0", "L0-1-m1-a0-random-s3", "L0-1-m1-a0-random-s4", "L0-1-m1-a0-shrink"]


def test_the_record_does_not_depend_on_threads_or_order(tiny: Tiny, tmp_path: Path) -> None:
    for threads in (1, 2, 5):
        qkpatch.sweep(tiny.path, GRID, tmp_path / str(threads), form="none", threads=threads)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "5")
    document = record(tmp_path / "1")
    assert (
        Sweep.loads((tmp_path / "1" / "sweep.json").read_bytes(), "").dumps().encode()
        == (tmp_path / "1" / "sweep.json").read_bytes()
    )
    turned = {**GRID, "layers": GRID["layers"][::-1]}
    qkpatch.sweep(tiny.path, turned, tmp_path / "turned", form="none")
    by_name = {variant["name"]: variant for variant in document["variants"]}
    assert by_name == {variant["name"]: variant for variant in record(tmp_path / "turned")["variants"]}


def test_each_product_is_decomposed_once_per_channel(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkpatch.spectral.product import QKProduct

    calls: list[str] = []
    decompose = QKProduct.decompose

    def counted(self: QKProduct, channel: Any) -> Any:
        calls.append(channel.value)
        return decompose(self, channel)

    monkeypatch.setattr(QKProduct, "decompose", counted)
    qkpatch.sweep(tiny.path, GRID, tmp_path / "sweep", form="none")
    assert sorted(calls) == sorted(["full", "symmetric", "antisymmetric"] * tiny.n_layers * tiny.n_heads)


# -------- runs that end early


class Ending(Unseen):
    """Ends the run after some heads."""

    def __init__(self, most: int) -> None:
        self.left, self.seen = most, 0

    def edited(self, n_heads: int) -> None:
        self.seen += n_heads
        self.left -= n_heads
        if self.left <= 0:
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_is_gone_on_with(tiny: Tiny, tmp_path: Path) -> None:
    out, whole = tmp_path / "sweep", tmp_path / "whole"
    qkpatch.sweep(tiny.path, GRID, whole, form="none")
    with pytest.raises(KeyboardInterrupt):
        qkpatch.sweep(tiny.path, GRID, out, form="none", threads=1, observer=Ending(2 * tiny.n_heads + 1))
    assert all(variant["figures"] is None for variant in record(out)["variants"])
    again = Ending(10**9)
    qkpatch.sweep(tiny.path, GRID, out, form="none", threads=1, observer=again)
    assert again.seen < tiny.n_layers * tiny.n_heads
    assert files(out) == files(whole)
    idle = Ending(10**9)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert qkpatch.sweep(tiny.path, GRID, out, form="none", observer=idle).variants
    assert idle.seen == 0
    assert before.keys() == {*out.iterdir()}


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_file_it_writes_the_next_run_ends_the_same(
    after: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, replace = {"modes": [1, 2], "layers": ["0-2", "1"]}, Rooted.replace
    qkpatch.sweep(tiny.path, grid, tmp_path / "whole", form="none")
    calls = 0
    for at in range(50):
        calls = 0

        def failing(self: Rooted, name: str, content: bytes, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls > at and not after:
                # What a kill leaves of a file that is being written.
                (self.path / f".{name}.0123abcd").write_bytes(content[:10])
                raise Killed
            replace(self, name, content)
            if calls > at:
                raise Killed

        out = tmp_path / f"{at}"
        monkeypatch.setattr(Rooted, "replace", failing)
        try:
            qkpatch.sweep(tiny.path, grid, out, form="none")
            break
        except Killed:
            monkeypatch.setattr(Rooted, "replace", replace)
            qkpatch.sweep(tiny.path, grid, out, form="none")
            assert files(out) == files(tmp_path / "whole"), at
    assert calls == 2 + 2 + 3 + 1  # the record at first and at last; two scripts; three layers; the page


# -------- what is refused


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("mods: [1]", "unknown key"),
        ("modes: []", "must not be empty"),
        ("heads: 0", "no axis"),
        ("[1, 2]", "expected a mapping"),
        ("", "expected a mapping, got nothing .*no axis; there are layers, modes"),
        ("modes: 2", r"expected list, got int 2; write modes: \[2\]"),
        ("layers: 10-18", r"write layers: \[10-18\]"),
        ("alpha: 0.5", r"write alpha: \[0.5\]"),
        ("select: random", r"write select: \[random\]"),
        ("modes: {a: 1}", "expected list, got dict {'a': 1}(?!; write)"),
        ("edits: [{layers: 1}]\nmodes: [1]", r"1 fault.*edits: a variant edits all its layers alike"),
        ("edits: 3\nmodes: [1]", r"edits: a variant edits all its layers alike"),
        ("modes: [1, 1]", "there twice"),
        ("layers: [0-1, '0,1']", "there twice"),
        ("alpha: [0.5, 0.50]", "there twice"),
        ("modes: [1]\nalpha: [0, 0.0]", "there twice"),
        ("modes: [1]\nalpha: [0, -0.0]", "there twice"),
        ("alpha: [-0.0, 0.5, 0.0]", "there twice"),
        ("alpha: [1e-320]", r"no number.*1\.0e-3"),
        ("alpha: [0.5, 1e400]", r"no number.*1\.0e-3"),
        ("energy: [1e-2]", r"no number.*1\.0e-3"),
        ("channel: [full, full]", "there twice"),
        ("select: [dominant, shrink]\nmatched: true", "there twice"),
        ("select: [dominant, random]\nmatched: true", "there twice"),
        ("modes: [null]\nalpha: [0]", "empty value"),
        ("modes: ['2']", "is no int"),
        ("modes: [true]", "is no int"),
        ("modes: [0]", "at least 1"),
        ("modes: [1, 99]", "m99: 99 modes"),
        ("alpha: [1.5]", "alpha 1.5: 1.5 is not between"),
        ("alpha: [.nan]", "not between 0 and 1"),
        ("alpha: [0.5, 1]", "alpha 1 changes nothing"),
        ("alpha: [1e-3x]", "is no number|no int"),
        ("layers: [2-1]", "reversed"),
        ("layers: [0-99]", "out of range"),
        ("layers: [{a: 1}]", "no list of numbers"),
        ("channel: [half]", "none of them"),
        ("channel: [[full]]", "none of them"),
        ("select: [best]", "none of them"),
        ("select: [dominant, subspace]\nchannel: [full, symmetric]", "channel symmetric, .*subspace"),
        ("modes: [1]\nseed: [1, 2]", "nothing is drawn"),
        ("select: [random]\nseed: [1, 1]", "there twice"),
        ("select: [random]\nseed: [-1]", "not between 0"),
        ("select: [bottom]\nmatched: true", "no variant is dominant"),
        ("modes: [1]\nmatched: 1", "expected bool"),
        ("modes: [1]\nheads: 99", "out of range"),
        ("modes: [1]\nheads: {a: 1}", "expected str"),
        ("modes: [1]\nrecipe: nope", "nope"),
        ("modes: [1]\nattention: 3", "expected str"),
        ("modes: [1]\nfold_norm: yes please", "expected bool"),
        ("modes: [1\n", "not valid YAML"),
        ("modes: [1]\nmodes: [2]", "duplicate key"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_written(
    grid: str, message: str, tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    path, out = tmp_path / "grid.yaml", tmp_path / "sweep"
    path.write_text(grid)
    result = run("sweep", tiny.path, "--grid", path, "-o", out, "--as", "none")
    assert result.exit_code == 2, result.output
    assert re.search(message, " ".join(result.output.split())), result.output
    assert not out.exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("n", "yes", "code"), [(1000, False, 0), (1001, False, 2), (10_000, False, 2), (20_001, True, 2)]
)
def test_very_many_variants_must_be_meant(
    n: int, yes: bool, code: int, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = build_tiny(tmp_path / "tiny", n_layers=1, n_heads=1, n_kv_heads=1, d_head=2, d_model=4)
    (tmp_path / "grid.yaml").write_text(f"modes: [1]\nselect: [random]\nseed: {list(range(n))}")
    said = (
        "sweep",
        tiny.path,
        "--grid",
        tmp_path / "grid.yaml",
        "-o",
        tmp_path / "out",
        "--as",
        "none",
        "--quiet",
    )
    result = run(*said, *(["--yes"] if yes else []))
    assert result.exit_code == code, result.output
    assert ("--yes" in result.output) == (code == 2 and not yes)
    assert (tmp_path / "out").exists() == (code == 0)


def test_another_sweep_stays(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    qkpatch.sweep(tiny.path, {"modes": [1]}, out, form="none")
    before = files(out)
    other = build_tiny(tmp_path / "other", seed=1)
    wider = build_tiny(tmp_path / "wider", n_heads=8)
    source_or_recipe = "another SOURCE or recipe"
    for source, grid, form, differs in (
        (tiny.path, {"modes": [2]}, "none", "another grid"),
        (tiny.path, {"modes": [1], "heads": 0}, "none", "another grid"),
        (tiny.path, {"modes": [1]}, "patch", "another --as"),
        (tiny.path, {"modes": [1], "heads": 0}, "lora", "another grid and another --as"),
        (other.path, {"modes": [1]}, "none", source_or_recipe),
        (wider.path, {"modes": [1]}, "none", source_or_recipe),
        (other.path, {"modes": [2]}, "patch", f"another grid and {source_or_recipe} and another --as"),
    ):
        with pytest.raises(UsageError, match=rf"holds the sweep of {differs} \[") as error:
            qkpatch.sweep(source, grid, out, form=form)
        assert error.value.fix
    assert files(out) == before
    for content in (b"{}", b"[]", b"no", b'{"schema": "qkpatch-sweep/1"}', b"[" * 10**5):
        (out / "sweep.json").write_bytes(content)
        with pytest.raises(QKPatchError):
            qkpatch.sweep(tiny.path, {"modes": [1]}, out, form="none")
        assert (out / "sweep.json").read_bytes() == content


def test_what_is_no_sweep_stays(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / ".mine.01234567").write_text("mine")
    with pytest.raises(UsageError, match=r"no sweep: it holds \.mine\.01234567, mine\.txt"):
        qkpatch.sweep(tiny.path, {"modes": [1]}, out, form="none")
    assert len(files(out)) == 2
    for place in (tiny.path, tiny.path / "sweep", tmp_path, out / "mine.txt"):
        with pytest.raises(QKPatchError):
            qkpatch.sweep(tiny.path, {"modes": [1]}, place, form="none")
    (tmp_path / "empty").mkdir()
    qkpatch.sweep(tiny.path, {"modes": [1]}, tmp_path / "empty", form="none")
    for name in ("", "missing.yaml"):
        with pytest.raises(QKPatchError):
            qkpatch.sweep(tiny.path, tmp_path / name, tmp_path / "new", form="none")
    with pytest.raises(UsageError, match="none of them"):
        qkpatch.sweep(tiny.path, {"modes": [1]}, tmp_path / "new", form="gguf")
    assert not (tmp_path / "new").exists()


def test_two_runs_do_not_write_to_one_sweep(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    out.mkdir()
    fd = os.open(out, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another run is writing"):
        qkpatch.sweep(tiny.path, {"modes": [1]}, out, form="none")
    os.close(fd)
    qkpatch.sweep(tiny.path, {"modes": [1]}, out, form="none")


def test_an_edit_that_changes_nothing_is_named(tmp_path: Path) -> None:
    zeros = {
        f"model.layers.1.self_attn.{which}_proj.weight": torch.zeros(n, 24)
        for which, n in (("q", 32), ("k", 16))
    }
    tiny = build_tiny(tmp_path / "tiny", dtype=torch.float32, extra=zeros)
    with pytest.raises(NumericalError, match="L0-1-m1 leaves every value as it is") as error:
        qkpatch.sweep(tiny.path, {"layers": [0, "0-1"], "modes": [1]}, tmp_path / "sweep", form="none")
    assert "layers.1" in (error.value.where or "")


# -------- what people see


def test_the_command_shows_a_table_and_more_for_programs(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    (tmp_path / "grid.yaml").write_text("modes: [1, 2]\nchannel: [full, symmetric]\nlayers: [1-2]\n")
    said = ("sweep", tiny.path, "--grid", tmp_path / "grid.yaml", "-o", tmp_path / "sweep", "--as", "none")
    shown, again = run(*said), run(*said)
    assert shown.exit_code == again.exit_code == 0
    assert "already" not in shown.stdout
    assert again.stdout == shown.stdout.replace("4 variant(s)", "4 variant(s), all done already")
    document = record(tmp_path / "sweep")
    for variant in document["variants"]:
        assert f"{variant['figures']['relative_change']:.4f}" in shown.stdout
        assert variant["name"] in shown.stdout
    assert json.loads(run(*said, "--json").stdout) == document
    lines = run(*said, "--csv").stdout.splitlines()
    assert lines[0] == "variant,relative_change,energy_removed,realised_share,rounding_error,layer,attention"
    assert len(lines) == 1 + 4 * 2
    assert run(*said, "--quiet").stdout == ""
    assert run(*said, "--csv", "--json").exit_code == 2
    assert run("sweep", tiny.path, "--grid", tmp_path / "none.yaml", "-o", tmp_path / "new").exit_code == 4


def test_a_sweep_of_a_moved_source_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    qkpatch.sweep(tiny.path, {"modes": [1]}, tmp_path / "sweep", form="none")
    shutil.move(tiny.path, tmp_path / "elsewhere")
    assert qkpatch.sweep(tmp_path / "elsewhere", {"modes": [1]}, tmp_path / "sweep", form="none").variants
    assert str(tmp_path / "elsewhere") in (tmp_path / "sweep" / "evaluate.sh").read_text()
    assert module.SWEEP_NAME in files(tmp_path / "sweep")
