"""What a plan says that it costs: the estimate's formula, held against what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as One
from typing import Any

import pytest
from conftest import Tiny, build_tiny

import qkpatch
from qkpatch.common.text import about
from qkpatch.planning.costs import COPIED, START, costs_of, head_seconds, run_seconds

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("n_bytes", "heads", "layout", "threads", "measured"),
    [
        (13.48e9, 288, One(d_head=128, d_model=4096, n_heads=32, n_kv_heads=32), 2, 54.18),
        (5.02e9, 288, One(d_head=128, d_model=4096, n_heads=32, n_kv_heads=32), 2, 13.61),
        (1.36e9, 576, One(d_head=128, d_model=8192, n_heads=64, n_kv_heads=8), 1, 39.25),
    ],
    ids=["llama-7b, cold", "one-5g, memory", "geometry-70b, cold"],
)
def test_the_estimate_is_within_a_third_of_the_benchmarks(
    n_bytes: float, heads: int, layout: Any, threads: int, measured: float
) -> None:
    estimated = run_seconds(n_bytes, heads * head_seconds(layout) / threads)
    assert measured / 1.33 < estimated < measured * 1.33


def test_it_is_of_bytes_or_heads_whichever_takes_longer(tiny: Tiny, tmp_path: Path) -> None:
    plan = qkpatch.plan(tiny.path, layers=[0, 2], modes=2)
    costs = costs_of(plan, tmp_path / "out", "cpu", 1)
    each = head_seconds(plan.edits[0].layout)
    assert costs.heads_a_second == pytest.approx(1 / each, rel=1e-2)
    by_heads, by_bytes = 8 * each, plan.output_bytes / COPIED
    assert by_heads > by_bytes
    assert costs.estimated_seconds == pytest.approx(START + by_heads, abs=0.05)
    assert run_seconds(3 * COPIED, 1) == START + 3
    for device in ("cuda", "auto"):  # nobody has measured it
        assert costs_of(plan, tmp_path, device, 1).estimated_seconds is None
    idle = costs_of(qkpatch.plan(tiny.path, alpha=1), tmp_path, "cpu", 1)
    assert (idle.estimated_seconds, idle.heads_a_second) == (round(START, 1), None)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "1 s"), (8.8, "9 s"), (22, "20 s"), (89, "90 s"), (95, "2 min"), (1700, "30 min"), (9000, "2 h")],
)  # fmt: skip
def test_a_time_is_told_as_coarsely_as_it_is_known(seconds: float, told: str) -> None:
    assert about(seconds) == told


def test_costs_come_first_and_a_shard_has_one_row(tmp_path: Path, run: Run) -> None:
    tiny = build_tiny(tmp_path / "split", n_layers=6, shards=[[f"layers.{n}." for n in range(3)], [""]])
    lines = [line.rstrip() + " " for line in run("plan", tiny.path, "--layers", "1-4").stdout.splitlines()]
    text = "\n".join(lines)
    assert text.index("expected peak memory") < text.index("About ") < text.index(" shard ")
    assert [line.split() for line in lines if line.strip().endswith(".safetensors")] == [
        ["1-2", "model-00001-of-00002.safetensors"],
        ["3-4", "model-00002-of-00002.safetensors"],
    ]
    assert max(map(len, lines)) <= 100
    assert json.loads(run("plan", tiny.path, "--json").stdout)["costs"]["estimated_seconds"] > 0


def test_an_edit_by_layer_has_one_line_for_each_kind(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    (tmp_path / "edit.yaml").write_text(
        "edits:\n- {layers: '0,2', modes: 2}\n- {layers: 1, energy: 0.3, modes: 3}\n"
    )
    lines = run("plan", tiny.path, "--config", tmp_path / "edit.yaml").stdout.splitlines()
    at = lines.index("Edit, by layer; heads 0-3")
    assert lines[at + 1 : at + 3] == [
        "  0,2: 2 dominant modes × 0.8, full channel",
        "  1: 1-3 dominant modes × 0.8, full channel, as hold 0.3 of the energy",
    ]
