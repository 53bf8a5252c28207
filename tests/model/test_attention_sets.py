"""Further sets of query and key tensors: edited when --attention names them, and left alone when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import families
import families_older
import numpy as np
import oracle
import pytest
import torch
import transformers
from families_special import mllama
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
CROSS_LAYERS = [1, 3]
LAYOUTS = {"transformers": "model.language_model.", "microsoft": "language_model.model."}


def save_random(model: transformers.PreTrainedModel, path: Path) -> Path:
    """In several shards, with gains and biases that matter."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "gate" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def read_all(path: Path) -> Tensors:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def changed(before: Tensors, after: Tensors) -> list[str]:
    assert list(before) == list(after)
    return [name for name in before if not families.same(before[name], after[name])]


def check_edit(old: torch.Tensor, new: torch.Tensor, keys: torch.Tensor) -> None:
    """Each head of a query weight lost its two strongest modes; heads are in the first dimension."""
    for h in range(len(old)):
        W_Q, W_K = old[h].double().numpy(), keys[h * len(keys) // len(old)].double().numpy()
        dense = oracle.decompose(W_Q, W_K, "full")
        modes = oracle.choose(dense, "full", "dominant", 2)
        expected = oracle.edit(W_Q, W_K, "full", modes, 0.0, dense).W_Q
        assert oracle.ulps(new[h].double().numpy(), oracle.round_to(expected, "BF16"), "BF16") <= 1
        assert not np.allclose(W_Q, expected, rtol=0.05)


@pytest.fixture
def llama_vision(tmp_path: Path) -> Path:
    """Llama 3.2 Vision with 5 layers, two of them with cross-attention."""
    torch.manual_seed(0)
    config = mllama()
    config.text_config.num_hidden_layers = 5
    config.text_config.cross_attention_layers = CROSS_LAYERS
    return save_random(transformers.MllamaForConditionalGeneration(config), tmp_path / "source")


def test_by_default_cross_attention_is_left_alone(llama_vision: Path, run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("apply", llama_vision, "--layers", "0-4", "--modes", 2, "--alpha", 0, "-o", out)
    assert result.exit_code == 0, result.output
    names = changed(read_all(llama_vision), read_all(out))
    assert names == [f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in (0, 2, 4)]
    manifest = json.loads((out / "qkpatch.json").read_text())
    assert manifest["edit"]["skipped_layers"] == CROSS_LAYERS
    assert manifest["edit"]["attention"] == ["self"]


def test_cross_attention_is_edited_with_its_norms_when_asked_for(
    llama_vision: Path, run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--attention", "cross", "--layers", "0-4", "--modes", 2, "--alpha", 0]
    result = run("apply", llama_vision, *options, "-o", out)
    assert result.exit_code == 0, result.output
    assert run("verify", out, "--source", llama_vision).exit_code == 0

    before, after = read_all(llama_vision), read_all(out)
    stems = [f"language_model.model.layers.{i}.cross_attn" for i in CROSS_LAYERS]
    assert changed(before, after) == [f"{stem}.q_proj.weight" for stem in stems]
    for stem in stems:
        gain_q, gain_k = (before[f"{stem}.{which}_norm.weight"].double() for which in "qk")
        assert not torch.allclose(gain_q * gain_k, torch.ones(len(gain_q), dtype=torch.float64), rtol=0.1)
        keys = before[f"{stem}.k_proj.weight"].double().view(2, -1, 32) * (gain_q * gain_k)[:, None]
        check_edit(
            before[f"{stem}.q_proj.weight"].view(4, -1, 32),
            after[f"{stem}.q_proj.weight"].view(4, -1, 32),
            keys,
        )

    manifest = json.loads((out / "qkpatch.json").read_text())
    assert manifest["edit"]["skipped_layers"] == [0, 2, 4]
    assert manifest["edit"]["attention"] == ["cross"]
    assert {edit["attention"] for edit in manifest["edits"]} == {"cross"}

    inputs = {
        "input_ids": torch.arange(4, 12)[None],
        "cross_attention_states": torch.linspace(-1, 1, 6 * 32).sin().view(1, 6, 32),
    }
    logits = [
        logits_of(transformers.MllamaForConditionalGeneration, path, inputs) for path in (llama_vision, out)
    ]
    assert not torch.allclose(*logits)


def test_the_norm_of_text_is_not_folded_where_keys_come_from_the_image(llama_vision: Path, run) -> None:
    assert run("plan", llama_vision, "--layers", "0-4", "--fold-norm").exit_code == 0
    result = run("plan", llama_vision, "--layers", "0-4", "--attention", "cross", "--fold-norm")
    assert result.exit_code == 3
    assert "no RMSNorm before attention, so there is no gain to fold" in result.stderr


def test_self_and_cross_attention_together_edit_every_layer(llama_vision: Path, run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--attention", "self,cross", "--layers", "0-4", "--modes", 2, "--alpha", 0]
    assert run("apply", llama_vision, *options, "-o", out).exit_code == 0
    kinds = {i: "cross" if i in CROSS_LAYERS else "self" for i in range(5)}
    assert sorted(changed(read_all(llama_vision), read_all(out))) == [
        f"language_model.model.layers.{i}.{kind}_attn.q_proj.weight" for i, kind in kinds.items()
    ]
    manifest = json.loads((out / "qkpatch.json").read_text())
    assert manifest["edit"]["skipped_layers"] == []
    assert {(edit["layer"], edit["attention"]) for edit in manifest["edits"]} == set(kinds.items())


@pytest.fixture(params=LAYOUTS)
def florence(request, tmp_path: Path) -> Path:
    """Florence-2 with four encoder layers of two heads and three decoder layers of four, in either layout."""
    torch.manual_seed(0)
    source = tmp_path / "source"
    save_random(transformers.Florence2ForConditionalGeneration(families_older.florence2()), source)
    if request.param == "microsoft":
        as_microsoft_names_it(source)
    assert any(name.startswith(LAYOUTS[request.param]) for name in read_all(source))
    return source


def as_microsoft_names_it(path: Path) -> None:
    """Rewrite a checkpoint to the names and text model type of microsoft/Florence-2-*, without an index."""
    tensors = {
        name.replace(LAYOUTS["transformers"], LAYOUTS["microsoft"]).removeprefix("model."): tensor
        for name, tensor in read_all(path).items()
    }
    for file in (*path.glob("*.safetensors"), path / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["model_type"] = "florence2_language"
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("attention", "place", "n_layers", "n_heads"),
    [
        ("self", "decoder.layers.{}.self_attn", 3, 4),
        ("encoder", "encoder.layers.{}.self_attn", 4, 2),
        ("cross", "decoder.layers.{}.encoder_attn", 3, 4),
    ],
)
def test_each_set_of_an_encoder_and_decoder_has_its_own_layers_and_heads(
    attention: str, place: str, n_layers: int, n_heads: int, florence: Path, run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--attention", attention, "--layers", f"1-{n_layers - 1}", "--modes", 2, "--alpha", 0]
    result = run("apply", florence, *options, "-o", out)
    assert result.exit_code == 0, result.output
    assert run("verify", out, "--source", florence).exit_code == 0

    before, after = read_all(florence), read_all(out)
    names = changed(before, after)
    prefix = next(p for p in LAYOUTS.values() if names[0].startswith(p))
    stems = [prefix + place.format(i) for i in range(1, n_layers)]
    assert sorted(names) == [f"{stem}.q_proj.weight" for stem in stems]
    for stem in stems:
        W_Q, W_Q_after, W_K = (
            tensors[f"{stem}.{which}_proj.weight"].view(n_heads, -1, 32)
            for tensors, which in ((before, "q"), (after, "q"), (before, "k"))
        )
        check_edit(W_Q, W_Q_after, W_K)

    result = run("plan", florence, "--attention", attention, "--layers", n_layers)
    assert result.exit_code == 2
    assert f"layer {n_layers} is out of range" in result.stderr


def test_the_edited_encoder_and_decoder_load_and_act(run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_class = transformers.Florence2ForConditionalGeneration
    source = save_random(model_class(families_older.florence2()), tmp_path / "source")
    inputs = families_older.florence2_inputs()
    seen = [logits_of(model_class, source, inputs)]
    for attention in ("self", "encoder", "cross"):
        out = tmp_path / attention
        options = ["--attention", attention, "--layers", "1-2", "--modes", 2, "--alpha", 0]
        assert run("apply", source, *options, "-o", out).exit_code == 0
        logits = logits_of(model_class, out, inputs)
        assert not any(torch.allclose(logits, other) for other in seen)
        seen.append(logits)


def test_encoder_and_decoder_cannot_be_edited_in_one_run_where_they_differ(florence: Path, run) -> None:
    result = run("plan", florence, "--attention", "self,encoder")
    assert result.exit_code == 2
    assert "self and encoder cannot be edited together: they differ in layers or heads" in result.stderr
    assert run("plan", florence, "--attention", "self,cross").exit_code == 0


def logits_of(model_class: type, path: Path, inputs: Tensors) -> torch.Tensor:
    model, report = model_class.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.float()(**inputs).logits
