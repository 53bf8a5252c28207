"""Errors that hit: each says what, where, and the cure that helps, whatever command meets it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, Tiny, build_tiny

import qkpatch
from qkpatch.cli import main
from qkpatch.errors import UsageError

Run = Callable[..., Any]


def said(result: Any, code: int) -> str:
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return str(result.stderr)


# -------- names that are nearly right


@pytest.mark.parametrize("name", ["demo/toy0", "./demo/toy0", "demo/toy0/"])
@pytest.mark.parametrize("command", [("plan",), ("recipes", "check"), ("inspect",), ("diff", "demo/toy-0")])
def test_a_path_that_is_nearly_right_is_told_before_the_hub_is_asked(
    command: tuple[str, ...], name: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny(tmp_path / "demo" / "toy-0")
    monkeypatch.chdir(tmp_path)
    text = said(run(*command, name), 2)
    assert "no such file or directory" in text
    assert "demo/toy-0" in text
    assert ("demo/toy0@main" in text) == (name == "demo/toy0")


@pytest.mark.parametrize("name", ["org/toy0", "demo/quite-another", "demo/toy0@main"])
def test_what_is_like_nothing_here_is_asked_for_on_the_hub(
    name: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny(tmp_path / "demo" / "toy-0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the Hub cannot be reached" in said(run("plan", name), 4)


def test_a_key_that_is_nearly_right_is_told(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    (tmp_path / "edit.yaml").write_text("layer: 1\nzzz: 2\n")
    text = said(run("plan", tiny.path, "--config", tmp_path / "edit.yaml"), 2)
    assert "$.layer: unknown key (did you mean layers? known here: alpha" in text
    assert "$.zzz: unknown key (known here: alpha" in text


def test_a_key_of_an_item_and_of_a_call_that_is_nearly_right_is_told(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "edit.yaml").write_text("edits:\n- {layers: 0, mode: 2}\n")
    text = said(run("plan", tiny.path, "--config", tmp_path / "edit.yaml"), 2)
    assert "edits[0].mode: unknown key (did you mean modes? an item has layers" in text
    with pytest.raises(UsageError, match="did you mean layers"):
        qkpatch.plan(tiny.path, layer=1)


@pytest.mark.parametrize(
    "flags", [("--config", "edit.yml"), ("--recipe", "mine.yml"), ("--patch", "edit.qkpach")]
)
def test_a_file_that_is_nearly_right_is_told(
    flags: tuple[str, str], tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("edit.yaml", "mine.yaml", "edit.qkpatch"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    command = "apply" if flags[0] == "--patch" else "plan"
    assert f"near: {Path(flags[1]).stem}." in said(run(command, tiny.path, *flags), 4)


@pytest.mark.parametrize("given", ["settigns/edit.yaml", "settings/edit"])
def test_a_folder_that_is_nearly_right_and_an_end_that_was_left_out_are_told(
    given: str, tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "edit.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "near: settings/edit.yaml" in said(run("plan", tiny.path, "--config", given), 4)


def test_a_bare_name_that_is_nearly_right_is_told_beside_recipes(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny(tmp_path / "llava-1.6")
    monkeypatch.chdir(tmp_path)
    assert "near: llava-1.6; recipes near it: llava-1.5" in said(run("plan", "lava-1.6"), 2)


def test_a_recipe_file_of_ones_own_is_shown(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPO / "configs" / "llama.yaml").read_text().replace("name: llama\n", "name: mine\n")
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("./mine.yaml", "mine.yaml", tmp_path / "mine.yaml"):
        result = run("recipes", name)
        assert result.exit_code == 0, result.output
        assert result.stdout == text


# -------- the command line itself


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--layers", "0", "--layers", "1"), "--layers is given 2 times, and takes one value"),
        (("--alpha=0.5", "--alpha", "0.5"), "--alpha is given 2 times"),
        (("-output", "x"), "did you mean --out?"),
        (("-layers", "1"), "did you mean --layers?"),
        (("-o=x",), "write -o x"),
        (("--layer", "1"), "did you mean --layers? `qkpatch apply --help` lists them"),
        (("--modes", "many"), "'many' is not a whole number"),
        (("--alpha", "0,8"), "'0,8' is not a number"),
        (("--channel", "half"), "'half' is not one of full, symmetric, antisymmetric"),
        (("--modes",), "--modes needs a value"),
        (("--dry-run=yes",), "--dry-run takes no value"),
        (("one", "more"), "more than it takes: one more"),
        (("-o", "memory://bucket/out"), "gone when this command ends"),
        (("-o", "s3:/bucket/out"), "two slashes: s3://bucket/out"),
    ],
)
def test_a_word_that_means_nothing_or_something_else_is_told_and_nothing_is_written(
    words: tuple[str, ...], says: str, tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in said(run("apply", tiny.path, *words), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_what_may_be_said_twice_or_in_one_word_may_be(tiny: Tiny, run: Run) -> None:
    result = run("plan", tiny.path, "-q", "-q", "--exclude", "a*", "--exclude", "b*", "-oedited")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("aply",), "did you mean apply?"),
        (("lora", "x"), "--out is missing"),
        (("plan",), "SOURCE is missing"),
        (("plan", "s3:/bucket/x"), "two slashes: s3://bucket/x"),
        (("verify", "x", "--recompute", "--no-recompute"), "--recompute is given 2 times"),
        (("plan", "x", "--json", "--markdown"), "one of --json and --markdown"),
        (("diff", "x", "y", "--json", "--markdown"), "one of --json and --markdown"),
        (("--bogus",), "no such option: --bogus"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_an_error_as_others_are(
    words: tuple[str, ...], says: str, run: Run
) -> None:
    result = run(*words)
    assert says in " ".join(said(result, 2).split())
    again = run(*words, "--json")
    assert again.exit_code == 2
    assert json.loads(again.stdout)["error"]["kind"] == "usage"


def test_completion_knows_the_command_by_its_name_whatever_started_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qkpatch.cli.prepare_streams", lambda: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/qkpatch/__main__.py"])
    for name, value in {
        "_QKPATCH_COMPLETE": "complete_bash",
        "COMP_WORDS": "qkpatch rev",
        "COMP_CWORD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.split() == ["revert"]


@pytest.mark.parametrize("words", [(), ("apply",), ("recipes",), ("card",)])
def test_help_swallows_nothing_and_has_no_names_of_types(
    words: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = run(*words, "--help").stdout
    assert "Print this and exit." in text
    assert not [kind for kind in ("<bool>", "<str>", "<Path>", "{SOURCE}") if kind in text]
    assert "org/name@revision" in text or words != ("apply",)


# -------- what a file of settings says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alpha: '0.8'", "a number has no quotes"),
        ("alpha: 0,8", "a point for a comma"),
        ("energy: 1e-3", "1.0e-3"),
        ("modes: 4.0", "write modes: 4"),
        ("modes: 010", "write 10 or 0.5"),
        ("alpha: 2", "--alpha, with --config edit.yaml"),
        ("layers: 99", "--layers 99, with --config edit.yaml"),
        ("edits: [{layers: 0, modes: 1}]", "edits, with --config edit.yaml"),
    ],
)
def test_a_wrong_number_has_a_cure_and_what_a_file_says_is_told_with_its_name(
    text: str, says: str, tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edit.yaml").write_text(text)
    flags = ("--modes", 2) if text.startswith("edits") else ()
    assert says in said(run("plan", tiny.path, "--config", "edit.yaml", *flags), 2)


# -------- files that other programs write


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_byte_order_mark_has_a_cure(name: str, encoding: str, tmp_path: Path, run: Run) -> None:
    tiny = build_tiny(tmp_path / "tiny", shards=[["layers.0"], [""]])
    path = tiny.path / name
    path.write_text(path.read_text(), encoding=encoding)
    text = said(run("plan", tiny.path), 3)
    assert name in text
    assert "without a byte-order mark" in text


@pytest.mark.parametrize("command", [("card",), ("verify", "--source", "x")])
def test_a_missing_manifest_is_one_kind_of_error(command: tuple[str, ...], tiny: Tiny, run: Run) -> None:
    assert "there is no qkpatch.json" in said(run(command[0], tiny.path, *command[1:]), 3)
    assert said(run(command[0], tiny.path / "nowhere", *command[1:]), 4)


# -------- what would do nothing


@pytest.mark.parametrize("select", [None, "dominant", "shrink"])
def test_a_seed_where_nothing_is_drawn_is_refused(
    select: str | None, tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    flags = () if select is None else ("--select", select)
    assert "--seed" in said(run("apply", tiny.path, "-o", tmp_path / "out", "--seed", 0, *flags), 2)
    (tmp_path / "edit.yaml").write_text("seed: 3\n")
    assert "--seed" in said(run("plan", tiny.path, "--config", tmp_path / "edit.yaml", *flags), 2)
    with pytest.raises(UsageError, match="nothing is drawn"):
        qkpatch.plan(tiny.path, seed=1, **({} if select is None else {"select": select}))


def test_a_seed_and_what_it_is_for_may_come_from_two_places(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    (tmp_path / "edit.yaml").write_text("select: random\nmodes: 1\n")
    assert run("plan", tiny.path, "--config", tmp_path / "edit.yaml", "--seed", 3).exit_code == 0


@pytest.mark.parametrize("more", [(), ("--json",), ("--csv",)])
def test_inspect_can_be_quiet(more: tuple[str, ...], tiny: Tiny, run: Run) -> None:
    result = run("inspect", tiny.path, "-q", *more)
    assert (result.exit_code, result.stderr) == (0, "")
    assert bool(result.stdout) == bool(more)


# -------- commands that are printed, to be copied


@pytest.mark.parametrize("name", ["-dash", "--layers", "a b", "it's", "$HOME"])
def test_a_command_that_is_printed_can_be_run(
    name: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_tiny(tmp_path / name)
    applied = run("apply", "-o", f"{name}-out", "--", name)
    assert applied.exit_code == 0, applied.output
    words = shlex.split(applied.stdout.partition("Prove it with: ")[2])
    assert words[:2] == ["qkpatch", "verify"]
    proven = run(*words[1:])
    assert proven.exit_code == 0, proven.output
    lines = run("card", "--", f"{name}-out").stdout.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("qkpatch ")]
    assert len(commands) == 2
    for words in commands:
        again = run(*[word if word != "OUT" else "again" for word in words[1:]])
        assert again.exit_code == 0, again.output


# -------- OUT where nobody names it


@pytest.mark.parametrize("where", [".", "sub"])
@pytest.mark.parametrize("how", ["directly", "by a link"])
def test_out_is_beside_source_where_one_stands_in_source(
    how: str, where: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = build_tiny(tmp_path / "folder" / "model")
    (tiny.path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tiny.path)
    monkeypatch.chdir((tmp_path / "link" if how == "by a link" else tiny.path) / where)
    before = sorted(tiny.path.rglob("*"))
    result = run("apply", "." if where == "." else "..")
    assert result.exit_code == 0, result.output
    assert "beside SOURCE" in result.stderr
    (out,) = (path for path in tiny.path.parent.iterdir() if path != tiny.path)
    assert out.name.startswith("model-qkpatch-")
    assert sorted(tiny.path.rglob("*")) == before


@pytest.mark.parametrize("name", ["m" * 255, "m" * 237, "é" * 127])
def test_a_name_of_its_own_choice_is_never_too_long(
    name: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = build_tiny(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    result = run("apply", tiny.path)
    assert result.exit_code == 0, result.output
    (out,) = (path for path in tmp_path.iterdir() if path != tiny.path)
    assert out.name[:100] == name[:100]


# -------- machines


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Everything that is installed here but torch."""
    folder = tmp_path_factory.mktemp("packages")
    ours = {str(path).split("/")[0] for path in files("torch") or ()}
    for place in sys.path:
        for path in Path(place).glob("*") if place.endswith("-packages") else ():
            if path.name not in ours and not path.name.endswith(".pth"):
                (folder / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": f"{REPO}:{folder}"}


def in_process(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "-m", "qkpatch", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.long
def test_without_torch_one_is_told_how_to_get_it_before_anything_is_written(
    without_torch: dict[str, str], tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    assert run("apply", tiny.path, "-o", out).exit_code == 0
    for arguments in (
        ("apply", tiny.path, "-o", tmp_path / "new" / "out"),
        ("inspect", tiny.path),
        ("lora", tiny.path, "-o", tmp_path / "new" / "adapter"),
        ("diff", tiny.path, out),
        ("verify", out, "--source", tiny.path),
    ):
        result = in_process(without_torch, *arguments)
        assert result.returncode == 2, (arguments, result.stderr)
        assert "pip install torch" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()
    result = in_process(without_torch, "apply", tiny.path, "-o", tmp_path / "new" / "out", "--json")
    assert json.loads(result.stdout)["error"]["kind"] == "usage"
    for more in ((), ("--json",), ("-o", tmp_path / "new" / "out")):
        assert in_process(without_torch, "plan", tiny.path, *more).returncode == 0
    assert in_process(without_torch, "verify", out, "--source", tiny.path, "--no-recompute").returncode == 0


def test_where_no_home_is_known_the_cure_is_told(tmp_path: Path) -> None:
    """In a container whose user is a number that nobody has named."""
    nameless = "import pwd\ndef none(*_): raise KeyError\npwd.getpwuid = none\n"
    homes = ("HOME", "USER", "LOGNAME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")
    result = subprocess.run(
        [sys.executable, "-c", f"{nameless}from qkpatch import cli\ncli.main()", "plan", "org/name"],
        env={**{k: v for k, v in os.environ.items() if k not in homes}, "PYTHONPATH": str(REPO)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 4, result.stderr
    assert "HF_HOME" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# -------- libraries that are there and do not work


@pytest.mark.parametrize(
    "fault",
    [
        "raise ImportError('libcudart.so.12: cannot open shared object file')",
        "raise OSError('/x/libtorch.so: undefined symbol: abc')",
        "import ctypes; ctypes.CDLL('libnowhere.so.12')",
        "import not_there_either",
    ],
)
@pytest.mark.parametrize("command", ["apply", "inspect"])
def test_a_torch_that_cannot_be_imported_is_told_with_its_words(
    command: str, fault: str, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text(fault)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "qkpatch",
            command,
            str(tiny.path),
            *(("-o", "out") if command == "apply" else ()),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'broken'}:{REPO}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "torch cannot be imported: " in done.stderr
    assert "install it anew: pip install --force-reinstall torch" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_library_that_cannot_be_imported_is_told_and_its_work_is_not_that(tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub").mkdir()
    (tmp_path / "huggingface_hub" / "__init__.py").write_text("import not_there_either")
    done = subprocess.run(
        [sys.executable, "-m", "qkpatch", "plan", "org/name"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "huggingface_hub cannot be imported: No module named 'not_there_either'" in done.stderr


# -------- what is not named, or named as elsewhere


@pytest.mark.parametrize(
    "command",
    [
        ("apply", ""), ("plan", ""), ("inspect", ""), ("recipes", "check", ""), ("diff", "", "."), ("diff", ".", ""),
        ("verify", "", "--source", "."), ("verify", ".", "--source", ""), ("card", ""), ("apply", ".", "-o", ""),
    ],
)  # fmt: skip
def test_an_empty_name_is_not_the_current_directory(
    command: tuple[str, ...], tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
    monkeypatch.chdir(tmp_path / "out")
    said(run(*command), 2)


def test_a_source_that_no_manifest_finds_again_is_asked_for_by_its_name(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    assert run("apply", tiny.path, "-o", tmp_path / "out").exit_code == 0
    text = said(run("verify", tmp_path / "out"), 2)
    assert "it was made from the directory 'tiny', and nothing records where that is" in text
    assert "--source SOURCE" in text


def test_an_empty_name_is_none_for_the_library_either(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.path)
    calls: list[Callable[[], object]] = [
        lambda: qkpatch.plan(""), lambda: qkpatch.verify("", tiny.path), lambda: qkpatch.card(""),
        lambda: qkpatch.diff("", tiny.path), lambda: qkpatch.recipe_for(""),
        lambda: qkpatch.apply(qkpatch.plan(tiny.path), ""),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError):
            call()


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/", "org/name"),
        ("https://huggingface.co/org/name/tree/v1", "org/name@v1"),
        ("https://huggingface.co/org/name/blob/main/config.json", "org/name@main"),
        ("hf://org/name", "org/name"),
        ("hf://models/org/name@v1", "org/name@v1"),
        ("org/name/tree/main", "org/name@main"),
    ],
)
def test_an_address_is_told_how_it_is_written_here(address: str, meant: str, run: Run) -> None:
    text = said(run("plan", address), 2)
    assert f"write org/name[@revision]: {meant}\n" in text


@pytest.mark.parametrize(
    "name", ["./a/tree/main", "a/b/c", "a/b/", "https://huggingface.co/datasets/org/name"]
)
def test_another_name_is_no_address_of_a_model(name: str, run: Run) -> None:
    assert "write org/name" not in said(run("plan", name), 2)


@pytest.mark.parametrize("command", [("card",), ("verify", "--source", ".")])
def test_an_output_that_is_nearly_right_is_told(
    command: tuple[str, ...], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny(tmp_path / "demo" / "toy-0")
    monkeypatch.chdir(tmp_path)
    assert "near: demo/toy-0" in said(run(*command, "demo/toy0"), 4)


# -------- JSON that is none


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("", "download it again"), ("[]", "download it again"), ('{"a": 1,}', "mend it, or download it again"),
        ("<!doctype html><html>", "it is an HTML page"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json_has_a_cure(name: str, text: str, cure: str, tmp_path: Path, run: Run) -> None:
    tiny = build_tiny(tmp_path / "split", shards=[("q_proj",), ("",)])
    (tiny.path / name).write_text(text)
    shown = said(run("plan", tiny.path), 3)
    assert name in shown
    assert cure in shown


@pytest.mark.parametrize("pattern", ["config.json", "*.json"])
def test_a_config_that_is_excluded_is_not_said_to_be_missing(pattern: str, tiny: Tiny, run: Run) -> None:
    assert "what --exclude says means it" in said(run("plan", tiny.path, "--exclude", pattern), 3)


# -------- where OUT is put


def test_a_file_of_a_model_has_its_output_beside_the_model(
    tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.path)
    before = sorted(tiny.path.iterdir())
    assert run("apply", "model.safetensors").exit_code == 0
    assert sorted(tiny.path.iterdir()) == before
    assert [path.name for path in tmp_path.glob("*/qkpatch.json")] == ["qkpatch.json"]


def test_a_plan_warns_where_the_current_disk_is_too_small(
    tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qkpatch.planning.costs.free_bytes", lambda out: 1000)
    result = run("plan", tiny.path)
    assert "1,000 are free here" in said(result, 0)
    document = json.loads(run("plan", tiny.path, "--json").stdout)
    assert any("1,000 are free here" in warning for warning in document["warnings"])
