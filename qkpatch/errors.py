"""Every failure qkpatch can explain: what happened, where, and what to do about it.

The exit code is a property of the kind of failure, so the command line needs no table:
0 ok, 1 verification mismatch, 2 usage, 3 unsupported or ambiguous checkpoint, 4 I/O and memory, 6 warnings where
none are allowed. Anything that is not a :class:`QKPatchError` is a fault of ours: it keeps its traceback, and ends
with 5.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import ClassVar

_LONGEST = 8000  # characters of a fact: what files put into it may be of any length
_SPACE = r"\s\"'<>`"


def in_url(letters: str) -> str:
    """A pattern of one of these ASCII letters, as it is or escaped in a URL, be it twice."""
    escaped = "|".join(f"{ord(letter):02X}" for letter in letters)
    return rf"(?:[{re.escape(letters)}]|%(?:25)*(?i:{escaped}))"


# By word, in which nothing is gone through again from each of its letters: no text takes longer than by its length.
_WORD = re.compile(rf"[^{_SPACE}]+")
# One slash, where it was taken for a path; \/ in JSON.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}:(?:\\?/)+")
_AT, _QUESTION = re.compile(in_url("@")), re.compile(in_url("?"))
# Of a word up to its last @. The last one before the path ends it, or of all, where a password was not quoted: it may
# hold a slash, a port does not.
_USERINFO = re.compile(rf"({_SCHEME.pattern})(?:[^/?#]*{_AT.pattern}|[^/?#:@]+:(?!\d*[/?#]).*)")
_SIGNED = re.compile(rf"{in_url('?&#;')}[\w.%+~-]{{1,64}}{in_url('=')}")
# A short one is taken for a token where it is a word by itself: hf_models may be a directory, hf_api.py is a module.
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}|(?<![\w/.\\-])hf_[A-Za-z0-9]{6,}(?![\w/\\-]|\.\w)")
_TOKEN_VARIABLES = {"HF_TOKEN": "hf_***", "HUGGING_FACE_HUB_TOKEN": "hf_***"} | dict.fromkeys(
    ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN",
     "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_CLIENT_SECRET"), "***"
)  # fmt: skip
# What is imported late, and how to install it.
_LIBRARIES = {name: name for name in ("huggingface_hub", "safetensors", "numpy")} | {
    "torch": "torch (a CPU build, where there is no GPU)"
}
_LEAST_TOKEN = 8  # characters; shorter ones are words
_MOST_WARNINGS = 20


def redact(text: str) -> str:
    """``text`` without what nobody should read in it; done twice, the same."""
    for variable, shown_as in _TOKEN_VARIABLES.items():
        token = os.environ.get(variable, "").strip()
        if len(token) >= _LEAST_TOKEN:
            text = text.replace(token, shown_as)
    return _TOKEN.sub("hf_***", _WORD.sub(lambda found: _public(found[0]), text))


def _public(word: str) -> str:
    """A word without the user of a URL, and without a query: of a URL any, elsewhere one that names something."""
    end = max((at.end() for at in _AT.finditer(word)), default=0)
    word = _USERINFO.sub(r"\1***@", word[:end]) + word[end:]
    scheme = _SCHEME.search(word)
    queries = _SIGNED.search(word), scheme and _QUESTION.search(word, scheme.end())
    begins = [query.start() for query in queries if query]
    return f"{word[: min(begins)]}?..." if begins else word


def plain(text: str) -> str:
    """``text`` on one line, fit to be shown: whatever acts, turns a line around or is unseen is spelled out as in JSON.

    This and :func:`shown` are what stands between a file's or a server's text and people, JSON and Markdown.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _spelled(c) for c in text)


# Controls but tab, newline and the carriage return of one; marks and overrides of direction; halves of pairs.
_ACTS = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)


def shown(text: str) -> str:
    """A document, of which lines and spacing are kept, without what acts in it; JSON stays the same JSON."""
    return _ACTS.sub(lambda found: _spelled(found[0]), text)


def one_line(text: str) -> str:
    """:func:`shown` on one line: for names that are kept, where :func:`plain` would spell out more than acts."""
    return shown(text).replace("\n", r"\n")


def _spelled(character: str) -> str:
    return json.dumps(character)[1:-1]


