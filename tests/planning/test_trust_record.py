"""The record is exact: settings as they were given, wherever they are told; and records of earlier versions hold."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, Tiny, build_tiny
from safetensors.torch import load_file, save_file

from qkpatch.common.json_text import exact
from qkpatch.output.options import PLAIN
from qkpatch.patching.apply import fingerprint_of
from qkpatch.planning.plan import make_plan
from qkpatch.planning.request import Request

Run = Callable[..., Any]

# What qkpatch 0.1.0 recorded, when all numbers had nine digits: the edits, by the name of the file in goldens/.
GOLDENS = {
    "defaults": (),
    "a third": ("--alpha", repr(1 / 3), "--layers", "1", "--select", "random", "--seed", 2**63 - 1),
    "sharded": (
        "--alpha", "0.123456789012", "--layers", "0,2", "--heads", "1", "--max-shard-size", "5KB",
        "--digest", "files",
    ),
}  # fmt: skip


def build_source(path: Path) -> Tiny:
    """The same bytes everywhere: weights that no random generator made, and facts with more than nine digits."""
    tiny = build_tiny(path)
    file = tiny.path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        numbers = torch.arange(len(name), len(name) + tensor.numel(), dtype=torch.int64)
        values = (numbers * 2654435761 % 2**32 >> 16) - 2**15
        tensors[name] = (values.double() / 2**17).to(tensor.dtype).view(tensor.shape)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tiny.path / "config.json").read_text())
    facts = {"attention_multiplier": 8**-0.5, "attn_logit_softcapping": 50.0, "use_qk_norm": False}
    (tiny.path / "config.json").write_text(json.dumps({**config, **facts}))
    return tiny


def golden(name: str) -> Path:
    return REPO / "tests" / "planning" / "goldens" / f"{name.replace(' ', '_')}.json"


@pytest.mark.parametrize("name", GOLDENS)
def test_records_of_earlier_versions_are_accepted(tmp_path: Path, run: Run, name: str) -> None:
    source, out = build_source(tmp_path / "source").path, tmp_path / "out"
    assert run("apply", source, "-o", out, *GOLDENS[name]).exit_code == 0
    (out / "qkpatch.json").write_bytes(golden(name).read_bytes())
    sums = out / "SHA256SUMS"
    if sums.exists():
        sums.write_bytes(golden(name).with_suffix(".sums").read_bytes())
    result = run("verify", out, "--source", source)
    assert result.exit_code == 0, result.output


# -------- settings

# Each is another float than its neighbours, and prints like a rounder one where digits are cut off.
ALPHAS = [
    0.9999999999, 1 - 2**-53, 1 / 3, 0.1 + 0.2, 0.8000000001, 0.80000000000000016, 1e-17, 2**-1074, 0.1234567891,
]  # fmt: skip


def check_alpha(alpha: float, tmp_path: Path, run: Run) -> None:
    """The manifest, ``verify``, the card's table and its command all have the very α that was asked for."""
    base = build_tiny(tmp_path / "base", dtype=torch.float64)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("apply", base.path, "-o", one, "--alpha", repr(alpha)).exit_code == 0
    assert json.loads((one / "qkpatch.json").read_text())["edit"]["alpha"] == alpha
    result = run("verify", one, "--source", base.path)
    assert result.exit_code == 0, result.output
    card = run("card", one).stdout
    assert f"| factor α | {alpha!r} |" in card
    words = shlex.split(next(line for line in card.splitlines() if line.startswith("qkpatch apply")))
    words[words.index("base")], words[words.index("OUT")] = str(base.path), str(two)
    assert run(*words[1:]).exit_code == 0
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert run("plan", base.path, "--alpha", repr(alpha)).stdout.count(f"× {alpha!r},") == 1


def test_alpha_is_recorded_and_told_exactly(tmp_path: Path, run: Run) -> None:
    check_alpha(0.9999999999, tmp_path, run)


@pytest.mark.stress
@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_alpha_is_recorded_and_told_exactly(tmp_path: Path, run: Run, alpha: float) -> None:
    check_alpha(alpha, tmp_path, run)


def test_alphas_that_differ_give_names_that_differ_and_ordinary_names_stay(tmp_path: Path) -> None:
    source = str(build_source(tmp_path / "source").path)

    def name(alpha: float | None) -> str:
        return make_plan(source, Request(alpha=alpha)).default_name

    assert [name(alpha) for alpha in (None, 0.0, 0.25, 0.5, 0.8, 1.0)] == [
        f"source-qkpatch-{digits}"
        for digits in ("ace9deb3", "7c9b9a2a", "862891eb", "ec49fa62", "ace9deb3", "464408d7")
    ]
    assert len({name(alpha) for alpha in [0.8, 1.0, 0.3, *ALPHAS]}) == 3 + len(ALPHAS)


def test_a_run_is_not_resumed_with_almost_the_same_alpha(tmp_path: Path) -> None:
    source = str(build_source(tmp_path / "source").path)
    one, two = (make_plan(source, Request(alpha=alpha)) for alpha in (0.5, 0.5000000001))
    assert fingerprint_of(one, PLAIN) != fingerprint_of(two, PLAIN)


@pytest.mark.parametrize(
    ("alpha", "text"), [(0.8, "0.8"), (1.0, "1"), (0.0, "0"), (1e-5, "1e-05"), (1 / 3, repr(1 / 3))]
)
def test_exact_numbers_are_brief(alpha: float, text: str) -> None:
    assert exact(alpha) == text
    assert float(text) == alpha


def test_figures_that_were_measured_have_nine_digits(tmp_path: Path, run: Run) -> None:
    source = build_source(tmp_path / "source").path
    assert run("apply", source, "-o", tmp_path / "out", "--alpha", repr(1 / 3)).exit_code == 0
    document = json.loads((tmp_path / "out" / "qkpatch.json").read_text())
    assert document["model"]["logits"]["attention_multiplier"] == 0.353553391
    figures = [
        number
        for edit in document["edits"]
        for head in edit["heads"]
        for value in head.values()
        for number in (value if isinstance(value, list) else [value])
        if isinstance(number, float)
    ]
    assert len(figures) > 50
    assert all(float(f"{number:.9g}") == number for number in figures)


def test_the_command_of_a_card_names_a_recipe_of_ones_own_by_its_file(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build_tiny(tmp_path / "base").path
    recipe = (REPO / "configs" / "llama.yaml").read_text().replace("name: llama\n", "name: mine\n")
    (tmp_path / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    assert run("apply", base, "-o", "one", "--recipe", "mine.yaml").exit_code == 0
    lines = [line for line in run("card", "one").stdout.splitlines() if line.startswith("qkpatch ")]
    for line in lines:
        assert run(*shlex.split(line)[1:]).exit_code == 0, line
    assert [line.split()[1] for line in lines] == ["apply", "verify"]
