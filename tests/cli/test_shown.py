"""Nothing that a file, a recipe or the Hub says acts in a terminal, forges a line, or breaks JSON."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO, Tiny, build_tiny
from fake_hub import FakeHub, Repo, command, hub_environment, run_qkpatch
from rich.console import Console
from typer.testing import Result

from qkpatch.cli.progress import bars
from qkpatch.cli.redaction import Redacted
from qkpatch.cli.tables import plain_table, print_table
from qkpatch.common.json_text import canonical_json
from qkpatch.errors import QKPatchError, plain, shown

CONTROLS = [chr(n) for n in (*range(1, 0x20), *range(0x7F, 0xA0)) if chr(n) != "/"]
BIDI = list("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
ALL = "".join([*CONTROLS, *BIDI])
FORGED = "\nok forged: 7 files\r\x1b[2K\x1b[1A"
# What may be in output: the lines' own ends, and the tabs of a document.
ACTS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def check(result: Result | subprocess.CompletedProcess[str]) -> str:
    """All that was said, in which nothing acts and no line is forged."""
    if not isinstance(result, subprocess.CompletedProcess):
        assert isinstance(result.exception, SystemExit | None), result.exception
    text = result.stdout + result.stderr
    assert not (found := ACTS.search(text)), (found, text)
    assert not any(line.lstrip().startswith("ok forged") for line in text.splitlines()), text
    return text


@pytest.fixture
def hostile(tmp_path: Path) -> Tiny:
    """A checkpoint in whose names and texts everything is that acts."""
    extra = {f"t{ALL}{FORGED}": torch.zeros(2)}
    tiny = build_tiny(tmp_path / f"s{FORGED}", extra=extra)
    for n, part in enumerate((ALL[:40], ALL[40:], FORGED)):
        (tiny.path / f"f{n}{part}.bin").write_bytes(b"x")
        (tiny.path / f"d{n}{part}").mkdir()
        (tiny.path / f"d{n}{part}" / f"{part}.txt").write_text("x")
    (tiny.path / "README.md").write_text(f"---\ntags:\n- a\n---\n# Card {ALL}\n")
    return tiny


def commands(tiny: Tiny, out: Path, other: Path) -> dict[str, list[object]]:
    return {
        "plan": ["plan", tiny.path],
        "plan --json": ["plan", tiny.path, "--json"],
        "inspect": ["inspect", tiny.path],
        "inspect --json": ["inspect", tiny.path, "--json"],
        "inspect --csv": ["inspect", tiny.path, "--csv"],
        "recipes check": ["recipes", "check", tiny.path],
        "recipes check --json": ["recipes", "check", tiny.path, "--json"],
        "diff": ["diff", tiny.path, other],
        "diff, the other way": ["diff", other, tiny.path],
        "diff --json": ["diff", tiny.path, other, "--json"],
        "apply": ["apply", tiny.path, "-o", out],
        "apply --json": ["apply", tiny.path, "-o", out.with_name(f"j{FORGED}"), "--json"],
        "verify": ["verify", out, "--source", tiny.path],
        "verify --json": ["verify", out, "--source", tiny.path, "--json"],
        "card": ["card", out],
    }


def test_every_control_character_through_every_command(
    hostile: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    other = build_tiny(tmp_path / "other").path
    out = tmp_path / f"o{FORGED}"
    for name, arguments in commands(hostile, out, other).items():
        result = run(*arguments)
        check(result)
        if name.endswith("--json"):
            json.loads(result.stdout)
    lied = [entry for entry in out.iterdir() if entry.name.startswith(("f", "d"))]
    for entry in lied:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (out / f"added{FORGED}").write_text("x")
    result = run("verify", out, "--source", hostile.path)
    assert result.exit_code == 1
    assert len(check(result).splitlines()) >= len(lied)
    assert json.loads(run("verify", out, "--source", hostile.path, "--json").stdout)["ok"] is False
    check(run("apply", hostile.path, "-o", out, "--overwrite"))


@pytest.mark.parametrize("field", ["model_type", "architectures", "text_config", "rope_scaling"])
def test_every_control_character_in_config(field: str, tiny: Tiny, run: Callable[..., Result]) -> None:
    config = json.loads((tiny.path / "config.json").read_text())
    value: object = {
        "architectures": [ALL + FORGED],
        "text_config": {"model_type": ALL + FORGED},
        "rope_scaling": {ALL: FORGED},
    }.get(field, ALL + FORGED)
    (tiny.path / "config.json").write_text(json.dumps({**config, field: value}))
    for flags in ([], ["--json"]):
        for words in (["plan"], ["recipes", "check"], ["inspect"]):
            result = run(*words, tiny.path, *flags)
            check(result)
            if flags and result.stdout:
                json.loads(result.stdout)


@pytest.mark.parametrize(
    "where",
    ["metadata", "shape", "dtype", "index", "manifest", "settings", "recipe", "recipe key", "file name", "not UTF-8"],
)  # fmt: skip
def test_every_control_character_in_what_is_refused(
    where: str, tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    text, path = ALL + FORGED, tiny.path
    flags: list[object] = []
    if where in ("metadata", "shape", "dtype"):
        entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        document = {
            "metadata": {"__metadata__": {text: 7}, text: entry},
            "shape": {text: {**entry, "shape": [text]}},
            "dtype": {text: {**entry, "dtype": text, "data_offsets": [0, 1]}},
        }[where]
        raw = json.dumps(document).encode()
        (path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    elif where == "index":
        names = {text: "model.safetensors", "x": "../" + text}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    elif where == "manifest":
        (path / "qkpatch.json").write_text(json.dumps({"schema": text}))
    elif where in ("settings", "recipe", "recipe key"):
        own = tmp_path / f"own{FORGED}.yaml"
        quoted = json.dumps(text)
        own.write_text(
            {"settings": f"layers: {quoted}", "recipe": f"name: {quoted}"}.get(where, f"{quoted}: 1")
        )
        flags = ["--config" if where == "settings" else "--recipe", own]
    elif where == "file name":
        path = tmp_path / f"none{text}"
    else:
        (tiny.path / "x").rename(tiny.path / "x\udcff\n") if (tiny.path / "x").exists() else None
        open(str(tiny.path / "x\udcff\nok forged").encode("utf-8", "surrogateescape"), "wb").close()
    for words in (["plan"], ["recipes", "check"], ["inspect"], ["diff", path]):
        given = flags if words in (["plan"], ["inspect"]) else []
        if "--config" in given and words == ["inspect"]:
            given = []
        check(run(*words, path, *given))
    result = run("plan", path, *flags, "--json")
    check(result)
    assert result.exit_code in (2, 3, 4), result.output
    assert json.loads(result.stdout)["error"]["what"]


def test_what_the_hub_says(hub: FakeHub, tmp_path: Path) -> None:
    """Messages of refusals, addresses and warnings."""
    hub.repos["org/tiny"] = Repo(build_tiny(tmp_path / "tiny").path)
    environment = hub_environment(hub.endpoint, tmp_path / "home")
    out = tmp_path / "out"
    assert check(run_qkpatch(environment, "apply", "org/tiny", "-o", out))
    hub.commit_answer["commitUrl"] = f"{hub.endpoint}/me/new/commit/{ALL}{FORGED}"
    assert "Commit to" in check(run_qkpatch(environment, "card", out, "--push", "me/new"))
    raw = json.dumps({"error": ALL + FORGED}).encode()

    def refuse(handler: object) -> None:
        handler._send(403, raw, {"X-HF-Warning": "a \x9b2K b", "Content-Type": "application/json"})  # type: ignore[attr-defined]

    hub.answers["/revision/|/models/org/tiny$"] = refuse
    result = run_qkpatch(environment, "plan", "org/tiny@main")
    assert result.returncode == 4
    assert "ok forged" in check(result)  # it is told, on the line of the error


@pytest.mark.long
@pytest.mark.floor
def test_what_the_command_line_itself_is(tiny: Tiny) -> None:
    for words in (
        ["plan", tiny.path, f"--{ALL}"],
        ["plan", tiny.path, "--layers", ALL + FORGED],
        [f"x{FORGED}"],
    ):
        done = subprocess.run(command(*words), capture_output=True, text=True, check=False, cwd=REPO)
        assert done.returncode == 2
        check(done)


# -------- of bounded length


@pytest.mark.parametrize(
    "text",
    ["x" * 900_000, pytest.param("\x1b" * 900_000, marks=pytest.mark.stress)],
    ids=["letters", "controls"],
)
def test_no_text_of_a_file_fills_the_screen(
    text: str, tiny: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Warnings, errors, names and mismatches are cut where they are shown; JSON has all of them."""
    out = tmp_path / "out"
    assert run("apply", tiny.path, "-o", out).exit_code == 0
    record = json.loads((out / "qkpatch.json").read_bytes())
    record["warnings"] = [text, *(f"w{i}" for i in range(5000))]
    (out / "qkpatch.json").write_text(canonical_json(record))
    again = run("apply", tiny.path, "-o", out)
    assert again.exit_code == 0
    assert "Warning: and 4,901 more; --json lists all" in again.stderr
    assert len(check(again)) < 10_000
    assert json.loads(run("apply", tiny.path, "-o", out, "--json").stdout)["warnings"] == record["warnings"]
    record["files"] += [{**record["files"][0], "name": f"{i}{text[:1]}{text[:1000]}"} for i in range(500)]
    record["model"]["model_type"] = text
    (out / "qkpatch.json").write_text(json.dumps(record))
    wrong = run("verify", out, "--source", tiny.path)
    assert wrong.exit_code == 1
    assert len(check(wrong)) < 700_000
    assert len(json.loads(run("verify", out, "--source", tiny.path, "--json").stdout)["mismatches"]) > 500


