"""Which objects are in which picture: COCO's instances, or a line of JSON per picture."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.tree import is_plain_relative, source_file
from qkpatch.common.json_text import load_json
from qkpatch.common.number_ranges import some
from qkpatch.errors import CheckpointError, UsageError
from qkpatch.evaluation.records import digest

MOST_BYTES = 1 << 30  # COCO's largest is a third of that
# Most of COCO's instances, and of no use here: outlines and boxes, which are nothing but numbers.
_OUTLINES = re.compile(rb'"(?:segmentation|bbox)"\s*:\s*(?:\[[][\d\s.,eE+-]*\]|\{[^{}]*\})\s*(?:,|(?=\}))')
_SHAPE = 'write {"image": "name.jpg", "objects": ["cup", ...]}, a line per picture, or give COCO\'s instances'

Found = dict[str, frozenset[str]]


@dataclass(frozen=True)
class Annotations:
    """What is in each picture, by its name, sorted; and all names of objects that there are."""

    folder: Path
    present: Mapping[str, frozenset[str]]
    names: frozenset[str]
    left_out: int = 0  # annotated pictures that are not in the folder

    @property
    def digest(self) -> str:
        """Which pictures, and what is said to be in them."""
        return digest([[name, sorted(there)] for name, there in self.present.items()])

    def only(self, pictures: Iterable[str]) -> Annotations:
        """Some of the pictures."""
        return replace(self, present={name: self.present[name] for name in sorted(pictures)})

    def drawn(self, n: int | None, seed: int) -> Annotations:
        """``n`` of the pictures, or all; fewer are a :class:`UsageError`."""
        if n is not None and n > len(self.present):
            raise UsageError(f"there are {len(self.present)} pictures, fewer than {n}", where="--sample")
        return self if n is None else self.only(random.Random(seed).sample(list(self.present), n))


def read_annotations(file: Path, folder: Path) -> Annotations:
    """The annotated pictures of ``file`` that are in ``folder``.

    Raises:
        UsageError: the file is of neither kind, names no object, or is of other pictures.
    """
    raw = source_file(file, file.name).read(MOST_BYTES)
    try:
        read = _coco if b'"annotations"' in raw and b'"categories"' in raw else _lines
        found, names = read(raw, str(file))
    except CheckpointError as error:
        raise UsageError(error.what, where=error.where, fix=_SHAPE) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it does not say which objects are where: {error!r}"
        raise UsageError(what, where=str(file), fix=_SHAPE) from error
    # What begins so is the key of something else in records.
    if odd := [name for name in found if not isinstance(name, str) or name.startswith(":")]:
        what = f"a picture is named by {odd[0]!r:.80}, which is no text, or begins with a colon"
        raise UsageError(what, where=str(file), fix=_SHAPE)
    if not names:
        raise UsageError("it names no object", where=str(file), fix=_SHAPE)
    with os_errors("list", folder):
        next(folder.iterdir(), None)  # which fails where there is none
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    here = sorted(name for name in found.keys() & there if is_plain_relative(name))
    if not here:
        shown = f"it names {some(sorted(found), 1)}; --images has {some(sorted(there), 1) or 'no file'}"
        fix = "give the annotations of these pictures, whose names count from --images on"
        raise UsageError(f"annotations of other pictures: {shown}", where=str(file), fix=fix)
    return Annotations(folder, {name: found[name] for name in here}, frozenset(names), len(found) - len(here))


def _coco(raw: bytes, where: str) -> tuple[Found, set[str]]:
    document = load_json(re.sub(rb",(\s*\})", rb"\1", _OUTLINES.sub(b"", raw)), where)
    names = {category["id"]: _name(category["name"]) for category in document["categories"]}
    pictures = {image["id"]: str(image["file_name"]) for image in document["images"]}
    found: dict[str, set[str]] = {name: set() for name in pictures.values()}
    for one in document["annotations"]:
        found[pictures[one["image_id"]]].add(names[one["category_id"]])
    return {name: frozenset(there) for name, there in found.items()}, set(names.values())


def _lines(raw: bytes, where: str) -> tuple[Found, set[str]]:
    found: Found = {}
    for number, line in enumerate(io.BytesIO(raw), 1):  # one after the other: there may be as many as bytes
        if line.strip():
            one = load_json(line, f"{where}:{number}")
            if one["image"] in found or not isinstance(one["objects"], list):
                raise ValueError(f"line {number}: {one['image']} a second time, or without a list of objects")
            found[one["image"]] = frozenset(map(_name, one["objects"]))
    return found, set().union(*found.values())


def _name(given: Any) -> str:
    if not given.strip():
        raise ValueError("an object without a name")
    return str(given).strip().lower()
