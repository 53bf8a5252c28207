"""The benchmarks themselves, on a tiny checkpoint: figures appear, and what is measured does the same job."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import oracle
import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file

sys.path.insert(0, str(REPO))

from scripts.bench import chart, contest, loop, report, shapes
from scripts.bench.measure import BenchError, PageCache, Usage, measure

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")

USAGE = Usage(1.0, 1.0, 0.5, 100, 50, 1, 1, 1, 1)


@pytest.mark.long
def test_a_call_measures_everyone_proves_the_output_and_writes_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.bench", "--scale", "tiny", "--dir", tmp_path, "--rounds", "1"]
    command += ["--parts", "disk,inspect", "--cache", "warm"]
    done = subprocess.run(list(map(str, command)), cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the output verifies" in done.stderr
    figures: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    found = {row["contestant"]: row for row in figures["rows"]}
    assert set(found) == {c.name for c in (contest.COPY, contest.APPLY, contest.LOOP, contest.INSPECT)}
    apply = found[contest.APPLY.name]
    assert apply["wall"] > 0
    assert apply["cpu"] > 0
    assert apply["over_copy"] > 1  # starting Python takes longer than copying this
    assert 100e6 < apply["peak_rss"] < report.MAX_PEAK
    assert 10e6 < apply["peak_anonymous"] <= apply["peak_rss"]
    assert apply["asked_written"] >= shapes.TINY.n_bytes
    assert found[contest.INSPECT.name]["over_copy"] is None
    for row in found.values():
        assert f"| {row['contestant']} |" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "tiny", "tiny.stamp"]


def test_the_loop_makes_the_same_edit_and_a_built_checkpoint_is_used_again(run, tmp_path: Path) -> None:
    source = shapes.build(shapes.TINY, tmp_path)
    before = source.stat().st_mtime_ns
    assert shapes.build(shapes.TINY, tmp_path) == source
    assert source.stat().st_mtime_ns == before
    assert shapes.is_built(shapes.TINY, tmp_path)
    assert not shapes.is_built(replace(shapes.TINY, vocab=64), tmp_path)
    loop.main(source, tmp_path / "loop", shapes.TINY.layers, contest.MODES, torch.float64)
    assert loop.ALPHA == contest.ALPHA
    flags = ("--layers", shapes.TINY.layers, "--modes", contest.MODES, "--alpha", contest.ALPHA)
    assert run("apply", source, "-o", tmp_path / "out", *flags).exit_code == 0
    changed = 0
    for path in sorted(source.glob("*.safetensors")):
        ours, theirs, old = (
            load_file(folder / path.name) for folder in (tmp_path / "out", tmp_path / "loop", source)
        )
        for name, tensor in ours.items():
            if torch.equal(tensor.view(torch.uint8), old[name].view(torch.uint8)):
                assert torch.equal(theirs[name].view(torch.uint8), tensor.view(torch.uint8))
                continue
            changed += 1
            assert "q_proj" in name
            assert oracle.ulps(theirs[name].double().numpy(), tensor.double().numpy(), "F16") <= 1
    assert changed == 2


def test_sparse_shapes_hold_numbers_where_they_are_edited_and_holes_elsewhere(tmp_path: Path) -> None:
    shape = replace(shapes.TINY, name="holes", hidden=512, is_sparse=True, shards=1)
    path = shapes.build(shape, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    assert path.stat().st_blocks * 512 < shape.n_bytes
    assert all(
        bool(tensors[n].any()) == (n.split(".")[2] in "12") for n in tensors if "q_proj" in n or "k_proj" in n
    )
    assert not tensors["lm_head.weight"].any()
    assert shape.disk_bytes < shape.n_bytes
    # What the shapes of real size say of themselves, without building them.
    assert 13e9 < shapes.LLAMA_7B.n_bytes < 14e9
    assert 14.5e9 < shapes.ONE_15G.n_bytes < 15.5e9
    assert 4.9e9 < shapes.ONE_5G.n_bytes < 5.3e9
    assert shapes.LLAMA_7B.edited_bytes == 9 * 4096 * 4096 * 2


def test_ratios_are_taken_within_a_round_and_targets_are_told_met_or_missed() -> None:
    runs = [
        contest.Run(
            "one-5g", "tmpfs", "memory", name, number, replace(USAGE, wall=wall * load, peak_rss=int(peak))
        )
        for number, load in enumerate((1.0, 5.0, 1.2))  # a busy machine in the second round
        for name, wall, peak in (
            (contest.COPY.name, 2.0, 2e6),
            (contest.APPLY.name, 2.2, 460e6),
            (contest.LOOP.name, 5.5, 5e9),
        )
    ]
    table = report.rows(runs)
    row = next(row for row in table if row.contestant == contest.APPLY.name)
    assert row.over_copy == pytest.approx(1.1)
    assert row.over_loop == pytest.approx(0.4)
    assert (row.wall_min, row.wall_max, row.rounds) == pytest.approx((2.2, 11.0, 3))
    assert [(v.limit, v.is_met) for v in report.verdicts(table)] == [
        (400.0, False),
        (1.0, False),
        (0.5, True),
    ]
    reflinked = [replace(run, place="btrfs", cache="warm") for run in runs]
    assert [(v.what, v.unit, v.limit) for v in report.verdicts(report.rows(reflinked))[1:]] == [
        ("apply, one-5g, btrfs, warm", "s", 3.0),
        ("apply ÷ load/edit/save loop, one-5g, btrfs, warm", "×", 1.0),
    ]
    whole = [
        contest.Run("llama-7b", "ext4", "warm", name, 0, replace(USAGE, cpu=9.5, user=7.5))
        for name in (contest.APPLY.name, contest.INSPECT.name)
    ]
    found = {v.what: v.is_met for v in report.verdicts(report.rows(whole))}
    assert not found["user time of apply, llama-7b, ext4, warm"]
    assert not found["CPU time of inspect, llama-7b, ext4, warm"]
    page = report.markdown(table, report.machine(), 20.0, ["xfs: not here"])
    assert "**missed**" in page
    assert "**Extrapolated**, not measured: 96 minutes" in " ".join(page.split())
    assert "* xfs: not here" in page
    picture = ElementTree.fromstring(chart.draw(table))
    assert sum(element.tag.endswith("polyline") for element in picture.iter()) == 3
    assert {"apply", "loop"} <= {word for text in picture.itertext() for word in re.findall(r"\w+", text)}
    assert ElementTree.fromstring(chart.draw([])) is not None


@pytest.mark.long
def test_who_fails_is_left_out_with_the_reason_and_qkpatch_may_not_fail(tmp_path: Path) -> None:
    source = shapes.build(shapes.TINY, tmp_path)
    place = contest.Place("disk", tmp_path, ("warm",))
    broken = contest.Contestant(
        "broken", lambda *_: [[sys.executable, "-c", "raise SystemExit('no such luck')"]]
    )
    both = [contest.COPY, broken]
    first, note, second = contest.contest(shapes.TINY, source, place, both, 2, PageCache(), lambda _: None)
    assert isinstance(first, contest.Run)
    assert isinstance(second, contest.Run)
    assert {first.contestant, second.contestant} == {contest.COPY.name}
    assert "no such luck" in str(note)
    assert not (tmp_path / "out").exists()
    shape = replace(shapes.TINY, edited=(7, 9))
    with pytest.raises(BenchError, match=r"exits with 2: .*0-3"):
        list(contest.contest(shape, source, place, [contest.APPLY], 1, PageCache(), lambda _: None))


@pytest.mark.long
def test_another_output_than_asked_for_is_not_taken(run, tmp_path: Path) -> None:
    source = shapes.build(shapes.TINY, tmp_path)
    assert run("apply", source, "-o", tmp_path / "out", "--layers", "1-1").exit_code == 0
    with pytest.raises(BenchError, match="not the layers 1-2"):
        contest.verify(shapes.TINY, source, tmp_path / "out")
    weights = tmp_path / "out" / "model-00001-of-00003.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BenchError, match="exits with 1"):
        contest.verify(shapes.TINY, source, tmp_path / "out")


def test_a_process_is_measured_alone_however_large_its_parent() -> None:
    ballast = bytearray(600 << 20)
    usage, out = measure(
        [sys.executable, "-c", "import time; x = b'1' * (64 << 20); time.sleep(0.2); print(len(x))"]
    )
    assert out == f"{64 << 20}\n"
    assert 64 << 20 < usage.peak_rss < 200 << 20 < len(ballast)
    assert 64 << 20 < usage.peak_anonymous <= usage.peak_rss
    assert usage.wall > 0.2


def test_quick_is_small_enough_to_be_quick() -> None:
    (quick,) = shapes.SCALES["quick"]
    assert 2 * quick.n_bytes < 3e9
    assert quick.n_bytes > report.LARGE  # so that the targets hold


@pytest.mark.long
def test_a_head_is_held_against_its_matrix_calls() -> None:
    command = [
        sys.executable,
        "-m",
        "scripts.bench.bare",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--hidden",
        "256",
    ]
    command += ["--d-head", "32", "--rounds", "1"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    found = re.findall(
        r"(\S.*?) +([\d.]+) ms of CPU a head; its matrix calls +([\d.]+) ms; × ([\d.]+)", done.stdout
    )
    assert [name for name, *_ in found] == ["edit with report", "spectrum with share"]
    assert all(float(figure) > 0 for _, *figures in found for figure in figures)


def test_the_cost_of_a_plan_is_measured_as_a_model_grows() -> None:
    command = [sys.executable, "-m", "scripts.bench.large", "--shards", "1,2"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert [row.split("|")[1].strip() for row in done.stdout.splitlines()[2:]] == ["1", "2"]


@pytest.mark.long
def test_the_cost_of_a_head_is_measured_in_each_channel() -> None:
    command = [
        sys.executable,
        "-m",
        "scripts.bench.heads",
        "--threads",
        "2",
        "--heads",
        "4",
        "--kv-heads",
        "2",
    ]
    command += ["--hidden", "256", "--d-head", "32"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["full", "symmetric", "antisymmetric"]
    assert all(float(line.split()[1]) > 0 and "float64 arrays at the peak" in line for line in lines)


@pytest.mark.stress
def test_workers_behind_links_take_as_long_as_their_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.bench.parts", "--shape", "tiny", "--workers", "2"]
    command += ["--link", "0.1", "--store", "0.15", "--dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, wall, _, least, start, finish = map(float, done.stderr.split())
    assert count == 2
    assert wall > start + finish + 0.7 * least  # planned rows pass no link
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.stamp"]
