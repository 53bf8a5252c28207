"""Manifests made to harm: whatever a field holds, `verify` ends by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, Tiny
from hostile import Run, calm

from qkpatch.common.json_text import canonical_json
from qkpatch.errors import CheckpointError
from qkpatch.planning.manifest import Manifest

# -------- manifests


@pytest.fixture
def out(tiny: Tiny, run: Run, tmp_path: Path) -> Path:
    calm(run("apply", tiny.path, "--layers", "0-1", "--modes", 2, "-o", tmp_path / "out"), 0)
    return tmp_path / "out"


def set_at(document: Any, path: str, value: object) -> None:
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parents:
        document = document[part]
    document[last] = value


ABSURD = [
    0,
    -1,
    2**63,
    10**400,
    1.5,
    -0.0,
    True,
    None,
    "",
    "x",
    "\0",
    "\x1b[31m\u202e",
    "../../x",
    [],
    {},
    [[]],
    [None],
    ["x"],
]
FIELDS = [
    "recipe.name", "edit.attention", "edit.layers", "edit.heads", "edit.skipped_layers", "edit.modes",
    "edit.alpha",
    "edit.channel", "edit.select", "edit.seed", "edit.fold_norm", "edit.from_recipe", "model.num_attention_heads",
    "model.head_dim", "model.rows", "model.logits", "edits", "edits.0", "edits.0.tensor", "edits.0.shard",
    "edits.0.dtype",
    "edits.0.shape", "edits.0.byte_range", "edits.0.sha256_before", "edits.0.sha256_after", "edits.0.scale_tensor",
    "edits.0.key_tensor", "edits.0.heads", "edits.0.heads.0", "edits.0.heads.0.head", "edits.0.heads.0.kv_head",
    "edits.0.heads.0.gains", "files", "files.0", "files.0.name", "files.0.size", "files.0.action", "warnings",
    "run", "tool",
    "recipe", "edit", "model", "source", "compute", "schema",
]  # fmt: skip


class TestManifest:
    @pytest.mark.long
    @pytest.mark.parametrize("field", FIELDS)
    def test_verify_ends_by_itself_whatever_a_field_holds(
        self, field: str, out: Path, tiny: Tiny, run: Run
    ) -> None:
        good = (out / "qkpatch.json").read_text()
        for value in ABSURD:
            document = json.loads(good)
            set_at(document, field, value)
            (out / "qkpatch.json").write_text(json.dumps(document))
            calm(run("verify", out, "--source", tiny.path), 0, 1, 2, 3, 4)

    @pytest.mark.parametrize(
        ("field", "text"),
        [
            pytest.param("edits.0.byte_range", "[1e999, 0]"),
            pytest.param("edits.0.byte_range", "[0, -1e999]"),
            ("edit.alpha", "1e999"),
            ("edit.modes", "1e999"),
            ("edit.layers", "[1e999]"),
            pytest.param("run", '{"x": ' + "[" * 400 + "]" * 400 + "}"),
            pytest.param("run", '{"x": ' + '{"y": ' * 400 + "1" + "}" * 400 + "}"),
            pytest.param("model.logits", "[" * 900 + "]" * 900),
            ("run", "[" * 100_000),
            ("edit.seed", "9" * 5000),
            ("recipe.name", r'"\ud800"'),
            ("run", '{"a": 1, "a": 2}'),
        ],
    )
    def test_spellings_that_only_text_can_have(
        self, field: str, text: str, out: Path, tiny: Tiny, run: Run
    ) -> None:
        document = json.loads((out / "qkpatch.json").read_text())
        set_at(document, field, "HERE")
        (out / "qkpatch.json").write_text(json.dumps(document).replace('"HERE"', text))
        assert (
            "malformed manifest" in (output := calm(run("verify", out, "--source", tiny.path), 3))
            or "JSON" in output
        )

    @pytest.mark.parametrize(
        ("field", "value", "fault"),
        [
            ("edit.modes", "4", "$.edit.modes: expected int, got str"),
            ("edit.modes", True, "$.edit.modes: expected int, got bool"),
            ("edit.alpha", "0.5", "$.edit.alpha: expected float, got str"),
            ("edit.layers", [1, None], "$.edit.layers[1]: expected int, got NoneType"),
            ("edit.channel", "half", "$.edit.channel: 'half' is not one of full, symmetric, antisymmetric"),
            ("source.commit", 1, "$.source.commit: expected str, got int"),
            ("model.logits", {"scale": []}, "$.model.logits.scale: expected int, got list"),
            ("output", {}, "$.output.max_shard_size: missing"),
            ("edits.0.byte_range", [1], "$.edits[0].byte_range: expected 2 items, got 1"),
            ("edits.0.heads.0.gains", ["x"], "$.edits[0].heads[0].gains[0]: expected float, got str"),
            ("files.0.mine", 1, "$.files[0].mine: unknown key"),
        ],
    )
    def test_a_fault_says_where_it_is(self, field: str, value: Any, fault: str, out: Path) -> None:
        document = json.loads((out / "qkpatch.json").read_text())
        set_at(document, field, value)
        with pytest.raises(CheckpointError) as error:
            Manifest.loads(json.dumps(document).encode(), "m")
        assert error.value.what == f"malformed manifest: {fault}"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("run.started", "2026-02-30T15:35:10+00:00"),
            ("run.started", "2026-11-28T25:35:10+00:00"),
            ("run.finished", "2026-11-28 15:35:12+00:00"),
            ("run.copied_by.copy_file_range", -1),
            ("source.name", "a\nb"),
            ("source.requested_revision", "\u202e"),
            ("tool.version", "0.1.0\r\n"),
            ("compute.device", "\u2028"),
        ],
    )
    def test_texts_times_and_counts_that_are_none_are_refused(self, field: str, value: Any) -> None:
        document = json.loads((REPO / "tests" / "planning" / "goldens" / "defaults.json").read_bytes())
        set_at(document, field, value)
        with pytest.raises(CheckpointError, match=rf"malformed manifest: \$\.{field}: .* is no "):
            Manifest.loads(json.dumps(document).encode(), "m")

    def test_a_folder_of_several_lines_is_recorded_on_one(self, tiny: Tiny, run: Run, tmp_path: Path) -> None:
        source = tiny.path.rename(tmp_path / "two\nlines\xa0of it")
        calm(run("apply", source, "--layers", "1", "-o", tmp_path / "out"), 0)
        calm(run("verify", tmp_path / "out", "--source", source), 0)
        recorded = json.loads((tmp_path / "out" / "qkpatch.json").read_text())["source"]["name"]
        assert recorded == "two\\nlines\xa0of it"

    def test_keys_that_other_versions_add_to_a_block_are_kept(self, out: Path, tiny: Tiny, run: Run) -> None:
        document = json.loads((out / "qkpatch.json").read_text())
        for block in ("tool", "compute", "source", "recipe", "edit", "model", "output", "run"):
            document[block] |= {"further": 1, "mine": {"a": [None, 0.5]}}
        document["more"] = [1]
        document["tool"]["version"] = "99.0.0"
        (out / "qkpatch.json").write_text(text := canonical_json(document))
        assert Manifest.loads(text.encode(), "m").dumps() == text
        said = calm(run("verify", out, "--source", tiny.path), 0)
        assert "keys of another version, which nothing here looks at" in " ".join(said.split())

    def test_what_the_first_version_did_not_say_has_a_default(self) -> None:
        raw = (REPO / "tests" / "planning" / "goldens" / "defaults.json").read_bytes()
        manifest = Manifest.loads(raw, "m")
        assert (manifest.source.checked, manifest.source.previous_edit) == (None, None)
        assert not any(file.outside for file in manifest.files)
        assert Manifest.loads(manifest.dumps().encode(), "again") == manifest

    def test_edited_scales_that_source_does_not_store(self, out: Path, tiny: Tiny, run: Run) -> None:
        document = json.loads((out / "qkpatch.json").read_text())
        document["edits"][0] |= {"scale_tensor": "nope", "scale_shard": "model.safetensors"}
        (out / "qkpatch.json").write_text(json.dumps(document))
        calm(run("verify", out, "--source", tiny.path), 1)

    def test_a_request_out_of_a_manifest_can_be_checked(self, out: Path) -> None:
        manifest = Manifest.loads((out / "qkpatch.json").read_bytes(), "m")
        manifest.request()
