"""Which objects a caption names: whole words, their plurals and synonyms, the longest match first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qkpatch.checkpoint.tree import source_file
from qkpatch.common.strict_yaml import MAX_BYTES, Fields, load_yaml
from qkpatch.errors import UsageError

WORD = re.compile(r"[^\W_]+")
_ENDS = re.compile(r"[.!?](?=\s|$)")
_OWN_PLURALS = {"person": "people", "child": "children", "mouse": "mice", "goose": "geese", "foot": "feet",
                "tooth": "teeth", "sheep": "sheep", "fish": "fish"}  # fmt: skip
_ENDINGS = (("man", "men"), ("fe", "ves"), ("lf", "lves"), ("af", "aves"), ("y", "ies"))


def _plural(word: str) -> str:
    for end, plural in _ENDINGS:
        if word.endswith(end) and not (end == "y" and word[-2:-1] in "aeiou"):
            return word[: -len(end)] + plural
    return _OWN_PLURALS.get(word, word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s"))


@dataclass(frozen=True)
class Vocabulary:
    """Objects and their synonyms, in lower case."""

    names: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, objects: AbstractSet[str], file: Path | None = None) -> Vocabulary:
        """Objects by their own names, and by the synonyms of a YAML file: ``cup: [mug, coffee cup]``.

        Raises:
            RecipeError: the file is no such mapping, or calls two objects the same.
            UsageError: it names none of the objects.
        """
        names: dict[str, tuple[str, ...]] = dict.fromkeys(sorted(objects), ())
        if file is None:
            return cls(names)
        root = Fields(load_yaml(source_file(file, file.name).read(MAX_BYTES), str(file)), str(file))
        owner = {name: name for name in objects}
        for key in root.string_keys():
            name = key.strip().lower()
            names[name] = tuple(word.strip().lower() for word in root.take_list(key, str))
            for word in (name, *names[name]):
                if not WORD.search(word) or owner.setdefault(word, name) != name:
                    root.fault(f"{word!r} is no word, or another object already", key)
        root.finish()
        if not any(names[name] for name in objects):
            fix = f"write them under the names of --objects, such as {min(objects)}: [...]"
            raise UsageError("it has no synonym of an object that is annotated", where=str(file), fix=fix)
        return cls(names)

    @cached_property
    def _forms(self) -> dict[tuple[str, ...], str]:
        said = [(word, name) for name in self.names for word in (name, *self.names[name])]
        forms = {words: name for word, name in said if (words := tuple(WORD.findall(word)))}
        for words, name in list(forms.items()):  # what is called so itself goes before what is derived
            forms.setdefault((*words[:-1], _plural(words[-1])), name)
            if words[-1].endswith("s"):
                forms.setdefault((*words[:-1], words[-1][:-1]), name)
        return forms

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._forms), default=0)

    def mentions(self, caption: str) -> list[str]:
        """The objects that a caption names, in order, each as often as it does."""
        words, found, i = tuple(WORD.findall(caption.lower())), [], 0
        while i < len(words):
            lengths = range(min(self._longest, len(words) - i), 0, -1)
            n = next((n for n in lengths if words[i : i + n] in self._forms), 0)
            found += [self._forms[words[i : i + n]]] if n else []
            i += n or 1
        return found


def whole_sentences(caption: str) -> str:
    """A caption up to the end of its last whole sentence; all of it where none ends."""
    ends = [end.end() for end in _ENDS.finditer(caption)]
    return caption[: ends[-1]] if ends else caption
