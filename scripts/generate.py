"""Continue a prompt greedily with several checkpoints, to see that an edited one still speaks.

python scripts/generate.py CHECKPOINT... [--prompt TEXT]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries when they are imported

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer


def continuation(path: Path, prompt: str, n_tokens: int) -> str:
    """The prompt and ``n_tokens`` greedy tokens after it."""
    config = AutoConfig.from_pretrained(path)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model: Any = auto.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(prompt, return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=n_tokens, do_sample=False)
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


def main() -> None:
    """Print one continuation per checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for path in arguments.checkpoints:
        print(f"{path.name}: {continuation(path, arguments.prompt, arguments.tokens)!r}")


if __name__ == "__main__":
    main()
