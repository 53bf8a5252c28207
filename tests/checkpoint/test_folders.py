"""Directories as people have them: what is not the model's, which files are the weights, and what is none of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from fake_hub import FakeHub, Repo, hub_environment, run_qkpatch
from safetensors.torch import save_file

import qkpatch
from qkpatch.checkpoint.names import BOOKKEEPING, LEFTOVERS, RUBBISH, matching
from qkpatch.checkpoint.open_directory import MOST_LEVELS

Run = Callable[..., Any]
EDIT = ("--layers", "1", "--modes", "2")
INDEX = "model.safetensors.index.json"


def put(folder: Path, *names: str, data: bytes = b"x" * 1000) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def apply(run: Run, source: Path, out: Path, *flags: object) -> str:
    """What is said of an edit that is made, and that verifies."""
    result = run("apply", source, "-o", out, *EDIT, *flags)
    assert result.exit_code == 0, result.output
    proof = run("verify", out, "--source", source)
    assert proof.exit_code == 0, proof.output
    return " ".join(result.stderr.split())


def refused(run: Run, source: Path, code: int = 3, *flags: object) -> str:
    result = run("plan", source, *EDIT, *flags)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.stderr.split())


# -------- what is not the model's


RUBBISH_FILES = [
    ".DS_Store", "._model.safetensors", "sub/._x", "__MACOSX/._model.safetensors", "Thumbs.db", "._____temp/model.bin",
    ".mdl", ".msc", ".mv", ".ipynb_checkpoints/x.ipynb", ".nfs000000001", ".git/config", "lost+found/x",
    ".cache/huggingface/download/a.metadata", "sub/.git/config", ".config.json.swp",
]  # fmt: skip


TOOLS = [".gitignore", ".hg/store", ".hgignore", ".svn/entries", ".idea/workspace.xml"]
KEPT = {"config.json", "model.safetensors", "tokenizer.json", "qkpatch.json"}


def test_what_systems_leave_is_left_out_and_does_not_matter_in_out(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    put(tiny.path, *RUBBISH_FILES, "sub/kept")
    said = apply(run, tiny.path, tmp_path / "out")
    assert names(tmp_path / "out") == {*KEPT, "sub/kept"}
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["sub"]
    assert "left out" not in said
    put(tmp_path / "out", *RUBBISH_FILES, *TOOLS, ".gitattributes")
    proof = run("verify", tmp_path / "out", "--source", tiny.path)
    assert proof.exit_code == 0, proof.output
    assert ".DS_Store" in proof.output
    again = run("apply", tiny.path, "-o", tmp_path / "out", *EDIT, "--overwrite")
    assert again.exit_code == 0, again.output
    # What git and the like keep there is the user's.
    assert names(tmp_path / "out") == {*KEPT, *TOOLS, "sub/kept", ".git/config", ".gitattributes"}


def test_secrets_by_their_names_are_told_and_what_is_told_has_an_end(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    put(tiny.path, ".env", "keys/id_rsa", ".gitignore", "tokenizer.model")
    said = apply(run, tiny.path, tmp_path / "out")
    assert (
        "2 file(s) named like secrets, 2.0 kB, are copied into OUT (--exclude leaves them out): .env (1.0"
        in said
    )
    assert (
        apply(run, tiny.path, tmp_path / "without", "--exclude", ".env", "--exclude", "keys").count("secrets")
        == 0
    )
    names = [f"{'x' * 200}/{i}{'y' * 200}/{'z' * 200}/token" for i in range(9)]
    put(tiny.path, *names)
    assert max(len(w) for w in qkpatch.plan(tiny.path, layers=1).warnings) <= 2001


def test_an_output_that_git_keeps_is_proved_and_replaced_with_its_history(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    apply(run, tiny.path, out)

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@y")
        return subprocess.run(
            ["git", "-C", out, *who, *arguments], check=True, capture_output=True, text=True
        ).stdout

    for command in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "first")):
        git(*command)
    assert run("verify", out, "--source", tiny.path).exit_code == 0
    result = run("apply", tiny.path, "-o", out, "--layers", "2", "--modes", "2", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "first" in git("log", "--oneline")
    assert set(git("status", "--short").split()) == {"M", "model.safetensors", "qkpatch.json"}


def test_an_output_that_was_downloaded_is_proved_and_replaced(
    tiny: Tiny, tmp_path: Path, run: Run, hub: FakeHub
) -> None:
    apply(run, tiny.path, tmp_path / "out")
    put(tmp_path / "out", ".gitattributes")
    hub.repos["me/new"] = Repo(tmp_path / "out")
    fetch = "from huggingface_hub import snapshot_download; snapshot_download('me/new', local_dir='back')"
    environment = hub_environment(hub.endpoint, tmp_path / "home")
    subprocess.run(
        [sys.executable, "-c", fetch], env=environment, cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "back" / ".cache" / "huggingface").is_dir()
    assert run("verify", tmp_path / "back", "--source", tiny.path).exit_code == 0
    again = run("apply", tiny.path, "-o", tmp_path / "back", "--layers", "2", "--modes", "2", "--overwrite")
    assert again.exit_code == 0, again.output
    assert names(tmp_path / "back") == {*KEPT, ".gitattributes"}


def test_only_what_is_never_loaded_is_ignored_in_out(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    apply(run, tiny.path, tmp_path / "out")
    for name in (
        "__pycache__/modeling.pyc",
        "optimizer.pt",
        "training_args.bin",
        ".env",
        "sub/x",
        "adapter_config.json",
    ):
        put(tmp_path / "out", name)
        assert run("verify", tmp_path / "out", "--source", tiny.path).exit_code == 1, name
        assert run("apply", tiny.path, "-o", tmp_path / "out", *EDIT, "--overwrite").exit_code == 2, name
        (tmp_path / "out" / name).unlink()


@pytest.mark.parametrize("digest", ["edited", "files"])
def test_what_older_versions_carried_over_still_verifies(
    tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    put(tiny.path, ".DS_Store", "training_args.bin", "checkpoint-100/optimizer.pt")
    with monkeypatch.context() as older:
        older.setattr("qkpatch.planning.plan.make_plan.__defaults__", (*_defaults()[:1], ()))
        older.setattr("qkpatch.checkpoint.names._regex", lambda _: __import__("re").compile("(?!)"))
        assert run("apply", tiny.path, "-o", tmp_path / "out", *EDIT, "--digest", digest).exit_code == 0
    assert {".DS_Store", "training_args.bin", "checkpoint-100/optimizer.pt"} <= names(tmp_path / "out")
    assert run("verify", tmp_path / "out", "--source", tiny.path).exit_code == 0
    (tmp_path / "out" / "training_args.bin").write_bytes(b"y" * 1000)
    assert run("verify", tmp_path / "out", "--source", tiny.path).exit_code == 1


def _defaults() -> tuple[Any, ...]:
    from qkpatch.planning.plan import make_plan

    return make_plan.__defaults__ or ()


TRAINERS = [
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "rng_state.pth", "trainer_state.json",
    "training_args.bin", "checkpoint-100/model.safetensors", "checkpoint-100/optimizer.pt",
    "runs/a/events.out.tfevents.1", "global_step100/zero_pp_rank_0_mp_rank_00_optim_states.pt", "wandb/run/x",
]  # fmt: skip


def test_what_a_trainer_leaves_is_left_out_and_said_with_sizes(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    put(tiny.path, *TRAINERS)
    (tiny.path / "kept").mkdir()
    said = apply(run, tiny.path, tmp_path / "out")
    assert names(tmp_path / "out") == KEPT
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["kept"]
    assert "11 file(s) or folder(s), 12.0 kB, are left out of OUT: checkpoint-100 (2.0 kB)" in said
    assert "stay unpatched" not in said


def test_exclude_leaves_out_records_and_proves(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    put(tiny.path, "a.gguf", "original/consolidated.00.pth", "original/b/x", "notes.txt")
    said = apply(run, tiny.path, tmp_path / "plain")
    assert (
        "2 other weight file(s), 2.0 kB, stay unpatched (--exclude leaves them out): a.gguf (1.0 kB), original/cons"
        in said
    )
    said = apply(run, tiny.path, tmp_path / "out", "--exclude", "*.gguf", "--exclude", "original/")
    assert names(tmp_path / "out") == {
        "config.json", "model.safetensors", "tokenizer.json", "qkpatch.json", "notes.txt",
    }  # fmt: skip
    assert "2 file(s) or folder(s), 3.0 kB, are left out of OUT: a.gguf (1.0 kB), original (2.0 kB)" in said
    record = json.loads((tmp_path / "out" / "qkpatch.json").read_text())
    assert record["output"]["exclude"] == ["*.gguf", "original/"]
    proof = run("verify", tmp_path / "out", "--source", tiny.path)
    assert "left out of OUT on demand: *.gguf, original/" in proof.output
    card = run("card", tmp_path / "out")
    assert "--exclude '*.gguf' --exclude original/" in card.output
    assert run("apply", tiny.path, "-o", tmp_path / "out", *EDIT, "--overwrite").exit_code == 0


def test_an_exclude_that_excludes_nothing_is_told(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    put(tiny.path, "a.gguf")
    said = apply(run, tiny.path, tmp_path / "out", "--exclude", "*.ggfu", "--exclude", "./a.gguf")
    assert "nothing in SOURCE is called as --exclude says: *.ggfu" in said
    assert "a.gguf" not in names(tmp_path / "out")


@pytest.mark.parametrize("name", [".git/config", ".DS_Store"])
def test_an_out_that_holds_nothing_of_anyones_is_taken(
    tiny: Tiny, tmp_path: Path, run: Run, name: str
) -> None:
    put(tmp_path / "out", name)
    apply(run, tiny.path, tmp_path / "out")
    assert names(tmp_path / "out") == {*KEPT, *([name] if name == ".git/config" else [])}


@pytest.mark.long
def test_of_a_repository_a_trainers_leftovers_are_not_downloaded(
    tiny: Tiny, tmp_path: Path, run: Run, hub: FakeHub
) -> None:
    put(tiny.path, "optimizer.pt", "checkpoint-1/model.safetensors", "keep/x", "a.gguf", "._x")
    hub.repos["org/it"] = Repo(tiny.path)
    environment = hub_environment(hub.endpoint, tmp_path / "home")
    flags = ("-o", tmp_path / "out", "--no-cache", "--exclude", "*.gguf", *EDIT)
    result = run_qkpatch(environment, "apply", "org/it", *flags)
    assert result.returncode == 0, result.stderr
    assert "3 file(s) or folder(s), 3.0 kB, are left out of OUT" in result.stderr
    assert names(tmp_path / "out") == {*KEPT, "keep/x"}
    proof = run_qkpatch(environment, "verify", tmp_path / "out", "--source", "org/it")
    assert proof.returncode == 0, proof.stderr
    assert not any(
        "optimizer.pt" in line or "a.gguf" in line for line in map(str, hub.log) if "resolve" in line
    )


def test_exclude_in_a_file_and_in_the_library(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    from qkpatch import api

    put(tiny.path, "a.gguf")
    (tmp_path / "edit.yaml").write_text("exclude: ['*.gguf']\nlayers: 1\nmodes: 2\n")
    assert run("apply", tiny.path, "-o", tmp_path / "out", "--config", tmp_path / "edit.yaml").exit_code == 0
    assert "a.gguf" not in names(tmp_path / "out")
    plan = api.plan(tiny.path, layers=1, modes=2, exclude="*.gguf")
    assert plan.model.checkpoint.left_out == {"a.gguf": 1000}


@pytest.mark.parametrize(
    ("glob", "code", "message"),
    [
        ("*.safetensors", 3, "no .safetensors weights"),
        ("config.json", 3, "there is no config.json"),
        ("", 2, "it names nothing"),
    ],
)
def test_what_the_model_needs_is_not_left_out(
    tiny: Tiny, run: Run, glob: str, code: int, message: str
) -> None:
    assert message in refused(run, tiny.path, code, "--exclude", glob)


@pytest.mark.parametrize(
    ("name", "pattern", "meant"),
    [
        ("a/b/c", "b", "a/b"), ("a/b/c", "a", "a"), ("a/b/c", "c", "a/b/c"), ("a/b/c", "b/c", "a/b/c"),
        ("a/b/c", "a/*", "a/b"), ("x.gguf", "*.gguf", "x.gguf"), ("x.gguf/y", "*.gguf", "x.gguf"),
        ("xgguf", "*.gguf", None), ("ab/c", "b", None), ("a/B", "b", None), ("a\nb", "a*b", "a\nb"),
        ("abc", "[x", None),
    ],
)  # fmt: skip
def test_globs(name: str, pattern: str, meant: str | None) -> None:
    assert matching(name, [pattern]) == meant


def test_the_tables_name_nothing_that_a_model_needs() -> None:
    for name in (
        "model.safetensors", INDEX, "config.json", "tokenizer.model", "modeling_x.py", "README.md", "pytorch_model.bin",
        "consolidated.00.pth", "checkpoint.json", "optimizer.py", "runs.json", ".gitattributes",
        "model.fp16.safetensors", "checkpoint-index.json", "scheduler/scheduler_config.json", "processor_config.json",
    ):  # fmt: skip
        assert matching(name, (*RUBBISH, *LEFTOVERS)) is None, name
    assert set(BOOKKEEPING) <= RUBBISH.keys()


# -------- trees that trip


def deep(folder: Path, levels: int) -> Path:
    """``levels`` directories inside each other, deeper than a path may be long."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    return folder


