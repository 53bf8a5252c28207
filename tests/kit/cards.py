"""A model with a card, what `card` prints over it, and results of lmms-eval beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from conftest import Tiny, build_tiny
from typer.testing import Result

SHARDS = [["layers.0."], ["layers.1."], [""]]
PATCHED, UNTOUCHED = "model-00002-of-00003.safetensors", "model-00001-of-00003.safetensors"
BASE_CARD = """---
# kept
license: other
license_name: tongue-twister  # kept too
language:
- en
tags: [vision, 'chat']
base_model: org/older
model-index:
- name: base
  results:
  - task: {type: x}
pipeline_tag: image-text-to-text
---

# Base

It is *good*. --- or so.
"""


def base_model(folder: Path) -> Tiny:
    """In three shards, with a card."""
    tiny = build_tiny(folder / "base", shards=SHARDS)
    (tiny.path / "README.md").write_text(BASE_CARD)
    return tiny


def edited_copy(base: Tiny, folder: Path, run: Callable[..., Result]) -> Path:
    """An edited copy of the directory."""
    assert run("apply", base.path, "-o", folder / "out", "--quiet").exit_code == 0
    return folder / "out"


def card_over(
    readme: str | bytes, base: Tiny, tmp_path: Path, run: Callable[..., Result], *flags: object
) -> str:
    """What `card` prints for an edit of a model whose card is ``readme``."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(base.path, source)
    (source / "README.md").write_bytes(readme.encode() if isinstance(readme, str) else readme)
    assert run("apply", source, "-o", out, "--quiet", *flags).exit_code == 0
    result = run("card", out)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter, as YAML reads it, and the text."""
    _, block, text = card.split("---\n", 2)
    return yaml.safe_load(block), text


def lmms(folder: Path, accuracy: list[float], chair: list[bool], **more: object) -> Path:
    """Results and samples as lmms-eval writes them."""
    folder.mkdir()
    n = len(accuracy)
    document = {
        "results": {
            "pope": {
                "alias": "pope",
                "pope_accuracy,none": sum(accuracy) / n,
                "pope_accuracy_stderr,none": 0.01,
                "pope_yes_ratio,none": 0.5,
            },
            "coco_cap_chair": {"coco_cap_chair_s,none": 100 * sum(chair) / len(chair), "alias": "coco"},
        },
        "versions": {"pope": "Yaml", "coco_cap_chair": "Yaml"},
        "n-samples": {"pope": {"original": n, "effective": n}},
        "configs": {"pope": {"generation_kwargs": {"max_new_tokens": 128}}},
        "config": {"model": "llava_hf", "model_args": f"pretrained={folder.name}"},
        **more,
    }
    path = folder / "20261127_results.json"
    path.write_text(json.dumps(document))
    pope = [{"doc_id": i, "pope_accuracy": {"score": a, "prediction": "yes"}} for i, a in enumerate(accuracy)]
    things = [{"answer": ["cat"], "pred": ["cat", "dog"] if c else ["cat"]} for c in chair]
    coco = [{"doc_id": i, "coco_cap_chair_s": thing} for i, thing in enumerate(things)]
    for task, samples in (("pope", pope), ("coco_cap_chair", coco)):
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"20261127_samples_{task}.jsonl").write_text(text)
    return path


def verified(run: Callable[..., Result], out: Path, source: Path) -> None:
    result = run("verify", out, "--source", source)
    assert result.exit_code == 0, result.stdout
