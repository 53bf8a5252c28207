"""The YAML block at the head of a model card: keys set and dropped, all else left as it was written, to the letter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

_BLOCK = re.compile(
    r"\A\s*---[ \t]*\r?\n(?P<yaml>.*?)(?:\r?\n|^)---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)
_KEY = re.compile(r"(?P<key>[A-Za-z_][\w-]*)[ \t]*:")
_ITEM = re.compile(r"\s*-\s+(?P<item>.+?)\s*$")
_PLAIN = re.compile(r"[A-Za-z0-9][\w./:-]*(?: [\w./:-]+)*")
_NOT_TEXT = re.compile(r"[-+.\d_:eE]+|(?i:true|false|yes|no|on|off|null|y|n)")


def split(card: str) -> tuple[str, str]:
    """The YAML of a card, empty where it has none, and the text below."""
    found = _BLOCK.match(card)
    return (found["yaml"], card[found.end() :]) if found else ("", card)


def changed(yaml: str, values: Mapping[str, str | list[str]], drop: Iterable[str] = ()) -> str:
    """``yaml`` with top-level keys set anew, at its end, and those of ``drop`` left out."""
    gone = {*values, *drop}
    kept = [text for key, text in _entries(yaml) if key not in gone]
    lines = "".join(text if text.endswith("\n") else text + "\n" for text in kept)
    for key, value in values.items():
        if isinstance(value, str):
            lines += f"{key}: {_scalar(value)}\n"
        else:
            lines += f"{key}:\n" + "".join(f"- {_scalar(item)}\n" for item in value)
    return lines


def listed(yaml: str, key: str) -> list[str]:
    """The texts of a list, in either of YAML's two forms, or the one text that stands for it."""
    text = next((text for name, text in _entries(yaml) if name == key), "")
    first, _, rest = text.partition(":")[2].partition("\n")
    inline = first.split(" #")[0].strip()
    if inline.startswith("["):
        whole = f"{inline}\n{rest}".partition("]")[0].lstrip("[")
        return [_unquoted(item) for item in whole.replace("\n", " ").split(",") if item.strip()]
    if inline:
        return [_unquoted(inline)]
    return [
        _unquoted(found["item"].split(" #")[0]) for line in rest.splitlines() if (found := _ITEM.match(line))
    ]


def _entries(yaml: str) -> list[tuple[str | None, str]]:
    """Top-level keys with all their lines; comments above the first one have no key."""
    entries: list[tuple[str | None, str]] = []
    for line in yaml.splitlines(keepends=True):
        found = _KEY.match(line)
        if found or not entries:
            entries.append((found["key"] if found else None, line))
        else:
            entries[-1] = entries[-1][0], entries[-1][1] + line
    return entries


def _scalar(text: str) -> str:
    is_plain = _PLAIN.fullmatch(text) and not _NOT_TEXT.fullmatch(text) and ": " not in text
    return text if is_plain and not text.endswith(":") else json.dumps(text, ensure_ascii=False)


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
