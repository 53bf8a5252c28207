"""The evidence: edits as `qkpatch apply` makes them, statistics with known answers, and a small run from end to end."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, Tiny
from safetensors.torch import load_file

from qkpatch.evaluation.records import Store
from qkpatch.evaluation.statistics import Interval, holm, ratio
from qkpatch.spectral.rule import Channel

sys.path.insert(0, str(REPO))

from scripts.evidence import __main__ as entry
from scripts.evidence import language, report, toy
from scripts.evidence.edits import DRAWN, Edit, Editor, applied, thirds
from scripts.evidence.statistics import difference, excess_over_curve, scenes_needed
from scripts.toy_vlm import captioning, training

HOWS = ("dominant", "random", "bottom", "subspace", "shrink")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("channel", list(Channel))
def test_edits_in_memory_are_those_of_apply(run, tiny: Tiny, tmp_path: Path, how, channel: Channel) -> None:
    if how == "subspace" and channel is not Channel.full:
        pytest.skip("a subspace belongs to no channel")
    flags = ["--layers", "1-2", "--modes", "2", "--alpha", "0.5", "--select", how, "--channel", channel.value]
    seed = ["--seed", "7"] if how in DRAWN else []
    assert run("apply", tiny.path, "-o", tmp_path / "out", *flags, *seed).exit_code == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    edited = Editor(tiny.path).edit(Edit((1, 2), 2, 0.5, how, channel, draw=7))
    for layer in (1, 2):
        assert torch.equal(edited.weights[layer], stored[tiny.name(layer, "q")])
    before = load_file(tiny.path / "model.safetensors")
    moved = [stored[n].double() - before[n].double() for n in before if "q_proj" in n]
    size = [before[n].double() for n in before if "q_proj" in n]
    norm = torch.linalg.vector_norm
    expected = norm(torch.stack([norm(m) for m in moved])) / norm(torch.stack([norm(s) for s in size]))
    assert math.isclose(edited.change, float(expected), rel_tol=1e-9)


@pytest.mark.parametrize("how", ["equal-norm", "noise", "shrink"])
def test_controls_of_equal_size_are_of_equal_size_in_every_head(tiny: Tiny, how) -> None:
    editor, before = Editor(tiny.path), load_file(tiny.path / "model.safetensors")
    edit = Edit((0, 1, 2), 1, 0.5)
    dominant, control = editor.edit(edit, torch.float64), editor.edit(replace(edit, how=how), torch.float64)
    for layer in range(3):
        W_Q = before[tiny.name(layer, "q")].double()
        sizes = [
            torch.linalg.matrix_norm((e.weights[layer] - W_Q).view(tiny.n_heads, tiny.d_head, -1))
            for e in (dominant, control)
        ]
        assert torch.allclose(*sizes, rtol=1e-9)
        assert not torch.equal(dominant.weights[layer], control.weights[layer])


def test_equal_norm_leaves_the_dominant_modes_alone_and_draws_differ(tiny: Tiny) -> None:
    editor, before = Editor(tiny.path), load_file(tiny.path / "model.safetensors")
    edit = Edit((1,), 2, 0.5, "equal-norm")
    first, again, other = (editor.edit(replace(edit, draw=d), torch.float64).weights[1] for d in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    W_Q = before[tiny.name(1, "q")].double()[: tiny.d_head]
    W_K = before[tiny.name(1, "k")].double()[: tiny.d_head]
    U = torch.linalg.svd(W_Q.T @ W_K)[0][:, :2]
    assert torch.allclose(first[: tiny.d_head] @ U, W_Q @ U, atol=1e-12)


def test_one_channel_can_be_given_the_size_of_another(tiny: Tiny) -> None:
    editor = Editor(tiny.path)
    symmetric = Edit((0, 1), 2, 0.5, channel=Channel.symmetric)
    other = replace(symmetric, channel=Channel.antisymmetric, sized_like=Channel.symmetric)
    sizes = [editor.edit(e, torch.float64).change for e in (symmetric, other)]
    assert math.isclose(*sizes, rel_tol=1e-9)
    assert other.kind == "antisymmetric sized like symmetric"


def test_keys_tell_settings_apart() -> None:
    budget = toy.Budget()
    settings = list(toy.grid(budget, 9))
    assert len({e.key for e in settings}) == len(settings)
    controls = list(toy.companions(settings[0], budget, in_full=True))
    assert len({e.key for e in controls}) == len(controls)
    assert sum(e.how == "random" for e in controls) == 10
    every = list(language.settings(language.Budget(), 30))
    assert len({e.key for e in every}) == len(every)


def test_thirds_cover_all_layers_and_the_middle_is_the_tools() -> None:
    from qkpatch.common.number_ranges import middle_third

    for n in (9, 30, 32):
        parts = thirds(n)
        assert parts["early"] + parts["middle"] + parts["late"] == parts["all"] == tuple(range(n))
        assert parts["middle"] == middle_third(n)


def test_weights_are_put_back(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=11, hidden_size=24, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8)  # fmt: skip
    loaded = AutoModelForCausalLM.from_config(config)
    before = [layer.self_attn.q_proj.weight.clone() for layer in loaded.model.layers]
    edited = Editor(tiny.path).edit(Edit((1,), 1, 0.0))
    with contextlib.suppress(KeyboardInterrupt), applied(loaded.model.layers, edited):
        assert torch.equal(loaded.model.layers[1].self_attn.q_proj.weight, edited.weights[1].float())
        raise KeyboardInterrupt
    for layer, weight in zip(loaded.model.layers, before, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, weight)


def columns(values: np.ndarray) -> np.ndarray:
    """(models, draws, scenes) of plain numbers as numerator and denominator."""
    return np.stack([values, np.ones_like(values)], -1)


def test_a_constant_difference_has_no_width() -> None:
    base = np.random.default_rng(0).random((3, 1, 50))
    found = difference(columns(base + 0.25), columns(base), replicates=300)
    for interval in (found.crossed, found.scenes_only):
        assert math.isclose(interval.estimate, 0.25)
        assert math.isclose(interval.low, 0.25)
        assert math.isclose(interval.high, 0.25)
        assert interval.p == 2 / 301
        assert interval.excludes_zero
    assert np.allclose(found.by_model, 0.25)


def test_intervals_have_the_width_that_theory_says() -> None:
    rng = np.random.default_rng(1)
    n = 400
    noise = rng.normal(0, 1, (1, 1, n)).repeat(3, 0)  # the same scenes, the same outcome in each model
    found = difference(columns(noise), columns(np.zeros_like(noise)), replicates=4000)
    expected = 2 * 1.96 * noise.std() / math.sqrt(n)
    for interval in (found.crossed, found.scenes_only):
        assert abs((interval.high - interval.low) / expected - 1) < 0.1
    assert math.isclose(found.crossed.estimate, noise[0].mean())


def test_models_that_disagree_widen_the_crossed_interval_alone() -> None:
    effects = np.array([-0.3, 0.0, 0.6])
    a = np.broadcast_to(effects[:, None, None], (3, 1, 60))
    found = difference(columns(a), columns(np.zeros((3, 1, 60))), replicates=2000)
    assert found.by_model == pytest.approx(tuple(effects))
    assert found.scenes_only.low == pytest.approx(0.1)
    assert found.scenes_only.high == pytest.approx(0.1)
    assert found.crossed.low == pytest.approx(-0.3)  # all three replicas the worst one: 1 in 27
    assert found.crossed.high == pytest.approx(0.6)
    assert not found.crossed.excludes_zero


def test_draws_that_disagree_widen_the_interval_too() -> None:
    draws = np.linspace(-1, 1, 10)
    b = np.broadcast_to(draws[None, :, None], (3, 10, 40))
    found = difference(columns(np.zeros((3, 1, 40))), columns(b), replicates=2000)
    assert abs(found.crossed.estimate) < 1e-12
    assert found.crossed.high - found.crossed.low > 0.3
    assert found.scenes_only.high - found.scenes_only.low < 1e-12


def test_a_true_null_is_rarely_called_a_difference() -> None:
    rng = np.random.default_rng(2)
    called = 0
    for number in range(60):
        a, b = (rng.random((3, 1, 200)) < 0.3 for _ in range(2))
        found = difference(columns(a.astype(float)), columns(b.astype(float)), seed=number, replicates=300)
        called += found.scenes_only.excludes_zero
    assert called <= 9  # 3 expected; 10 or more have a chance of 1 in 1,000


def test_ratios_are_of_sums() -> None:
    assert ratio(np.array([[3.0, 7.0], [0.0, 0.0]])).tolist() == [3 / 7, 0.0]


def test_excess_over_a_straight_curve_is_the_distance_to_it() -> None:
    def setting(effect: float, place: float) -> tuple[np.ndarray, np.ndarray]:
        shape = (2, 30)
        return columns(np.full(shape, effect)), columns(np.full(shape, place))

    curve = [setting(0.3, 0.9), setting(0.1, 0.5), setting(0.2, 0.7)]
    found = excess_over_curve(setting(0.15, 0.8), curve, replicates=50)
    assert found.crossed.estimate == pytest.approx(-0.1)
    assert found.scenes_only.low == pytest.approx(-0.1)
    beyond = excess_over_curve(setting(0.3, 0.95), curve, replicates=50)
    assert beyond.crossed.estimate == pytest.approx(0.0)


def test_another_conclusion_is_told_and_another_figure_is_not() -> None:
    before = json.loads((REPO / "docs" / "evidence" / "report.json").read_text())
    after = json.loads(json.dumps(before))
    assert report.changed(report.verdicts(before), report.verdicts(after)) == []
    first = after["primary"][0]["found"]["crossed"]
    assert first["high"] < 0
    first["low"] -= 0.01
    assert report.changed(report.verdicts(before), report.verdicts(after)) == []
    first["high"] = 0.01
    (line,) = report.changed(report.verdicts(before), report.verdicts(after))
    assert line == "dominant > random? chair_s, chosen: lower, now nothing"


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_sample_sizes_by_hand() -> None:
    # (1.95996 √0.2 + 0.84162 √0.19)² / 0.01 = 154.3...
    assert scenes_needed(rate=0.5, relative=0.2, discordance=0.2) == 155
    assert scenes_needed(0.5, 0.04, 0.1) / scenes_needed(0.5, 0.08, 0.1) == pytest.approx(4, rel=0.05)
    with pytest.raises(ValueError, match="cannot make"):
        scenes_needed(0.5, 0.2, 0.05)
    assert Interval(0.0, -1.96, 1.96, 1.0).smallest_detectable == pytest.approx(2.80, abs=0.01)


def test_a_store_remembers_and_drops_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "store.jsonl"
    made: list[str] = []

    def make(value: str) -> str:
        made.append(value)
        return value

    Store(path, {}).once("a", lambda: make("1"))
    Store(path, {}).once("b", lambda: make("2"))
    path.write_text(path.read_text() + '["c", {"half')
    store = Store(path, {})
    assert store.once("a", lambda: make("x")) == "1"
    assert store.once("c", lambda: make("3")) == "3"
    assert made == ["1", "2", "3"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        ["a", "1"],
        ["b", "2"],
        ["c", "3"],
    ]


def test_the_rule_of_choice_prefers_low_chair_within_the_allowance() -> None:
    def measured(absent: int, found: int) -> toy.Measured:
        return toy.Measured(0.1, np.array([[5, 0, found, 100], [5, absent, found, 100]], float), None, None)

    table = {
        None: measured(1, 90),
        "good": measured(0, 89),
        "greedy": measured(0, 40),
        "idle": measured(1, 90),
    }

    class Fake:
        def validation(self, edit):
            return table[edit]

    assert toy.choose([Fake(), Fake()], ["greedy", "idle", "good"]) == "good"
    assert toy.choose([Fake()], ["greedy"]) == "greedy"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three toys that are hardly trained."""
    out = tmp_path_factory.mktemp("toys")
    schedule = training.Schedule(tower_steps=1, tower_batch=2, steps=2, batch=2, warm_up=1)
    for seed in range(3):
        training.train(seed, out / f"toy-{seed}", schedule, tell=lambda line: None)
    return out


