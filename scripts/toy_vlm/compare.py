"""One checkpoint before and after an edit: captions of the same scenes in a picture, and CHAIR."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from scripts.toy_vlm.captioning import Seen, captions
from scripts.toy_vlm.glyphs import OBJECTS
from scripts.toy_vlm.model import load_model
from scripts.toy_vlm.scenes import Scene, scenes
from scripts.toy_vlm.scoring import chair, score

DEMO_SEED, DEMO_STREAM = 2026, 3
SHOWN = 3

Caption = tuple[str, ...]


def compare(before: Path, after: Path, picture: Path, n_scenes: int) -> None:
    """Print three captions and CHAIR of both checkpoints, and draw the three scenes."""
    chosen = list(islice(scenes("broken", DEMO_SEED, DEMO_STREAM), n_scenes))
    said = [_captions(path, chosen) for path in (before, after)]
    shown = pick(chosen, said[0], said[1])
    print(f"Of {n_scenes} scenes, the first {SHOWN} of which other things are said after the edit:")
    for i in shown:
        print(f"\nthere:  {', '.join(sorted(chosen[i].names))}")
        for name, captions_ in zip(("before", "after"), said, strict=True):
            print(f"{name + ':':8}{describe(captions_[i], chosen[i])}")
    print(f"\non {n_scenes} scenes   CHAIR_s   CHAIR_i   recall   objects named")
    for name, captions_ in zip(("before", "after"), said, strict=True):
        found = chair([score(words, scene.names) for words, scene in zip(captions_, chosen, strict=True)])
        shares = f"{found['chair_s']:9.1%} {found['chair_i']:9.1%} {found['recall']:8.1%}"
        print(f"{name:15} {shares} {found['length']:15.2f}")
    print(
        "CHAIR_s: captions that name what is not there. CHAIR_i: mentions that do. Recall: objects that are named."
    )
    draw([(chosen[i], said[0][i], said[1][i]) for i in shown], picture)
    print(f"\nThe three scenes, with what is made up in red: {picture}")
    print(
        "This is a toy of 1.6 million parameters. What it shows is that the tools work, not that the method does;"
    )
    print("docs/evidence/ has the measurement, with controls.")


def pick(chosen: Sequence[Scene], before: Sequence[Caption], after: Sequence[Caption]) -> list[int]:
    """The first scenes of which other things are said, filled up with the first of which the same is; in order."""
    differ = [i for i in range(len(chosen)) if set(before[i]) != set(after[i])]
    same = [i for i in range(len(chosen)) if set(before[i]) == set(after[i])]
    return sorted((differ + same)[:SHOWN])


def describe(caption: Caption, scene: Scene) -> str:
    """The caption's nouns, those that are not there in brackets."""
    nouns = [word for word in caption if word in OBJECTS]
    return ", ".join(noun if noun in scene.names else f"[{noun}: not there]" for noun in nouns)


def draw(rows: Sequence[tuple[Scene, Caption, Caption]], path: Path) -> None:
    """Pictures side by side, with the captions before and after under each."""
    from PIL import Image, ImageDraw

    scale, margin, line = 7, 16, 16
    side = scale * rows[0][0].picture.shape[0]
    height = side + 18 * line
    sheet = Image.new("RGB", (len(rows) * (side + margin) + margin, height), "white")
    pen, bottom = ImageDraw.Draw(sheet), 0
    for column, (scene, before, after) in enumerate(rows):
        x, y = margin + column * (side + margin), margin
        picture = Image.fromarray(scene.picture).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        y += side + line // 2
        y = _write(pen, (x, y), side, "there:", sorted(scene.names), scene)
        y = _write(pen, (x, y), side, "before:", before, scene)
        bottom = max(bottom, _write(pen, (x, y), side, "after:", after, scene))
    sheet = sheet.crop((0, 0, sheet.width, bottom + margin // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _write(pen: Any, at: tuple[int, int], width: int, title: str, words: Sequence[str], scene: Scene) -> int:
    """Nouns, those that are not there in red, wrapped to ``width``; where the next line begins."""
    (left, y), line, space = at, 16, 7
    pen.text((left, y), title, fill="#777777")
    x = indent = left + 52
    for word in words:
        if word not in OBJECTS:
            continue
        size = int(pen.textlength(word))
        if x + size > left + width:
            x, y = indent, y + line
        pen.text((x, y), word, fill="black" if word in scene.names else "#d00000")
        x += size + space
    return y + line + 6


def _captions(path: Path, chosen: Sequence[Scene]) -> list[Caption]:
    torch.set_num_threads(1)
    model = load_model(path)
    return captions(model, Seen.by(model, chosen))