@pytest.mark.parametrize("words", [("plan",), ("diff",), ("recipes", "check")])
def test_no_name_of_a_tensor_fills_the_screen(
    words: tuple[str, ...], tmp_path: Path, run: Callable[..., Result]
) -> None:
    tinies = [build_tiny(tmp_path / n, extra={n + "x" * 200_000: torch.zeros(2)}) for n in "ab"]
    result = run(*words, *(tiny.path for tiny in (tinies if words == ("diff",) else tinies[:1])))
    assert result.exit_code in (0, 1)
    assert len(check(result)) < 10_000


def test_names_and_numbers_stay_whole_where_a_terminal_is_narrow() -> None:
    name, console = f"L3-5-m1-{'x' * 60}", Console(file=io.StringIO(), width=40)
    table = plain_table("variant", "‖ΔW_Q‖/‖W_Q‖", "energy removed")
    table.add_row(name, "0.3109", "0.2043")
    print_table(console, table)
    assert {name, "0.3109", "0.2043"} <= {*console.file.getvalue().split()}  # type: ignore[attr-defined]
    assert console.width == 40


@pytest.mark.parametrize("width", [72, 80, 100])
def test_no_word_of_a_heading_is_cut_and_no_line_is_longer_than_the_terminal(width: int) -> None:
    headings = [
        "layer",
        "heads",
        "‖ΔW_Q‖/‖W_Q‖ mean",
        "max",
        "‖M‖ after/before",
        "gap min",
        "modes",
        "realised",
    ]
    console = Console(file=io.StringIO(), width=width)
    table = plain_table(*headings)
    table.add_row("5", "4", "0.0877", "0.0922", "0.9350", "0.019", "2-3", "0.707")
    print_table(console, table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert set(" ".join(headings).split()) <= set(" ".join(lines).split())
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(("kind", "shown"), [("dumb", False), ("xterm", True)])
def test_a_bar_is_whole_where_a_terminal_is_narrow_and_none_where_it_cannot_draw(
    kind: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"TERM": kind, "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)
    with bars(quiet=False) as observer:
        observer.begins("look at OUT:", 13_300_000_000, 0)
        for _ in range(3):
            observer.copied(4_000_000_000)
            time.sleep(0.02)
    drawn = terminal.getvalue()
    assert ("left" in drawn) is shown
    assert bool(drawn) is shown
    assert "…" not in drawn


# -------- one document, and an end


GONE = "true; exit ${PIPESTATUS[0]}"  # a reader who has left


def ended(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A shell's last line, in which Q is the command."""
    line = script.replace("Q", shlex.join(map(str, command(*words))))
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=REPO)


FAULT = """
import sys
from qkpatch import api, cli
def plan(*a, **k): raise KeyError("hf_0123456789abcdefghij\x1b")
api.plan = plan
cli.main()
"""


@pytest.mark.long
def test_an_unexpected_error_is_a_document_too() -> None:
    arguments = [sys.executable, "-c", FAULT, "plan", "x", "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=REPO)
    assert done.returncode == 5
    error = json.loads(done.stdout)["error"]
    assert (error["kind"], error["exit_code"]) == ("fault", 5)
    assert error["what"].startswith("KeyError: ")
    assert "hf_0" not in error["what"] + done.stderr
    assert "Traceback" in done.stderr
    assert "Please report it" in done.stderr
    for end in (f"| {GONE}", f"2>&1 | {GONE}", ">/dev/full", ">/dev/full 2>&1"):
        line = f"{shlex.join(arguments)} {end}"
        assert subprocess.run(["bash", "-c", line], capture_output=True, check=False).returncode == 5, end


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("plan", "no/such/place", "--json"), 2),
        (("plan", "no/such/place", "--json", "--debug"), 2),
        (("plan", "demo/toy-0", "--json", "--bogus"), 2),
        pytest.param(("plan", "demo/toy-0", "--json", "--layers", "99"), 2, marks=pytest.mark.stress),
        pytest.param(("plan", "demo/toy-0", "--json", "--alpha", "x"), 2, marks=pytest.mark.stress),
        pytest.param(("inspect", "--json"), 2, marks=pytest.mark.stress),
        pytest.param(("bogus", "--json"), 2, marks=pytest.mark.stress),
    ],
)
def test_with_json_every_error_is_one_document_and_its_code_stands(words: tuple[str, ...], code: int) -> None:
    done = ended("Q", *words)
    assert done.returncode == code
    assert json.loads(done.stdout)["error"]["exit_code"] == code
    for end in (f"| {GONE}", ">/dev/full", ">&-"):
        assert ended(f"Q {end}", *words).returncode == code, end


