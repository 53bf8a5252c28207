"""Patch files: the bytes of the direct run, on what they were made from alone; hostile and damaged ones are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from failing import fill_disk
from fake_hub import FakeHub, Repo, hub_environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fp8 import build

import qkpatch
from qkpatch.errors import CheckpointError, FileSystemError, UsageError
from qkpatch.patches import in_place

Run = Callable[..., Any]
EDITS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "some heads": ("--layers", "0-2", "--heads", "1-2", "--modes", "2"),
    "random": ("--layers", "0-1", "--select", "random", "--seed", "7", "--alpha", "0"),
    "shrink": ("--select", "shrink", "--alpha", "0.5"),
    "antisymmetric": ("--channel", "antisymmetric", "--modes", "3"),
    "no-op": ("--alpha", "1"),
}


def contents(root: Path) -> dict[str, Any]:
    """Bytes of every file; of the manifest all but the run block."""
    found: dict[str, Any] = {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }
    if "qkpatch.json" in found:
        found["qkpatch.json"] = {**json.loads(found["qkpatch.json"]), "run": None}
    found.pop("SHA256SUMS", None)
    return found


@pytest.fixture
def patch(tiny: Tiny, tmp_path: Path) -> Path:
    return qkpatch.make_patch(qkpatch.plan(tiny.path, layers=range(3), modes=2), tmp_path / "edit.qkpatch")


# -------- what it gives


@pytest.mark.parametrize("edit", EDITS)
def test_a_patch_gives_the_bytes_of_the_direct_run(edit: str, tiny: Tiny, tmp_path: Path, run: Run) -> None:
    flags, file = EDITS[edit], tmp_path / "edit.qkpatch"
    assert run("apply", tiny.path, "-o", tmp_path / "direct", *flags).exit_code == 0
    made = run("apply", tiny.path, "--patch-only", "-o", file, *flags)
    assert made.exit_code == 0, made.output
    assert f"qkpatch apply {tiny.path} --patch {file} -o OUT" in made.stdout
    result = run("apply", tiny.path, "--patch", file, "-o", tmp_path / "patched")
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "patched") == contents(tmp_path / "direct")
    assert run("verify", tmp_path / "patched", "--source", tiny.path).exit_code == 0
    again = run("apply", tiny.path, "--patch", file, "-o", tmp_path / "direct")
    assert "Already done" in again.stdout
    assert run("apply", tiny.path, "--patch", file, "--in-place").exit_code == 0
    name = "model.safetensors"
    assert (tiny.path / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()


@pytest.mark.parametrize(
    "how",
    [("--digest", "files"), ("--digest", "none"), ("--link",), ("--resume",), ("--max-shard-size", "4KB")],
)
def test_ways_to_write_are_those_of_apply(
    how: tuple[str, ...], patch: Path, tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    direct = ("apply", tiny.path, "-o", tmp_path / "direct", "--layers", "0-2", "--modes", "2", *how)
    assert run(*direct).exit_code == 0
    assert run("apply", tiny.path, "-o", tmp_path / "patched", "--patch", patch, *how).exit_code == 0
    assert contents(tmp_path / "patched") == contents(tmp_path / "direct")


def test_rows_are_found_by_their_tensors_however_a_source_is_sharded(
    patch: Path, tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    sharded = tmp_path / "sharded"
    assert run("apply", tiny.path, "-o", sharded, "--alpha", "1", "--max-shard-size", "4KB").exit_code == 0
    (sharded / "qkpatch.json").unlink()
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert run("apply", sharded, "--patch", patch, "-o", tmp_path / "patched").exit_code == 0
    assert run("apply", sharded, "--layers", "0-2", "--modes", "2", "-o", tmp_path / "direct").exit_code == 0
    a, b = contents(tmp_path / "patched"), contents(tmp_path / "direct")
    assert a == b
    before = contents(sharded)
    assert run("apply", sharded, "--patch", patch, "--in-place").exit_code == 0
    assert run("revert", sharded).exit_code == 0
    assert contents(sharded) == before


def test_fp8_scales_travel_along(tmp_path: Path, run: Run) -> None:
    source, flags = tmp_path / "source", ("--layers", "1", "--modes", "2", "--alpha", "0")
    build(source)
    assert run("apply", source, "-o", tmp_path / "direct", *flags).exit_code == 0
    made = run("apply", source, "--patch-only", "-o", tmp_path / "edit.qkpatch", *flags)
    assert made.exit_code == 0, made.output
    assert any("scale" in name for name in load_file(tmp_path / "edit.qkpatch"))
    assert (
        run("apply", source, "--patch", tmp_path / "edit.qkpatch", "-o", tmp_path / "patched").exit_code == 0
    )
    assert contents(tmp_path / "patched") == contents(tmp_path / "direct")
    assert run("apply", source, "--in-place", *flags).exit_code == 0
    assert run("revert", source).exit_code == 0


def test_it_is_a_plain_safetensors_file_of_rows(patch: Path, tiny: Tiny, tmp_path: Path) -> None:
    qkpatch.apply(qkpatch.plan(tiny.path, layers=range(3), modes=2), tmp_path / "out")
    edited = load_file(tmp_path / "out" / "model.safetensors")
    with safe_open(patch, framework="pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        for name in names:
            tensor, _, rows = name.removesuffix("]").rpartition("[")
            first, last = map(int, rows.split(":"))
            assert file.get_tensor(name).dtype == torch.bfloat16
            assert torch.equal(file.get_tensor(name), edited[tensor][first:last])
    assert len(names) == 3 * 4
    assert json.loads(metadata["manifest"])["edit"]["modes"] == 2
    assert set(json.loads(metadata["record"])["digests"]) == set(names)
    assert patch.stat().st_size < (tiny.path / "model.safetensors").stat().st_size * 3


def test_a_patch_takes_no_torch(patch: Path, tiny: Tiny, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch'] = None; import qkpatch; "
        "qkpatch.apply(qkpatch.plan(sys.argv[1], patch=sys.argv[2]), sys.argv[3])"
    )
    arguments = [sys.executable, "-c", code, str(tiny.path), str(patch), str(tmp_path / "out")]
    subprocess.run(arguments, check=True, timeout=120)
    assert qkpatch.verify(tmp_path / "out", tiny.path).ok


@pytest.mark.long
def test_of_a_repository_only_rows_are_fetched(hub: FakeHub, tiny: Tiny, tmp_path: Path) -> None:
    import subprocess
    import sys

    hub.repos["org/tiny"] = Repo(tiny.path)
    code = "import sys, qkpatch; qkpatch.make_patch(qkpatch.plan('org/tiny', layers=1), sys.argv[1])"
    environment = hub_environment(hub.endpoint, tmp_path / "home")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "edit.qkpatch")], check=True, env=environment)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    qkpatch.apply(qkpatch.plan(tiny.path, patch=tmp_path / "edit.qkpatch"), tmp_path / "patched")
    qkpatch.apply(qkpatch.plan(tiny.path, layers=1), tmp_path / "direct")
    name = "model.safetensors"
    assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()


# -------- another SOURCE


def refused(run: Run, out: Path, *arguments: object, says: str, code: int = 2) -> None:
    result = run("apply", *arguments, "-o", out)
    assert result.exit_code == code, result.output
    assert says in result.stderr, result.stderr
    assert "try " in result.stderr
    assert not out.exists()
    assert not list(out.parent.glob(".out*"))


@pytest.mark.parametrize("which", ["q", "k"])
def test_another_fine_tune_is_refused(which: str, patch: Path, tiny: Tiny, tmp_path: Path, run: Run) -> None:
    """Keys too: the edit depends on them."""
    tensors = load_file(tiny.path / "model.safetensors")
    tensors[tiny.name(2, which)][0, 0] += 1
    other = shutil.copytree(tiny.path, tmp_path / "other")
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    refused(
        run,
        tmp_path / "out",
        other,
        "--patch",
        patch,
        says="have other values" if which == "k" else "has other values",
    )
    before = contents(other)
    assert run("apply", other, "--patch", patch, "--in-place").exit_code == 2
    assert contents(other) == before


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"d_model": 32}, "BF16 [8, 32] there, and BF16 [8, 24] in the patch"),
        ({"dtype": torch.float16}, "F16 [8, 24] there, and BF16 [8, 24]"),
        ({"n_layers": 2}, "another SOURCE"),
        ({"n_heads": 2}, "another SOURCE"),
        ({"d_head": 4}, "another SOURCE"),
        ({"d_head": 16}, "another SOURCE"),
        ({"n_kv_heads": 4}, "another SOURCE"),
        ({"prefix": "language_model.model.layers.{layer}.self_attn."}, ""),
    ],
)
def test_other_shapes_and_dtypes_are_told(
    numbers: dict[str, Any], says: str, patch: Path, tmp_path: Path, run: Run
) -> None:
    other = build_tiny(tmp_path / "other", **numbers)
    code = 2 if says else 3
    refused(run, tmp_path / "out", other.path, "--patch", patch, says=says, code=code)


@pytest.mark.parametrize(
    "flags",
    [
        ("--layers", "1"),
        ("--alpha", "0.5"),
        ("--fold-norm",),
        ("--heads", "0"),
        ("--seed", "1"),
        ("--prefix", "a.{layer}."),
    ],
)
def test_a_patch_beside_an_edit_is_refused(
    flags: tuple[str, ...], patch: Path, tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    result = run("apply", tiny.path, "--patch", patch, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 2, result.output


@pytest.mark.parametrize(
    "flags", [("--max-shard-size", "1KB"), ("--exclude", "*.txt"), ("--link",), ("--overwrite",), ("--push", "me/name"),
              ("--digest", "files"), ("--in-place",), ("--dry-run",), ("--resume",)]
)  # fmt: skip
def test_flags_of_a_copy_are_refused(flags: tuple[str, ...], tiny: Tiny, tmp_path: Path, run: Run) -> None:
    result = run("apply", tiny.path, "--patch-only", "-o", tmp_path / "edit.qkpatch", *flags)
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "edit.qkpatch").exists()


def test_a_patch_of_a_recipe_of_ones_own_asks_for_it(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    shown = run("recipes", "llama")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(shown.stdout.replace("name: llama", "name: mine"))
    made = run("apply", tiny.path, "--recipe", recipe, "--patch-only", "-o", tmp_path / "edit.qkpatch")
    assert made.exit_code == 0, made.output
    refused(run, tmp_path / "out", tiny.path, "--patch", tmp_path / "edit.qkpatch", says="mine")
    whole = (
        "apply",
        tiny.path,
        "--patch",
        tmp_path / "edit.qkpatch",
        "--recipe",
        recipe,
        "-o",
        tmp_path / "out",
    )
    assert run(*whole).exit_code == 0


# -------- damaged and hostile files


def rewritten(patch: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> None:
    with safe_open(patch, framework="pt") as file:
        said = {**file.metadata(), **metadata}
    save_file(load_file(patch) if tensors is None else tensors, patch, said)


def record(patch: Path) -> dict[str, Any]:
    with safe_open(patch, framework="pt") as file:
        return dict(json.loads(file.metadata()["record"]))


def test_what_is_cut_short_or_no_patch_is_refused(patch: Path, tiny: Tiny, tmp_path: Path, run: Run) -> None:
    raw = patch.read_bytes()
    shard = (tiny.path / "model.safetensors").read_bytes()
    flipped = bytearray(raw)
    flipped[-3] ^= 4
    huge = (2**40).to_bytes(8, "little") + raw[8:]
    for content in (
        b"",
        raw[:7],
        raw[:1000],
        raw[:-1],
        raw + b"\0",
        bytes(flipped),
        shard,
        b"{}" * 500,
        huge,
    ):
        patch.write_bytes(content)
        refused(run, tmp_path / "out", tiny.path, "--patch", patch, says="patch file", code=3)
    refused(run, tmp_path / "out", tiny.path, "--patch", tmp_path / "nothing", says="No such file", code=4)
    refused(run, tmp_path / "out", tiny.path, "--patch", tmp_path, says="not a regular file", code=4)


def test_forged_digests_ranges_and_names_are_refused(
    patch: Path, tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    whole, tensors, said = patch.read_bytes(), load_file(patch), record(patch)
    name = next(iter(tensors))
    attacks: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = [
        ({**tensors, name: tensors[name] + 1}, said),
        (tensors, {**said, "digests": {**said["digests"], name: ["0" * 64, "f" * 64]}}),
        (tensors, {**said, "digests": {**said["digests"], name: ["0" * 64]}}),
        (tensors, {**said, "digests": {**said["digests"], name: ["0" * 64, said["digests"][name][1]]}}),
        (tensors, {**said, "digests": {}}),
        (tensors, {**said, "digests": [1]}),
        (tensors, {**said, "reads": {}}),
        (tensors, {**said, "former": {"qkpatch.json": 0}}),
        (tensors, {**said, "more": 1}),
        ({n: t for n, t in tensors.items() if n != name}, said),
    ]
    tensor = name.partition("[")[0]
    for other in (
        f"{tensor}[24:40]", f"{tensor}[8:0]", f"{tensor}[0:99999999999999999999]", f"{tensor}[-8:0]", f"{tensor}[1:9]",
        "../../etc/passwd[0:8]", tiny.name(0, "k") + "[0:8]", "model.embed_tokens.weight[0:8]", "qkpatch.json", "[0:8]",
    ):  # fmt: skip
        moved = {(other if n == name else n): t for n, t in tensors.items()}
        digests = {(other if n == name else n): d for n, d in said["digests"].items()}
        attacks.append((moved, {**said, "digests": digests}))
    for forged, says in attacks:
        patch.write_bytes(whole)
        rewritten(patch, forged, record=json.dumps(says))
        result = run("apply", tiny.path, "--patch", patch, "-o", tmp_path / "out")
        assert result.exit_code in (2, 3), (says, result.output)
        assert "Traceback" not in result.output
        assert not (tmp_path / "out").exists()


def test_rows_of_an_empty_tensor_are_none(tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "tiny", extra={"empty": torch.zeros(4, 0), "one": torch.tensor(1.0)}).path
    patch = qkpatch.make_patch(qkpatch.plan(source, layers=1), tmp_path / "edit.qkpatch")
    whole, nothing = patch.read_bytes(), hashlib.sha256().hexdigest()
    for name, tensor in (("empty[0:2]", torch.zeros(2, 0)), ("one[0:0]", torch.zeros(0))):
        patch.write_bytes(whole)
        said = record(patch)
        said["digests"][name] = [nothing, nothing]
        rewritten(patch, {**load_file(patch), name: tensor}, record=json.dumps(said))
        with pytest.raises(UsageError, match="is not there"):
            qkpatch.plan(source, patch=patch)


def test_an_uneven_edit_travels_in_a_patch(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    edit = tmp_path / "edit.yaml"
    edit.write_text("edits:\n- {layers: 0, modes: 2, alpha: 0.5}\n- {layers: 1-2, energy: 0.3, alpha: 0}\n")
    assert run("apply", tiny.path, "--config", edit, "-o", tmp_path / "direct").exit_code == 0
    made = run("apply", tiny.path, "--config", edit, "--patch-only", "-o", tmp_path / "edit.qkpatch")
    assert made.exit_code == 0, made.output
    assert (
        run("apply", tiny.path, "--patch", tmp_path / "edit.qkpatch", "-o", tmp_path / "patched").exit_code
        == 0
    )
    assert contents(tmp_path / "patched") == contents(tmp_path / "direct")
    assert run("apply", tiny.path, "--in-place", "--config", edit).exit_code == 0
    assert run("apply", tiny.path, "--in-place", "--config", edit).exit_code == 0
    assert run("revert", tiny.path).exit_code == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "qkpatch/1"}', "null", "9" * 500])
def test_a_broken_manifest_or_record_is_refused(text: str, patch: Path, tiny: Tiny) -> None:
    whole = patch.read_bytes()
    for key in ("manifest", "record"):
        patch.write_bytes(whole)
        rewritten(patch, **{key: text})
        with pytest.raises(CheckpointError):
            qkpatch.plan(tiny.path, patch=patch)


def test_figures_of_other_heads_are_refused(patch: Path, tiny: Tiny) -> None:
    with safe_open(patch, framework="pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    manifest["edits"][0]["heads"].pop()
    rewritten(patch, manifest=json.dumps(manifest))
    with pytest.raises(UsageError, match="other rows"):
        qkpatch.plan(tiny.path, patch=patch)


# -------- faults


def test_what_is_there_is_not_replaced(patch: Path, tiny: Tiny, tmp_path: Path) -> None:
    plan, before = qkpatch.plan(tiny.path), patch.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        qkpatch.make_patch(plan, patch)
    assert patch.read_bytes() == before
    with pytest.raises(UsageError, match="lies in SOURCE"):
        qkpatch.make_patch(plan, tiny.path / "edit.qkpatch")
    with pytest.raises(FileSystemError):
        qkpatch.make_patch(plan, tmp_path / "nowhere" / "edit.qkpatch")


@pytest.mark.parametrize("can", [pytest.param("unnamed files", marks=pytest.mark.linux), "links", "neither"])
def test_what_comes_there_meanwhile_is_not_replaced_and_a_kill_leaves_nothing(
    can: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, file = qkpatch.plan(tiny.path, layers=1), tmp_path / "folder" / "edit.qkpatch"
    file.parent.mkdir()
    seen, write = list[list[str]](), in_place.write_patch
    opens, links = os.open, os.link

    def refusing(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & (unnamed := getattr(os, "O_TMPFILE", -1)) == unnamed:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return opens(path, flags, *arguments, **named)

    def unlinking(*arguments: Any, **named: Any) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    def watched(*arguments: Any) -> None:
        write(*arguments)
        seen.append(os.listdir(file.parent))

    monkeypatch.setattr(in_place, "write_patch", watched)
    if can != "unnamed files":
        monkeypatch.setattr(os, "open", refusing)
        monkeypatch.setattr(os, "link", links if can == "links" else unlinking)
    made = qkpatch.make_patch(plan, file)
    assert [name.rpartition(".")[0] for name in seen.pop()] == ["edit.qkpatch"] * (can != "unnamed files")
    assert os.listdir(file.parent) == ["edit.qkpatch"]
    whole = made.read_bytes()
    made.unlink()

    def late(*arguments: Any) -> None:
        write(*arguments)
        file.write_text("mine")

    monkeypatch.setattr(in_place, "write_patch", late)
    with pytest.raises(UsageError, match="came into being while qkpatch was running"):
        qkpatch.make_patch(plan, file)
    assert file.read_text() == "mine"
    assert os.listdir(file.parent) == ["edit.qkpatch"]
    file.unlink()
    monkeypatch.undo()
    assert qkpatch.make_patch(plan, file).read_bytes() == whole


def test_a_full_disk_leaves_no_patch(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for at in (1, 5, 14, 20):
        fill_disk(monkeypatch, at)
        with pytest.raises(FileSystemError, match="No space left"):
            qkpatch.make_patch(qkpatch.plan(tiny.path, layers=range(3)), place / "edit.qkpatch")
        monkeypatch.undo()
        assert list(place.iterdir()) == []


def test_an_undo_file_is_no_patch(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    assert run("apply", tiny.path, "--in-place").exit_code == 0
    undo = shutil.copy(tiny.path / "qkpatch.undo", tmp_path / "undo.qkpatch")
    refused(run, tmp_path / "out", tiny.path, "--patch", undo, says="qkpatch revert")


def test_a_patch_is_no_undo_file(patch: Path, tiny: Tiny, run: Run) -> None:
    shutil.copy(patch, tiny.path / "qkpatch.undo")
    before = contents(tiny.path)
    result = run("revert", tiny.path)
    assert result.exit_code == 2, result.output
    assert contents(tiny.path) == before
