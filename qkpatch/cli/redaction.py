"""``Redacted``: what the command line says on stderr, without secrets, and without what acts in a terminal."""

from __future__ import annotations

import atexit
import io
import re
import threading
from contextlib import suppress
from typing import TextIO

from qkpatch.errors import redact, shown

# What libraries draw on a terminal: colours, and bars that are drawn again.
_DRAWN = re.compile(r"(\x1b\[(?:[\d;]*m|\d*[AK]|\?25[lh])|\r)")


class Redacted(io.TextIOBase):
    """A stream of text that is redacted line by line, each thread's by itself: a line may come in pieces."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun: dict[int, str] = {}  # lines that are not whole yet, by thread
        self._lock = threading.RLock()
        atexit.register(self._finish)

    # As io has them: of the stream behind.
    encoding = property(lambda self: self._stream.encoding)
    errors = property(lambda self: self._stream.errors)

    def writable(self) -> bool:
        """Whether text can be written, as ``io`` asks: yes."""
        return True

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream behind."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Take ``text``, and pass on what lines it completes."""
        with self._lock:
            thread = threading.get_ident()
            whole, newline, begun = (self._begun.pop(thread, "") + text).rpartition("\n")
            if begun:
                self._begun[thread] = begun
            if newline:
                self._pass_on(whole + newline)
        return len(text)

    def flush(self) -> None:
        """Pass on to a terminal what there is, for bars are lines that never end; elsewhere only what is whole."""
        with self._lock:
            if self.isatty():
                self._pass_on(self._begun.pop(threading.get_ident(), ""))
            self._stream.flush()

    def _finish(self) -> None:
        with self._lock, suppress(OSError, ValueError):  # full, or closed
            for begun in self._begun.values():
                self._pass_on(begun)
            self._begun.clear()
            self._stream.flush()

    def _pass_on(self, text: str) -> None:
        parts = _DRAWN.split(redact(text)) if self.isatty() else [redact(text)]
        self._stream.write("".join(part if i % 2 else shown(part) for i, part in enumerate(parts)))
