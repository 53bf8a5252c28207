"""`--overwrite` replaces what qkpatch wrote and nothing else, by content, whatever happened to times and modes.

One attack of a kind by default; its relatives are marked `stress`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, build_tiny
from safetensors.torch import load_file, save_file
from typer.testing import Result

from qkpatch import api
from qkpatch.common import system
from qkpatch.common.json_text import canonical_json
from qkpatch.errors import UsageError
from qkpatch.output.options import Writing
from qkpatch.planning.plan import make_plan
from qkpatch.planning.settings import Request

SHARD = "model.safetensors"
stress = pytest.mark.stress
Run = Callable[..., Result]


@pytest.fixture
def out(tiny: Tiny, tmp_path: Path, run: Run) -> Path:
    (tiny.path / "README.md").write_text("# Base\n")
    assert run("apply", tiny.path, "-o", tmp_path / "out", "--heads", "0").exit_code == 0
    return tmp_path / "out"


def state(root: Path) -> dict[str, Any]:
    return {
        path.relative_to(root).as_posix(): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def again(run: Run, source: Path, out: Path, *flags: str) -> Result:
    """Another edit over OUT."""
    return run("apply", source, "-o", out, "--alpha", "0", "--overwrite", *flags)


def alpha(out: Path) -> float:
    return float(json.loads((out / "qkpatch.json").read_bytes())["edit"]["alpha"])


def refused(run: Run, source: Path, out: Path, said: str) -> None:
    """OUT is left alone, unless somebody insists."""
    before = state(out)
    result = again(run, source, out)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "--overwrite --force" in result.stderr
    assert state(out) == before
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []
    assert again(run, source, out, "--force").exit_code == 0
    assert alpha(out) == 0


def tune(out: Path, which: str = "v", layer: int = 2) -> None:
    """What a fine-tuning in place does: same names, shapes and sizes, other values."""
    tensors = load_file(out / SHARD)
    name = next(name for name in tensors if f".{layer}." in name and f"{which}_proj" in name)
    tensors[name] += 1
    save_file(tensors, out / SHARD, {"format": "pt"})


DISGUISES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda out: None,
    "touch": lambda out: [path.touch() for path in (out / SHARD, out / "qkpatch.json")],
    "chmod": lambda out: subprocess.run(["chmod", "-R", "u+w,go-w", out], check=True),
    "old dates": lambda out: [os.utime(path, (0, 0)) for path in [*out.iterdir(), out]],
    "tar": lambda out: carried(out, "tar"),
    "moved": lambda out: carried(out, "copy"),
    "links": lambda out: [os.link(path, out.parent / f"other-{path.name}") for path in out.iterdir()],
}


def carried(out: Path, how: str) -> None:
    """Gone to another place and back, as `mv` across file systems goes."""
    far = out.with_name("far")
    if how == "tar":
        far.mkdir()
        subprocess.run(f"tar -C {out} -c . | tar -C {far} -x", shell=True, check=True)
    else:
        subprocess.run(["cp", "-a", out, far], check=True)
    shutil.rmtree(out)
    far.rename(out)


# -------- by content


def test_a_tuned_model_inside_an_output_survives_whatever_the_dates_say(
    tiny: Tiny, out: Path, run: Run
) -> None:
    tune(out)
    DISGUISES["touch"](out)
    refused(run, tiny.path, out, f"{SHARD}, which is not as qkpatch left it")


def test_an_output_of_an_older_version_is_replaced(tiny: Tiny, out: Path, run: Run) -> None:
    """Its manifest has not all keys of today's."""
    record = json.loads((out / "qkpatch.json").read_text())
    for file in record["files"]:
        file.pop("outside")
    record["source"].pop("checked")
    (out / "qkpatch.json").write_text(canonical_json(record))
    assert again(run, tiny.path, out).exit_code == 0
    assert alpha(out) == 0


def test_an_output_is_replaced_however_it_came_here(tiny: Tiny, out: Path, run: Run) -> None:
    DISGUISES["moved"](out)
    assert again(run, tiny.path, out).exit_code == 0
    assert alpha(out) == 0


