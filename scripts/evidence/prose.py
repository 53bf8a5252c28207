"""What SmolLM2 lost by each edit: rows for the report, and the part of it that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import mean
from typing import Any

import numpy as np

from qkpatch.common.json_text import exact
from qkpatch.common.number_ranges import format_ranges
from scripts.evidence.edits import DRAWN, Edit
from scripts.evidence.language import WINDOW, Budget, Reader, settings
from scripts.evidence.statistics import difference
from scripts.markdown import table

ALLOWANCE = 0.02  # of perplexity, for a default


def language_rows(reader: Reader, budget: Budget) -> dict[str, Any]:
    """The base loss, and a row per setting; random kinds with the mean and the range of their draws."""
    _, base = reader.losses(None)
    every = list(settings(budget, reader.editor.n_layers))
    rows = []
    for first in (e for e in every if e.draw == 0):
        draws = [e for e in every if replace(e, draw=0) == first]
        rows.append(_row(reader, draws, base))
    return {"base_loss": float(base.mean()), "tokens": len(base) * (WINDOW - 1), "rows": rows}


def _row(reader: Reader, draws: Sequence[Edit], base: Any) -> dict[str, Any]:
    found = [reader.losses(edit) for edit in draws]
    windows = len(found[0][1])
    ones = np.ones(windows)
    after = np.stack([np.stack([losses, ones], -1) for _, losses in found])[None]
    before = np.stack([base[:windows], ones], -1)[None, None]
    edit = draws[0]
    each = [float(losses.mean() - base[:windows].mean()) for _, losses in found]
    interval = difference(after, before, replicates=2000).crossed
    return {
        "setting": edit.key if edit.how not in DRAWN else edit.key.rpartition(",")[0],
        "kind": edit.kind, "layers": list(edit.layers), "modes": edit.modes, "alpha": edit.alpha,
        "change": mean(change for change, _ in found), "tokens": windows * (WINDOW - 1), "draws": len(draws),
        "loss": asdict(interval), "lowest_draw": min(each), "highest_draw": max(each),
        "perplexity": math.expm1(interval.estimate),
    }  # fmt: skip


def prose_of_language(found: Mapping[str, Any], budget: Mapping[str, Any]) -> list[str]:
    """The report's part on real text weights."""
    head = ("layers", "r", "α", "kind", "size", "tokens", "Δ loss", "95 % interval", "range of draws",
            "Δ perplexity", "Δ loss / size")  # fmt: skip
    lines = []
    for row in found["rows"]:
        loss = row["loss"]
        several = row["draws"] > 1
        draws = f"{row['draws']}: {row['lowest_draw']:+.4f} to {row['highest_draw']:+.4f}" if several else "–"
        cells = [format_ranges(row["layers"]), str(row["modes"]), exact(row["alpha"]), row["kind"], f"{row['change']:.3f}", f"{row['tokens']:,}",
                 f"{loss['estimate']:+.4f}", f"{loss['low']:+.4f} to {loss['high']:+.4f}", draws,
                 f"{row['perplexity']:+.1%}", f"{loss['estimate'] / row['change']:+.2f}"]  # fmt: skip
        lines.append(cells[:4] + [cell.replace("-", "−") for cell in cells[4:]])
    return [
        "## What it costs real text weights",
        f"SmolLM2-135M-Instruct (30 layers, 9 query and 3 key heads of 64), bfloat16 weights as stored, sums in float32; loss on {found['tokens']:,} tokens of Python's help "
        f"topics (`pydoc_data.topics`, windows of {WINDOW} tokens), {found['base_loss']:.4f} nats before any edit. Dominant and shrink at the candidates for a default are measured on all of these, all else on "
        f"the first {budget['few_windows'] * (WINDOW - 1):,} of them, against the loss before on the same ones; intervals are over windows and draws. One model and one kind of text. *Δ loss* is in nats, *size* is ‖ΔW_Q‖ / ‖W_Q‖.",
        "![change of loss against the size of the edit](language.png)",
        table(head, lines),
    ]  # fmt: skip
