"""How everything is asked and counted, what a picture gave, and a file that grows by a line as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from qkpatch.checkpoint.files import os_errors
from qkpatch.checkpoint.tree import source_file
from qkpatch.common.json_text import load_json
from qkpatch.common.typed_json import Only, as_json, from_json
from qkpatch.errors import QKPatchError, UsageError
from qkpatch.planning.blocks import Count

MOST_BYTES = 16 << 20  # of a line; the longest, of what a text was read as, has 3 MB
_OF_PART = ".part-"

# As models give them. NaN is between no bounds; e to the 700 is a float, and to the 710 none.
LogP = Annotated[float, Only("log-probability", lambda x: -1e6 <= x <= 1)]
Loss = Annotated[float, Only("loss of a token", lambda x: -1 <= x <= 700)]
Share = Annotated[float, Only("number from 0 to 1", lambda x: 0 <= x <= 1)]
Number = Annotated[float, Only("finite number", lambda x: abs(x) < 1e300)]


def option(default: Any, text: str, least: float | None = None) -> Any:
    """A field, with what ``--help`` says of it, and the least that it can be; ``...`` where it must be given."""
    return field(metadata={"help": text, "least": least}, **({} if default is ... else {"default": default}))


class _Checked:
    """Options whose numbers are refused where they are none, or too low."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            given, least = getattr(self, f.name), f.metadata["least"]
            if None not in (given, least) and not (
                type(given) in (int, type(least)) and least <= given < 1e9
            ):
                where = f"--{f.name.replace('_', '-')}"
                raise UsageError(f"{given!r:.80} is no number from {least} on", where=where)


@dataclass(frozen=True)
class Inputs(_Checked):
    """Where pictures and words come from, and where they are looked at."""

    images: Path = option(..., "The folder with the pictures.")
    objects: Path = option(..., "What is in them: COCO's instances, or JSON lines.")
    vocabulary: Path | None = option(None, "Synonyms, in YAML: a list of words by object.")
    text: Path | None = option(None, "Plain text, whose perplexity is measured.")
    batch_size: int = option(8, "Pictures at a time.", 1)
    device: str = option("cpu", "cpu, cuda, cuda:i or auto.")
    trust_remote_code: bool = option(False, "Run the code that comes with the model.")


