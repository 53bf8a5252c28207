"""A manifest in which one leaf is another: `verify` finds it, or says so, or it is of the few that nobody can know."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny
from fake_hub import FakeHub, Repo, hub_environment, run_qkpatch
from families import CASES
from families_special import CASES as SPECIAL
from test_fp8 import build as build_fp8
from test_lies import digest

import qkpatch
from qkpatch.errors import QKPatchError
from qkpatch.planning.manifest import Manifest

Place = tuple[str | int, ...]
GONE = object()

# What `verify` takes as it is told, by place: no byte of SOURCE and OUT says otherwise.
BELIEVED = {
    "source.name": "what SOURCE's folder was called: folders are renamed and copied",
    "source.requested_revision": "which branch or tag was asked for: both move, and the commit is compared",
    "source.checked": "whether files of the Hub cache were hashed on that machine; of all files where all have digests",
    "edit.from_recipe": "whether layers and modes were asked for: what is left out means the same",
    "edit.edits[].energy": "another share that takes the same modes of every head: then it is the same edit",
    "output.max_shard_size": "another size that leads to the same shards",
    "tool.python": "no bit depends on it",
    "run.started": "nobody else saw the clock; it is no later than the end",
    "run.finished": "likewise",
    "run.copied_by": "by which means files were copied; there are as many, by means that there are",
}

# What is also found in real manifests in place of a text, beside the text with a letter more.
OTHERS = {
    "directory": ["file", "hub"], "edited": ["none", "files"], "files": ["none", "edited"], "cpu": ["cuda", "cuda:1"],
    "float64": ["float32"], "copied": ["patched", "resharded"], "full": ["symmetric"], "symmetric": ["full"],
    "dominant": ["bottom", "random"], "random": ["dominant"], "out_in": ["in_out"],
}  # fmt: skip


def changes(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Each place and what to put there: another leaf, a list of one entry more or less, nothing at all, one key more.

    Of a list the first and the last entry are looked into: figures come by the hundred.
    """
    if isinstance(value, dict):
        yield from (((*place, "more"), new) for new in (0, "x"))
        if value and all(type(inner) is int for inner in value.values()):
            yield place, {"hardlink": sum(value.values())}
        for key, inner in value.items():
            yield (*place, key), GONE
            yield from changes(inner, (*place, key))
    elif isinstance(value, list):
        yield place, [*value, copy.deepcopy(value[-1]) if value else "x"]
        if value:
            yield place, value[:-1]
        for i in sorted({0, len(value) - 1} if value else ()):
            yield from changes(value[i], (*place, i))
    else:
        yield from ((place, other) for other in others(value))


def others(leaf: Any) -> list[Any]:
    if leaf is None:
        return [0, "x", "0" * 64, True]
    if isinstance(leaf, bool):
        return [not leaf]
    if isinstance(leaf, int | float):
        return [leaf + 1, None] if isinstance(leaf, int) else [leaf * (1 + 1e-6), None]
    near = re.sub(
        r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), leaf
    )  # its last digit, if it has one
    times = [f"{year}{leaf[4:]}" for year in (2001, 2099)] if re.match(r"\d{4}-\d\d-\d\dT", leaf) else []
    return [f"{leaf}x", *OTHERS.get(leaf, []), *times, *({near} - {leaf})]


def put(document: Any, place: Place, new: Any) -> Any:
    document = copy.deepcopy(document)
    *above, last = place
    inner = document
    for step in above:
        inner = inner[step]
    if new is GONE:
        del inner[last]
    else:
        inner[last] = new
    return document


def is_same(a: bytes, b: bytes) -> bool:
    """A key that is left out may say what it said: then it is no change."""
    try:
        one, other = Manifest.loads(a, ""), Manifest.loads(b, "")
    except QKPatchError:
        return False
    return (one, one.run) == (other, other.run)


def called(place: Place) -> str:
    return ".".join("[]" if isinstance(step, int) else step for step in place).replace(".[]", "[]")


Verify = Callable[[], dict[str, Any] | None]


def believed(out: Path, verify: Verify, only: tuple[str, ...] = ()) -> tuple[int, dict[str, list[Any]]]:
    """How many changes were tried, and those of which ``verify`` says the same as of none, by place."""
    honest, file = verify(), out / "qkpatch.json"
    assert honest is not None
    assert honest["ok"], honest
    raw, sums = file.read_bytes(), out / "SHA256SUMS"
    document, found, tried = json.loads(raw), dict[str, list[Any]](), 0
    for place, new in changes({key: document[key] for key in only or document}):
        file.write_text(json.dumps(put(document, place, new)))
        if is_same(raw, file.read_bytes()):
            continue
        tried += 1
        if sums.exists():
            sums.write_text(re.sub(r"[0-9a-f]+(?=  qkpatch.json)", digest(file), sums.read_text()))
        if verify() == honest:
            found.setdefault(called(place), []).append("nothing" if new is GONE else new)
    return tried, found


# -------- kinds of edits


