"""Scenes as others have them: a folder of pictures, what is in them, and a text of true captions."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from scripts.toy_vlm.scenes import scenes


def write_album(folder: Path, n: int, seed: int, stream: int) -> None:
    """``pictures/0000.png``, ..., ``objects.jsonl`` and ``text.txt`` of the first scenes of a stream."""
    from PIL import Image

    (folder / "pictures").mkdir(parents=True)
    lines, text = [], []
    for number, scene in enumerate(islice(scenes("broken", seed, stream), n)):
        name = f"{number:04}.png"
        Image.fromarray(scene.picture).save(folder / "pictures" / name)
        lines.append(json.dumps({"image": name, "objects": sorted(scene.names)}))
        text.append(" ".join(("describe", ":", *scene.caption)))
    (folder / "objects.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "text.txt").write_text("\n".join(text) + "\n")
