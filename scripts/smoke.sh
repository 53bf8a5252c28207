#!/usr/bin/env bash
# Builds the wheel, installs it alone in a fresh environment, and runs it outside the repository:
# a missing runtime dependency or a recipe left out of the wheel shows here and nowhere else.
#   scripts/smoke.sh [PYTHON [WHEEL]]
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${1:-python3}" -m venv "$work/venv"
if [ -n "${2-}" ]; then
    cp "$2" "$work"
else
    "$work/venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$work" "$repo"
fi
"$work/venv/bin/pip" install --quiet --constraint "$repo/constraints.txt" "$work"/qkpatch-*.whl
cd "$work"
venv/bin/qkpatch --version
venv/bin/qkpatch --help >/dev/null
venv/bin/qkpatch recipes
venv/bin/qkpatch recipes llava-1.5 >/dev/null
# The whole job on a checkpoint of a few kilobytes, with runtime dependencies only.
venv/bin/python - <<'PY'
import json
import pathlib
import struct

root = pathlib.Path("tiny")
root.mkdir()
numbers = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
(root / "config.json").write_text(json.dumps({"model_type": "llama", **numbers}))
header, data = {}, b""
for layer in range(2):
    for name, rows in (("q", 16), ("k", 8)):
        raw = b"".join(struct.pack("<f", ((7 * i + layer) % 31 - 15) / 16) for i in range(rows * 16))
        header[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = {
            "dtype": "F32", "shape": [rows, 16], "data_offsets": [len(data), len(data) + len(raw)]
        }
        data += raw
text = json.dumps(header).encode()
(root / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
PY
venv/bin/qkpatch plan tiny --layers 0-1 --modes 2 --json >/dev/null
venv/bin/qkpatch apply tiny --layers 0-1 --modes 2 -o patched 2> stderr.txt
cat stderr.txt
test ! -s stderr.txt  # no warning from a library either
venv/bin/qkpatch verify patched --source tiny
venv/bin/qkpatch inspect tiny --modes 2
echo "smoke: ok"
