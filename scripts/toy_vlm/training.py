"""Training: fresh scenes at every step, AdamW, a schedule in steps; bit-identical on the same stack.

As in a real LLaVA the vision tower is trained first, to tell what is where, and then everything together, to
describe and to answer. One thread, because sums over threads come out differently. A run that is killed goes on
from its last snapshot as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from scripts.toy_vlm.batches import IGNORED, caption_text, padded, pixels, question_text
from scripts.toy_vlm.glyphs import OBJECTS
from scripts.toy_vlm.model import make_model, save_checkpoint
from scripts.toy_vlm.scenes import COLOUR_NAMES, GRID, scenes

TOWER_STREAM, TRAINING_STREAM = 10, 0
NOTHING = len(OBJECTS)  # what an empty cell shows


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; half of each batch are captions, half questions."""

    tower_steps: int = 300
    tower_batch: int = 64
    tower_rate: float = 2e-3
    steps: int = 2000
    batch: int = 32
    peak_rate: float = 1.5e-3
    warm_up: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, then a cosine to a hundredth of the peak."""
        if step < self.warm_up:
            return self.peak_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.peak_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def train(
    seed: int,
    out: Path,
    schedule: Schedule = Schedule(),
    *,
    every: int = 100,
    tell: Callable[[str], None] = print,
) -> None:
    """Train the model of ``seed`` and write its checkpoint, and ``training.jsonl``, to ``out``."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model = make_model(seed).train()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=schedule.peak_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    snapshot = out.with_name(out.name + ".snapshot.pt")
    identity = {"seed": seed, **asdict(schedule)}
    log: list[dict[str, float]] = []
    spent = 0.0
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=True)
        if state["identity"] == identity:
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            log, spent = state["log"], state["spent"]
    first = int(log[-1]["step"]) if log else 0
    if not log:
        _train_tower(model.model.vision_tower, seed, schedule, tell)
    source = islice(scenes("natural", seed, TRAINING_STREAM), first * schedule.batch, None)
    started, sums = time.process_time(), [0.0, 0.0]
    for step in range(first, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        losses = _step(model, optimiser, list(islice(source, schedule.batch)), schedule.clip)
        sums = [total + loss for total, loss in zip(sums, losses, strict=True)]
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            n = (step % every) + 1
            log.append({"step": step + 1, "caption_loss": sums[0] / n, "question_loss": sums[1] / n})
            sums = [0.0, 0.0]
            elapsed = spent + time.process_time() - started
            tell(f"seed {seed} step {step + 1}/{schedule.steps}: caption loss {log[-1]['caption_loss']:.4f}, "
                 f"question loss {log[-1]['question_loss']:.4f}, {elapsed:.0f} s of CPU")  # fmt: skip
            out.parent.mkdir(parents=True, exist_ok=True)
            draft = snapshot.with_suffix(".draft")
            torch.save({"identity": identity, "model": model.state_dict(), "optimiser": optimiser.state_dict(),
                        "log": log, "spent": elapsed}, draft)  # fmt: skip
            draft.replace(snapshot)
    save_checkpoint(model, out)
    (out / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (identity, *log)))
    snapshot.unlink(missing_ok=True)


def _train_tower(tower: Any, seed: int, schedule: Schedule, tell: Callable[[str], None]) -> None:
    """Teach the tower to name every cell's object and colour, through a linear head that is thrown away."""
    head = torch.nn.Sequential(
        torch.nn.LayerNorm(tower.config.hidden_size),
        torch.nn.Linear(tower.config.hidden_size, NOTHING + 1 + len(COLOUR_NAMES)),
    )
    optimiser = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=schedule.tower_rate)
    source = scenes("natural", seed, TOWER_STREAM)
    for step in range(schedule.tower_steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.tower_rate * min((step + 1) / 30, 1 - step / schedule.tower_steps)
        batch = list(islice(source, schedule.tower_batch))
        what = torch.full((len(batch), GRID * GRID), NOTHING)
        colour = torch.full_like(what, IGNORED)
        for row, scene in enumerate(batch):
            for placed in scene.objects:
                what[row, placed.cell], colour[row, placed.cell] = placed.what, placed.colour
        scores = head(tower(pixels(batch)).last_hidden_state[:, 1:]).flatten(0, 1)
        names, colours = scores.split([NOTHING + 1, len(COLOUR_NAMES)], dim=1)
        loss = cross_entropy(names, what.flatten()) + 0.2 * cross_entropy(
            colours, colour.flatten(), ignore_index=IGNORED
        )
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 == schedule.tower_steps:
            tell(
                f"seed {seed} vision tower {step + 1}/{schedule.tower_steps}: loss {float(loss.detach()):.4f}"
            )


def _step(model: Any, optimiser: torch.optim.Optimizer, batch: list[Any], clip: float) -> tuple[float, float]:
    """One update; the losses of captions and of answers, nats per token, which count alike."""
    half = len(batch) // 2
    losses = []
    # Apart, since captions are shorter.
    for part, text in ((batch[:half], caption_text), (batch[half:], question_text)):
        ids, labels = padded([text(scene) for scene in part])
        hidden = model.model(input_ids=ids, pixel_values=pixels(part)).last_hidden_state[:, :-1]
        learnt = labels[:, 1:] != IGNORED
        losses.append(cross_entropy(model.lm_head(hidden[learnt]), labels[:, 1:][learnt]))
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(losses[0] + losses[1])
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    return float(losses[0].detach()), float(losses[1].detach())


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
