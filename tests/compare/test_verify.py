"""`verify` finds every way in which OUT can differ from SOURCE plus the edit that its manifest declares."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from safetensors.torch import load_file, save_file
from typer.testing import Result

SHARD = "model.safetensors"
Manifest = dict[str, Any]


@pytest.fixture
def out(tiny: Tiny, tmp_path: Path, run: Callable[..., Result]) -> Path:
    """A fresh output: head 0 of layer 1 is edited."""
    assert run("apply", tiny.path, "-o", tmp_path / "out", "--heads", "0").exit_code == 0
    return tmp_path / "out"


@pytest.fixture
def check(run: Callable[..., Result], tiny: Tiny, out: Path) -> Callable[..., dict[str, str]]:
    """Run ``verify --json`` on ``out``, expect exit code 1, and return what is wrong, by place."""

    def call(source: Path = tiny.path) -> dict[str, str]:
        result = run("verify", out, "--source", source, "--json")
        assert result.exit_code == 1, result.output
        document = json.loads(result.stdout)
        assert document["ok"] is False
        found: dict[str, str] = {}
        for mismatch in document["mismatches"]:
            found[mismatch["where"]] = f"{found.get(mismatch['where'], '')}{mismatch['what']}; "
        return found

    return call


def flip(path: Path, offset: int) -> None:
    """Change the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def place(path: Path, tensor: str) -> int:
    """Where a tensor's bytes begin in its file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return 8 + length + int(json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0])


def rewrite_manifest(out: Path, change: Callable[[Manifest], object]) -> None:
    manifest = json.loads((out / "qkpatch.json").read_bytes())
    change(manifest)
    (out / "qkpatch.json").write_text(json.dumps(manifest))


Check = Callable[..., dict[str, str]]


# -------- what passes


def test_a_fresh_output_passes(tiny: Tiny, out: Path, run: Callable[..., Result]) -> None:
    result = run("verify", out, "--source", tiny.path)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ok")
    assert run("verify", out, "--source", tiny.path, "--quiet").output == ""


def test_json_says_how_much_was_compared(tiny: Tiny, out: Path, run: Callable[..., Result]) -> None:
    result = run("verify", out, "--source", tiny.path, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "ok": True,
        "mismatches": [],
        "files": 3,
        "edited_tensors": 1,
        "notes": [],
        "arithmetic": {"heads": 1, "stack": "same", "differing_values": 0, "not_reproducible": []},
        "edited_bytes": 8 * 24 * 2,
        "compared_bytes": sum(path.stat().st_size for path in tiny.path.iterdir()),
    }


def test_a_moved_and_copied_output_passes(
    tiny: Tiny, out: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    shutil.copytree(out, tmp_path / "copy")
    shutil.move(tiny.path, tmp_path / "elsewhere")
    assert run("verify", tmp_path / "copy", "--source", tmp_path / "elsewhere").exit_code == 0


def test_verify_changes_nothing(tiny: Tiny, out: Path, run: Callable[..., Result]) -> None:
    def state() -> dict[Path, tuple[int, bytes]]:
        files = [p for root in (tiny.path, out) for p in root.rglob("*")]
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = state()
    assert run("verify", out, "--source", tiny.path).exit_code == 0
    assert state() == before


# -------- bytes


@pytest.mark.parametrize("which", ["v", "k"])
def test_a_flipped_byte_in_an_untouched_tensor_is_found(
    tiny: Tiny, out: Path, check: Check, which: str
) -> None:
    name = tiny.name(2, which)
    flip(out / SHARD, place(out / SHARD, name) + 5)
    found = check()
    assert found.keys() == {SHARD}
    assert name in found[SHARD]


def test_a_flipped_byte_in_a_planned_row_is_found(tiny: Tiny, out: Path, check: Check) -> None:
    name = tiny.name(1, "q")
    flip(out / SHARD, place(out / SHARD, name) + 5)
    assert "sha256_after" in check()[name]


@pytest.mark.parametrize("head", [1, 3])
def test_a_flipped_byte_in_the_rows_of_an_unplanned_head_is_found(
    tiny: Tiny, out: Path, check: Check, head: int
) -> None:
    name = tiny.name(1, "q")
    flip(out / SHARD, place(out / SHARD, name) + head * 8 * 24 * 2)
    assert name in check()[SHARD]


@pytest.mark.parametrize("offset", [0, 8, 20, 60])
def test_a_flipped_byte_in_the_header_is_found(out: Path, check: Check, offset: int) -> None:
    flip(out / SHARD, offset)
    assert "header" in check()[SHARD]


def test_a_flipped_byte_in_another_file_is_found(out: Path, check: Check) -> None:
    flip(out / "tokenizer.json", 1)
    assert "byte 1" in check()["tokenizer.json"]


@pytest.mark.parametrize("file", [SHARD, "config.json"])
@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_another_length_is_found(out: Path, check: Check, file: str, change: str) -> None:
    data = (out / file).read_bytes()
    (out / file).write_bytes(data[:-1] if change == "shorter" else data + b" ")
    assert str(len(data)) in check()[file]


def test_every_damage_is_listed(tiny: Tiny, out: Path, check: Check, run: Callable[..., Result]) -> None:
    flip(out / "tokenizer.json", 0)
    flip(out / SHARD, place(out / SHARD, tiny.name(0, "q")))
    (out / "extra").touch()
    (out / "config.json").unlink()
    assert check().keys() == {"tokenizer.json", SHARD, "extra", "config.json"}
    text = run("verify", out, "--source", tiny.path)
    assert text.exit_code == 1
    assert all(name in text.stdout for name in ("tokenizer.json", tiny.name(0, "q"), "extra", "config.json"))


# -------- files


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", SHARD])
def test_a_missing_file_is_found(out: Path, check: Check, file: str) -> None:
    (out / file).unlink()
    assert "missing from OUT" in check()[file]


@pytest.mark.parametrize("file", ["extra.txt", "sub/extra.py", "model-00002-of-00002.safetensors", ".hidden"])
def test_an_extra_file_is_found(out: Path, check: Check, file: str) -> None:
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("x")
    assert "not in SOURCE" in check()[file]


# -------- the manifest


@pytest.mark.parametrize("digest", ["sha256_before", "sha256_after"])
def test_an_altered_digest_is_found(tiny: Tiny, out: Path, check: Check, digest: str) -> None:
    rewrite_manifest(out, lambda m: m["edits"][0].update({digest: "0" * 64}))
    assert digest in check()[tiny.name(1, "q")]


def test_an_edit_that_the_manifest_conceals_is_found(tiny: Tiny, out: Path, check: Check) -> None:
    rewrite_manifest(out, lambda m: m["edits"].clear())
    assert tiny.name(1, "q") in check()


def test_an_edited_head_that_the_manifest_conceals_is_found(tiny: Tiny, out: Path, check: Check) -> None:
    rewrite_manifest(out, lambda m: m["edits"][0]["heads"].clear())
    assert tiny.name(1, "q") in check()


@pytest.mark.parametrize(
    "lie",
    [
        {"dtype": "F16"},
        {"shape": [24, 32]},
        {"byte_range": [0, 1536]},
        {"shard": "tokenizer.json"},
        {"shard": "elsewhere.safetensors"},
        {"tensor": "model.layers.9.self_attn.q_proj.weight"},
        {"tensor": "model.embed_tokens.weight"},
    ],
    ids=str,
)
def test_a_record_of_another_tensor_is_found(out: Path, check: Check, lie: Manifest) -> None:
    rewrite_manifest(out, lambda m: m["edits"][0].update(lie))
    assert check()


@pytest.mark.parametrize("head", [-1, -4, 4, 10**6])
def test_a_head_the_model_does_not_have_excuses_no_damage(
    tiny: Tiny, out: Path, check: Check, head: int
) -> None:
    """Head −1 would be the bytes before the query weight, which no digest covers."""
    begin = place(out / SHARD, tiny.name(1, "q"))
    flip(out / SHARD, begin - 1)
    rewrite_manifest(
        out, lambda m: m["edits"][0]["heads"].append({**m["edits"][0]["heads"][0], "head": head})
    )
    assert SHARD in check()


def test_the_manifest_cannot_declare_away_a_change_of_another_tensor(
    tiny: Tiny, out: Path, check: Check
) -> None:
    name = tiny.name(1, "v")
    flip(out / SHARD, place(out / SHARD, name))

    def claim(manifest: Manifest) -> None:
        manifest["edits"].append({**manifest["edits"][0], "tensor": name})

    rewrite_manifest(out, claim)
    assert check()


def test_a_second_record_of_a_tensor_excuses_no_damage_in_another_shard(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    source = build_tiny(tmp_path / "divided", shards=[["layers.1."], [""]])
    out, other = tmp_path / "out", "model-00002-of-00002.safetensors"
    assert run("apply", source.path, "-o", out, "--heads", "0").exit_code == 0

    def digest(root: Path, begin: int, end: int) -> str:
        return hashlib.sha256((root / other).read_bytes()[begin:end]).hexdigest()

    def claim(manifest: Manifest) -> None:
        (edit,) = manifest["edits"]
        begin, end = edit["byte_range"]
        flip(out / other, begin)
        lie = {"sha256_before": digest(source.path, begin, end), "sha256_after": digest(out, begin, end)}
        manifest["edits"].insert(0, {**edit, "shard": other, **lie})

    rewrite_manifest(out, claim)
    assert run("verify", out, "--source", source.path).exit_code in (1, 3)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "the modes": lambda m: m["edit"].update(modes=3),
    "layers": lambda m: m["edit"].update(layers=[0, 1]),
    "a layer's number": lambda m: m["edits"][0].update(layer=0),
    "the heads": lambda m: m["edits"][0]["heads"].pop(),
    "a key head": lambda m: m["edits"][0]["heads"][-1].update(kv_head=9),
    "the key tensor": lambda m: m["edits"][0].update(key_tensor="model.layers.0.self_attn.k_proj.weight"),
    "the number of heads": lambda m: m["model"].update(
        num_attention_heads=1, num_key_value_heads=1, head_dim=32
    ),
    "the recipe": lambda m: m["recipe"].update(name="qwen3"),
    "a file's action": lambda m: m["files"][0].update(action="patched"),
    "one more edit": lambda m: m["edits"].append(
        {**m["edits"][0], "tensor": "model.layers.0.self_attn.q_proj.weight"}
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_is_not_the_plan_its_edit_leads_to_is_found(
    lie: str, out: Path, tiny: Tiny, run
) -> None:
    rewrite_manifest(out, LIES[lie])
    assert run("verify", out, "--source", tiny.path).exit_code == 1


def test_a_file_in_a_folder_of_ones_own_is_found(out: Path, check: Check) -> None:
    (out / ".github").mkdir()
    (out / ".github" / "config").write_text("x")
    assert "not in SOURCE" in check()[".github/config"]


def test_a_file_list_that_is_not_sources_is_found(out: Path, check: Check) -> None:
    rewrite_manifest(out, lambda m: m["files"].pop())
    assert "record of this file" in check()["tokenizer.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"schema": "qkpatch/2"}',
        '{"schema": "qkpatch/1"}',
        '{"schema": "qkpatch/1", "schema": "qkpatch/1"}',
        "\xff",
        "[" * 100_000,
    ],
    ids=["empty", "list", "null", "object", "newer", "bare", "twice", "no utf-8", "deep"],
)
def test_a_malformed_manifest_is_refused(
    tiny: Tiny, out: Path, run: Callable[..., Result], text: str
) -> None:
    (out / "qkpatch.json").write_bytes(text.encode("latin-1"))
    result = run("verify", out, "--source", tiny.path)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 3
    assert "qkpatch.json" in result.stderr


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document, of lists the first element only."""
    found = [path] if path else []
    if isinstance(value, dict):
        found += [p for key, inner in value.items() for p in paths_in(inner, (*path, key))]
    elif isinstance(value, list) and value:
        found += paths_in(value[0], (*path, 0))
    return found