@pytest.mark.long
@pytest.mark.parametrize("words", [("--help",), ("apply", "--help"), ("--version",), ("recipes",), ()])
def test_a_reader_who_leaves_is_no_error(words: tuple[str, ...]) -> None:
    quiet = (0, 141) if words else (2, 141)
    done = ended(f"Q | {GONE}", *words)
    assert done.returncode in quiet
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ended(f"Q 2>&1 | {GONE}", *words).returncode in quiet
    assert ended("Q >/dev/full", *words).returncode == 4


# -------- the one place


def test_what_is_plain_is_one_line() -> None:
    assert plain("a b‖é重") == "a b‖é重"
    text = plain(ALL + FORGED + "\ud800")
    assert text.isprintable()
    assert json.loads(f'"{plain(chr(27))}"') == "\x1b"
    assert plain(text) == text


def test_a_document_keeps_its_lines_and_what_people_write() -> None:
    kept = "a\tb\r\nc\n\u200dé‖ \u3000\u00a0\U0001f9d1\u200d\U0001f4bb"
    assert shown(kept) == kept
    assert not ACTS.search(shown(ALL).replace("\n", ""))


def test_json_says_the_same_once_it_is_shown() -> None:
    value = {ALL: [ALL, FORGED, "é"]}
    for text in (canonical_json(value), json.dumps(value, ensure_ascii=False)):
        assert json.loads(shown(text)) == value
        assert not ACTS.search(shown(text).replace("\n", ""))


def test_an_error_says_one_line_for_each_fact() -> None:
    error = QKPatchError(f"a{FORGED}", where=f"b{FORGED}", fix=f"c{FORGED}")
    assert "\n" not in str(error)
    assert QKPatchError(["2 faults:", f"  x{FORGED}"]).what.count("\n") == 1
    assert len(QKPatchError("x" * 10**6).what) < 9000


@pytest.mark.parametrize("is_terminal", [False, True])
def test_libraries_may_draw_on_a_terminal_and_nothing_else(is_terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    behind = Stream()
    stream = Redacted(behind)
    stream.write("\x1b[31mred\x1b[0m \x1b[2J \x1b]0;title\x07 \x9b2K\r\x1b[A\n")
    said = behind.getvalue()
    assert ("\x1b[31m" in said) == is_terminal
    for acting in ("\x1b[2J", "\x1b]", "\x07", "\x9b"):
        assert acting not in said
