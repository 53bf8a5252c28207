"""What the documents say is done: commands and their output, Python, options, targets, links.

In README.md and docs/ a block of `console` shows commands after `$ ` and all that they print (a line `...` stands for
any number of lines), a block of `sh` is a script, a block of `python` a program. The blocks of a page are run in their
order in one folder that has demo/ in it. Names on the Hub are served from tiny checkpoints.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import REPO, build_tiny
from fake_hub import Repo, fake_hub, hub_environment
from s3_server import upload

from qkpatch.cli import app

LONGEST_LINE, LONGEST_README = 120, 120
COMMANDS = REPO / "docs" / "cli.md"
DOCUMENTS = sorted([
    *REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("configs/*.md"), *REPO.glob("demo/*.md"),
])  # fmt: skip

# Blocks, or commands of a console, that are not run here.
NOT_RUN = {
    r"^pip install \.$": "it would change the environment of the tests; `make smoke` installs the wheel",
    r"^make\b": "`.ci/run` runs every target, which a test below sees to",
    r" --ray ": "it starts a cluster; `tests/cluster` runs one",
    r"^(vllm serve|python -m sglang)": "servers that are not installed here; the page says that they were not run",
}
# What is run of a script in its place, lest it take long.
SHORTENED = {
    # docs/real-model.md: the same command, of the toy and its pictures
    "llava-hf/llama3-llava-next-8b-hf --device cuda": "demo/toy-0 --prompt '<image> describe :' "
    "--question '<image> exists {object}'",
    "val2014 --objects instances_val2014.json --vocabulary synonyms.yaml --sample 3000": "album/pictures "
    "--objects album/objects.jsonl --sample 8",
    "--max-new-tokens 512": "--max-new-tokens 16",
    "--layers 11-20 --modes 4 --alpha 0.8 --draws 3 -o": "--layers 3-5 --modes 4 --alpha 0.8 --draws 1 -o",
}

MARKS = {
    "README.md": pytest.mark.floor,
    "docs/adapters.md": pytest.mark.long,
    "docs/choosing.md": pytest.mark.long,
    "docs/cluster.md": pytest.mark.long,
    "docs/guide.md": pytest.mark.long,
    "docs/hub.md": pytest.mark.long,
    "docs/real-model.md": pytest.mark.long,
    "docs/serving.md": pytest.mark.long,
    "docs/stores.md": pytest.mark.long,
}

# A container's stand-in: what is run in the image is run here.
DOCKER = """\
#!/bin/sh
[ "$1" = run ] || exit 0
while [ "$1" != qkpatch ]; do shift; done
exec "$@"
"""

VLM = {"num_hidden_layers": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT = "language_model.model.layers.{layer}.self_attn."
# Name on the Hub: its config.json, and its tensors' prefix.
SERVED: dict[str, tuple[dict[str, Any], str]] = {
    "llava-hf/llava-1.5-7b-hf": (
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
         "text_config": {"model_type": "llama", **VLM}}, TEXT,
    ),
    "llava-hf/llama3-llava-next-8b-hf": (
        {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"],
         "text_config": {"model_type": "llama", **VLM}}, TEXT,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], **VLM},
        "model.layers.{layer}.self_attn.",
    ),
    "org/name": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **VLM}, "model.layers.{layer}.self_attn.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """What stands between two fences, and where."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPO)}:{self.line}"

    @property
    def commands(self) -> list[tuple[str, str]]:
        """A console's commands, each with what is shown of its output."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)
        assert not parts[0].strip(), f"{self.where}: a console begins with `$ `"
        return [(command, shown) for command, _, shown in (part.partition("\n") for part in parts[1:])]


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    text = page.read_text("utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return tuple(Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in found)


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def is_run(command: str) -> bool:
    return not any(re.search(pattern, command, re.MULTILINE) for pattern in NOT_RUN)


def normal(text: str) -> list[str]:
    """Lines without what differs between runs and machines: times, free disk, memory, digests, addresses."""
    for pattern, stands_for in (
        (r"free disk [\d.]+ \w+", "free disk #"),
        (r"expected peak memory [\d.]+ MB \(\d+ thread", "expected peak memory # MB (# thread"),
        (r"\b\d+(\.\d+)? s\b", "# s"),
        (r"\b[0-9a-f]{8,64}\b", "#"),
        (r"http://127\.0\.0\.1:\d+", "https://huggingface.co"),
    ):
        text = re.sub(pattern, stands_for, text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def is_as_shown(shown: str, printed: str) -> bool:
    """Whether the output is that of a page, where `...` is any number of lines."""
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(line) + r"\n" for line in normal(shown))
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in normal(printed))) is not None


@pytest.fixture
def stores(request: pytest.FixtureRequest, page: Path) -> Iterator[dict[str, str]]:
    """The environment that leads to a bucket `models`, which has the toy as `base`, for the page that speaks of it."""
    if page.name != "stores.md":
        yield {}
        return
    s3 = request.getfixturevalue("s3")
    upload(REPO / "demo" / "toy-0", "models", "base")
    yield s3.environment


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A shell's, with `qkpatch`, `python` and the Hub."""
    folder = tmp_path_factory.mktemp("shell")
    with fake_hub() as hub:
        for name, (config, prefix) in SERVED.items():
            sizes = {
                "n_layers": VLM["num_hidden_layers"],
                "n_heads": 2,
                "n_kv_heads": 1,
                "d_head": 8,
                "d_model": 16,
            }
            tiny = build_tiny(folder / "hub" / name, config=config, prefix=prefix, **sizes)
            hub.repos[name] = Repo(tiny.path)
        programs = folder / "bin"
        programs.mkdir()
        warm, socket = f"{sys.executable} {REPO / 'tests' / 'kit' / 'warm.py'}", folder / "socket"
        for name, does in {"qkpatch": f"{warm} call {socket}", "python": sys.executable}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {does} "$@"\n')
            (programs / name).chmod(0o755)
        (programs / "docker").write_text(DOCKER)
        (programs / "docker").chmod(0o755)
        search = f"{programs}:{os.environ['PATH']}"
        environment = hub_environment(
            hub.endpoint, folder / "home", PATH=search, HF_HUB_DISABLE_PROGRESS_BARS="1"
        )
        server = subprocess.Popen(
            [*warm.split(), "serve", str(socket)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield environment


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=MARKS.get(name := str(p.relative_to(REPO)), ()), id=name)
        for p in DOCUMENTS
        if blocks(p) and p != COMMANDS
    ],
)
def test_a_page_does_what_it_says(
    page: Path, environment: dict[str, str], stores: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(REPO / "demo", tmp_path / "demo")
    environment = {**environment, **stores}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, timeout=120, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.where}: {command[-1]}\n{done.stdout}"
        return done.stdout

    for block in blocks(page):
        if block.language == "console":
            for command, shown in block.commands:
                if is_run(command):
                    printed = run("bash", "-c", command)
                    assert is_as_shown(shown, printed), f"{block.where}: {command}\nprints\n{printed}"
        elif block.language == "sh" and is_run(block.text):
            script = block.text
            for long, short in SHORTENED.items():
                script = script.replace(long, short)
            run("bash", "-euc", script)
        elif block.language == "python":
            run("python", "-c", block.text)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_every_command_is_run_or_there_is_a_reason(page: Path) -> None:
    begins = re.compile(r"^ *(?:\$ |qkpatch |make\b|pip )", re.MULTILINE)
    for block in blocks(page):
        assert block.language in ("console", "sh", "python", "text", "yaml", "json", "mermaid"), block.where
        if block.language in ("text", "yaml", "json") and page != COMMANDS:
            assert not begins.search(block.text), f"{block.where}: a command in a block that is not run"
        if block.language == "sh" and not is_run(block.text):
            assert "qkpatch " not in re.sub("#.*", "", block.text), (
                f"{block.where}: put qkpatch into a block that is run"
            )
    indented = re.compile(r"^(?: {4,}|\t)(?:\$ |qkpatch |make |pip )", re.MULTILINE)
    assert not indented.search(prose(page)), f"{page.name}: a command outside a fence"