ABSENT = object()
NONSENSE = [ABSENT, None, "text", -1, [], {}]


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_a_manifest_with_nonsense_anywhere_is_refused_or_does_not_matter(
    tiny: Tiny, out: Path, run: Callable[..., Result], each: bool
) -> None:
    """At every place one kind of it in turn; under ``stress`` each."""
    text = (out / "qkpatch.json").read_text()
    stumbles = []
    for i, path in enumerate(paths_in(json.loads(text))):
        for value in NONSENSE if each else [NONSENSE[i % len(NONSENSE)]]:
            manifest = json.loads(text)
            parent = manifest
            for step in path[:-1]:
                parent = parent[step]
            if value is ABSENT:
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            (out / "qkpatch.json").write_text(json.dumps(manifest))
            result = run("verify", out, "--source", tiny.path, "--quiet")
            if not isinstance(result.exception, SystemExit | None) or result.exit_code not in (0, 1, 3):
                shown = "absent" if value is ABSENT else repr(value)
                stumbles.append(
                    f"{'.'.join(map(str, path))} {shown}: {result.exit_code} {result.exception!r}"
                )
    assert not stumbles, "\n".join(stumbles)


def test_a_directory_without_a_manifest_is_refused(tiny: Tiny, out: Path, run: Callable[..., Result]) -> None:
    (out / "qkpatch.json").unlink()
    result = run("verify", out, "--source", tiny.path)
    assert result.exit_code == 3
    assert "qkpatch.json" in result.stderr


