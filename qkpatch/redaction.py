"""Secrets stay out of what is said: user names and passwords in addresses, signatures in their queries, and tokens."""

from __future__ import annotations

import atexit
import io
import os
import re
import threading
from contextlib import suppress
from typing import TextIO

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


class Redacted(io.TextIOBase):
    """A stream of text that is redacted line by line, each thread's by itself: a line may come in pieces."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun: dict[int, str] = {}  # lines that are not whole yet, by thread
        self._lock = threading.RLock()
        atexit.register(self._finish)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """That of the stream."""
        return self._stream.errors

    def writable(self) -> bool:
        """Always."""
        return True

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """That of the stream."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Take ``text``, and pass on what lines it completes."""
        with self._lock:
            thread = threading.get_ident()
            whole, newline, begun = (self._begun.pop(thread, "") + text).rpartition("\n")
            if begun:
                self._begun[thread] = begun
            if newline:
                self._stream.write(redact(whole + newline))
        return len(text)

    def flush(self) -> None:
        """Pass on to a terminal what there is, for bars are lines that never end; elsewhere only what is whole."""
        with self._lock:
            if self.isatty():
                self._stream.write(redact(self._begun.pop(threading.get_ident(), "")))
            self._stream.flush()

    def _finish(self) -> None:
        with self._lock, suppress(OSError, ValueError):  # full, or closed
            for begun in self._begun.values():
                self._stream.write(redact(begun))
            self._begun.clear()
            self._stream.flush()
