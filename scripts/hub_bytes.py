"""What `plan` and `inspect` fetch of a model of Qwen2.5-VL-7B's sizes, as the tests' Hub counts it."""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "kit")]

from scripts.bench.shapes import ITEM, Shape, build  # noqa: E402 - found only then

# Its language model; all but the queries and keys are holes, which take no disk.
SHAPE = Shape("qwen-7b", "7B", 28, 3584, 28, 4, 18944, 152064, (0, 27), shards=5, is_sparse=True)


def main() -> None:
    """Serve the shape, run both commands, print what the Hub has seen."""
    hub_module = import_module("fake_hub")
    weights = SHAPE.n_layers * (SHAPE.heads + SHAPE.kv_heads) * SHAPE.d_head * SHAPE.hidden * ITEM
    print(
        f"{SHAPE.n_bytes / 1e9:.1f} GB in {SHAPE.shards} shards, of which queries and keys {weights / 1e6:.1f} MB"
    )
    with tempfile.TemporaryDirectory(prefix="qkpatch-hub-") as folder, hub_module.fake_hub() as hub:
        hub.repos["org/seven"] = hub_module.Repo(build(SHAPE, Path(folder)))
        environment = hub_module.hub_environment(hub.endpoint, Path(folder) / "home")
        for command in ("plan", "inspect"):
            hub.log.clear()
            hub.sent.clear()
            arguments = [command, "org/seven", "--json"]
            done = hub_module.subprocess.run(
                hub_module.command(*arguments), env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
            n_bytes, shards = sum(hub.sent.values()), hub.sent_of(".safetensors")
            share = f", queries and keys and {shards / weights - 1:.2%} more" if command == "inspect" else ""
            print(f"{command}: {len(hub.log)} requests, {n_bytes / 1e6:.2f} MB{share}")


if __name__ == "__main__":
    main()
