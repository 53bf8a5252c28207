"""Adapters in PEFT, in the families' own classes: the checkpoint that ``apply`` writes, but for what float32 rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edited_families
import pytest
import torch
from adapters import CHANNELS, Agreement, agreement, load, main, save_source
from safetensors.torch import load_file, save_file
from test_modules import classes

import qkpatch

# One of each kind in the normal run: as stored and renamed, fused in three ways, gated, normed, with linear attention.
KINDS = (
    "llama", "phi3", "qwen3", "llava-1.5", "qwen2.5-vl", "gemma3", "internvl:qwen3", "qwen3.5", "fuyu", "molmo2",
    "blip2",
)  # fmt: skip


def assert_same(found: Agreement, modules: tuple[str, ...]) -> None:
    """The adapter is the checkpoint; one that is nowhere, or does nothing, is far from that."""
    assert sorted(found.modules) == sorted(modules)
    assert found.off <= 1
    assert found.logits <= found.bound
    assert found.moved > 8 * found.bound


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


CASES = [key for key, case in edited_families.CASES.items() if case.model_class in classes("peft")]


@pytest.mark.parametrize(
    "key", [key if key in KINDS else pytest.param(key, marks=pytest.mark.stress) for key in CASES]
)
def test_an_adapter_is_the_edited_checkpoint_in_every_channel(key: str, tmp_path: Path) -> None:
    case = edited_families.CASES[key]
    save_source(case, tmp_path / "source")
    for channel in CHANNELS:
        found = agreement(case, tmp_path / "source", tmp_path / channel, channel=channel)
        modules = config_of(tmp_path / channel / "adapter")["target_modules"]
        assert len(modules) == len(case.edited)
        assert_same(found, modules)
    if case.original is None:  # the other generation of stored names: the same modules
        save_source(case, tmp_path / "other", original=False)
        layers = f"{case.edited[0]}-{case.edited[-1]}"
        manifest = qkpatch.lora(tmp_path / "other", tmp_path / "names", layers=layers, modes=2, alpha=0.0)
        assert list(manifest.adapter.modules) == modules


@pytest.mark.long
@pytest.mark.parametrize(
    ("key", "edit"),
    [
        ("phi3", {"select": "random", "seed": 3}),
        ("phi3", {"select": "bottom", "alpha": 0.5}),
        ("phi3", {"select": "subspace", "seed": 1}),
        ("phi3", {"heads": "1,3", "modes": 3}),
        ("phi3", {"energy": 0.5, "modes": 6}),
        (
            "llava-1.5",
            {"edits": [{"layers": 1, "modes": 1}, {"layers": 2, "modes": 3, "channel": "symmetric"}]},
        ),
        ("gemma3", {"fold_norm": True}),
        ("gemma3", {"fold_norm": True, "channel": "antisymmetric", "modes": 1}),
        ("mllama", {"attention": "self,cross", "layers": "1-3"}),
        ("florence2", {"attention": "encoder"}),
        ("florence2", {"attention": "cross"}),
    ],
    ids=str,
)
def test_so_it_is_with_every_other_way_to_choose(key: str, edit: dict[str, Any], tmp_path: Path) -> None:
    case = edited_families.CASES[key]
    save_source(case, tmp_path / "source")
    found = agreement(case, tmp_path / "source", tmp_path, **edit)
    assert_same(found, config_of(tmp_path / "adapter")["target_modules"])


def test_one_that_does_nothing_or_is_nowhere_would_be_noticed(tmp_path: Path) -> None:
    case = edited_families.CASES["llava-1.5"]
    save_source(case, tmp_path / "source")
    found = agreement(case, tmp_path / "source", tmp_path, layers="1-2")
    modules = config_of(tmp_path / "adapter")["target_modules"]
    assert_same(found, modules)
    for wrong in (
        {"logits": found.moved},  # as the base
        {"modules": found.modules[1:]},
        {"off": 2.0},
        {"moved": 0.0},
    ):
        with pytest.raises(AssertionError):
            assert_same(Agreement(**{**vars(found), **wrong}), modules)
    # Names as they are stored are not those of the class, and PEFT says so.
    config = config_of(tmp_path / "adapter")
    config["target_modules"] = [m.replace("model.language_model.", "language_model.model.") for m in modules]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    from peft import PeftModel

    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(load(case, tmp_path / "source"), tmp_path / "adapter")


def test_the_files_are_as_peft_has_them(tmp_path: Path) -> None:
    case = edited_families.CASES["phi3"]
    save_source(case, tmp_path / "source")
    manifest = qkpatch.lora(tmp_path / "source", tmp_path / "a", layers="1", heads="0,2", modes=3, alpha=0.5)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_{}.weight"
    A, B = tensors.pop(name.format("A")), tensors.pop(name.format("B"))
    assert not tensors
    assert A.dtype == B.dtype == torch.float32
    assert A.shape == (6, 32)
    assert torch.allclose((A @ A.T).double()[:3, :3], torch.eye(3, dtype=torch.float64), atol=1e-6)
    # [4 query, 2 key, 2 value] heads of 8 rows: B is in blocks by head, and zero elsewhere.
    blocks = B.view(8, 8, 6)
    assert blocks[0, :, :3].any()
    assert blocks[2, :, 3:].any()
    blocks[0, :, :3], blocks[2, :, 3:] = 0, 0
    assert not blocks.any()
    config = config_of(tmp_path / "a")
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    from peft import LoraConfig
    from safetensors import safe_open

    assert set(config) <= {*LoraConfig.__dataclass_fields__}

    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        said = file.metadata()
    assert said["format"] == "pt"
    assert said["base_model_name_or_path"] == config["base_model_name_or_path"] == "source"
    assert json.loads(said["edit"])["modes"] == 3
    assert manifest.dumps() == (tmp_path / "a" / "qkpatch.json").read_text()
    assert str(tmp_path) not in "".join(f.read_text() for f in (tmp_path / "a").glob("*.json"))


def test_layers_of_other_ranks_are_padded_to_one(tmp_path: Path) -> None:
    """A head whose product has rank 1 has one mode alone."""
    case = edited_families.CASES["llama"]
    save_source(case, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    keys = tensors["model.layers.1.self_attn.k_proj.weight"]
    keys[1:16] = 0  # the first key head, of two query heads
    save_file(tensors, file, {"format": "pt"})
    found = agreement(case, tmp_path / "source", tmp_path, layers="1-2")
    assert_same(found, config_of(tmp_path / "adapter")["target_modules"])
    made = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {
        name.split(".")[4]: (len(A), int((A != 0).any(1).sum()))
        for name, A in made.items()
        if "lora_A" in name
    }
    assert ranks == {"1": (8, 6), "2": (8, 8)}


def test_of_fp8_it_is_the_change_of_what_a_loader_reads(tmp_path: Path) -> None:
    import numpy as np
    import oracle
    from test_fp8 import BLOCK, D_HEAD, STEM, H, K, build

    from qkpatch.spectral.fp8 import dequantise

    stored = build(tmp_path / "source")
    qkpatch.lora(tmp_path / "source", tmp_path / "a", layers="1", modes=2, alpha=0.0)
    made = load_file(tmp_path / "a" / "adapter_model.safetensors")
    A, B = (made[f"base_model.model.{STEM.format(1, 'q')}lora_{part}.weight"].double() for part in "AB")
    W_Q, W_K = (
        dequantise(
            stored[STEM.format(1, which) + "weight"],
            stored[STEM.format(1, which) + "weight_scale_inv"].double(),
            BLOCK,
        ).double()
        for which in "qk"
    )
    for head in range(H):
        rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
        key = head // (H // K)
        keys = W_K[key * D_HEAD : (key + 1) * D_HEAD].numpy()
        dense = oracle.decompose(W_Q[rows].numpy(), keys, "full")
        modes = oracle.choose(dense, "full", "dominant", 2)
        wanted = oracle.edit(W_Q[rows].numpy(), keys, "full", modes, 0.0, dense).W_Q
        change = (B[rows] @ A).numpy()
        assert np.abs(W_Q[rows].numpy() + change - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_the_table_of_families_and_channels_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["llama"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| llama", channel] for channel in CHANNELS]


@pytest.mark.long
@pytest.mark.fixtures
def test_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """In float32, so that the checkpoint's own rounding is as small as the adapter's; the passes are in float64."""
    from families import Case, token_ids

    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((smollm2 / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float32", "torch_dtype": "float32"}))
    tensors = {n: t.float() for file in smollm2.glob("*.safetensors") for n, t in load_file(file).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    case = Case("LlamaForCausalLM", lambda: None, inputs=token_ids)
    found = agreement(case, source, tmp_path, layers="10-18", modes=4, alpha=0.5)
    assert len(found.modules) == 9
    assert found.moved > 0.1
    assert_same(found, config_of(tmp_path / "adapter")["target_modules"])
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (source / "model.safetensors").stat().st_size / 100
