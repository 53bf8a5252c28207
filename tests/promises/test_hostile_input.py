"""Careless and hostile input: numbers that overflow, names that act, streams that are closed. Never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Tiny, build_tiny
from safetensors.torch import load_file, save_file

from qkpatch.common.interrupts import Terminated, unwinding_on_kill

NEGATIVE_ZERO = -0.0


def rewrite(tiny: Tiny, **weights: torch.Tensor) -> None:
    """Replace weights by ``q1=...``, ``k0=...``: which of them, and in which layer."""
    path = tiny.path / "model.safetensors"
    named = {tiny.name(int(key[1:]), key[0]): weight for key, weight in weights.items()}
    save_file({**load_file(path), **named}, path, {"format": "pt"})


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("qkpatch", f"{sys.executable} -m qkpatch")],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


class TestNumbers:
    def test_a_zero_that_only_changes_its_sign_is_no_edit(self, tiny: Tiny, run, tmp_path: Path) -> None:
        rewrite(tiny, q1=torch.full((32, 24), NEGATIVE_ZERO, dtype=torch.bfloat16))
        result = run("apply", tiny.path, "--layers", 1, "--modes", 2, "-o", tmp_path / "out")
        assert result.exit_code == 3
        assert "leaves every value as it is" in result.stderr
        assert "leave layer 1 out" in result.stderr

    def test_a_dead_head_keeps_its_bytes_while_the_others_are_edited(
        self, tiny: Tiny, run, tmp_path: Path
    ) -> None:
        weight = load_file(tiny.path / "model.safetensors")[tiny.name(1, "q")]
        weight[8:16] = NEGATIVE_ZERO
        rewrite(tiny, q1=weight)
        for select in ("dominant", "random", "bottom", "subspace", "shrink"):
            out = tmp_path / select
            result = run("apply", tiny.path, "--layers", 1, "--modes", 2, "--select", select, "-o", out)
            assert result.exit_code == 0, result.output
            after = load_file(out / "model.safetensors")[tiny.name(1, "q")]
            assert torch.equal(after[8:16].view(torch.int16), weight[8:16].view(torch.int16))
            assert not torch.equal(after[:8], weight[:8])

    def test_a_selection_that_runs_out_of_modes_is_said(self, tmp_path: Path, run) -> None:
        tiny = build_tiny(tmp_path / "thin", dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        factors = (torch.randn(4 * 8, 5, generator=generator), torch.randn(5, 24, generator=generator))
        rewrite(tiny, q1=(factors[0].double() @ factors[1].double()))  # every head has rank 5
        result = run(
            "apply", tiny.path, "--layers", 1, "--modes", 4, "--select", "random", "-o", tmp_path / "out"
        )
        assert "fewer than 4 such modes" in result.stderr
        assert "in 4 head(s) (layer.head): 1.0, 1.1, 1.2, 1.3" in result.stderr
        edit = json.loads((tmp_path / "out" / "qkpatch.json").read_text())["edits"][0]
        assert [head["modes"] for head in edit["heads"]] == [[4]] * 4

    @pytest.mark.parametrize("select", ["dominant", "subspace", "shrink"])
    @pytest.mark.parametrize("size", [1e200, 1e100, 1e-170, 1e-300])
    def test_magnitudes_at_the_ends_of_float64_are_edited_or_refused(
        self, size: float, select: str, tmp_path: Path, run
    ) -> None:
        tiny = build_tiny(tmp_path / "far", dtype=torch.float64)
        weights = load_file(tiny.path / "model.safetensors")
        rewrite(tiny, q1=weights[tiny.name(1, "q")] * size, k1=weights[tiny.name(1, "k")] * size)
        result = run(
            "apply", tiny.path, "--layers", 1, "--modes", 2, "--select", select, "-o", tmp_path / "out"
        )
        assert result.exit_code in (0, 3), result.exception
        assert isinstance(result.exception, SystemExit | None)
        assert run("inspect", tiny.path, "--layers", 1).exit_code in (0, 3)
        if size == 1e200:
            assert "beyond what torch.float64 can square" in result.stderr


class TestConfig:
    def test_a_text_model_unknown_to_the_recipe_is_taken_when_the_user_insists(
        self, tiny: Tiny, run, tmp_path: Path
    ) -> None:
        config = json.loads((tiny.path / "config.json").read_text())
        (tiny.path / "config.json").write_text(
            json.dumps(config | {"model_type": "lookalike", "architectures": None})
        )
        result = run("plan", tiny.path)
        assert result.exit_code == 3
        assert "--recipe llama" in result.stderr
        assert run("plan", tiny.path, "--recipe", "llama").exit_code == 0

    @pytest.mark.parametrize("value", [["llama"], {"a": 1}, 7, True])
    def test_a_model_type_that_is_no_text(self, value: object, tiny: Tiny, run) -> None:
        config = json.loads((tiny.path / "config.json").read_text())
        (tiny.path / "config.json").write_text(json.dumps(config | {"model_type": value}))
        assert run("plan", tiny.path).exit_code == 3
        assert run("plan", tiny.path, "--recipe", "llama").exit_code in (0, 3)

    def test_a_fifo_as_config_is_refused_and_not_waited_for(self, tiny: Tiny, run) -> None:
        (tiny.path / "config.json").unlink()
        os.mkfifo(tiny.path / "config.json")
        assert run("plan", tiny.path / "model.safetensors").exit_code == 4

    @pytest.mark.parametrize(
        "text", ["[]", "{", '{"edit": NaN}', '{"schema": "qkpatch/1"}', '{"edit": {"a": "\\ud800"}}']
    )
    def test_a_manifest_in_source_that_is_none_is_refused_before_anything_is_written(
        self, text: str, tiny: Tiny, run, tmp_path: Path
    ) -> None:
        (tiny.path / "qkpatch.json").write_text(text)
        result = run("apply", tiny.path, "-o", tmp_path / "out")
        assert result.exit_code == 3
        assert "qkpatch.json" in result.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["tiny"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("heads: 010", "'010' is not a plain decimal number"),
            ("modes: 0x4", "'0x4' is not a plain decimal number"),
            ("layers: 1:30", "'1:30' is not a plain decimal number"),
            ("alpha: !!timestamp x", "tagged"),
            ("layers: 2020-01-01", "quote it"),
            ("layers: [1, x]", "expected int, got str 'x'"),
            ("layers: []", "must not be empty"),
        ],
    )
    @pytest.mark.floor
    def test_yaml_that_would_be_read_as_something_else(
        self, text: str, message: str, tiny: Tiny, run
    ) -> None:
        (tiny.path / "edit.yaml").write_text(text)
        result = run("plan", tiny.path, "--config", tiny.path / "edit.yaml")
        assert result.exit_code == 2
        assert message in result.stderr

    def test_a_settings_file_that_never_ends_is_not_read(self, tiny: Tiny, run, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for endless in (tmp_path / "pipe", Path("/dev/zero")):
            assert run("plan", tiny.path, "--config", endless).exit_code == 4

    def test_an_unknown_setting_lists_the_known_ones(self, tiny: Tiny, run, tmp_path: Path) -> None:
        (tmp_path / "edit.yaml").write_text("out: x\n")
        result = run("plan", tiny.path, "--config", tmp_path / "edit.yaml")
        known = (
            "alpha, attention, channel, edits, energy, exclude, fold_norm, heads, layers, max_shard_size, min_modes, "
            "modes, prefix, recipe, seed, select"
        )
        assert f"known here: {known}" in result.stderr

    def test_a_yaml_list_of_layers_is_a_layer_list(self, tiny: Tiny, run, tmp_path: Path) -> None:
        (tmp_path / "edit.yaml").write_text("layers: [0, 2]\nmodes: 2\n")
        plan = json.loads(run("plan", tiny.path, "--config", tmp_path / "edit.yaml", "--json").stdout)
        assert plan["edit"]["layers"] == [0, 2]


class TestNames:
    def test_control_characters_in_names_do_not_reach_the_terminal(self, tiny: Tiny, run) -> None:
        (tiny.path / "twin\x1b[31m.bin").write_bytes(b"x")
        result = run("plan", tiny.path)
        assert "\x1b" not in result.output
        assert "twin\\u001b" in result.stderr

    def test_control_characters_and_markup_in_shard_names_are_only_text(self, tmp_path: Path, run) -> None:
        tiny = build_tiny(tmp_path / "odd", shards=[("",)])
        name = "[red]m\x1b]0;x\x07.safetensors"
        (tiny.path / "model-00001-of-00001.safetensors").rename(tiny.path / name)
        index = json.loads((tiny.path / "model.safetensors.index.json").read_text())
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)
        (tiny.path / "model.safetensors.index.json").write_text(json.dumps(index))
        result = run("plan", tiny.path)
        assert "\x1b" not in result.output
        assert "[red]m" in result.stdout
        assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
        assert (tmp_path / "out" / name).exists()

    @pytest.mark.parametrize("length", [237, 250, 300])
    def test_an_out_whose_name_is_too_long_is_refused(
        self, length: int, tiny: Tiny, run, tmp_path: Path
    ) -> None:
        result = run("apply", tiny.path, "-o", tmp_path / ("x" * length))
        assert result.exit_code == 2
        assert "shorten it" in result.stderr

    def test_the_longest_name_that_fits_works(self, tiny: Tiny, run, tmp_path: Path) -> None:
        assert run("apply", tiny.path, "-o", tmp_path / ("x" * 236)).exit_code == 0

    def test_a_source_directory_whose_name_is_not_utf8(self, tiny: Tiny, run, tmp_path: Path) -> None:
        odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"))
        tiny.path.rename(odd)
        assert run("apply", odd, "-o", tmp_path / "out").exit_code == 0
        assert json.loads((tmp_path / "out" / "qkpatch.json").read_text())["source"]["name"] == "d\\udcff"

    def test_markup_in_names_is_only_text(self, tmp_path: Path, run) -> None:
        tiny = build_tiny(tmp_path / "[bold]model")
        assert "[bold]model: recipe llama" in run("plan", tiny.path).stdout

    def test_a_layer_number_of_thousands_of_digits_is_no_layer(self, tmp_path: Path, run) -> None:
        extra = {f"model.layers.{'9' * 5000}.self_attn.q_proj.weight": torch.zeros(1)}
        tiny = build_tiny(tmp_path / "digits", extra=extra)
        assert run("plan", tiny.path).exit_code == 0

    @pytest.mark.parametrize("device", ["cuda:" + "9" * 30, "cuda:٣", "cuda:", "CPU", ""])
    def test_a_device_that_cannot_be(self, device: str, tiny: Tiny, run) -> None:
        for command in ("plan", "inspect"):
            assert run(command, tiny.path, "--device", device).exit_code == 2


class TestStreams:
    """The job is done, or refused; where its report goes must not turn one into the other."""

    @pytest.mark.long
    def test_a_stdout_that_knows_no_unicode(self, tiny: Tiny, tmp_path: Path) -> None:
        done = shell(f"qkpatch apply {tiny.path} -o {tmp_path}/out", PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        assert "Wrote" in done.stdout
        assert " ------" in done.stdout
        assert "+---" not in done.stdout, "a frame of bars, among which a norm is none that can be read"

    @pytest.mark.long
    def test_a_full_stdout_is_an_error_that_says_the_work_is_done(self, tiny: Tiny, tmp_path: Path) -> None:
        done = shell(f"qkpatch apply {tiny.path} -o {tmp_path}/out >/dev/full")
        assert done.returncode == 4
        assert "the result cannot be printed" in done.stderr
        assert "Traceback" not in done.stderr
        assert (tmp_path / "out" / "qkpatch.json").exists()

    def test_full_devices_keep_the_exit_code(self, tiny: Tiny) -> None:
        assert shell("qkpatch plan no-such-thing 2>/dev/full").returncode == 2
        done = shell("qkpatch --help >/dev/full")
        assert done.returncode == 4
        assert "Traceback" not in done.stderr

    @pytest.mark.long
    def test_closed_streams(self, tiny: Tiny, tmp_path: Path) -> None:
        assert shell(f"qkpatch apply {tiny.path} -o {tmp_path}/a >&-").returncode == 0
        assert shell(f"qkpatch apply {tiny.path} -o {tmp_path}/b 2>&-").returncode == 0
        assert (tmp_path / "b" / "qkpatch.json").exists()

    @pytest.mark.long
    def test_a_closed_pipe_is_not_a_verification_mismatch(self, tiny: Tiny) -> None:
        done = shell(f"set -o pipefail; qkpatch recipes | true; qkpatch inspect {tiny.path} | true")
        assert done.returncode in (0, 128 + signal.SIGPIPE)
        assert done.stderr == ""


class TestSignals:
    def test_what_nohup_ignores_stays_ignored(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with unwinding_on_kill():
                os.kill(os.getpid(), signal.SIGHUP)
                with pytest.raises(Terminated):
                    os.kill(os.getpid(), signal.SIGTERM)
        finally:
            signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_class_is_made_is_told_as_itself(
    number: signal.Signals, code: int, tiny: Tiny, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Signalled:
        def __set_name__(self, owner: type, name: str) -> None:
            os.kill(os.getpid(), number)

    def importing(*_: object, **__: object) -> None:
        type("Class", (), {"attribute": Signalled()})

    monkeypatch.setattr("qkpatch.api.plan", importing)
    done = run("plan", tiny.path)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.endswith("nothing half done is left behind.\n")


def test_a_wrong_out_is_refused_before_the_hub_is_asked(run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    result = run("apply", "llava-1.5", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "exists and is not empty" in result.stderr


@pytest.mark.parametrize("out", [".", "..", "", "x/.."])
def test_an_out_without_a_name_of_its_own_is_refused(
    out: str, tiny: Tiny, run, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path / "here")
    result = run("apply", tiny.path, "-o", out, "--overwrite")
    assert result.exit_code == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_overwrite_does_not_replace_an_output_that_has_changed_since(tiny: Tiny, run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("apply", tiny.path, "-o", out).exit_code == 0
    weights = load_file(out / "model.safetensors")
    time.sleep(0.02)  # the clock of a file system may tick only every few milliseconds
    save_file(
        {name: weight + 1 for name, weight in weights.items()}, out / "model.safetensors", {"format": "pt"}
    )
    result = run("apply", tiny.path, "-o", out, "--overwrite")
    assert result.exit_code == 2
    assert "holds model.safetensors, which is not as qkpatch left it" in result.stderr


def test_overwrite_does_not_replace_a_file_that_was_put_in_with_an_old_date(
    tiny: Tiny, run, tmp_path: Path
) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    assert run("apply", tiny.path, "-o", out).exit_code == 0
    mine.write_bytes(bytes((out / "model.safetensors").stat().st_size))
    time.sleep(0.02)
    os.utime(mine, (0, 0))
    subprocess.run(["cp", "-p", mine, out / "model.safetensors"], check=True)
    assert run("apply", tiny.path, "-o", out, "--overwrite").exit_code == 2
    assert (out / "model.safetensors").read_bytes() == mine.read_bytes()


def test_verify_refuses_a_manifest_whose_edits_are_not_the_edit_it_declares(
    tiny: Tiny, run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("apply", tiny.path, "--layers", "0-1", "-o", out)
    document = json.loads((out / "qkpatch.json").read_text())
    (out / "model.safetensors").write_bytes((tiny.path / "model.safetensors").read_bytes())
    (out / "qkpatch.json").write_text(json.dumps({**document, "edits": []}))
    result = run("verify", out, "--source", tiny.path)
    assert result.exit_code == 1
    assert "should be edited, and the manifest has no record of it" in result.stdout