@stress
@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("layer", [0, 1])
def test_tuned_models_of_every_kind_survive(
    tiny: Tiny, out: Path, run: Run, disguise: str, which: str, layer: int
) -> None:
    tune(out, which, layer)
    DISGUISES[disguise](out)
    refused(run, tiny.path, out, "not as qkpatch left it")


@stress
@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("digest", ["edited", "files"])
def test_outputs_are_replaced_whatever_happened_to_them(
    tiny: Tiny, out: Path, run: Run, disguise: str, digest: str
) -> None:
    assert again(run, tiny.path, out, "--digest", digest).exit_code == 0
    DISGUISES[disguise](out)
    assert run("apply", tiny.path, "-o", out, "--overwrite", "--alpha", "0.25").exit_code == 0
    assert alpha(out) == 0.25


CHANGES: dict[str, Callable[[Path], object]] = {
    "the card": lambda out: (out / "README.md").write_text("# Bass\n"),
    "a published card": lambda out: (out / "README.md").write_text(
        "---\ntags:\n- qkpatch\n---\n\n<!-- The card of the base model follows, as it was. -->\n\n# Base\n"
    ),
    "a small file": lambda out: (out / "tokenizer.json").write_text("[]"),
    "a file less": lambda out: (out / "tokenizer.json").unlink(),
    "a file more": lambda out: (out / "mine.txt").write_text("mine"),
    "a file in a folder": lambda out: ((out / "sub").mkdir(), (out / "sub" / "mine").write_text("mine")),
    "an empty file": lambda out: (out / "mine").touch(),
    "an empty folder": lambda out: (out / "mine" / "sub").mkdir(parents=True),
    "a link": lambda out: (out / "mine").symlink_to("/"),
    "a link in place of a file": lambda out: (
        (out / "tokenizer.json").unlink(),
        (out / "tokenizer.json").symlink_to(out.parent / "tiny" / "tokenizer.json"),
    ),
    "a pipe": lambda out: os.mkfifo(out / "mine"),
    "a name that is not UTF-8": lambda out: open(os.fsencode(out) + b"/\xff", "wb").close(),
    "sums of another kind": lambda out: (out / "SHA256SUMS").write_text("mine"),
    "a note in the manifest": lambda out: edit_manifest(out, lambda m: m["run"].update(note="mine")),
    "a key in the manifest": lambda out: edit_manifest(out, lambda m: m.update(mine=1)),
    "another warning": lambda out: edit_manifest(out, lambda m: m["warnings"].append("mine")),
    "digests forgotten": lambda out: edit_manifest(
        out, lambda m: m["edits"][0].update(sha256_before=None, sha256_after=None)
    ),
    "no edits at all": lambda out: edit_manifest(out, lambda m: m["edits"].clear()),
    "no manifest": lambda out: (out / "qkpatch.json").unlink(),
}


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((out / "qkpatch.json").read_bytes())
    change(document)
    (out / "qkpatch.json").write_text(json.dumps(document))


@stress
@pytest.mark.parametrize("digest", ["edited", "files"])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_else_changed_is_not_replaced(
    tiny: Tiny, tmp_path: Path, run: Run, change: str, digest: str
) -> None:
    out = tmp_path / "out"
    (tiny.path / "README.md").write_text("# Base\n")
    assert run("apply", tiny.path, "-o", out, "--digest", digest).exit_code == 0
    CHANGES[change](out)
    refused(run, tiny.path, out, "holds ")


# -------- without proof


