"""Names out of files as YAML scalars, whatever they hold."""

from __future__ import annotations

import re

from qkpatch.errors import UnsupportedError
from qkpatch.recipes.recipe import TOP_LEVEL

_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # a recipe's text cannot hold these, escaped or not
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./{}-]*", re.ASCII)
_NOT_TEXT = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def is_text(text: str) -> bool:
    """Whether a recipe can hold ``text``."""
    return _NO_TEXT.search(text) is None


def scalar(text: str, *, flow: bool = False) -> str:
    """``text`` as a YAML scalar on one line, plain where that is unambiguous.

    Raises:
        UnsupportedError: no recipe can hold it.
    """
    if not is_text(text):
        raise UnsupportedError(
            "a name holds a character that no recipe can", where=ascii(text), fix="rename the tensors"
        )
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT and not (flow and re.search("[{}]", text)):
        return text
    if text == TOP_LEVEL:
        return text
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def comment(text: str) -> str:
    """``text`` for the rest of a line after #."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)
