"""Files made to harm: paths that lead away, bombs of memory and time, code. Never a traceback, and nothing is run."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import re
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPO, Tiny, build_tiny
from hostile import Run, calm, grown_mib, linux

from qkpatch.checkpoint.files import MAX_JSON_BYTES
from qkpatch.common.number_ranges import parse_ranges
from qkpatch.common.strict_yaml import MAX_BYTES, load_yaml
from qkpatch.errors import RecipeError, UsageError
from qkpatch.planning.request import parse_request
from qkpatch.recipes.reading import parse_recipe

# -------- config.json

COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def reconfigure(tiny: Tiny, **changes: object) -> None:
    path = tiny.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestConfig:
    @pytest.mark.parametrize(
        "value", [10**9, 10**30, 2**20, 2**20 + 1, 2**31, 0, -1, 1.5, 1e999, "32", [32], {}, True]
    )
    @pytest.mark.parametrize("key", COUNTS)
    def test_absurd_counts_are_refused(self, key: str, value: object, tiny: Tiny, run: Run) -> None:
        reconfigure(tiny, **{key: value})
        calm(run("plan", tiny.path), 3)

    @pytest.mark.long
    @linux
    @pytest.mark.parametrize("value", [10**9, 2**20])
    @pytest.mark.parametrize("key", COUNTS)
    def test_memory_does_not_follow_the_counts(self, key: str, value: int, tiny: Tiny) -> None:
        reconfigure(tiny, **{key: value})
        assert grown_mib("plan", tiny.path) < 64

    def test_a_number_of_digits_beyond_python_is_no_number(self, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        path.write_text(path.read_text()[:-1] + f', "num_hidden_layers": {"9" * 5000}}}')
        calm(run("plan", tiny.path), 3)

    @pytest.mark.parametrize("depth", [100, 900, 100_000])
    def test_nesting_anywhere(self, depth: int, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        text = path.read_text()[:-1]
        for key in ("extra", "text_config", "layer_types", "per_layer_config", "num_hidden_layers"):
            path.write_text(f'{text}, "{key}": {"[" * depth}{"]" * depth}}}')
            calm(run("plan", tiny.path), 0, 3)

    def test_a_config_above_the_limit_is_not_read(self, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        os.truncate(path, MAX_JSON_BYTES + 1)
        start = time.perf_counter()
        assert "more than any real file" in calm(run("plan", tiny.path), 3)
        assert time.perf_counter() - start < 5

    @pytest.mark.parametrize(
        "text", ["NaN", "1e999", "-Infinity", "[]", "{}", "null", '"x"', "true", "9" * 400]
    )
    @pytest.mark.parametrize(
        "key", ["query_pre_attn_scalar", "attn_logit_softcapping", "rope_theta", "torch_dtype"]
    )
    def test_numbers_that_are_only_recorded(self, key: str, text: str, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        path.write_text(f'{path.read_text()[:-1]}, "{key}": {text}}}')
        calm(run("plan", tiny.path, "--json"), 0, 3)

    @pytest.mark.parametrize(
        "value",
        ["NaN", "Infinity", "1e999", '{"a": NaN}', r'"\ud800"', "[" * 450 + "]" * 450, "[" * 900 + "]" * 900],
    )
    def test_model_types_that_cannot_be_recorded(self, value: str, tiny: Tiny, run: Run) -> None:
        path = tiny.path / "config.json"
        path.write_text(path.read_text().replace('"llama"', value, 1))
        out = tiny.path.parent / "out"
        calm(run("plan", tiny.path, "--recipe", "llama", "--json"), 3)
        calm(run("apply", tiny.path, "--recipe", "llama", "--modes", 2, "-o", out), 3)
        assert not out.exists()

    def test_a_config_of_17_mib_is_no_config(self, tiny: Tiny, run: Run) -> None:
        """Parsed, it could take 25 times as much."""
        path = tiny.path / "config.json"
        path.write_text(path.read_text() + " " * (17 << 20))
        assert "more than any real file" in calm(run("plan", tiny.path), 3)

    @pytest.mark.parametrize("layer", ["9" * 5000, "-1", "٣", "²", "1.0", "", " 1", "0x1"])
    def test_layer_numbers_that_are_none(self, layer: str, tiny: Tiny, run: Run) -> None:
        reconfigure(tiny, per_layer_config={layer: {"head_dim": 4}})
        calm(run("plan", tiny.path), 0, 3)


# -------- index, paths, links


@pytest.fixture
def sharded(tmp_path: Path) -> Tiny:
    return build_tiny(tmp_path / "sharded", shards=[("q_proj",), ("",)])


def point(tiny: Tiny, shard: object) -> None:
    """Make the index say that one query is in ``shard``."""
    path = tiny.path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tiny.name(0, "q")] = shard
    path.write_text(json.dumps(index))


class TestPaths:
    @pytest.mark.parametrize(
        "shard",
        [
            "..", "../", "../model.safetensors", "sub/../../model.safetensors", "/", "//", "//host/share",
            "/proc/self/environ", "..\\m", "C:\\m",
            "\\\\host\\m", "m\0.safetensors", "../" * 500 + "etc/passwd", "\x00", "a\\b",
            "x" * 5000,
        ],
    )  # fmt: skip
    def test_an_index_that_leads_out_is_refused_as_such(self, shard: str, sharded: Tiny, run: Run) -> None:
        point(sharded, shard)
        output = calm(run("apply", sharded.path, "-o", sharded.path.parent / "out"), 3)
        assert "not a plain path inside the checkpoint" in " ".join(output.split())
        assert not (sharded.path.parent / "out").exists()

    @pytest.mark.parametrize(
        "shard",
        [
            "~/m.safetensors", "%2e%2e/m.safetensors", "．．/m.safetensors", "…", "file:m", "http:m", "$HOME",
            "`id`", "-rf",
            "m.safetensors ", "MODEL-00001-OF-00002.SAFETENSORS", "\u202e",
            "model.safetensors.index.json\n",
        ],
    )  # fmt: skip
    def test_an_index_with_other_odd_names_finds_no_such_file(
        self, shard: str, sharded: Tiny, run: Run
    ) -> None:
        point(sharded, shard)
        assert "not there" in calm(run("plan", sharded.path), 3)

    @pytest.mark.parametrize("shard", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
    def test_an_index_that_names_files_of_another_kind(self, shard: str, sharded: Tiny, run: Run) -> None:
        point(sharded, shard)
        calm(run("plan", sharded.path), 3)

    @pytest.mark.parametrize(
        "weight_map", [None, [], "x", 7, {}, {"a": None}, {"a": ["m"]}, {"a": {"m": 1}}, {"a": True}]
    )
    def test_a_weight_map_that_is_none(self, weight_map: object, sharded: Tiny, run: Run) -> None:
        (sharded.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        calm(run("plan", sharded.path), 3)

    def test_an_index_above_the_limit_is_not_read(self, sharded: Tiny, run: Run) -> None:
        os.truncate(sharded.path / "model.safetensors.index.json", MAX_JSON_BYTES + 1)
        assert "more than any real file" in calm(run("plan", sharded.path), 3)

    def test_a_link_that_leaves_the_directory_is_followed_and_its_content_copied(
        self, sharded: Tiny, run: Run
    ) -> None:
        """The Hub cache consists of such links, and people keep shards on another disk."""
        shard = sharded.path / "model-00001-of-00002.safetensors"
        blobs = sharded.path.parent / "blobs"
        blobs.mkdir()
        shard.rename(blobs / "0123")
        shard.symlink_to("../blobs/0123")
        before = (blobs / "0123").read_bytes()
        out = sharded.path.parent / "out"
        calm(run("apply", sharded.path, "-o", out, "--modes", 2), 0)
        assert (out / shard.name).is_file()
        assert not (out / shard.name).is_symlink()
        assert (blobs / "0123").read_bytes() == before
        calm(run("verify", out, "--source", sharded.path), 0)

    def test_a_shard_that_links_to_no_safetensors_file_is_refused_without_a_word_of_its_content(
        self, sharded: Tiny, run: Run
    ) -> None:
        secret = sharded.path.parent / "secret"
        secret.write_text("hunter2 " * 100)
        shard = sharded.path / "model-00001-of-00002.safetensors"
        shard.unlink()
        shard.symlink_to(secret)
        assert "hunter2" not in calm(run("apply", sharded.path, "-o", sharded.path.parent / "out"), 3)
        assert not (sharded.path.parent / "out").exists()


# -------- YAML


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (BOMB, "aliases"),
            ("a: &a {x: *a}", "aliases"),
            ("&a [*a]", "aliases"),
            ("<<: {modes: 1}", "tagged as"),
            ("alpha: !!bool x", "leave the tag out"),
            ('alpha: !!float ""', "leave the tag out"),
            ("!!map [a]", "leave the tag out"),
            ("!!set {a, b}", "leave the tag out"),
            ("!!omap [a: b]", "leave the tag out"),
            ("alpha: !!binary aGk=", "leave the tag out"),
            ("alpha: !!python/name:os.system", "leave the tag out"),
            ("!!python/object/apply:os.system ['true']", "leave the tag out"),
            ("alpha: ! x", "leave the tag out"),
            ("%TAG ! tag:yaml.org,2002:\n---\nalpha: !float x", "leave the tag out"),
            ('recipe: "\\Uffffffff"', "not valid YAML"),
            ('recipe: "\\U00110000"', "not valid YAML"),
            ('recipe: "\\ud800.yaml"', "holds the character"),
            ('recipe: "a\\0.yaml"', "holds the character"),
            ('"\\udfff": 1', "holds the character"),
            ("alpha: 0:00.5", "not a plain decimal number"),
            ("alpha: 0_0.5", "not a plain decimal number"),
            ("modes: 1_000", "not a plain decimal number"),
            ("modes: 0b1", "not a plain decimal number"),
            ("modes: +1", "not a plain decimal number"),
            (f"modes: {'9' * 5000}", "not valid YAML"),
            ("[" * 100_000, "nested too deeply"),
            ("{a: " * 100_000, "nested too deeply"),
            ("- " * 100_000, "nested too deeply"),
            ("? " * 100_000, "nested too deeply"),
            ("a: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
            ("a" * (MAX_BYTES + 1), "bytes of YAML"),
            ("%YAML 9.9\n---\na: 1", "incompatible"),
            ("a\0b: 1", "not valid YAML"),
            ("a: \x1b[31m", "not valid YAML"),
        ],
        ids=lambda text: text[:30],
    )  # fmt: skip
    def test_what_is_refused_in_settings_and_recipes(self, text: str, message: str) -> None:
        for parse in (parse_request, parse_recipe):
            with pytest.raises(RecipeError, match=re.escape(message)):
                parse(text.encode(), "x.yaml")

    @pytest.mark.parametrize("alpha", ["9" * 400, "-" + "9" * 400, "9" * 4000])
    def test_an_alpha_beyond_all_floats(self, alpha: str) -> None:
        with pytest.raises(RecipeError, match="not valid YAML"):
            parse_request(f"alpha: {alpha}".encode(), "edit.yaml")

    @pytest.mark.long
    def test_ranges_named_over_and_over_do_not_fill_the_memory(self) -> None:
        """A megabyte of YAML has room for a hundred thousand such ranges, each of which takes 40 MB."""
        tracemalloc.start()
        try:
            with pytest.raises(UsageError, match="named twice"):
                parse_ranges("0-999999," * 5 + "0", "--layers")
            assert tracemalloc.get_traced_memory()[1] < 150 << 20
        finally:
            tracemalloc.stop()

    def test_the_largest_alpha_that_is_a_float_is_still_only_out_of_range(self, tiny: Tiny, run: Run) -> None:
        (tiny.path / "edit.yaml").write_text(f"alpha: {10**299}\n")
        assert "is not between 0 and 1" in calm(
            run("plan", tiny.path, "--config", tiny.path / "edit.yaml"), 2
        )

    @pytest.mark.parametrize(
        "text",
        ["a: [" + "x," * 10_000 + "x]", "a:\n" + "\n" * 400_000, '"' + "\\n" * 200_000 + '": 1',
        "{" + "[,{" * 100_000],
        ids=["a long list", "blank lines", "escapes", "broken brackets"],
    )  # fmt: skip
    def test_no_text_takes_long(self, text: str) -> None:
        start = time.perf_counter()
        with contextlib.suppress(RecipeError):
            load_yaml(text.encode(), "x.yaml")
        assert time.perf_counter() - start < 20


# -------- names reach the terminal as text


HOSTILE = "model.\x1b[31m\x9b\u202e[bold]\x07.weight"


def test_hostile_tensor_names_in_every_report(tmp_path: Path, run: Run) -> None:
    tiny = build_tiny(tmp_path / "names", extra={HOSTILE: torch.zeros(3)})
    calm(run("plan", tiny.path), 0)
    calm(run("inspect", tiny.path, "--layers", 1), 0)
    out = tmp_path / "out"
    calm(run("apply", tiny.path, "--modes", 2, "-o", out), 0)
    raw = bytearray((out / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin = json.loads(raw[8 : 8 + length])[HOSTILE]["data_offsets"][0]
    raw[8 + length + begin] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    assert "differs outside the planned rows" in " ".join(
        calm(run("verify", out, "--source", tiny.path), 1).split()
    )


# -------- nothing that a file says is ever executed


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((REPO / "qkpatch").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "runpy",
    "transformers",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_ATTRIBUTES = {
    "torch": {"load", "jit", "hub"}, "numpy": {"load"}, "np": {"load"}, "yaml": {"load_all", "unsafe_load",
    "full_load", "Loader"},
    "os": {"system", "popen"},
}  # fmt: skip
# What imports by name, and who hands it a name of its own callers'.
BY_NAME = {"importlib.import_module": {"subject.py"}, "library": set[str]()}


def test_the_package_runs_nothing_out_of_a_file() -> None:
    for path, tree in trees():
        for node in ast.walk(tree):
            place = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES, place
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES, place
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in FORBIDDEN_CALLS, place
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.attr not in FORBIDDEN_ATTRIBUTES.get(node.value.id, set()), place
            if isinstance(node, ast.keyword):
                # What evaluates a model runs its code where the user asks for that.
                is_asked = path.parent.name == "evaluation" and not isinstance(node.value, ast.Constant)
                allowed = {"trust_remote_code"} if is_asked else set[str]()
                assert node.arg not in {"trust_remote_code", "allow_pickle", "shell"} - allowed, place


def test_what_is_imported_by_name_is_named_in_the_code() -> None:
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                said = [node.func, *node.args]
                for part, name in zip(map(ast.unparse, said), said[1:], strict=False):
                    if path.name not in BY_NAME.get(part, {path.name}):
                        assert isinstance(name, ast.Constant), f"{path.name}:{node.lineno}"


def test_the_package_does_not_even_name_what_would() -> None:
    for path in sorted((REPO / "qkpatch").rglob("*.py")):
        remote = "" if path.parent.name == "evaluation" else "|trust_remote_code"
        found = re.search(
            r"torch\.load|pickle\.|(?<![.])\beval\(|\bexec\(|unsafe_load" + remote, path.read_text()
        )
        assert found is None, f"{path.name}: {found}"
    loads = [p.name for p in (REPO / "qkpatch").rglob("*.py") if "yaml.load(" in p.read_text()]
    assert loads == ["strict_yaml.py"]


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_and_code_beside_the_weights_are_carried_over_and_never_run(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    (tiny.path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "pickled")))
    (tiny.path / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'imported')!r})\n")
    reconfigure(tiny, auto_map={"AutoModel": "modeling_evil.Model"}, trust_remote_code=True)
    out = tmp_path / "out"
    calm(run("apply", tiny.path, "--modes", 2, "-o", out), 0)
    calm(run("inspect", tiny.path, "--layers", 1), 0)
    calm(run("verify", out, "--source", tiny.path), 0)
    assert (out / "pytorch_model.bin").read_bytes() == (tiny.path / "pytorch_model.bin").read_bytes()
    assert not (tmp_path / "pickled").exists()
    assert not (tmp_path / "imported").exists()
    (tiny.path / "model.safetensors").unlink()
    calm(run("plan", tiny.path), 3)
    assert not (tmp_path / "pickled").exists()
