"""Two checkpoints for `diff`, written byte by byte, and the command held against its schema."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
from typer.testing import Result

SCHEMA = json.loads((resources.files("qkpatch") / "compare" / "diff.schema.json").read_text())
Entry = tuple[str, Sequence[int], bytes]
Diff = Callable[..., dict[str, Any]]


def write(path: Path, tensors: Mapping[str, Entry], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of raw bytes, in the order given, of any dtype."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))
    return path


def differing(run: Callable[..., Result]) -> Diff:
    """Run ``diff --json``, hold it against the schema and its exit code, and the text against the verdict."""

    def call(a: Path, b: Path) -> dict[str, Any]:
        result = run("diff", a, b, "--json")
        document: dict[str, Any] = json.loads(result.stdout)
        jsonschema.Draft202012Validator(SCHEMA).validate(document)
        assert result.exit_code == (0 if document["equal"] else 1), result.output
        text = run("diff", a, b)
        assert text.exit_code == result.exit_code
        assert ("Equal:" if document["equal"] else "Different:") in text.stdout
        for kind in ("changed", "retyped", "only_in_a", "only_in_b"):
            for tensor in document["tensors"][kind][:20]:
                assert tensor["name"][:1000] in text.stdout  # of long ones the end is cut
        return document

    return call


def comparing(diff: Diff, folder: Path) -> Callable[..., dict[str, Any]]:
    """Diff two versions of one tensor, and return what is said of it."""

    def call(
        dtype: str, a: bytes, b: bytes, shape: Sequence[int], other: str | None = None
    ) -> dict[str, Any]:
        document = diff(
            write(folder / "a.safetensors", {"x": (dtype, shape, a)}),
            write(folder / "b.safetensors", {"x": (other or dtype, shape, b)}),
        )
        found = document["tensors"]["retyped" if other else "changed"]
        assert len(found) == 1
        assert document["tensors"]["equal"] == 0
        return dict(found[0])

    return call


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