def tiny(folder: Path, edit: dict[str, Any], **build: Any) -> tuple[Path, Path]:
    return applied(build_tiny(folder / "source", **build).path, {"heads": [0, 3], **edit})


def applied(source: Path, edit: dict[str, Any], **how: Any) -> tuple[Path, Path]:
    out = source.with_name("out")
    qkpatch.apply(qkpatch.plan(source, **edit), out, **how)
    return source, out


def with_biases(folder: Path) -> tuple[Path, Path]:
    numbers = {
        "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **numbers}
    sizes = {"q": 32, "k": 16, "v": 16}
    extra = {
        f"model.layers.{n}.self_attn.{which}_proj.bias": torch.linspace(-1, 1, size).bfloat16()
        for n in range(3)
        for which, size in sizes.items()
    }
    return tiny(folder, {"layers": 1, "channel": "symmetric"}, config=config, extra=extra)


def with_gains(folder: Path) -> tuple[Path, Path]:
    gains = {
        f"model.layers.{n}.input_layernorm.weight": torch.linspace(0.5, 2, 24).bfloat16() for n in range(3)
    }
    return tiny(folder, {"layers": 1, "fold_norm": True}, extra=gains)


def of_class(name: str) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        import transformers

        case = {**CASES, **SPECIAL}[name]
        torch.manual_seed(0)
        model = getattr(transformers, case.model_class)(case.config())
        model.to(torch.bfloat16).save_pretrained(folder / "source")
        return applied(folder / "source", {"layers": case.edited[0], "heads": [0, 3]})

    return make


def uneven(folder: Path) -> tuple[Path, Path]:
    items = [{"layers": "0", "modes": 3, "alpha": 0.5}, {"layers": "1-2", "energy": 0.4, "min_modes": 2}]
    return tiny(folder, {"edits": items})


def hashed(folder: Path) -> tuple[Path, Path]:
    source = build_tiny(folder / "source").path
    edit = {"layers": 1, "select": "random", "modes": 2, "seed": 3, "max_shard_size": "4KB"}
    return applied(source, {**edit, "exclude": ["tokenizer*"]}, digest="files")


def of_fp8(folder: Path) -> tuple[Path, Path]:
    build_fp8(folder / "source")
    return applied(folder / "source", {"layers": 1, "heads": [0, 1], "alpha": 0})


def edited_twice(folder: Path) -> tuple[Path, Path]:
    _, first = tiny(folder, {"layers": 1})
    first = first.rename(folder / "first")
    return applied(first, {"layers": 2, "alpha": 0.5, "channel": "antisymmetric", "modes": 3}, digest="none")


def in_place(folder: Path) -> tuple[Path, Path]:
    source = build_tiny(folder / "source").path
    shutil.copytree(source, folder / "out")
    qkpatch.apply_in_place(qkpatch.plan(folder / "out", layers=1, select="shrink"))
    return source, folder / "out"


KINDS: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "full": lambda folder: tiny(folder, {"layers": 1}),
    "symmetric, biases": with_biases,
    "gated": of_class("qwen3.5"),
    "fused": of_class("phi3"),
    "energy by layer": uneven,
    "gain folded": with_gains,
    "random, resharded, hashed": hashed,
    "FP8": of_fp8,
    "over an edit, no digests": edited_twice,
    "shrunk in place": in_place,
}


# Of `make test`: what is not compared with the plan as it is.
SOME = ("tool", "compute", "source", "output", "files", "warnings", "run")


@pytest.mark.parametrize(
    ("kind", "only"), [("full", SOME), *(pytest.param(kind, (), marks=pytest.mark.stress) for kind in KINDS)]
)
def test_no_leaf_is_another_unsaid(tmp_path: Path, kind: str, only: tuple[str, ...]) -> None:
    source, out = KINDS[kind](tmp_path)

    def verify() -> dict[str, Any] | None:
        try:
            return qkpatch.verify(out, source).to_json()
        except QKPatchError:
            return None

    tried, found = believed(out, verify, only)
    assert tried > (60 if only else 300)
    check(found)


@pytest.mark.stress
@pytest.mark.parametrize("digest", ["edited", "files"])
def test_no_leaf_about_a_repository_is_another_unsaid(tmp_path: Path, hub: FakeHub, digest: str) -> None:
    source, out = build_tiny(tmp_path / "base").path, tmp_path / "out"
    hub.repos["org/base"] = Repo(source)
    environment = hub_environment(hub.endpoint, tmp_path / "home")
    made = run_qkpatch(environment, "apply", "org/base", "-o", out, "--heads", "0", "--digest", digest)
    assert made.returncode == 0, made.stderr

    def verify() -> dict[str, Any] | None:
        result = run_qkpatch(environment, "verify", out, "--source", "org/base", "--json")
        document: dict[str, Any] = json.loads(result.stdout)
        return None if "error" in document else document

    tried, found = believed(out, verify, SOME)
    assert tried > 60
    check(found)


def check(found: dict[str, list[Any]]) -> None:
    assert found.keys() <= BELIEVED.keys(), "\n".join(f"{place}: {new}" for place, new in found.items())
