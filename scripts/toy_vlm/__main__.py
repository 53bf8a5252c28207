"""Train the toy, or caption scenes with it.

python -m scripts.toy_vlm train --seed 0 --out DIR
python -m scripts.toy_vlm compare BEFORE AFTER --picture PNG
python -m scripts.toy_vlm album FOLDER --scenes 200
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries when they are imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from scripts.toy_vlm.album import write_album
from scripts.toy_vlm.compare import compare
from scripts.toy_vlm.training import Schedule, sha256, train


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train one model on one core, about ten minutes")
    training.add_argument("--seed", type=int, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--steps", type=int, default=Schedule.steps, help="default: %(default)s")
    training.add_argument(
        "--tower-steps", type=int, default=Schedule.tower_steps, help="default: %(default)s"
    )
    comparing = commands.add_parser("compare", help="caption scenes before and after an edit")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--picture", type=Path, required=True, help="PNG to write three of them to")
    comparing.add_argument(
        "--scenes", type=int, default=500, help="how many are scored; default: %(default)s"
    )
    album = commands.add_parser("album", help="write scenes as a folder of pictures and what is in them")
    album.add_argument("folder", type=Path)
    album.add_argument("--scenes", type=int, default=200, help="default: %(default)s")
    album.add_argument("--seed", type=int, default=2026, help="default: %(default)s")
    album.add_argument(
        "--stream", type=int, default=4, help="scenes that others have not seen; default: %(default)s"
    )
    arguments = parser.parse_args()
    if arguments.command == "train":
        train(
            arguments.seed,
            arguments.out,
            Schedule(steps=arguments.steps, tower_steps=arguments.tower_steps),
            tell=lambda line: print(line, flush=True),
        )
        print(f"{sha256(arguments.out / 'model.safetensors')}  {arguments.out / 'model.safetensors'}")
    elif arguments.command == "album":
        write_album(arguments.folder, arguments.scenes, arguments.seed, arguments.stream)
    else:
        compare(arguments.before, arguments.after, arguments.picture, arguments.scenes)


if __name__ == "__main__":
    main()
