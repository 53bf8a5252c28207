"""``inspect`` as it goes through the layers."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Tiny

from qkpatch.checkpoint.files import open_read
from qkpatch.common import system
from qkpatch.errors import NumericalError
from qkpatch.patching import spectra
from qkpatch.patching.inspection import Inspection
from qkpatch.planning.request import Request


@pytest.mark.parametrize("threads", [1, 2])
def test_the_next_layer_is_opened_while_one_is_computed_and_none_stays_open(
    threads: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes from the Hub arrives meanwhile: opening announces what will be read."""
    opened, closed, next_is_open = [], [], threading.Event()
    open_layer, head_spectra = spectra.open_layer, spectra._head_spectra

    @contextmanager
    def watched(opener, target, *args) -> Iterator[object]:
        opened.append(target.layer)
        if len(opened) > threads:
            next_is_open.set()
        try:
            with open_layer(opener, target, *args) as weights:
                yield weights
        finally:
            closed.append(target.layer)

    def patient(*args):
        assert next_is_open.wait(10)
        return head_spectra(*args)

    monkeypatch.setattr(spectra, "open_layer", watched)
    monkeypatch.setattr(spectra, "_head_spectra", patient)
    inspection = Inspection.of(str(tiny.path), Request(modes=2))
    layers = [layer.layer for layer in inspection.spectra(threads=threads)]
    assert layers == opened == sorted(closed) == [0, 1, 2]

    def broken(*_):
        raise NumericalError("no")

    monkeypatch.setattr(spectra, "_head_spectra", broken)
    with pytest.raises(NumericalError):
        list(inspection.spectra(threads=threads))
    assert 3 < len(opened) == len(closed)


def test_the_disk_brings_what_will_be_read(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of queries and keys, when a layer is opened, and not the rest of the file."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(system, "will_read", lambda fd, begin, end: asked.append((begin, end)))
    inspection = Inspection.of(str(tiny.path), Request(modes=2))
    asked.clear()  # config.json and other small files
    list(inspection.spectra())
    rows = [span for target in inspection.targets for span in target.read_ranges((0, 1, 2, 3)).values()]
    assert sorted(asked) == sorted(span for spans in rows for span in spans)


def cached_pages(path: Path) -> bytes:
    """A byte for each page of a file, odd where the page cache holds it; asking brings none."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        found = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(mapped)), found)
        del first
    return bytes(found)


@pytest.mark.linux
def test_what_will_be_read_comes_while_something_else_is_done(tmp_path: Path) -> None:
    """All of it, though it is more than a disk reads ahead by itself."""
    path, half = tmp_path / "file", 32 << 20
    path.write_bytes(os.urandom(half) * 2)
    with open_read(path) as opened:
        os.fsync(opened.fd)
        os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if any(cached_pages(path)):
        pytest.skip("this file system keeps what it has")
    with open_read(path, None, [(half, 2 * half)]):
        until = time.monotonic() + 20
        while not all(wanted := cached_pages(path)[half // mmap.PAGESIZE :]) and time.monotonic() < until:
            time.sleep(0.01)
    assert all(wanted)
    assert not any(cached_pages(path)[: half // mmap.PAGESIZE])