@pytest.mark.long
def test_a_small_run_writes_a_report_and_a_second_one_measures_nothing_anew(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evidence", "--tiny", "--no-language", "--jobs", "1", "--models", str(toys)]
    command += ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(captioning, "LONGEST", 3)
    entry.main()
    written = (tmp_path / "out" / "report.md").read_text()
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    for question in (
        "dominant > random?",
        "dominant > shrink?",
        "symmetric > antisymmetric?",
        "capability kept?",
    ):
        assert sum(row["question"] == question for row in document["primary"]) in (3, 9)
        assert question in written
    assert {row["kind"] for row in document["validation"]} >= {
        "dominant",
        "shrink",
        "noise",
        "equal-norm",
        "subspace",
    }
    assert (tmp_path / "out" / "effect.png").stat().st_size > 5000
    assert len(document["stop_curve"]) == 2
    stored = {path.name: path.read_bytes() for path in (tmp_path / "results").glob("*.jsonl")}
    assert len(stored) == 3
    keys = [json.loads(line)[0] for line in next(iter(stored.values())).splitlines()]
    assert len(set(keys)) == len(keys)  # nothing was measured twice
    monkeypatch.setattr(toy, "captions", None)  # nothing is left to be said
    entry.main()
    assert {path.name: path.read_bytes() for path in (tmp_path / "results").glob("*.jsonl")} == stored
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {**again, "cpu_seconds": 0} == {**document, "cpu_seconds": 0}
    assert "; 0 conclusions differ from those of the report that was there" in capsys.readouterr().err
    # The command itself, whose work is divided between processes, finds the same.
    (tmp_path / "out" / "report.json").unlink()
    shared = [sys.executable, "-m", "scripts.evidence", *command[1:], "--jobs", "2"]
    done = subprocess.run(shared, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "results").glob("*.jsonl")} == stored
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {**again, "cpu_seconds": 0} == {**document, "cpu_seconds": 0}