class QKPatchError(Exception):
    """A failure with its facts: ``what`` happened, ``where`` (file, tensor, flag), how to ``fix`` it.

    Each is fit to be shown: without secrets, :func:`plain`, and of bounded length. ``what`` may be several lines.
    """

    exit_code: ClassVar[int] = 3
    kind: ClassVar[str] = "error"

    def __init__(
        self, what: str | Sequence[str], *, where: str | None = None, fix: str | None = None
    ) -> None:
        self.what = _fact(what)
        self.where = None if where is None else _fact(where)
        self.fix = None if fix is None else _fact(fix)
        super().__init__(self.what)

    def __str__(self) -> str:
        """All three facts on one line, for logs and tests; ``console`` lays them out for people."""
        where, fix = f" [{self.where}]" if self.where else "", f" -> {self.fix}" if self.fix else ""
        return self.what + where + fix

    def to_json(self) -> dict[str, str | int | None]:
        """The same facts as a JSON object."""
        return {key: getattr(self, key) for key in ("kind", "what", "where", "fix", "exit_code")}


def _fact(text: str | Sequence[str]) -> str:
    lines = [text] if isinstance(text, str) else text
    said = "\n".join(plain(redact(line[: 2 * _LONGEST])) for line in lines)
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"


class UsageError(QKPatchError):
    """The request itself is wrong: a flag, a range, a settings file."""

    exit_code = 2
    kind = "usage"


def no_torch() -> UsageError:
    """The error for what computes where torch is not installed."""
    fix = f"pip install {_LIBRARIES['torch']}"
    return UsageError("torch is not installed here, and this takes it", where="torch", fix=fix)


def broken_library(error: Exception) -> UsageError | None:
    """The error for a library that is missing or installed badly; None where ``error`` says something else."""
    missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
    if missing == "torch":
        return no_torch()
    frames = traceback.walk_tb(error.__traceback__)
    modules = [missing or "", *(str(frame.f_globals.get("__name__")) for frame, _ in frames)]
    for library in (name.partition(".")[0] for name in modules):
        # An OSError of one that was imported is of its work: a file, a connection.
        if library in _LIBRARIES and (isinstance(error, ImportError) or library not in sys.modules):
            fix = f"install it anew: pip install --force-reinstall {_LIBRARIES[library]}"
            return UsageError(f"{library} cannot be imported: {error}", where=library, fix=fix)
    return None


class RecipeError(QKPatchError):
    """A recipe or settings YAML is malformed; all its faults are reported together."""

    exit_code = 2
    kind = "recipe"


class HeaderError(QKPatchError):
    """A safetensors file breaks the format."""

    kind = "header"


class CheckpointError(QKPatchError):
    """The checkpoint contradicts itself: index, headers, config and shapes disagree."""

    kind = "checkpoint"


class UnsupportedError(QKPatchError):
    """A checkpoint qkpatch recognises and does not edit: quantised q/k, MLA, pickles, ..."""

    kind = "unsupported"


class AmbiguousError(QKPatchError):
    """No recipe, or more than one, fits; ``what`` lists the candidates."""

    kind = "ambiguous"


class MismatchError(QKPatchError):
    """OUT is not SOURCE plus the edit that its manifest declares, where it must be."""

    exit_code = 1
    kind = "mismatch"


class NumericalError(QKPatchError):
    """NaN or Inf in or out, or an edit that would not change its tensor."""

    kind = "numerical"


class FileSystemError(QKPatchError):
    """Reading, writing, disk space or publishing failed."""

    exit_code = 4
    kind = "io"


class HubError(FileSystemError):
    """The Hub could not deliver what was asked for."""

    kind = "hub"


class StoreError(FileSystemError):
    """A store could not deliver, or take, what it was asked to."""

    kind = "store"


class WarnedError(QKPatchError):
    """There are warnings, and none are allowed."""

    exit_code = 6
    kind = "warning"

    def __init__(self, warnings: Sequence[str]) -> None:
        told = [f"  {warning}" for warning in warnings[:_MOST_WARNINGS]]
        more = [f"  and {len(warnings) - len(told)} more"] * (len(told) < len(warnings))
        what = [f"{len(warnings)} warning(s), and none are allowed:", *told, *more]
        super().__init__(what, where="--strict", fix="mend what they are about, or leave --strict out")


def refuse_warnings(warnings: Sequence[str], *, strict: bool) -> None:
    """Raise :class:`WarnedError` where there are any, and none are allowed."""
    if strict and warnings:
        raise WarnedError(warnings)


class UnexpectedError(QKPatchError):
    """A fault of qkpatch's own, of which the traceback on stderr tells more."""

    exit_code = 5
    kind = "fault"

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}", fix="report it, with what is on stderr")
