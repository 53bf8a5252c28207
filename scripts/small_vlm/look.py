"""Whether it looks at all: what it says of pictures, of other pictures, and of nothing."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from qkpatch.evaluation.records import Protocol
from qkpatch.evaluation.subject import Subject
from qkpatch.evaluation.vocabulary import Vocabulary
from scripts.small_vlm.training import PROMPT
from scripts.toy_vlm.album import write_album
from scripts.toy_vlm.glyphs import OBJECTS
from scripts.toy_vlm.scenes import BACKGROUND, IMAGE_SIZE
from scripts.toy_vlm.scoring import chair, score

BATCH, LONGEST = 20, 28


def look(path: Path, n: int, folder: Path, stream: int = 5) -> dict[str, float]:
    """Recall and CHAIR of captions; the same scored against the next scene; how many differ from a blank picture's."""
    from PIL import Image

    write_album(folder, n, 2026, stream)
    lines = [json.loads(line) for line in (folder / "objects.jsonl").read_text().splitlines()]
    blank = folder / "blank.png"
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND).save(blank)
    subject, words = Subject.load(str(path)), Vocabulary.of(frozenset(OBJECTS))
    pictures = [folder / "pictures" / line["image"] for line in lines]
    protocol = Protocol(PROMPT, max_new_tokens=LONGEST)
    said = [
        record["caption"]
        for first in range(0, n, BATCH)
        for record in subject.captions(pictures[first : first + BATCH], protocol)
    ]
    (of_nothing,) = (record["caption"] for record in subject.captions([blank], protocol))
    there = [frozenset(line["objects"]) for line in lines]
    named = [words.mentions(caption) for caption in said]
    right = chair([score(names, of) for names, of in zip(named, there, strict=True)])
    wrong = chair([score(names, of) for names, of in zip(named, [*there[1:], there[0]], strict=True)])
    for caption, of in list(zip(said, there, strict=True))[:5]:
        print(f"there:  {', '.join(sorted(of))}\nsaid:   {caption}")
    print(f"blank:  {of_nothing}")
    return {
        **right,
        "recall, wrong picture": wrong["recall"],
        "chair_s, wrong picture": wrong["chair_s"],
        "differ from a blank picture's": fmean(caption != of_nothing for caption in said),
        "different captions": len(set(said)) / n,
    }
