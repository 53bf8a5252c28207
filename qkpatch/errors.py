"""Every failure qkpatch can explain: what happened, where, and what to do about it.

The exit code is a property of the kind of failure, so the command line needs no table:
0 ok, 1 verification mismatch, 2 usage, 3 unsupported or ambiguous checkpoint, 4 I/O.
Anything that is not a :class:`QKPatchError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import re
from typing import ClassVar

_SPACE = r"\s\"'<>`"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*:(?:\\?/)+"  # one slash, where it was taken for a path; \/ in JSON
# The last @ before the path ends it; a password that was not quoted may hold a slash, a port does not.
_USERINFO = re.compile(rf"({_SCHEME})(?:[^/?#{_SPACE}]*|[^/?#:@{_SPACE}]+:(?!\d*[/?#])[^{_SPACE}]*)@")
_QUERY = re.compile(rf"({_SCHEME}[^?{_SPACE}]*)\?[^{_SPACE}]*|[?&#][\w.%+~-]+=[^{_SPACE}]*")
# A short one is taken for a token where it is a word by itself: hf_models may be a directory, hf_api.py is a module.
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}|(?<![\w/.\\-])hf_[A-Za-z0-9]{6,}(?![\w/\\-]|\.\w)")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_LEAST_TOKEN = 8  # characters; shorter ones are words


def redact(text: str) -> str:
    """``text`` without what nobody should read in it; done twice, the same."""
    for variable in _TOKEN_VARIABLES:
        token = os.environ.get(variable, "").strip()
        if len(token) >= _LEAST_TOKEN:
            text = text.replace(token, "hf_***")
    text = _USERINFO.sub(r"\1***@", text)
    text = _QUERY.sub(lambda found: f"{found[1] or ''}?...", text)
    return _TOKEN.sub("hf_***", text)


class QKPatchError(Exception):
    """A failure with its facts: ``what`` happened, ``where`` (file, tensor, flag), how to ``fix`` it; no secrets."""

    exit_code: ClassVar[int] = 3
    kind: ClassVar[str] = "error"

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = redact(what)
        self.where = None if where is None else redact(where)
        self.fix = None if fix is None else redact(fix)
        super().__init__(self.what)

    def __str__(self) -> str:
        """All three facts on one line, for logs and tests; ``console`` lays them out for people."""
        parts = [self.what]
        if self.where:
            parts.append(f"[{self.where}]")
        if self.fix:
            parts.append(f"-> {self.fix}")
        return " ".join(parts)

    def to_json(self) -> dict[str, str | int | None]:
        """The same facts as a JSON object."""
        return {
            "kind": self.kind,
            "what": self.what,
            "where": self.where,
            "fix": self.fix,
            "exit_code": self.exit_code,
        }


class UsageError(QKPatchError):
    """The request itself is wrong: a flag, a range, a settings file."""

    exit_code = 2
    kind = "usage"


def no_torch() -> UsageError:
    """The error for what computes where torch cannot be imported."""
    return UsageError(
        "torch is not installed here, and this takes it",
        where="torch",
        fix="pip install torch (a CPU build, where there is no GPU)",
    )


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
