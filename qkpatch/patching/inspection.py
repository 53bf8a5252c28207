"""``Inspection``: what the spectra of a model are taken of. Torch-free until they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qkpatch.checkpoint.names import USUAL
from qkpatch.common.interrupts import import_torch
from qkpatch.common.observer import UNSEEN, Observer
from qkpatch.model.locate import Access
from qkpatch.model.model import Model, open_model
from qkpatch.model.targets import LayerTarget
from qkpatch.planning.memory import choose_threads, head_memory
from qkpatch.planning.request import Request
from qkpatch.planning.settings import EditSettings, resolve

if TYPE_CHECKING:
    from qkpatch.patching.spectra import LayerSpectra


@dataclass(frozen=True)
class Inspection:
    """A model, and the layers and heads that are looked at."""

    model: Model
    settings: EditSettings
    targets: tuple[LayerTarget, ...]

    @classmethod
    def of(cls, source: str, request: Request) -> Inspection:
        """All layers that have a product, where ``request`` names none.

        Raises:
            QKPatchError: as :func:`open_model` and :func:`resolve`.
        """
        # What is done to modes does not matter to how large they are.
        request = request.without("alpha", "select", "seed", "max_shard_size")
        exclude = (*USUAL, *(request.exclude or ()))
        model = open_model(source, request.recipe, request.attention, Access.ranges, exclude, request.prefix)
        if request.edits is None:
            request = request.over(Request(layers=model.editable_layers))
        settings = resolve(request, model)
        return cls(model, settings, model.targets(settings.layers, fold_norm=settings.fold_norm))

    def spectra(
        self, device: str = "cpu", threads: int | None = None, observer: Observer = UNSEEN
    ) -> Iterator[LayerSpectra]:
        """The spectra of each layer in turn.

        Raises:
            UsageError: there is no such device, or so many threads are absurd.
            NumericalError: weights hold NaN or Inf.
        """
        per_thread = head_memory(target.layout for target in self.targets)
        # A layer that is read where it is waits in memory, and so does the next.
        if self.model.source.path is None:
            per_thread += 2 * max(target.read_bytes(self.settings.heads) for target in self.targets)
        n_threads = choose_threads(threads, per_thread, len(self.model.checkpoint.tensors))
        import_torch()
        from qkpatch.patching.device import choose_device
        from qkpatch.patching.spectra import layer_spectra

        where = choose_device(device)
        observer.begins("look", 0, len(self.targets) * len(self.settings.heads))
        for layer in layer_spectra(self, where, n_threads):
            observer.edited(len(layer.heads))
            yield layer