def test_no_directory_at_all_is_an_error(tiny: Tiny, tmp_path: Path, run: Callable[..., Result]) -> None:
    assert run("verify", tmp_path / "nowhere", "--source", tiny.path).exit_code == 4


# -------- the wrong OUT, the wrong SOURCE


def test_a_plain_copy_of_source_is_found_out(tiny: Tiny, out: Path, check: Check) -> None:
    shutil.copy(tiny.path / SHARD, out / SHARD)
    assert check().keys() == {tiny.name(1, "q")}


def test_another_edit_of_the_same_source_is_found_out(
    tiny: Tiny, out: Path, tmp_path: Path, run: Callable[..., Result], check: Check
) -> None:
    assert run("apply", tiny.path, "-o", tmp_path / "b", "--heads", "0", "--alpha", "0").exit_code == 0
    shutil.copy(tmp_path / "b" / SHARD, out / SHARD)
    assert "sha256_after" in check()[tiny.name(1, "q")]


def test_a_source_with_other_values_is_found_out(tiny: Tiny, tmp_path: Path, check: Check) -> None:
    other = build_tiny(tmp_path / "other", seed=1)
    (said,) = check(other.path).items()
    assert said[0] == "qkpatch.json"
    assert "OUT was made from the directory 'tiny', and this is the directory 'other'" in said[1]
    assert tiny.name(1, "q") in said[1]


