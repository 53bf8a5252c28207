"""Adapters of a sweep: those that `qkpatch lora` writes, whole or not there, and what lmms-eval loads of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import REPO, Tiny, build_tiny
from test_sweep import Ending, files, record

import qkpatch
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.errors import FileSystemError, QKPatchError, UsageError
from qkpatch.output.staging import Staging

GRID: dict[str, Any] = {
    "layers": ["0-1", 1], "modes": [1, 3], "alpha": [0.5], "channel": ["full", "symmetric", "antisymmetric"],
    "matched": True, "seed": [3],
}  # fmt: skip
SHRINK = "shrink has full rank"


@pytest.mark.parametrize(("threads", "dtype"), [(1, torch.bfloat16), (3, torch.float32)])
def test_each_is_byte_for_byte_what_lora_writes(threads: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = build_tiny(tmp_path / "tiny", dtype=dtype)
    grids = [GRID, {"modes": [2], "select": ["bottom", "subspace"], "heads": "1-2", "layers": [0, "1,2"]}]
    for i, grid in enumerate(grids):
        out = tmp_path / f"sweep{i}"
        sweep = qkpatch.sweep(tiny.path, grid, out, threads=threads)
        assert any(SHRINK in warning for warning in sweep.warnings) == (i == 0)
        for variant in record(out)["variants"]:
            edit = variant["edit"]
            if edit["select"] == "shrink":
                assert not variant["files"]
                assert not (out / variant["name"]).exists()
                continue
            keys = ("layers", "heads", "modes", "alpha", "channel", "select")
            seed = {"seed": edit["seed"]} if edit["select"] in ("random", "subspace") else {}
            direct = tmp_path / "direct" / variant["name"]
            qkpatch.lora(tiny.path, direct, **{key: edit[key] for key in keys}, **seed)
            assert files(direct) == files(out / variant["name"])
            assert {f"{variant['name']}/{name}" for name in files(direct)} - variant["files"].keys() == {
                f"{variant['name']}/qkpatch.json"
            }
            shutil.rmtree(direct)
        assert not (out / "parts").exists()
        assert {path.name for path in out.iterdir()} == {
            *(v["name"] for v in record(out)["variants"] if v["files"]),
            "evaluate.sh", "evaluate.sbatch", "report.html", "sweep.json",
        }  # fmt: skip


def test_figures_do_not_depend_on_what_is_written(tiny: Tiny, tmp_path: Path) -> None:
    with_adapters = qkpatch.sweep(tiny.path, GRID, tmp_path / "lora")
    alone = qkpatch.sweep(tiny.path, GRID, tmp_path / "none", form="none")
    for one, other in zip(with_adapters.variants, alone.variants, strict=True):
        assert (one.name, one.figures, one.layers) == (other.name, other.figures, other.layers)


def test_what_is_whole_stays_and_what_is_damaged_or_gone_is_made_again(tiny: Tiny, tmp_path: Path) -> None:
    grid, out = {"modes": [1, 2], "layers": [0, 2]}, tmp_path / "sweep"
    qkpatch.sweep(tiny.path, grid, out)
    whole, times = files(out), {path: path.stat().st_mtime_ns for path in out.rglob("adapter*")}
    shutil.rmtree(out / "L0-m2")
    seen = Ending(10**9)
    qkpatch.sweep(tiny.path, grid, out, observer=seen)
    assert seen.seen == tiny.n_heads  # of layer 0 alone
    assert files(out) == whole
    assert [p for p, t in times.items() if p.stat().st_mtime_ns == t] == [
        p for p in times if "L0-m2" not in str(p)
    ]
    (out / "L0-m1" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="adapter_config") as error:  # it may be the user's own
        qkpatch.sweep(tiny.path, grid, out)
    assert error.value.fix
    shutil.rmtree(out / "L0-m1")
    qkpatch.sweep(tiny.path, grid, out)
    assert files(out) == whole


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.long
def test_killed_at_any_write_the_next_run_ends_the_same(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"modes": [1, 2], "layers": ["0-2", "1"], "select": ["dominant", "shrink"]}
    qkpatch.sweep(tiny.path, grid, tmp_path / "whole")
    writers = [(Rooted, "replace"), (Staging, "publish"), (Rooted, "open")]
    before = {(kind, name): getattr(kind, name) for kind, name in writers}
    for at in range(0, 400, 7):
        calls = 0

        def killing(call: Any, at: int = at) -> Any:
            def called(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > at:
                    raise Killed
                return call(*args, **kwargs)

            return called

        for (kind, name), call in before.items():
            monkeypatch.setattr(kind, name, killing(call))
        out = tmp_path / str(at)
        try:
            qkpatch.sweep(tiny.path, grid, out, threads=1)
            is_done = True
        except Killed:
            is_done = False
        for (kind, name), call in before.items():
            monkeypatch.setattr(kind, name, call)
        qkpatch.sweep(tiny.path, grid, out, threads=1)
        assert files(out) == files(tmp_path / "whole"), at
        if is_done:
            break
    assert is_done


@pytest.mark.long
def test_a_real_kill_is_gone_on_from(tiny: Tiny, tmp_path: Path) -> None:
    grid, out = {"modes": [1, 2], "layers": ["0-2"]}, tmp_path / "sweep"
    code = (
        "import os, signal, sys, qkpatch\n"
        "from qkpatch.sweeps.parts import Parts\n"
        "add = Parts.add\n"
        "def last(self, *given):\n"
        "    add(self, *given)\n"
        "    len(self._found) == 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "Parts.add = last\n"
        f"qkpatch.sweep(sys.argv[1], {grid!r}, sys.argv[2], threads=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny.path), str(out)], check=False, timeout=300)
    assert done.returncode == -9
    seen = Ending(10**9)
    qkpatch.sweep(tiny.path, grid, out, observer=seen)
    assert seen.seen == tiny.n_heads  # of the third layer
    qkpatch.sweep(tiny.path, grid, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_full_disk_is_told_and_gone_on_from(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkpatch.sweeps.parts import Parts

    def full(*_: object) -> None:
        raise FileSystemError("no space left", where="SWEEP")

    out, grid = tmp_path / "sweep", {"modes": [1]}
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "keep", full)
        with pytest.raises(FileSystemError):
            qkpatch.sweep(tiny.path, grid, out)
    assert record(out)["variants"][0]["figures"] is None
    qkpatch.sweep(tiny.path, grid, out)
    assert record(out)["variants"][0]["files"]


def test_a_class_whose_modules_are_unknown_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = json.loads((build_tiny(tmp_path / "known").path / "config.json").read_text())
    tiny = build_tiny(tmp_path / "tiny", config={**config, "architectures": ["MineForCausalLM"]})
    grid = {"modes": [1], "recipe": "llama"}
    with pytest.raises(QKPatchError, match="not known"):
        qkpatch.sweep(tiny.path, grid, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    assert qkpatch.sweep(tiny.path, grid, tmp_path / "sweep", form="none").variants


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """Loads what it is given as lmms-eval's classes do, by transformers, and keeps the logits."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "lmms_eval.py").write_text(
        "import pathlib, sys, torch, transformers\n"
        "given = {word: sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1])}\n"
        "place, out = given['--model_args'].removeprefix('pretrained='), pathlib.Path(given['--output_path'])\n"
        "config = transformers.AutoConfig.from_pretrained(place)\n"
        "kind = transformers.LlavaForConditionalGeneration\n"
        "model = kind.from_pretrained(place, dtype=torch.float32).eval()\n"
        "transformers.AutoProcessor.from_pretrained(place)\n"
        "out.mkdir(parents=True)\n"
        "torch.save(model(torch.arange(2, 20)[None]).logits.detach(), out / 'logits')\n"
    )
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{folder}:{os.pathsep.join(sys.path)}"}


@pytest.mark.long
def test_what_is_evaluated_has_its_adapter(tmp_path: Path, stand_in: dict[str, str]) -> None:
    """A variant's logits are those of the edited checkpoint, and not the base's: nothing was loaded in vain."""
    source, out = REPO / "demo" / "toy-0", tmp_path / "sweep"
    grid = {"modes": [4], "alpha": [0], "layers": ["3-5"], "matched": True}
    sweep = qkpatch.sweep(source, grid, out)
    done = subprocess.run(
        ["bash", str(out / "evaluate.sh")],
        env=stand_in,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logits = {path.parent.name: torch.load(path) for path in out.glob("results/*/logits")}
    assert len(logits) == 1 + len(sweep.variants) == 4
    ids = torch.arange(2, 20)[None]
    for variant in sweep.variants:
        edit = {key: getattr(variant.edit, key) for key in ("layers", "modes", "alpha", "select")}
        model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
        with torch.no_grad(), qkpatch.patched(model, **edit):
            expected = model(ids).logits
        change = float((expected - logits["base"]).abs().max())
        assert change > 0.05, variant.name
        assert float((logits[variant.name] - expected).abs().max()) < 0.02 * change, variant.name
    assert not list((out / "checkpoints").iterdir())
