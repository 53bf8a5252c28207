"""The YAML block at the head of a model card: what is inherited of it, to the letter, and what is set anew."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from qkpatch.common.strict_yaml import Entry, top_level
from qkpatch.errors import RecipeError, plain

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(?P<yaml>(?:.*\n)*?)(?:---|\.\.\.)[ \t\r]*(?:\n|\Z)")
# What looks like keys and has no end, unlike a rule above text.
_UNCLOSED = re.compile(r"\s*---[ \t]*\r?\n(?:[ \t]*(?:#.*)?\r?\n)*[\w-]+:(?:\s|\Z)")
_PLAIN = re.compile(r"(?=[A-Za-z0-9])[\w./-]+(?:[ :][\w./-]+)*")
_NOT_TEXT = re.compile(r"[-+.\d_:eE]+|0[xXoObB]\w+|(?i:true|false|yes|no|on|off|null|y|n)")
# Lists of names on the Hub, which rejects a card that has anything else there.
_OF_REPOSITORIES = ("base_model", "datasets")
# A path on somebody's machine.
_LOCAL = re.compile(r"\s*(?:file:|~/|/[^/]+/|[A-Za-z]:[\\/]|\\\\)", re.IGNORECASE)
_REPOSITORY = re.compile(
    r"(?!.*(?:--|\.\.|\.git$))(?=.{1,96}$)[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?", re.A
)


@dataclass(frozen=True)
class FrontMatter:
    """A model card, taken apart."""

    text: str  # what follows the block; all of it where that cannot be read
    entries: Mapping[str, Entry] = field(default_factory=dict)
    fault: str | None = None  # why the block cannot be read

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, card: str) -> FrontMatter:
        """Take ``card`` apart; between two rules may be text as well, which is no block."""
        card = card.removeprefix("\ufeff")
        found = _BLOCK.match(card)
        try:
            entries = top_level(found["yaml"], "README.md") if found else None
        except RecipeError as error:
            return cls(card, fault=str(error.what))
        if found is None and _UNCLOSED.match(card):
            return cls(card, fault="not closed by a second ---")
        return cls(card) if found is None or entries is None else cls(card[found.end() :], entries)

    def listed(self, key: str) -> list[str]:
        """The texts of a list, or the one text that stands for it."""
        return [text for text in self.entries.get(key, ("", None))[1] or () if text is not None]

    def changed(self, values: Mapping[str, str | list[str]], drop: Collection[str] = ()) -> str:
        """The lines of the block with keys set anew at its end, less ``drop``, local paths and what the Hub rejects."""
        kept = (self._worth(key) for key in self.entries if key not in values and key not in drop)
        return "".join([*kept, *(_lines(key, value) for key, value in values.items())])

    def _worth(self, key: str) -> str:
        lines, texts = self.entries[key]
        is_name = key in _OF_REPOSITORIES
        good = [t for t in self.listed(key) if (_REPOSITORY.fullmatch(t) if is_name else not _LOCAL.match(t))]
        if len(good) == len(texts or ()) and (texts is not None or key not in _OF_REPOSITORIES):
            return lines if lines.endswith("\n") else lines + "\n"
        return _lines(key, good) if good else ""


def _lines(key: str, value: str | list[str]) -> str:
    if isinstance(value, str):
        return f"{_scalar(key)}: {_scalar(value)}\n"
    return "".join([f"{_scalar(key)}:\n", *(f"- {_scalar(item)}\n" for item in value)])


def _scalar(text: str) -> str:
    is_plain = _PLAIN.fullmatch(text) and not _NOT_TEXT.fullmatch(text)
    return text if is_plain else json.dumps(plain(text), ensure_ascii=False)
