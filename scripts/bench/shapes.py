"""Checkpoints of real size, built from shapes alone: llama configs, random bytes, normal q and k."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

VERSION = 1  # Raise it when what is built changes: it makes existing checkpoints stale.
ITEM = 2  # bytes of a float16
PIECE = 64 << 20
SEED = 26062


@dataclass(frozen=True)
class Shape:
    """A llama language model in float16; what a benchmark edits is ``layers``."""

    name: str
    title: str
    n_layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int  # size of the hidden layer of an MLP; 0: no MLP at all
    vocab: int
    edited: tuple[int, int]
    d_head: int = 128
    shards: int = 1
    ballast: int = 0  # bytes of one tensor more, before all others
    is_sparse: bool = False  # only q and k of the edited layers are written, the rest is holes

    @property
    def layers(self) -> str:
        """The edited layers, as ``--layers`` takes them."""
        return f"{self.edited[0]}-{self.edited[1]}"

    @property
    def edited_layers(self) -> range:
        """The same as numbers."""
        return range(self.edited[0], self.edited[1] + 1)

    @property
    def edited_bytes(self) -> int:
        """Bytes of the queries that an edit rewrites."""
        return len(self.edited_layers) * self.heads * self.d_head * self.hidden * ITEM

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.ballast + ITEM * sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def disk_bytes(self) -> int:
        """Bytes that the checkpoint itself takes on a disk; a copy may take all :attr:`n_bytes`."""
        if not self.is_sparse:
            return self.n_bytes
        rows = (self.heads + self.kv_heads) * self.d_head
        return len(self.edited_layers) * rows * self.hidden * ITEM

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of a llama's state dict."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.n_layers):
            name = f"model.layers.{layer}."
            q_rows, k_rows = self.heads * self.d_head, self.kv_heads * self.d_head
            yield f"{name}self_attn.q_proj.weight", (q_rows, self.hidden)
            yield f"{name}self_attn.k_proj.weight", (k_rows, self.hidden)
            yield f"{name}self_attn.v_proj.weight", (k_rows, self.hidden)
            yield f"{name}self_attn.o_proj.weight", (self.hidden, q_rows)
            if self.mlp:
                yield f"{name}mlp.gate_proj.weight", (self.mlp, self.hidden)
                yield f"{name}mlp.up_proj.weight", (self.mlp, self.hidden)
                yield f"{name}mlp.down_proj.weight", (self.hidden, self.mlp)
            yield f"{name}input_layernorm.weight", (self.hidden,)
            yield f"{name}post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self) -> dict[str, object]:
        """What ``config.json`` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp or self.hidden,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.d_head,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        }


LLAMA_7B = Shape(
    "llama-7b", "7B, 3 shards", 32, 4096, 32, 32, mlp=11008, vocab=32064, edited=(10, 18), shards=3
)
ONE_5G = Shape("one-5g", "7B attention, 1 shard of 5 GB", 32, 4096, 32, 32, 256, 32064, (10, 18))
ONE_15G = Shape(
    "one-15g", "7B, 1 shard of 15 GB", 32, 4096, 32, 32, 11008, 32064, (10, 18), ballast=1_500_000_000
)
# Not the other tensors of a 70B model: they would be holes, which a copy writes out.
GEOMETRY_70B = Shape(
    "geometry-70b",
    "70B attention, 64 and 8 heads, holes",
    20,
    8192,
    64,
    8,
    0,
    32000,
    (10, 18),
    is_sparse=True,
)
QUICK = Shape("quick", "eight layers of 7B attention, 1 shard", 8, 4096, 32, 32, 256, 8000, (2, 4))
TINY = Shape("tiny", "for tests", 4, 64, 4, 2, 96, 128, (1, 2), d_head=16, shards=3)

SCALES = {
    "full": (LLAMA_7B, GEOMETRY_70B, ONE_15G, ONE_5G),
    "small": (ONE_5G, GEOMETRY_70B),
    "quick": (QUICK,),
    "tiny": (TINY,),
}
ALL = {shape.name: shape for shapes in SCALES.values() for shape in shapes}


def is_built(shape: Shape, folder: Path) -> bool:
    """Whether ``folder`` holds the whole shape, as this version builds it."""
    stamp = _stamp(shape, folder)
    return (folder / shape.name).is_dir() and stamp.is_file() and stamp.read_text() == _stamp_text(shape)


def build(shape: Shape, folder: Path) -> Path:
    """Build the checkpoint ``folder / shape.name`` unless it is there."""
    path, stamp = folder / shape.name, _stamp(shape, folder)
    if is_built(shape, folder):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, tensors in _files(shape).items():
        _write(shape, path / name, tensors)
    if shape.shards > 1:
        index = {
            "metadata": {"total_size": shape.n_bytes},
            "weight_map": {tensor: name for name, tensors in _files(shape).items() for tensor, _ in tensors},
        }
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(shape.config(), indent=2))
    stamp.write_text(_stamp_text(shape))
    return path


def _files(shape: Shape) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Tensors by file; a layer is in one file."""
    if shape.shards == 1:
        return {"model.safetensors": list(shape.tensors())}
    files: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        f"model-{i + 1:05}-of-{shape.shards:05}.safetensors": [] for i in range(shape.shards)
    }
    names, layer = list(files), 0
    for tensor, dims in shape.tensors():
        if tensor.startswith("model.layers."):
            layer = int(tensor.split(".")[2])
        elif tensor != "model.embed_tokens.weight":
            layer = shape.n_layers - 1
        files[names[layer * shape.shards // shape.n_layers]].append((tensor, dims))
    return files


def _write(shape: Shape, path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    if shape.ballast:
        header["ballast"] = {"dtype": "U8", "shape": [shape.ballast], "data_offsets": [0, shape.ballast]}
        starts["ballast"], position = (0, shape.ballast), shape.ballast
    for name, dims in tensors:
        end = position + ITEM * math.prod(dims)
        header[name] = {"dtype": "F16", "shape": dims, "data_offsets": [position, end]}
        starts[name], position = (position, end), end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.Generator(np.random.SFC64(SEED + len(tensors)))
    torch.manual_seed(SEED)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data_start = file.tell()
        file.truncate(data_start + position)
        for name, (begin, end) in starts.items():
            file.seek(data_start + begin)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                if not shape.is_sparse or int(name.split(".")[2]) in shape.edited_layers:
                    file.write(_projection((end - begin) // ITEM // shape.hidden, shape.hidden))
            elif not shape.is_sparse:
                for done in range(begin, end, PIECE):
                    file.write(generator.bytes(min(PIECE, end - done)))


def _projection(rows: int, columns: int) -> bytes:
    """Normal numbers with loud and quiet input channels, as trained weights have: the spectrum decays."""
    loudness = torch.randn(columns).mul(0.5).exp().mul(0.02)
    values = torch.randn(rows, columns).mul(loudness).to(torch.float16)
    return values.numpy().tobytes()


def _stamp(shape: Shape, folder: Path) -> Path:
    return folder / f"{shape.name}.stamp"


def _stamp_text(shape: Shape) -> str:
    return json.dumps({"version": VERSION, **asdict(shape)})
