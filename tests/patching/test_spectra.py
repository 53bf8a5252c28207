"""``inspect`` as it goes through the layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import Tiny

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