def flatten(folder: Path) -> None:
    """Remove what :func:`deep` made, for whoever clears up by recursion."""
    import shutil

    while (folder / "d" / "d").exists():
        (folder / "d" / "d").rename(folder / "e")
        (folder / "d").rmdir()
        (folder / "e").rename(folder / "d")
    shutil.rmtree(folder / "d", ignore_errors=True)


@pytest.mark.parametrize("where", ["source", "out", "out by force"])
def test_a_tree_of_many_levels_is_refused(tiny: Tiny, tmp_path: Path, run: Run, where: str) -> None:
    out = tmp_path / "out"
    if where != "source":
        apply(run, tiny.path, out)
    tree = deep(tiny.path if where == "source" else out, 1300)
    try:
        flags = (
            () if where == "source" else ("--overwrite",) if where == "out" else ("--overwrite", "--force")
        )
        result = run("apply", tiny.path, "-o", out, *EDIT, *flags)
        assert result.exit_code == 4, result.output
        assert f"more than {MOST_LEVELS} directories inside each other" in result.stderr
        if where != "source":
            assert run("verify", out, "--source", tiny.path).exit_code == 4
        assert list(tmp_path.glob(".out*")) == []
    finally:
        flatten(tree)


def test_a_tree_in_the_staging_directory_ends_in_an_error_of_ours(tiny: Tiny, tmp_path: Path) -> None:
    from qkpatch.errors import FileSystemError
    from qkpatch.output.options import Writing
    from qkpatch.patching.apply import apply_plan
    from qkpatch.planning.plan import make_plan
    from qkpatch.planning.request import Request

    class Moment:
        def begins(self, what: str, n_bytes: int, n_heads: int) -> None: ...
        def copied(self, n_bytes: int) -> None: ...
        def edited(self, n_heads: int) -> None:
            (staging,) = tmp_path.glob(".out.qkpatch-*")
            if not (staging / "files" / "d").exists():
                deep(staging / "files", 1300)

    plan = make_plan(str(tiny.path), Request(layers=(1,), modes=2))
    try:
        with pytest.raises(FileSystemError, match="inside each other"):
            apply_plan(plan, tmp_path / "out", observer=Moment(), writing=Writing())
    finally:
        for staging in tmp_path.glob(".out.qkpatch-*"):
            flatten(staging / "files")