@dataclass(frozen=True)
class Protocol(_Checked):
    """Whatever moves a figure, besides the model and the pictures; it is written into every result."""

    prompt: str = option("Please describe this image in detail.", "What is asked; all of it, with <image>.")
    question: str = option("Is there a {object} in the image? Answer yes or no.", "Likewise, of each object.")
    questions: int = option(3, "Per picture and kind, of each answer; 0 asks nothing.", 0)
    max_new_tokens: int = option(512, "Where captions end at the latest.", 1)
    keep_unfinished: bool = option(False, "Count the last sentence of a caption that was cut short.")
    sample: int | None = option(None, "So many of the pictures, drawn; else all.", 1)
    sample_seed: int = option(0, "Of sample, questions, halves, trials and bootstrap.", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt.strip():
            raise UsageError("it is empty", where="--prompt", fix="say what the model is asked")
        if "{object}" not in self.question:
            raise UsageError("it asks about no object", where="--question", fix="put {object} into it")

    def asked(self, thing: str) -> str:
        """The question about one object, with the article that it takes."""
        article = "an" if thing[0] in "aeiou" else "a"
        return self.question.replace(" a {object}", f" {article} {thing}").replace("{object}", thing)

    def to_json(self) -> dict[str, Any]:
        """With what is the same in all of them."""
        return {**as_json(self), "decoding": "greedy", "matching": "whole words, plurals, longest first"}


@dataclass(frozen=True)
class Limits(_Checked):
    """What a search must keep, how long it may take, and what it may do."""

    keep_recall: float = option(0.98, "Least share of recall that is kept.", 0.0)
    max_kl: float | None = option(None, "Most KL divergence after the prompt, in nats.", 0.0)
    max_perplexity: float | None = option(None, "Most perplexity of --text, as a multiple: 1.02.", 0.0)
    trials: int = option(24, "Settings to try.", 1)
    minutes: float | None = option(None, "As many settings as take so long, in place of --trials.", 0.0)
    channels: bool = option(False, "Try the channels of the product too.")
    anyway: bool = option(False, "Write the setting even where a control is as good.")

    def broken(self, found: Mapping[str, Any]) -> list[str]:
        """Which limits figures break."""
        most = {"kl_prompts": self.max_kl, "perplexity_ratio": self.max_perplexity}
        limits = {"recall_lost": 1 - self.keep_recall, **{key: x for key, x in most.items() if x is not None}}
        reached = {key: found.get(key, math.inf) for key in limits}
        return [f"{key} {reached[key]:.4g}" for key, limit in limits.items() if reached[key] > limit]


@dataclass(frozen=True)
class Record:
    """What a model said about one picture; log-probabilities are natural ones."""

    caption: str  # without an unfinished last sentence, where that is dropped
    finished: bool
    tokens: Count
    next_tokens: Mapping[str, LogP]  # after the prompt: the likeliest by id
    # Biases of its end that would cut it sooner, falling, and where: letters.
    stops: tuple[tuple[Number, Count], ...]
    answers: Mapping[str, Share]  # P(yes) / (P(yes) + P(no)), by the object asked about


class Store(UserDict[str, Any]):
    """A file of JSON lines, ``[key, value]``; without a path in memory alone. A last line cut short is made again.

    Machines that share the work write files of their own beside it, one for each run (:func:`of_parts`), so that no
    two append to one, and begin with what is in all; a run of the whole takes that over line by line.

    Args:
        path: the file.
        settings: what all runs have in common that write to it.
        kinds: the types of values, by how their keys begin; the first that fits counts.
        agreed: what a run of the whole and those of parts have in common besides.
        machine: of a run of a part alone: what those have in common among themselves.

    Raises:
        UsageError: the file, or one beside it, is of a run of other settings, or damaged, or not of this kind.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        kinds: Mapping[str, Any] | None = None,
        *,
        agreed: Mapping[str, Any] | None = None,
        machine: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._path, self._head, self._others = path, as_json(settings), dict[str, Any]()
        self._kinds = {":settings": Mapping[str, Any], **(kinds or {})}
        wanted = self._head | as_json(agreed or {}) | as_json(machine or {})
        if path is not None:
            if path.exists():
                self.data = self._read(path, mends=machine is None)
                _check(self.data, self._head, path)
            for place in of_parts(path.parent, path.stem):
                found = self._read(place, mends=False)
                _check(found, wanted, place)
                wanted = found.get(":settings", wanted)
                self._others |= found
            with os_errors("write", path):
                path.parent.mkdir(parents=True, exist_ok=True)
        known = self.data
        if machine is not None and path is not None:
            known, self.data, self._head = self._others, {**self._others, **self.data}, wanted
            self._path = path.with_name(f"{path.stem}{_OF_PART}{secrets.token_hex(4)}{path.suffix}")
        if self._head and not known:
            self[":settings"] = self._head

    def _read(self, path: Path, *, mends: bool) -> dict[str, Any]:
        """What a file has in whole lines; ``mends``: the rest goes."""
        found: dict[str, Any] = {}
        source_file(path, path.name)  # and no pipe, which would be waited for
        with os_errors("read", path), path.open("rb") as file:
            for n, line in enumerate(iter(lambda: file.readline(MOST_BYTES), b""), 1):
                if not line.endswith(b"\n") and len(line) < MOST_BYTES and line[:2] in (b"[", b'["'):
                    if mends:
                        os.truncate(path, file.tell() - len(line))
                    break
                try:
                    if len(line) == MOST_BYTES:
                        raise ValueError("it is longer than any")
                    key, item = from_json(tuple[str, Any], load_json(line, ""))
                    kinds = (kind for begin, kind in self._kinds.items() if key.startswith(begin))
                    from_json(next(kinds, Any), item, key)
                except (ValueError, QKPatchError) as error:
                    what = f"not a file of records, line {n}: {getattr(error, 'what', error)}"
                    raise self.damaged(what, path) from error
                found[key] = item
        return found

    def damaged(self, what: str, path: Path | None = None) -> UsageError:
        """The error for a file that somebody else wrote in."""
        fix = "take that line out, and it is measured anew; or name another -o"
        return UsageError(what, where=str(path or self._path), fix=fix)

    def __setitem__(self, key: str, item: Any) -> None:
        super().__setitem__(key, item)
        if self._path is not None:
            with os_errors("write", self._path), self._path.open("a", encoding="utf-8") as file:
                head = {":settings": self._head} if self._head and not file.tell() else {}
                for row in (head | {key: item}).items():
                    file.write(json.dumps(row, separators=(",", ":")) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def check_machine(self, ours: Mapping[str, Any]) -> None:
        """Raise :class:`UsageError` where runs of parts, to whose finds more is to come, were on another machine."""
        if self._path is not None:
            _check(
                self._others, as_json(ours), self._path.parent, "go on where they were, or name another -o"
            )

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of ``key``, made and written down where it is missing."""
        if key not in self:
            self[key] = self._others[key] if key in self._others else make()
        return self[key]


def of_parts(folder: Path, stem: str = "*") -> list[Path]:
    """The files in a folder that runs of parts have written."""
    return sorted(folder.glob(f"{stem}{_OF_PART}{8 * '[0-9a-f]'}.jsonl"))


def _check(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    path: Path,
    fix: str = "name another -o, or move the file away",
) -> None:
    """Raise :class:`UsageError` where what a file has is of other settings; what is empty is of none."""
    before = found.get(":settings")
    same = [key for key in wanted if isinstance(before, dict) and before.get(key) == wanted[key]]
    if found and (differing := [key for key in wanted if key not in same]):
        what = f"it holds a run of other settings: {', '.join(differing)}"
        raise UsageError(what, where=str(path), fix=fix)


def digest(value: Any) -> str:
    """SHA-256 of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
