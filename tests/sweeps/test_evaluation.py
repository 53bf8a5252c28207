"""The scripts that evaluate a sweep, run with a stand-in for lmms-eval that notes how it is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Tiny, build_tiny
from fake_hub import Repo, fake_hub, hub_environment
from safetensors.torch import load_file

import qkpatch

STAND_IN = """
import json, pathlib, sys
given = {word: sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1])}
place = pathlib.Path(given["--model_args"].split(",")[0].removeprefix("pretrained="))
note = {"argv": sys.argv[1:], "files": sorted(p.name for p in place.iterdir()), "place": str(place)}
out = pathlib.Path(given["--output_path"])
out.mkdir(parents=True)
(out / "called.json").write_text(json.dumps(note))
keep = pathlib.Path(__file__).parent / "kept" / out.name
keep.parent.mkdir(exist_ok=True)
keep.write_bytes((place / "model.safetensors").read_bytes())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    stand_in = tmp_path / "stand in"
    stand_in.mkdir()
    (stand_in / "lmms_eval.py").write_text(STAND_IN)
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{stand_in}:{os.pathsep.join(sys.path)}"}


def bash(
    *words: str | Path, env: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *map(str, words)], env=env, cwd=cwd, text=True, capture_output=True, timeout=300, check=False
    )


def called(out: Path, name: str) -> dict[str, str]:
    return dict(json.loads((out / "results" / name / "called.json").read_text()))


@pytest.mark.long
def test_base_and_variants_are_evaluated_each_as_it_is(tmp_path: Path, environment: dict[str, str]) -> None:
    """Paths that a shell, or lmms-eval's list of arguments, would take apart do no harm."""
    tiny = build_tiny(tmp_path / "it's a $HOME, a=b")
    out = tmp_path / "a \"sweep\", 'x'"
    grid = {
        "modes": [1],
        "channel": ["full", "symmetric"],
        "select": ["random"],
        "seed": [2],
        "layers": ["0,2"],
        "heads": "0-2",
    }
    names = [variant.name for variant in qkpatch.sweep(tiny.path, grid, out, form="none").variants]
    env = {**environment, "MODEL": "my_model", "ARGS": "dtype=bfloat16", "TASKS": "pope", "LIMIT": "8"}
    assert (
        bash(out / "evaluate.sh", env={**env, "MODEL": ""}).returncode != 0
    )  # no family of lmms-eval's by default
    done = bash(out / "evaluate.sh", env=env)
    assert done.returncode == 0, done.stderr
    assert names == ["L0+2-m1-random-s2", "L0+2-m1-symmetric-random-s2"]
    for name in ["base", *names]:
        note = called(out, name)
        place = f"checkpoints/it-s-a--HOME--a-b-{name}"
        assert note["argv"] == [
            "--model", "my_model", "--model_args", f"pretrained={place},dtype=bfloat16", "--tasks", "pope",
            "--limit", "8", "--batch_size", "1", "--log_samples", "--output_path", f"results/{name}",
        ]  # fmt: skip
        assert not (out / place).exists()
        kept = load_file(tmp_path / "stand in" / "kept" / name)
        if name == "base":
            edited = load_file(tiny.path / "model.safetensors")
        else:
            edit = {"modes": 1, "layers": "0,2", "heads": "0-2", "select": "random", "seed": 2}
            channel = "symmetric" if "symmetric" in name else "full"
            qkpatch.apply(qkpatch.plan(tiny.path, **edit, channel=channel), tmp_path / name)
            edited = load_file(tmp_path / name / "model.safetensors")
        assert all((kept[key] == edited[key]).all() for key in edited)
    # What has results is not evaluated again; nor does the sweep mind what lies in it now.
    (out / "results" / "base" / "called.json").unlink()
    assert bash(out / "evaluate.sh", env=env).returncode == 0
    assert not (out / "results" / "base" / "called.json").exists()
    qkpatch.sweep(tiny.path, grid, out, form="none")


def test_one_task_of_an_array_is_one_variant(tiny: Tiny, tmp_path: Path, environment: dict[str, str]) -> None:
    out = tmp_path / "sweep"
    names = [v.name for v in qkpatch.sweep(tiny.path, {"modes": [1, 2]}, out, form="patch").variants]
    script = (out / "evaluate.sbatch").read_text()
    assert f"--array=0-{len(names)}\n" in script
    spool = tmp_path / "spool"  # where SLURM copies it to
    spool.write_text(script)
    env = {**environment, "MODEL": "m", "SLURM_SUBMIT_DIR": str(out), "SLURM_ARRAY_TASK_ID": "2"}
    done = bash(spool, env=env)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (out / "results").iterdir()] == [names[1]]
    qkpatch.apply(qkpatch.plan(tiny.path, modes=2), tmp_path / "applied")
    evaluated = tmp_path / "stand in" / "kept" / names[1]
    assert evaluated.read_bytes() == (tmp_path / "applied" / "model.safetensors").read_bytes()


@pytest.mark.long
def test_a_failure_ends_it_and_is_evaluated_again(
    tiny: Tiny, tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "sweep"
    qkpatch.sweep(tiny.path, {"modes": [1]}, out, form="none")
    (tmp_path / "stand in" / "lmms_eval.py").write_text("raise SystemExit(7)")
    assert bash(out / "evaluate.sh", env={**environment, "MODEL": "m"}).returncode == 7
    (tmp_path / "stand in" / "lmms_eval.py").write_text(STAND_IN)
    assert bash(out / "evaluate.sh", "m1", env={**environment, "MODEL": "m"}).returncode == 0
    assert not (out / "results" / "base").exists()
    assert called(out, "m1")


def test_families_that_lmms_eval_knows_need_no_name(tmp_path: Path, environment: dict[str, str]) -> None:
    demo = Path(__file__).parents[2] / "demo" / "toy-0"
    qkpatch.sweep(demo, {"modes": [1], "layers": [4]}, tmp_path / "sweep", form="none")
    assert bash(tmp_path / "sweep" / "evaluate.sh", "base", env=environment).returncode == 0
    assert called(tmp_path / "sweep", "base")["argv"][:2] == ["--model", "llava_hf"]


@pytest.mark.long
def test_a_repository_is_downloaded_at_its_commit(
    tiny: Tiny, tmp_path: Path, environment: dict[str, str]
) -> None:
    code = "import qkpatch, sys; qkpatch.sweep('org/tiny', {'modes': [1], 'layers': [1]}, sys.argv[1], form='none')"
    with fake_hub() as hub:
        hub.repos["org/tiny"] = Repo(tiny.path)
        env = hub_environment(
            hub.endpoint, tmp_path / "home", **{**environment, "MODEL": "m", "HF_HUB_OFFLINE": "0"}
        )
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "sweep")], check=True, env=env, timeout=120
        )
        assert not list((tmp_path / "home").rglob("*.safetensors"))  # the rows alone are fetched
        done = bash(tmp_path / "sweep" / "evaluate.sh", env=env)
    assert done.returncode == 0, done.stderr
    for name in ("base", "L1-m1"):
        assert "model.safetensors" in called(tmp_path / "sweep", name)["files"]