def test_what_has_no_digests_is_not_replaced(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    assert run("apply", tiny.path, "-o", out, "--digest", "none").exit_code == 0
    refused(run, tiny.path, out, "no digest of it is recorded")


@stress
def test_another_source_proves_nothing_and_digests_of_all_files_prove_everything(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    other, out = build_tiny(tmp_path / "other", seed=1), tmp_path / "out"
    assert run("apply", other.path, "-o", out).exit_code == 0
    refused(run, tiny.path, out, "not as qkpatch left it")
    shutil.rmtree(out)
    assert run("apply", other.path, "-o", out, "--digest", "files").exit_code == 0
    assert again(run, tiny.path, out).exit_code == 0
    shutil.rmtree(out)
    assert run("apply", other.path, "-o", out, "--digest", "files").exit_code == 0
    tune(out)
    refused(run, tiny.path, out, SHARD)


@stress
def test_a_recipe_of_ones_own_is_proved_with_it_alone(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine.yaml"
    text = run("recipes", "llama").stdout.replace("name: llama", "name: mine")
    mine.write_text(text)
    assert run("apply", tiny.path, "-o", out, "--recipe", mine).exit_code == 0
    assert again(run, tiny.path, out).exit_code == 2
    assert run("apply", tiny.path, "-o", out, "--overwrite", "--recipe", mine).exit_code == 0


@stress
@pytest.mark.parametrize("flags", [("--alpha", "1"), ("--max-shard-size", "4KB"), ("--link",)])
def test_outputs_of_other_kinds_are_replaced_and_their_tuned_copies_are_not(
    tiny: Tiny, tmp_path: Path, run: Run, flags: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert run("apply", tiny.path, "-o", out, "--overwrite", *flags).exit_code == 0
    shard = sorted(out.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    refused(run, tiny.path, out, "not as qkpatch left it")


def test_a_folder_without_files_is_somebodys_as_well(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    (tiny.path / "empty" / "er").mkdir(parents=True)
    for _ in range(2):
        assert run("apply", tiny.path, "-o", out, "--overwrite").exit_code == 0
    (out / "mine").mkdir()
    refused(run, tiny.path, out, "mine, which is not as qkpatch left it")


def test_a_plan_refuses_what_apply_refuses(tiny: Tiny, out: Path, run: Run) -> None:
    assert run("plan", tiny.path, "-o", out, "--overwrite").exit_code == 0
    tune(out)
    assert run("plan", tiny.path, "-o", out, "--overwrite").exit_code == 2
    (out / "mine").write_text("mine")
    assert run("plan", tiny.path, "-o", out, "--overwrite").exit_code == 2
    assert run("apply", tiny.path, "-o", out, "--overwrite", "--dry-run", "--force").exit_code == 0
    alone = run("apply", tiny.path, "-o", out, "--force")
    assert alone.exit_code == 2
    assert "--overwrite" in alone.stderr


@stress
@pytest.mark.parametrize("flags", [("--overwrite",), ("--overwrite", "--force")])
def test_force_never_harms_source_or_what_is_no_directory(
    tiny: Tiny, tmp_path: Path, run: Run, flags: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tiny.path)
    before = state(tmp_path)
    for out in (tiny.path, tmp_path / "file", tmp_path / "link", tiny.path / "in", tmp_path):
        assert run("apply", tiny.path, "-o", out, *flags).exit_code == 2
    assert state(tmp_path) == before


# -------- while it runs


class Meddler:
    """An observer that does something once, when the first head was edited."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._actions = [action]

    def begins(self, what: str, n_bytes: int, n_heads: int) -> None:
        """Too early."""

    def copied(self, n_bytes: int) -> None:
        pass

    def edited(self, n_heads: int) -> None:
        for action in self._actions:
            action()
        self._actions.clear()


def test_what_changes_in_the_output_meanwhile_is_not_replaced(tiny: Tiny, out: Path) -> None:
    with pytest.raises(UsageError, match="changed while qkpatch was running"):
        overwritten(tiny.path, out, lambda: tune(out))
    assert alpha(out) == 0.8


MEANWHILE: dict[str, Callable[[Path], object]] = {
    "more": lambda out: (out / "mine").write_text("mine"),
    "less": lambda out: (out / "tokenizer.json").unlink(),
    "in place, with its old date": lambda out: in_place(out / SHARD),
    "replaced": lambda out: (
        shutil.copy2(out / SHARD, out.parent / "x"),
        (out.parent / "x").rename(out / SHARD),
    ),
    "a link": lambda out: (out / "mine").symlink_to("nowhere"),
    "an empty folder": lambda out: (out / "mine").mkdir(),
    "another directory": lambda out: (
        out.rename(out.with_name("old")),
        shutil.copytree(out.with_name("old"), out),
    ),
}


def in_place(path: Path) -> None:
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def overwritten(source: Path, out: Path, action: Callable[[], object], *, force: bool = False) -> None:
    plan = make_plan(str(source), Request(alpha=0.0))
    writing = Writing(overwrite=True, force=force)
    api.apply(plan, out, observer=Meddler(action), writing=writing)


@stress
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("change", MEANWHILE)
@pytest.mark.parametrize("has_renameat2", [True, False])
def test_whatever_changes_meanwhile_is_not_replaced(
    tiny: Tiny, out: Path, monkeypatch: pytest.MonkeyPatch, change: str, force: bool, has_renameat2: bool
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(38, "not implemented")

    if not has_renameat2:
        monkeypatch.setattr(system, "renameat2", unsupported)
    with pytest.raises(UsageError, match="changed while"):
        overwritten(tiny.path, out, lambda: MEANWHILE[change](out), force=force)
    assert alpha(out) == 0.8


@pytest.mark.parametrize("has_renameat2", [True, False])
def test_what_comes_between_the_last_look_and_the_exchange_is_not_lost(
    tiny: Tiny, out: Path, monkeypatch: pytest.MonkeyPatch, has_renameat2: bool
) -> None:
    exchange, seen = system.renameat2, list[int]()

    def late(old_fd: int, old: str, new_fd: int, new: str, flags: int) -> None:
        seen.append(flags)
        if seen == [2]:
            (out / "mine").write_text("mine")
        if not has_renameat2:
            raise OSError(38, "not implemented")
        exchange(old_fd, old, new_fd, new, flags)

    monkeypatch.setattr(system, "renameat2", late)
    with pytest.raises(UsageError, match="mine, which is not as qkpatch left it: it changed while"):
        overwritten(tiny.path, out, lambda: None)
    assert (out / "mine").read_text() == "mine"
    assert alpha(out) == 0.8
    assert [path.name for path in out.parent.iterdir() if ".qkpatch-" in path.name] == []


@stress
def test_links_made_to_shared_files_meanwhile_are_no_change(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    assert run("apply", tiny.path, "-o", out, "--link").exit_code == 0
    overwritten(tiny.path, out, lambda: os.link(tiny.path / "tokenizer.json", tmp_path / "one more"))
    assert alpha(out) == 0


# -------- the words are true


def test_a_source_that_changed_is_not_laid_to_the_output(tiny: Tiny, out: Path, run: Run) -> None:
    (tiny.path / "README.md").write_text("# Bass\n")
    text = again(run, tiny.path, out).stderr
    assert "holds README.md, which is not as qkpatch left it, or SOURCE was changed since" in text
    result = run("apply", tiny.path, "-o", out, "--heads", "0")
    assert result.exit_code == 2
    assert "--overwrite --force" in result.stderr


def test_the_cure_is_not_what_is_refused_next(tiny: Tiny, out: Path, run: Run, tmp_path: Path) -> None:
    other = run("apply", tiny.path, "-o", out, "--alpha", "0")
    assert other.stderr.rstrip().endswith("or add --overwrite")
    assert again(run, tiny.path, out).exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "--overwrite --force" in run("apply", tiny.path, "-o", tmp_path / "mine").stderr


def test_an_output_of_another_source_says_of_which(tiny: Tiny, out: Path, run: Run, tmp_path: Path) -> None:
    other = build_tiny(tmp_path / "second", seed=1).path
    shutil.copy(tiny.path / "README.md", other)
    result = run("apply", other, "-o", out, "--heads", "0")
    assert result.exit_code == 2
    assert "OUT was made from the directory 'tiny'" in " ".join(result.stderr.split())