def test_no_directory_is_entered_twice(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    for i in range(12):
        folder = tiny.path / f"level{i}"
        folder.mkdir()
        for j in range(6):
            (folder / f"to{j}").symlink_to(tiny.path / f"level{i + 1}", target_is_directory=True)
    (tiny.path / "level12").mkdir()
    assert "a link to the same directory as" in refused(run, tiny.path, 4)
    assert run("plan", tiny.path, *EDIT, "--exclude", "level*").exit_code == 0


def test_a_link_to_what_is_left_out_is_left_out(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    put(tiny.path, "checkpoint-100/model.safetensors")
    (tiny.path / "best").symlink_to("checkpoint-100", target_is_directory=True)
    put(tmp_path / "train", "checkpoint-100/tokenizer.json")  # but what lies elsewhere is what SOURCE means
    (tiny.path / "tokenizer.json").unlink()
    (tiny.path / "tokenizer.json").symlink_to(tmp_path / "train" / "checkpoint-100" / "tokenizer.json")
    said = apply(run, tiny.path, tmp_path / "out")
    assert "best (1.0 kB), checkpoint-100 (1.0 kB)" in said
    assert names(tmp_path / "out") == KEPT


@pytest.mark.parametrize("kind", ["pipe", "socket", "dangling link", "link to itself"])
def test_what_is_no_file_is_refused_unless_it_is_left_out(
    tiny: Tiny, tmp_path: Path, run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.path / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tiny.path)
        socket.socket(socket.AF_UNIX).bind("odd")
    else:
        path.symlink_to("odd" if kind == "link to itself" else "gone")
    said = refused(run, tiny.path, 4)
    assert "leave it out: --exclude odd" in said
    assert ("a dangling link, to gone" in said) == (kind == "dangling link")
    assert ("restore what it leads to, or download it again; if nothing" in said) == ("link" in kind)
    apply(run, tiny.path, tmp_path / "out", "--exclude", "odd")


# -------- what is none of it


def a_model(folder: Path, kind: str = "llama") -> None:
    put(folder, "config.json", data=json.dumps({"model_type": kind}).encode())
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")


def adapter(folder: Path) -> None:
    put(folder, "adapter_config.json", data=b'{"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}')
    save_file(
        {"base_model.model.layers.0.q_proj.lora_A.weight": torch.zeros(1)},
        folder / "adapter_model.safetensors",
    )


def lone_adapter(folder: Path) -> None:
    adapter(folder)
    (folder / "adapter_config.json").unlink()


def cache_root(folder: Path) -> None:
    a_model(folder / "snapshots" / ("0" * 40))
    put(folder, "refs/main", "blobs/x")


def nvila(folder: Path) -> None:
    put(folder, "config.json", data=b'{"model_type": "llava_llama"}')
    a_model(folder / "llm", "qwen2")
    a_model(folder / "vision_tower", "siglip_vision_model")


def diffusers(folder: Path) -> None:
    put(folder, "model_index.json", "vae/config.json", data=b"{}")
    a_model(folder / "text_encoder", "clip_text_model")


def mistral(folder: Path) -> None:
    put(folder, "params.json", data=b"{}")
    save_file({"layers.0.attention.wq.weight": torch.zeros(1)}, folder / "consolidated.safetensors")


NONE_OF_IT: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "an adapter": (adapter, ("an adapter (LoRA) of meta-llama/Llama-3.1-8B", "merge it first")),
    "a pickled adapter": (
        lambda f: put(f, "adapter_config.json", "adapter_model.bin", data=b"{}"), ("adapter (LoRA) of another model",),
    ),
    "the root of a cached repository": (
        cache_root, ("repository's root in a Hub cache", f"snapshots/{'0' * 40} (llama)", "org/name"),
    ),
    "a Hub cache": (lambda f: cache_root(f / "models--a--b"), ("Hub cache of whole repositories", "models--a--b/snap")),
    "NVILA": (nvila, ("models lie in folders below", "llm (qwen2), vision_tower (siglip_vision_model)")),
    "diffusers": (diffusers, ("a diffusers pipeline", "text_encoder (clip_text_model)")),
    "Mistral's own": (mistral, ("params.json and consolidated.safetensors", "transformers form")),
    "Meta's own": (lambda f: put(f, "params.json", "consolidated.00.pth"), ("params.json and consolidated.00.pth",)),
    "GGUF": (lambda f: put(f, "config.json", "m-Q4_K_M.gguf"), ("GGUF", "m-Q4_K_M.gguf", "convert_hf_to_gguf.py")),
    "pickles": (lambda f: put(f, "config.json", "pytorch_model.bin"), ("only pickled weights: pytorch_model.bin",)),
    "Flax": (lambda f: put(f, "config.json", "flax_model.msgpack"), ("another framework's: flax_model.msgpack",)),
    "FSDP": (lambda f: put(f, "pytorch_model_0/__0_0.distcp"), ("torch.distributed", "accelerate merge-weights")),
    "DeepSpeed": (lambda f: put(f, "global_step5/x.pt", "zero_to_fp32.py"), ("DeepSpeed", "zero_to_fp32.py")),
    "a training run": (
        lambda f: (a_model(f / "checkpoint-10"), put(f, "runs/x"))[0], ("a training run", "checkpoint-10"),
    ),
    "an adapter without its config": (lone_adapter, ("an adapter (LoRA) of another model", "merge it first")),
    "shards called as a trainer's states": (
        lambda f: put(f, "config.json", *(f"checkpoint-{i}-of-3.safetensors" for i in (1, 2, 3))),
        ("called as a trainer's states", "checkpoint-1-of-3.safetensors", "rename them"),
    ),
    "nothing": (lambda f: f.mkdir(), ("only an empty folder",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", NONE_OF_IT)
def test_what_is_no_model_is_told_by_what_it_is(tmp_path: Path, run: Run, kind: str) -> None:
    make, wanted = NONE_OF_IT[kind]
    make(tmp_path / "it")
    said = refused(run, tmp_path / "it")
    for text in wanted:
        assert text in said


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    ("make", "file"),
    [(adapter, "adapter_model.safetensors"), (mistral, "consolidated.safetensors")],
)
def test_a_file_is_told_in_the_words_of_its_folder(
    tmp_path: Path, run: Run, make: Callable[[Path], None], file: str, config: bool
) -> None:
    make(tmp_path / "it")
    if config:
        put(tmp_path / "it", "config.json", data=b'{"model_type": "llama"}')
    said, whole = refused(run, tmp_path / "it" / file), refused(run, tmp_path / "it")
    assert said == whole.replace(str(tmp_path / "it"), str(tmp_path / "it" / file))


def test_the_models_own_file_beside_an_adapter_and_the_vendors_is_read(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    adapter(tiny.path)
    mistral(tiny.path)
    apply(run, tiny.path / "model.safetensors", tmp_path / "out")


def test_a_gguf_file(tmp_path: Path, run: Run) -> None:
    put(tmp_path, "m.gguf")
    assert "convert_hf_to_gguf.py" in refused(run, tmp_path / "m.gguf")


def test_a_folder_below_that_was_named_is_a_model(tmp_path: Path, run: Run) -> None:
    nvila(tmp_path / "it")
    inner = build_tiny(tmp_path / "other").path
    for name in ("config.json", "model.safetensors"):
        (inner / name).replace(tmp_path / "it" / "llm" / name)
    assert "llm (llama)" in refused(run, tmp_path / "it")
    apply(run, tmp_path / "it" / "llm", tmp_path / "out")


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_an_adapter_beside_the_model_is_refused_or_left_out(
    tiny: Tiny, tmp_path: Path, run: Run, weights: str | None
) -> None:
    put(tiny.path, "adapter_config.json", data=b"{}")
    if weights:
        put(tiny.path, weights)
    assert "loads that adapter on top of them" in refused(run, tiny.path)
    apply(run, tiny.path, tmp_path / "out", "--exclude", "adapter_*")
    assert run("inspect", tiny.path, "--exclude", "adapter_*").exit_code == 0
    assert not any("adapter" in name for name in names(tmp_path / "out"))


def test_an_adapter_in_a_folder_below_is_part_of_the_model(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    adapter(tiny.path / "vision-lora")
    apply(run, tiny.path, tmp_path / "out")


def test_empty_tensors_elsewhere_are_those_of_zero_3(tmp_path: Path, run: Run) -> None:
    empty = {f"vision.{i}.weight": torch.zeros(0) for i in range(5)}
    told = apply(run, build_tiny(tmp_path / "tiny", extra=empty).path, tmp_path / "out")
    assert "5 tensor(s) are empty, as a ZeRO-3 save without gathering leaves them: vision.0.weight, " in told
    assert "ZeRO-3" not in apply(run, build_tiny(tmp_path / "whole").path, tmp_path / "out2")


@pytest.mark.parametrize("data", [b"{}", b'{"error": "Entry not found"}', b'{"architectures": []}'])
def test_a_config_that_names_nothing_may_be_another_files(tiny: Tiny, run: Run, data: bytes) -> None:
    put(tiny.path, "config.json", data=data)
    said = refused(run, tiny.path)
    assert "config.json says neither model_type nor architectures: is it the model's?" in said
    assert "None" not in said


@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize("section", [{}, {"scale": torch.zeros(1, dtype=torch.uint8)}])
def test_a_quantisation_that_is_only_said(
    tmp_path: Path, run: Run, section: dict[str, torch.Tensor], part: str | None
) -> None:
    tiny = build_tiny(tmp_path / "tiny", extra=section)
    config = json.loads((tiny.path / "config.json").read_text())
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tiny.path / "config.json").write_text(json.dumps(config | ({part: said} if part else said)))
    told = apply(run, tiny.path, tmp_path / "out")
    assert ("quantised (bitsandbytes), and none are" in told) == (not section)
