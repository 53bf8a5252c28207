"""What a plan costs as a model grows: mixtures of experts of 1 to 1,000 shards, 200,000 tensors, nearly all holes.

python -m scripts.bench.large [--shards 1,10,100,1000] [--apply LAYERS]

Headers and configs are those of the Qwen3 MoE family (94 layers, 64 query and 4 key heads of 128, hidden 4096);
only queries, keys and their norms in the edited layers hold numbers, and only with --apply, which edits LAYERS middle
layers.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scripts.markdown import table

from .measure import Usage, measure

N_LAYERS, HEADS, KV_HEADS, D_HEAD, HIDDEN, MOE = 94, 64, 4, 128, 4096, 1536
TENSORS_A_SHARD = 200
Sizes = dict[str, tuple[int, ...]]


def layer(number: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of one layer."""
    name = f"model.layers.{number}."
    yield f"{name}self_attn.q_proj.weight", (HEADS * D_HEAD, HIDDEN)
    for which in "kv":
        yield f"{name}self_attn.{which}_proj.weight", (KV_HEADS * D_HEAD, HIDDEN)
    yield f"{name}self_attn.o_proj.weight", (HIDDEN, HEADS * D_HEAD)
    for which in "qk":
        yield f"{name}self_attn.{which}_norm.weight", (D_HEAD,)
    for which in ("input", "post_attention"):
        yield f"{name}{which}_layernorm.weight", (HIDDEN,)
    yield f"{name}mlp.gate.weight", (experts, HIDDEN)
    for expert in range(experts):
        for which, shape in (("gate", (MOE, HIDDEN)), ("up", (MOE, HIDDEN)), ("down", (HIDDEN, MOE))):
            yield f"{name}mlp.experts.{expert}.{which}_proj.weight", shape


def edited(count: int) -> range:
    """``count`` middle layers."""
    first = (N_LAYERS - count) // 2
    return range(first, first + count)


def build(folder: Path, shards: int, filled: range) -> int:
    """A checkpoint of about ``shards`` × 200 tensors, with numbers in ``filled`` layers; how many it has."""
    wanted = shards * TENSORS_A_SHARD
    experts = max(1, round((wanted / N_LAYERS - 9) / 3))
    tensors: Sizes = {"model.embed_tokens.weight": (151936, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for number in range(N_LAYERS):
        tensors.update(layer(number, experts))
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        _write(folder / file, {name: tensors[name] for name in part}, filled)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN,
        "num_hidden_layers": N_LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": D_HEAD, "num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": MOE,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return len(names)


def _write(path: Path, tensors: Sizes, layers: range) -> None:
    header, position, filled = {}, 0, []
    kinds = [f"self_attn.{which}_{kind}" for which in "qk" for kind in ("proj", "norm")]
    full = tuple(f"model.layers.{number}.{kind}" for number in layers for kind in kinds)
    for name, shape in tensors.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        if name.startswith(full):
            filled.append((position, (end - position) // 2))
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + position)
        for at, count in filled:
            file.seek(start + at)
            numbers = random.normal(size=count).astype(np.float32) / 50
            file.write((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def main(counts: list[int], n_edited: int) -> None:
    """Measure each size."""
    found = []
    for shards in counts:
        with tempfile.TemporaryDirectory(prefix="qkpatch-bench-") as temporary:
            source, out = Path(temporary) / "source", Path(temporary) / "out"
            source.mkdir()
            n_tensors = build(source, shards, edited(n_edited))
            command: list[str | Path] = [sys.executable, "-m", "qkpatch"]
            usages = [measure([*command, "plan", source, "--json"])[0]]
            if n_edited:
                layers = edited(n_edited)
                edit = ["--layers", f"{layers[0]}-{layers[-1]}", "--modes", "4", "--quiet"]
                usages.append(measure([*command, "apply", source, "-o", out, *edit])[0])
            found.append(
                (f"{shards}", f"{n_tensors:,}", *(cell for usage in usages for cell in _cells(usage)))
            )
            print(*found[-1], file=sys.stderr, flush=True)
    head = [
        "shards",
        "tensors",
        *("plan: CPU s", "wall s", "peak MB"),
        *("apply: CPU s", "wall s", "peak MB"),
    ]
    print(table(head[: len(found[0])], found))


def _cells(usage: Usage) -> tuple[str, str, str]:
    return f"{usage.cpu:.2f}", f"{usage.wall:.2f}", f"{usage.peak_rss / 1e6:.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.large", description=__doc__)
    parser.add_argument("--shards", default="1,10,100,1000")
    parser.add_argument("--apply", type=int, default=0, metavar="LAYERS", help="and edit so many")
    asked = parser.parse_args()
    main([int(count) for count in asked.shards.split(",")], asked.apply)
