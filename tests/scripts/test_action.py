"""The action for CI: its metadata, and its steps as a runner would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPO

ACTION = yaml.safe_load((REPO / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"] if "run" in step}


@pytest.fixture
def runner(tmp_path: Path) -> dict[str, str]:
    """A runner's environment, with the `qkpatch` of this tree."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "qkpatch").write_text(f'#!/bin/sh\nexec {sys.executable} -m qkpatch "$@"\n')
    (programs / "qkpatch").chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "HOME": str(tmp_path),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }


def run(name: str, runner: dict[str, str], **inputs: str) -> subprocess.CompletedProcess[str]:
    """A step, its inputs put in as a runner puts them."""
    step = STEPS[name]
    given = {key: value["default"] for key, value in ACTION["inputs"].items() if "default" in value} | inputs
    env = {}
    for key, value in step["env"].items():
        inner = value.removeprefix("${{ inputs.").removesuffix(" }}")
        env[key] = given[inner]
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(shell, env={**runner, **env}, cwd=runner["HOME"], capture_output=True, text=True)


def test_inputs_reach_the_shell_as_values_and_never_as_text_of_it() -> None:
    for step in STEPS.values():
        assert "${{" not in step["run"], "an input could be a command"
    asked = {value for step in STEPS.values() for value in step["env"].values()}
    assert {v for v in asked if "hf-token" in v} == {"${{ inputs.hf-token }}"}
    assert "HF_TOKEN" not in STEPS["Install"]["env"]
    assert "HF_TOKEN" not in {**ACTION["runs"].get("env", {})}


@pytest.mark.long
def test_its_steps_plan_apply_and_verify(runner: dict[str, str]) -> None:
    toy = str(REPO / "demo" / "toy-0")
    inputs: dict[str, Any] = {"source": toy, "edit": "--layers 3-4 --modes 2", "out": "my baked"}
    planned = run("Plan", runner, **inputs)
    assert planned.returncode == 0, planned.stderr
    assert "2 dominant modes" in Path(runner["GITHUB_STEP_SUMMARY"]).read_text()
    applied = run("Apply", runner, **inputs)
    assert applied.returncode == 0, applied.stderr
    assert Path(runner["GITHUB_OUTPUT"]).read_text() == "out=my baked\n"
    out = Path(runner["HOME"]) / "my baked"
    assert [edit["layer"] for edit in json.loads((out / "qkpatch.json").read_text())["edits"]] == [3, 4]
    assert run("Verify", runner, **inputs).returncode == 0
    (out / "config.json").write_bytes((out / "config.json").read_bytes() + b" ")
    assert run("Verify", runner, **inputs).returncode == 1


def test_a_plan_that_fails_fails_the_step(runner: dict[str, str]) -> None:
    failed = run("Plan", runner, source=str(REPO / "demo" / "toy-0"), edit="--layers 99")
    assert failed.returncode == 2
    assert "out of range" in failed.stderr


@pytest.mark.long
@pytest.mark.parametrize("step", ["Plan", "Apply"])
def test_a_strict_action_fails_where_there_is_a_warning(step: str, runner: dict[str, str]) -> None:
    inputs = {"source": str(REPO / "demo" / "toy-0"), "edit": "--layers 3 --alpha 1"}
    assert run(step, runner, **inputs, strict="true").returncode == 6
    assert not (Path(runner["HOME"]) / "edited").exists()
    assert run(step, runner, **inputs).returncode == 0


def test_an_input_is_no_command(runner: dict[str, str]) -> None:
    run("Plan", runner, source="x", edit="; touch broken $(touch broken) `touch broken`")
    assert not (Path(runner["HOME"]) / "broken").exists()