def test_every_reason_not_to_run_is_needed() -> None:
    shown = [b.text for page in DOCUMENTS for b in blocks(page) if b.language == "sh"]
    shown += [
        command
        for page in DOCUMENTS
        for b in blocks(page)
        if b.language == "console"
        for command, _ in b.commands
    ]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, text, re.MULTILINE) for text in shown), pattern


def test_other_output_than_shown_would_be_noticed() -> None:
    assert is_as_shown("a 1 s\n\nb  \n", "a 27.5 s\nb\n")
    assert is_as_shown("a\n...\nd\n", "a\nb\nc\nd\n")
    assert is_as_shown("...\n", "")
    assert not is_as_shown("a\n", "a\nb\n")
    assert not is_as_shown("3 edited\n", "4 edited\n")
    assert not is_as_shown("", "a\n")


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_no_line_of_a_page_is_long(page: Path) -> None:
    long = [n for n, line in enumerate(page.read_text("utf-8").splitlines(), 1) if len(line) > LONGEST_LINE]
    assert not long, f"{page.name}: lines {long}"


def test_the_readme_is_short() -> None:
    assert len((REPO / "README.md").read_text("utf-8").splitlines()) <= LONGEST_README


def every_command(command: Any, name: str = "qkpatch") -> Iterator[tuple[str, Any]]:
    yield name, command
    for below, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, f"{name} {below}")


def test_every_command_with_its_options_is_documented() -> None:
    sections = dict(
        re.findall(
            r"^## ([^\n]*)\n\n```text\n(.*?)^```$", COMMANDS.read_text("utf-8"), re.MULTILINE | re.DOTALL
        )
    )
    for name, command in every_command(typer.main.get_command(app)):
        for parameter in command.params:
            for option in (o for o in parameter.opts if o.startswith("-")):
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", sections[name]), (
                    f"{name} {option}: make docs"
                )
    assert str(REPO) not in COMMANDS.read_text("utf-8")


@pytest.mark.parametrize(
    "page",
    [p for p in DOCUMENTS if p.name in ("README.md", "guide.md", "hub.md", "method.md")],
    ids=lambda p: str(p.relative_to(REPO)),
)
def test_options_in_prose_exist(page: Path) -> None:
    known = set(re.findall(r"--[a-z][a-z-]*", COMMANDS.read_text("utf-8")))
    others = {"--log_samples"}  # of lmms-eval
    named = {m.split()[0] for m in re.findall(r"`(--[^`|\s]*)", prose(page))}
    assert named <= known | others


def targets(text: str) -> set[str]:
    """Targets that a text runs `make` for, with nothing but variables after them."""
    return {
        word
        for line in re.findall(r"(?:^|`)make((?: +[a-z][\w-]*)+)", text, re.MULTILINE)
        for word in line.split()
    }


def test_every_target_that_is_named_exists_and_is_run_by_ci() -> None:
    named = {target for page in DOCUMENTS for target in targets(page.read_text("utf-8"))}
    assert {"demo", "evidence", "docs"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert named <= targets((REPO / ".ci" / "run").read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
