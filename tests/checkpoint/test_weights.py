"""Which files of a folder are the weights: those that transformers loads, whatever an index says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from safetensors.torch import load_file, save_file
from test_folders import INDEX, Run, apply, names, refused

from qkpatch.checkpoint.weights import index_name


def shard(path: Path, **how: Any) -> Tiny:
    return build_tiny(path, shards=[("q_proj",), ("k_proj",), ("",)], **how)


def rename_variant(folder: Path) -> None:
    """As ``save_pretrained(variant="fp16")`` names things."""
    index = json.loads((folder / INDEX).read_text())
    for name in sorted(set(index["weight_map"].values())):
        (folder / name).rename(folder / name.replace("model-", "model.fp16-"))
    index["weight_map"] = {t: s.replace("model-", "model.fp16-") for t, s in index["weight_map"].items()}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    (folder / INDEX).unlink()


def test_a_stale_index_beside_a_whole_file(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    (tiny.path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    said = apply(run, tiny.path, tmp_path / "out")
    assert (
        f"{INDEX} is stale, and model.safetensors is taken: the index names 1 file(s) that are not there"
        in said
    )
    assert loaded_query(tmp_path / "out", 1) != loaded_query(tiny.path, 1)
    apply(run, tiny.path, tmp_path / "anew", "--max-shard-size", "4KB")
    assert loaded_query(tmp_path / "out", 1) == loaded_query(tmp_path / "anew", 1)
    apply(run, tiny.path, tmp_path / "one", "--max-shard-size", "1GB")
    assert INDEX not in names(tmp_path / "one")


@pytest.mark.parametrize("kind", ["too much", "too little", "elsewhere", "./", "NaN"])
def test_an_index_that_is_wrong_where_nothing_is_edited(tmp_path: Path, run: Run, kind: str) -> None:
    tiny = shard(tmp_path / "sharded")
    index = json.loads((tiny.path / INDEX).read_text())
    weight_map = index["weight_map"]
    if kind == "too much":
        weight_map["model.layers.1.self_attn.rotary_emb.inv_freq"] = "model-00001-of-00003.safetensors"
    elif kind == "too little":
        del weight_map[tiny.name(1, "v")]
    elif kind == "elsewhere":
        weight_map[tiny.name(0, "k")] = "model-00001-of-00003.safetensors"
    elif kind == "./":
        index["weight_map"] = {name: f"./{file}" for name, file in weight_map.items()}
    else:
        index["metadata"]["total_size"] = float("nan")
    (tiny.path / INDEX).write_text(json.dumps(index))
    said = apply(run, tiny.path, tmp_path / "out")
    assert ("the index is wrong about" in said) == (kind in ("too much", "too little", "elsewhere"))
    apply(run, tiny.path, tmp_path / "anew", "--max-shard-size", "4KB")
    assert (
        loaded_query(tmp_path / "out", 1) == loaded_query(tmp_path / "anew", 1) != loaded_query(tiny.path, 1)
    )


def test_a_variant_with_an_index_of_its_own(tmp_path: Path, run: Run) -> None:
    tiny = shard(tmp_path / "sharded")
    rename_variant(tiny.path)
    said = apply(run, tiny.path, tmp_path / "out")
    assert "transformers loads model.fp16* with variant='fp16' alone" in said
    assert loaded_query(tmp_path / "out", 1, variant="fp16") != loaded_query(tiny.path, 1, variant="fp16")
    apply(run, tiny.path, tmp_path / "one", "--max-shard-size", "1GB")
    assert "model.fp16.safetensors" in names(tmp_path / "one")


def test_a_variant_is_resharded_under_names_that_are_loaded(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    (tiny.path / "model.safetensors").rename(tiny.path / "model.fp16.safetensors")
    apply(run, tiny.path, tmp_path / "out", "--max-shard-size", "4KB")
    assert "model.safetensors.index.fp16.json" in names(tmp_path / "out")
    assert loaded_query(tmp_path / "out", 1, variant="fp16") != loaded_query(tiny.path, 1, variant="fp16")


@pytest.mark.parametrize("stem", ["model", "model.fp16", "model.non_ema.v2", "diffusion_pytorch_model.bf16"])
def test_names_of_variants_are_those_of_transformers(stem: str) -> None:
    from transformers.modeling_utils import _add_variant

    base, _, variant = stem.partition(".")
    assert index_name(stem) == _add_variant(f"{base}.safetensors.index.json", variant or None)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_complete_set_of_shards_without_an_index(tmp_path: Path, run: Run, variant: str | None) -> None:
    tiny = shard(tmp_path / "sharded")
    if variant:
        rename_variant(tiny.path)
    name = index_name("model" if variant is None else "model.fp16")
    (tiny.path / name).unlink()
    said = apply(run, tiny.path, tmp_path / "out")
    assert f"there is no index: it is derived from the shards' headers, and OUT gets it: {name}" in said
    apply(run, tiny.path, tmp_path / "anew", "--max-shard-size", "4KB")
    assert loaded_query(tmp_path / "out", 1, variant=variant) == loaded_query(
        tmp_path / "anew", 1, variant=variant
    )
    with pytest.raises(OSError, match="no file named"):
        loaded_query(tiny.path, 1, variant=variant)


def test_a_set_of_one_shard_gets_an_index_too(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    (tiny.path / "model.safetensors").rename(tiny.path / "model-00001-of-00001.safetensors")
    apply(run, tiny.path, tmp_path / "out")
    assert INDEX in names(tmp_path / "out")
    assert loaded_query(tmp_path / "out", 1)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_missing_shard_is_named(tmp_path: Path, run: Run, lost: int, indexed: bool) -> None:
    tiny = shard(tmp_path / "sharded")
    if not indexed:
        (tiny.path / INDEX).unlink()
    (tiny.path / f"model-0000{lost}-of-00003.safetensors").unlink()
    assert f"model-0000{lost}-of-00003.safetensors" in refused(run, tiny.path)


def test_the_last_of_many_shards_alone_is_no_model(tmp_path: Path, run: Run) -> None:
    tiny = shard(tmp_path / "sharded")
    (tiny.path / INDEX).unlink()
    for i in (1, 3):
        (tiny.path / f"model-0000{i}-of-00003.safetensors").unlink()
    said = refused(run, tiny.path)
    assert "2 shard(s) are not there: model-00001-of-00003.safetensors, model-00003" in said
    assert "at one file" not in said


def test_what_config_makes_transformers_load_is_what_is_edited(tiny: Tiny, run: Run) -> None:
    config = json.loads((tiny.path / "config.json").read_text())
    (tiny.path / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    save_file({"a": torch.zeros(1)}, tiny.path / "other.safetensors")
    assert "makes transformers load other.safetensors, not model.safetensors" in refused(run, tiny.path)


def loaded_query(folder: Path, layer: int, variant: str | None = None) -> bytes:
    """The query weight of a layer as transformers loads it."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        **json.loads((folder / "config.json").read_text()), vocab_size=11, intermediate_size=8
    )
    model = LlamaModel.from_pretrained(
        folder,
        config=config,
        variant=variant,
        use_safetensors=True,
        dtype=torch.bfloat16,
        ignore_mismatched_sizes=False,
    )
    return bytes(model.layers[layer].self_attn.q_proj.weight.detach().view(torch.uint8).numpy().tobytes())


def test_a_shard_that_is_to_replace_values_of_another(tmp_path: Path, run: Run) -> None:
    tiny = shard(tmp_path / "sharded")
    path = tiny.path / "model-00003-of-00003.safetensors"
    save_file({**load_file(path), tiny.name(2, "k"): torch.zeros(16, 24)}, path, {"format": "pt"})
    said = refused(run, tiny.path)
    assert "stored twice, in model-00002-of-00003.safetensors and model-00003-of-00003.safetensors" in said
    assert "save_pretrained" in said
