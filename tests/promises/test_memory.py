"""Peak memory follows the size of one head, not of a shard or a model."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

# VmHWM of a fresh process that runs the command line.
MEASURE = """
import re, sys
from qkpatch.cli import app
try:
    app(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""
NUMBERS = {"num_hidden_layers": 2, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


def checkpoint(path: Path, ballast: int) -> Path:
    """Two small layers and, before and after them, ``ballast`` bytes of other weights (a hole in the file)."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **NUMBERS}))
    names = [
        (f"model.layers.{i}.self_attn.{n}_proj.weight", rows)
        for i in range(2)
        for n, rows in (("q", 512), ("k", 256))
    ]
    sizes = [
        ("ballast.0", [ballast]),
        *[(name, [rows, 512]) for name, rows in names],
        ("ballast.1", [ballast]),
    ]
    header, position, starts = {}, 0, {}
    for name, shape in sizes:
        n_bytes = shape[0] if len(shape) == 1 else 2 * shape[0] * shape[1]
        dtype = "U8" if len(shape) == 1 else "BF16"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + n_bytes]}
        starts[name] = position
        position += n_bytes
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data_start = file.tell()
        file.truncate(data_start + position)
        for number, (name, rows) in enumerate(names):
            file.seek(data_start + starts[name])
            values = (
                0x3C00 + (i * 2654435761 + number) % 0x200 + (i * 40503 >> 3 & 1) * 0x8000
                for i in range(rows * 512)
            )
            file.write(struct.pack(f"<{rows * 512}H", *values))
    return path


def peak_kib(*arguments: object) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return int(done.stderr.split()[-1])


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is a Linux figure")
def test_a_shard_a_gigabyte_larger_takes_no_more_memory_and_the_plan_foretells_it(
    run, tmp_path: Path
) -> None:
    small = checkpoint(tmp_path / "small", 1000)
    large = checkpoint(tmp_path / "large", 512 << 20)
    flags = ("--layers", "0-1", "--modes", 4, "--quiet")
    of_small = peak_kib("apply", small, *flags, "-o", tmp_path / "out-small")
    of_large = peak_kib("apply", large, *flags, "-o", tmp_path / "out-large")
    assert (tmp_path / "out-large" / "model.safetensors").stat().st_size > 1 << 30
    assert abs(of_large - of_small) < 24 << 10
    expected = json.loads(run("plan", large, "--json").stdout)["costs"]["expected_peak_memory_bytes"]
    assert of_large << 10 < 1.1 * expected


@pytest.mark.long
def test_a_shard_of_nine_gigabytes_is_edited_within_450_megabytes(tmp_path: Path) -> None:
    """A head of a 7B model, 128 × 4096, between holes that a copy leaves out."""
    source, n_bytes = tmp_path / "source", 2 * 4096 * 4096
    numbers = {"num_hidden_layers": 1, "hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128}
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "llama", **numbers}))
    sizes = {"ballast.0": 4 << 30, "q": n_bytes, "k": n_bytes, "ballast.1": 5 << 30}
    header, starts, position = {}, {}, 0
    for name, size in sizes.items():
        is_ballast = name.startswith("ballast")
        key = name if is_ballast else f"model.layers.0.self_attn.{name}_proj.weight"
        header[key] = {
            "dtype": "U8" if is_ballast else "F16",
            "shape": [size] if is_ballast else [4096, 4096],
            "data_offsets": [position, position + size],
        }
        starts[name], position = position, position + size
    text = json.dumps(header).encode()
    values = b"".join(struct.pack("<H", 0x2000 + i * 2654435761 % 0x1C00) for i in range(1 << 16))
    with open(source / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data_start = file.tell()
        file.truncate(data_start + position)
        for name, turn in (("q", 0), ("k", 1000)):
            file.seek(data_start + starts[name])
            for head in range(6):  # of 1 MiB; the others stay holes
                at = turn + 2 * head
                file.write((values[at:] + values[:at]) * 8)
    if (source / "model.safetensors").stat().st_blocks * 512 > 1 << 30:
        pytest.skip("a file system without holes")
    flags = ("--layers", "0", "--modes", 4, "--heads", "0-4", "--threads", 2, "--quiet")
    for number, more in enumerate(((), ("--channel", "antisymmetric"), ("--max-shard-size", "4GiB"))):
        out = tmp_path / f"out-{number}"
        assert peak_kib("apply", source, *flags, *more, "-o", out) << 10 < 450e6
        files = [file.stat() for file in out.glob("*.safetensors")]
        assert sum(file.st_size for file in files) > 9 << 30
        assert sum(file.st_blocks for file in files) * 512 < 1 << 30
