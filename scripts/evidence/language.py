"""Real trained weights: what edits cost SmolLM2-135M in loss on English prose that comes with CPython."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkpatch.evaluation.records import Store
from qkpatch.evaluation.statistics import Array
from scripts.evidence.edits import DRAWN, Edit, Editor, How, applied, thirds
from scripts.evidence.toy import CHANNELS

VERSION = 2  # raise it when what is measured changes: it makes stored results stale
WINDOW, BATCH = 512, 8  # tokens of a window, windows at a time


@dataclass(frozen=True)
class Budget:
    """How much is measured: what a default is chosen from on all windows, everything else on the first few."""

    windows: int = 104  # 53,144 predicted tokens
    few_windows: int = 4
    draws: int = 10  # of random modes, as many and of equal norm
    draws_of_others: int = 3  # of subspaces and of noise
    modes: tuple[int, ...] = (1, 4, 8)
    alphas: tuple[float, ...] = (0.0, 0.5, 0.7, 0.8)
    candidates: tuple[tuple[int, float], ...] = ((4, 0.5), (4, 0.8))  # modes and α for a default
    other_ranges: tuple[str, ...] = ("early", "late", "all")  # at the reference, dominant and shrink

    def windows_for(self, edit: Edit | None, middle: tuple[int, ...]) -> int:
        """On how many windows a setting is measured."""
        if edit is None:
            return self.windows
        at = (edit.modes, edit.alpha)
        is_wanted = at in self.candidates and edit.kind in ("dominant", "shrink") and edit.layers == middle
        return self.windows if is_wanted else self.few_windows


def text() -> str:
    """The help topics of Python's own documentation, as CPython ships them, in the order of their names."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))


class Reader:
    """SmolLM2, and its losses window by window.

    Weights are bfloat16 numbers, edited ones too; sums are made in float32: processors without instructions for
    bfloat16 take seven times as long over it, and each kind adds up otherwise.
    """

    def __init__(self, path: Path, results: Path, budget: Budget) -> None:
        self._path, self._budget = path, budget
        identity = f"{hashlib.sha256(text().encode()).hexdigest()[:12]} {budget.windows}"
        self.store = Store(results / f"{path.name}-v{VERSION}.jsonl", {})
        self._identity = identity
        self._prefix: tuple[int, list[Tensor]] | None = None

    @cached_property
    def editor(self) -> Editor:
        """Its heads."""
        return Editor(self._path)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            self._path, dtype=torch.float32, local_files_only=True
        )
        return model.eval()

    @cached_property
    def _ids(self) -> Tensor:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self._path, local_files_only=True)
        ids = tokenizer(text(), return_tensors="pt").input_ids[0]
        return torch.as_tensor(ids[: self._budget.windows * WINDOW]).view(-1, WINDOW)

    def losses(self, edit: Edit | None) -> tuple[float, Array]:
        """‖ΔW_Q‖ / ‖W_Q‖, and the mean loss (nats per token) of each window."""
        windows = self._budget.windows_for(edit, thirds(self.editor.n_layers)["middle"])
        key = f"{self._identity} {windows} {'base' if edit is None else edit.key}"

        def make() -> dict[str, Any]:
            edited = None if edit is None else self.editor.edit(edit)
            first = min(edit.layers) if edit else 0
            with nullcontext() if edited is None else applied(self._model.model.layers, edited):
                return {"change": edited.change if edited else 0.0, "losses": self._read(first, windows)}

        raw = self.store.once(key, make)
        return raw["change"], np.array(raw["losses"], float)

    @torch.inference_mode()
    def _read(self, first: int, windows: int) -> list[float]:
        """Mean loss per window; ``first`` is the lowest layer that is edited, below which nothing changes."""
        if self._prefix is None or self._prefix[0] != first:
            self._prefix = (first, [])
        done, losses = self._prefix[1], []
        for number, batch in enumerate(torch.split(self._ids, BATCH)[: math.ceil(windows / BATCH)]):
            if number == len(done):
                done.append(self._layers(self._model.model.embed_tokens(batch), 0, first))
            ids = batch[: windows - number * BATCH]
            hidden = done[number]
            hidden = self._layers(hidden[: len(ids)], first, len(self._model.model.layers))
            hidden = self._model.model.norm(hidden)
            for row, states in zip(ids, hidden, strict=True):
                logits = self._model.lm_head(states[:-1]).float()
                losses.append(float(torch.nn.functional.cross_entropy(logits, row[1:])))
        return losses

    def _layers(self, hidden: Tensor, first: int, last: int) -> Tensor:
        model = self._model.model
        positions = torch.arange(hidden.shape[1])[None]
        turns = model.rotary_emb(hidden, position_ids=positions)
        for layer in model.layers[first:last]:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=turns)
        return hidden


def settings(budget: Budget, n_layers: int) -> Iterator[Edit]:
    """Dominant edits and fixed controls in the middle, drawn ones at one setting, and a few elsewhere."""
    ranges = thirds(n_layers)
    fixed: tuple[How, ...] = ("bottom", "shrink")
    for modes in budget.modes:
        for alpha in budget.alphas:
            plain = Edit(ranges["middle"], modes, alpha)
            yield from (replace(plain, channel=channel) for channel in CHANNELS)
            yield from (replace(plain, how=how) for how in fixed)
    modes, alpha = budget.candidates[0]
    reference = Edit(ranges["middle"], modes, alpha)
    for how in DRAWN:
        draws = budget.draws if how in ("random", "equal-norm") else budget.draws_of_others
        yield from (replace(reference, how=how, draw=draw) for draw in range(draws))
    for name in budget.other_ranges:
        yield from (replace(reference, layers=ranges[name], how=how) for how in ("dominant", "shrink"))


def run(reader: Reader, budget: Budget, tell: Callable[[str], None]) -> None:
    """Measure everything."""
    reader.losses(None)
    every: Sequence[Edit] = list(settings(budget, reader.editor.n_layers))
    for number, edit in enumerate(every, 1):
        reader.losses(edit)
        if number % 10 == 0 or number == len(every):
            tell(f"SmolLM2: {number}/{len(every)}")