def test_a_source_that_differs_in_the_edited_rows_alone_is_found_out(
    tiny: Tiny, tmp_path: Path, check: Check
) -> None:
    shutil.copytree(tiny.path, tmp_path / "other")
    name, file = tiny.name(1, "q"), tmp_path / "other" / SHARD
    tensors = load_file(file)
    tensors[name][0] += 1
    save_file(tensors, file, {"format": "pt"})
    found = check(tmp_path / "other")
    assert found.keys() == {name}
    assert "sha256_before" in found[name]


def test_a_source_of_another_shape_is_found_out(tmp_path: Path, check: Check) -> None:
    assert SHARD in check(build_tiny(tmp_path / "other", n_layers=4).path)


def test_a_source_divided_otherwise_is_found_out(tmp_path: Path, check: Check) -> None:
    other = build_tiny(tmp_path / "other", shards=[["layers.1."], [""]])
    found = check(other.path)
    assert SHARD in found
    assert "model.safetensors.index.json" in found


def test_a_source_in_another_dtype_is_found_out(tiny: Tiny, tmp_path: Path, check: Check) -> None:
    other = build_tiny(tmp_path / "other", dtype=torch.float16)
    assert "of another dtype or shape there" in check(other.path)["qkpatch.json"]


def test_a_source_that_is_another_model_is_found_out(
    out: Path, tmp_path: Path, check: Check, run: Callable[..., Result]
) -> None:
    """It was once eleven mismatches, and the advice to choose another recipe."""
    other = build_tiny(
        tmp_path / "other", prefix="backbone.layers.{layer}.attn.", config={"model_type": "none"}
    )
    (said,) = check(other.path).values()
    assert "and this is the directory 'other'" in said
    assert "its edit cannot be made there" in said
    assert "--recipe" not in run("verify", out, "--source", other.path).stdout


def test_a_source_that_is_not_there_is_an_error(
    out: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run("verify", out, "--source", tmp_path / "nowhere").exit_code == 2


@pytest.mark.parametrize("made_from", ["directory", "file"])
def test_a_file_for_its_folder_is_one_sentence(made_from: str, tiny: Tiny, tmp_path: Path, run) -> None:
    sides = {"directory": tiny.path, "file": tiny.path / "model.safetensors"}
    other = next(kind for kind in sides if kind != made_from)
    assert run("apply", sides[made_from], "-o", tmp_path / "out").exit_code == 0
    assert run("verify", tmp_path / "out", "--source", sides[made_from]).exit_code == 0
    result = run("verify", tmp_path / "out", "--source", sides[other], "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["mismatches"]
    assert (
        f"OUT was made from the {made_from} {sides[made_from].name!r}, and this is the {other}"
        in found["what"]
    )
