"""A VLM of SmolLM2-135M and the toy's eyes.

python -m scripts.small_vlm assemble OUT
python -m scripts.small_vlm look OUT
python -m scripts.small_vlm train --steps 200 --projector FILE
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries when they are imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from scripts.small_vlm.look import look
from scripts.small_vlm.model import EYES, LANGUAGE, assemble, load_projector, make_tokenizer, save
from scripts.small_vlm.training import Schedule, fit, train


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--language", type=Path, default=LANGUAGE, help="SmolLM2, of make fixtures")
    parser.add_argument("--eyes", type=Path, default=EYES, help="a toy; default: demo/toy-0")
    commands = parser.add_subparsers(dest="command", required=True)
    assembling = commands.add_parser("assemble", help="write the model as one checkpoint, 540 MB")
    assembling.add_argument("out", type=Path)
    looking = commands.add_parser("look", help="does it look at the picture?")
    looking.add_argument("model", type=Path)
    looking.add_argument("--scenes", type=int, default=100, help="default: %(default)s")
    training = commands.add_parser("train", help="make the projector anew, on one core")
    training.add_argument("--steps", type=int, default=Schedule.steps, help="default: %(default)s")
    assembling.add_argument("--projector", type=Path, help="what train wrote; default: by ridge regression")
    training.add_argument("--projector", type=Path, required=True, help="written, and its log beside it")
    arguments = parser.parse_args()
    if not arguments.language.is_dir():
        sys.exit(f"error: {arguments.language} is not there; `make fixtures` builds it")
    if arguments.command == "assemble":
        given = arguments.projector
        model = assemble(arguments.language, arguments.eyes, given and load_projector(given))
        if given is None:
            fit(model, make_tokenizer(arguments.language), Schedule())
        save(model, arguments.language, arguments.out)
    elif arguments.command == "look":
        with tempfile.TemporaryDirectory() as folder:
            for name, value in look(arguments.model, arguments.scenes, Path(folder)).items():
                print(f"{name:32}{value:8.3f}")
    else:
        model = assemble(arguments.language, arguments.eyes)
        train(model, arguments.language, arguments.projector, Schedule(steps=arguments.steps))


if __name__ == "__main__":
    main()
