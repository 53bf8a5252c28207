"""Who waits long for a server hears for which: by ``logging``, which the command line shows."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qkpatch.common.interrupts import signals_masked

_SECONDS = 5.0  # until the first word; then twice as many
_log = logging.getLogger(__name__)


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Log now and then, while the block lasts, that ``what`` has not answered."""
    is_over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = _SECONDS
        while not is_over.wait(wait):
            wait = 2 * _SECONDS
            _log.info("%s: no answer for %.0f s; still trying", what, time.monotonic() - began)

    with signals_masked():
        threading.Thread(target=tell, name="qkpatch-waiting", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
