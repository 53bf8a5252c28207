"""What is refused before a byte is written; what stands where an adapter goes; the edit that a manifest records."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import torch
from commands import last_said
from conftest import Tiny, build_tiny
from fake_hub import FakeHub, Repo, hub_environment, run_qkpatch
from safetensors.torch import load_file, save_file
from typer.testing import Result

import qkpatch
from qkpatch.common.observer import UNSEEN
from qkpatch.errors import UsageError

Run = Callable[..., Result]
SCHEMA = json.loads((resources.files("qkpatch") / "planning" / "manifest.schema.json").read_text())
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "qkpatch.json"]


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("flags", "code", "what", "cure"),
    [
        (["--select", "shrink"], 3, "full rank", "qkpatch apply"),
        (["--alpha", "1"], 2, "alpha 1 changes nothing", "smaller"),
        (["--max-rank", "15"], 2, "make rank 16 in layer 1", "--modes 3, or --max-rank 16"),
        (["--max-rank", "3"], 2, "more than 3", "--heads 0-2 --modes 1, or --max-rank 16"),
        (["--channel", "antisymmetric", "--modes", "3", "--max-rank", "12"], 2, "make rank 16", "--modes 2"),
        (["--channel", "antisymmetric", "--max-rank", "1"], 2, "more than 1", "--max-rank 16"),
        (["--max-rank", "0"], 2, "0 is not between 1 and", "-"),
        (["--for", "vllm", "--max-rank", "513"], 2, "513 is not between 1 and 512", "-"),
        (["--max-shard-size", "1GB"], 2, "no such option", "-"),
        (["--device", "cuda:99"], 2, "is not there", "cpu"),
        (["--threads", "0"], 2, "is not between", "-"),
        (["--layers", "7"], 2, "out of range", "-"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_adapter_holds_is_refused_with_what_does(
    flags: list[str], code: int, what: str, cure: str, tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    before = contents(tmp_path)
    result = run("lora", tiny.path, *last_said("--layers", "1", *flags), "-o", tmp_path / "a")
    assert result.exit_code == code, result.output
    assert what in result.stderr
    assert cure == "-" or cure in result.stderr
    assert contents(tmp_path) == before
    if cure.startswith("--"):  # each of the cures helps
        for each in cure.split(", or "):
            rest = flags[: flags.index("--max-rank")] if "--max-rank" in each else flags
            words = last_said("--layers", "1", *rest, *each.split())
            again = run("lora", tiny.path, *words, "-o", tmp_path / each)
            assert again.exit_code == 0, again.output


def test_an_adapter_has_no_shards(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no shards"):
        qkpatch.lora(tiny.path, tmp_path / "a", layers=[1], max_shard_size="1GB")


def test_of_an_energy_the_rank_is_known_once_modes_are_counted(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    flags = ("lora", tiny.path, "--layers", "1", "--energy", "0.9", "--modes", "8")
    made = run(*flags, "-o", tmp_path / "a", "--json")
    rank = json.loads(made.stdout)["adapter"]["rank"]
    assert 4 < rank < 32
    result = run(*flags, "--max-rank", rank - 1, "-o", tmp_path / "b")
    assert result.exit_code == 2
    assert f"make rank {rank} in layer 1" in result.stderr
    assert not (tmp_path / "b").exists()
    assert (
        run(*flags[:-2], "--modes", (rank - 1) // 4, "--max-rank", rank - 1, "-o", tmp_path / "b").exit_code
        == 0
    )


def test_weights_that_are_none_are_refused_and_nothing_is_left(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source", dtype=torch.float64).path
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    for value, what in (
        (torch.nan, "NaN or Inf"),
        (1e60, "float32 does not hold"),
        (0.0, "the product is zero"),
    ):
        damaged = tensors[name].clone()
        damaged[:] = damaged * value if value == value else value
        save_file({**tensors, name: damaged}, source / "model.safetensors", {"format": "pt"})
        result = run("lora", source, "--layers", "1", "-o", tmp_path / "a")
        assert result.exit_code == 3, result.output
        assert what in result.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_interrupt_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    class Interrupting(type(UNSEEN)):  # type: ignore[misc]
        def edited(self, n_heads: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qkpatch.lora(tiny.path, tmp_path / "a", layers="0-2", observer=Interrupting())
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_what_stands_there_stays_unless_it_is_an_adapter_as_it_was_left(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "a"
    make = ("lora", tiny.path, "-o", out, "--layers")
    assert run(*make, "1").exit_code == 0
    first = contents(out)
    assert list(first) == FILES
    result = run(*make, "2")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert run(*make, "1").exit_code == 2  # not even the same
    assert contents(out) == first
    assert run(*make, "2", "--overwrite").exit_code == 0
    second = contents(out)
    assert second != first
    for name in FILES:
        (out / name).write_bytes(second[name] + b" ")
        result = run(*make, "1", "--overwrite")
        assert result.exit_code == 2, name
        assert name in result.stderr
        (out / name).write_bytes(second[name])
    (out / "trained.txt").write_text("mine")
    assert run(*make, "1", "--overwrite").exit_code == 2
    assert run(*make, "1", "--overwrite", "--force").exit_code == 0
    assert contents(out) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "tiny"]


def test_it_is_never_written_into_source_or_over_the_checkpoint_of_the_same_edit(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    assert run("apply", tiny.path, "--layers", "1", "-o", tmp_path / "out").exit_code == 0
    before = contents(tmp_path)
    for out in (tiny.path, tiny.path / "a", tmp_path / "out", tmp_path / "a.safetensors", Path()):
        assert run("lora", tiny.path, "--layers", "1", "-o", out).exit_code == 2, out
    assert contents(tmp_path) == before


def test_the_record_is_a_manifest_and_the_same_run_gives_the_same_bytes(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    result = run("lora", tiny.path, "--layers", "0-2", "--for", "vllm", "--json", "-o", tmp_path / "a")
    document = json.loads(result.stdout)
    jsonschema.validate(document, SCHEMA)
    assert document == json.loads((tmp_path / "a" / "qkpatch.json").read_text())
    assert document["adapter"]["max_lora_rank"] == 16
    (tmp_path / "b").mkdir()  # an empty directory is no hindrance
    again = qkpatch.lora(tiny.path, tmp_path / "b" / "a", layers="0-2", runtime="vllm", threads=3)
    assert again.to_json() == document
    assert contents(tmp_path / "b" / "a") == contents(tmp_path / "a")
    (tmp_path / "c").mkdir()
    text = run("lora", tiny.path, "--layers", "0-2", "--for", "vllm", "-o", tmp_path / "c").stdout
    assert "--max-lora-rank 16" in text
    assert "vLLM was not run" in text
    assert run("verify", tmp_path / "a", "--source", tiny.path).exit_code == 3
    assert run("plan", tmp_path / "a").exit_code == 3


def test_the_recorded_edit_is_made_again(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    edit = ("--layers", "1-2", "--modes", "2", "--select", "random", "--seed", "7", "--heads", "1-3")
    out, direct = tmp_path / "out", tmp_path / "direct"
    assert run("apply", tiny.path, *edit, "--max-shard-size", "1kB", "-o", out).exit_code == 0
    assert run("lora", tiny.path, *edit, "-o", direct).exit_code == 0
    assert run("lora", tiny.path, "--from", out, "-o", tmp_path / "from" / "direct").exit_code == 0
    assert contents(direct) == contents(tmp_path / "from" / "direct")
    # An adapter records its edit too.
    assert run("lora", tiny.path, "--from", direct, "-o", tmp_path / "again" / "direct").exit_code == 0
    assert contents(direct) == contents(tmp_path / "again" / "direct")

    other = build_tiny(tmp_path / "other" / "tiny", seed=1).path
    before = contents(tmp_path)
    for arguments, what in (
        (["--from", out], "nothing records where that is"),
        ([tiny.path, "--from", out, "--layers", "1"], "leave out the flags of an edit"),
        ([other, "--from", out], "is another tensor than was edited"),
        ([tiny.path, "--from", tiny.path], "there is no qkpatch.json"),
        ([tiny.path, "--from", tmp_path / "nowhere"], "nowhere"),
        ([], "SOURCE is not named"),
    ):
        result = run("lora", *arguments, "-o", tmp_path / "b")
        assert result.exit_code in (2, 3, 4), result.output
        assert what in result.stderr
    assert contents(tmp_path) == before


@pytest.mark.long
def test_from_the_hub_headers_and_rows_are_fetched_and_the_base_is_named(
    hub: FakeHub, tmp_path: Path
) -> None:
    big = {"model.big.weight": torch.zeros(1 << 20)}
    repo = Repo(build_tiny(tmp_path / "model", extra=big).path)
    (repo.path / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    hub.repos["org/model"] = repo
    environment = hub_environment(hub.endpoint, tmp_path / "home")

    def call(*arguments: object) -> str:
        done = run_qkpatch(environment, *arguments)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    call("lora", "org/model", "--layers", "1", "-o", tmp_path / "a")
    assert hub.sent_of("model.safetensors") < 1 << 20
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", repo.commit)
    card = (tmp_path / "a" / "README.md").read_text()
    for line in (
        "license: mit",
        "base_model: org/model",
        "base_model_relation: adapter",
        "library_name: peft",
    ):
        assert line in card.splitlines()
    assert "# Base" not in card
    call("apply", "org/model", "--layers", "1", "-o", tmp_path / "out")
    call("lora", "--from", tmp_path / "out", "-o", tmp_path / "b" / "a")
    first, again = contents(tmp_path / "a"), contents(tmp_path / "b" / "a")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert first[name] == again[name]