@pytest.mark.long
def test_losses_are_those_of_transformers_whichever_layers_are_taken_as_done(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(language, "WINDOW", 48)
    reader = language.Reader(smollm2, tmp_path, language.Budget(windows=2, few_windows=1))
    edit = Edit(tuple(range(10, 20)), 4, 0.8)
    _, base = reader.losses(None)
    change, after = reader.losses(edit)
    _, few = reader.losses(replace(edit, how="random", draw=3))
    assert (len(base), len(after), len(few)) == (2, 2, 1)
    assert change > 0
    assert not np.array_equal(base, after)
    loaded = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(smollm2)(language.text(), return_tensors="pt").input_ids[:, :96]
    with torch.inference_mode():
        theirs = [float(loaded(input_ids=w, labels=w).loss) for w in ids.view(2, 1, 48)]
    assert np.allclose(base, theirs, rtol=1e-5)
    with applied(loaded.model.layers, reader.editor.edit(edit)), torch.inference_mode():
        theirs = [float(loaded(input_ids=w, labels=w).loss) for w in ids.view(2, 1, 48)]
    assert np.allclose(after, theirs, rtol=1e-5)


def test_the_text_is_long_enough() -> None:
    assert len(language.text()) > 300_000
    assert list(itertools.islice(language.text().splitlines(), 1))
