"""An adapter, loaded by PEFT into a family's own class, beside the checkpoint that ``apply`` writes of the same edit.

Run by itself it prints how far the two are apart, by family and channel: ``python tests/kit/adapters.py [FAMILY ...]``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from edited_families import CASES
from families import Case
from torch import Tensor

import qkpatch

CHANNELS = ("full", "symmetric", "antisymmetric")
U = 2.0**-24  # the roundoff of float32
# To first order a model's answer is linear in the change of its weights. A change that is off by ρ of its own size
# then moves the logits by about ρ of what the change moves them. Passes are made in float64, but most norms round to
# float32 whatever comes: another U of the logits. This many times both is allowed.
LINEAR = 32


@dataclass(frozen=True)
class Agreement:
    """How far an adapter is from the checkpoint of the same edit."""

    off: float  # largest |W + B A − W'| over its bound, of all numbers of all edited weights
    relative: float  # ‖W + B A − W'‖ / ‖W' − W‖, the largest of all edited weights
    logits: float  # largest difference of the logits of adapter and checkpoint
    largest: float  # logit
    moved: float  # largest difference of the logits of checkpoint and base
    modules: tuple[str, ...]  # those of the model that the adapter is in

    @property
    def bound(self) -> float:
        """Of ``logits``."""
        return LINEAR * (self.relative * self.moved + U * self.largest)


def save_source(case: Case, path: Path, *, original: bool = True) -> None:
    """A tiny random model in float32, with gains that are not all ones and attention that is not even."""
    torch.manual_seed(0)
    model = getattr(transformers, case.model_class)(case.config()).float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif any(projection in name for projection in ("q_proj", "k_proj", "qkv", "query_key_value")):
            parameter.data *= 8
    model.save_pretrained(path, save_original_format=original if case.original is None else case.original)


def logits(model: Any, case: Case) -> Tensor:
    """What the model answers; what is no number's place (of tokens that cannot be) is left out."""
    inputs = {k: v.to(precise(case)) if v.is_floating_point() else v for k, v in case.inputs().items()}
    with torch.no_grad():
        found: Tensor = model(**inputs).logits.double()
    return torch.where(found > torch.finfo(torch.float32).min, found, 0.0)


def precise(case: Case) -> torch.dtype:
    """What passes are made in; Kosmos' masks hold no float64."""
    return torch.float32 if case.model_class.startswith("Kosmos") else torch.float64


def load(case: Case, path: Path) -> Any:
    how = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = getattr(transformers, case.model_class).from_pretrained(path, **how)
    return model.to(precise(case)).eval()


def agreement(case: Case, source: Path, scratch: Path, **edit: Any) -> Agreement:
    """Make the adapter and the checkpoint of an edit of ``source``, load both, and compare them."""
    usual = {"layers": f"{case.edited[0]}-{case.edited[-1]}", "modes": 2, "alpha": 0.0}
    edit = edit if "edits" in edit else {**usual, **edit}
    manifest = qkpatch.lora(source, scratch / "adapter", **edit)
    qkpatch.apply(qkpatch.plan(source, **edit), scratch / "out")
    before, after = load(case, source), load(case, scratch / "out")
    weights = {name: tensor.double() for name, tensor in before.state_dict().items()}
    plain, edited = logits(before, case), logits(after, case)
    from peft import PeftModel  # seconds, which only who comes here has to spend
    from peft.tuners.lora import LoraLayer

    adapted = PeftModel.from_pretrained(before, scratch / "adapter", autocast_adapter_dtype=False)
    adapted = adapted.to(precise(case)).eval()
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    }
    off, relative = 0.0, 0.0
    for name in manifest.adapter.modules:
        A, B = (getattr(layers[name], part)["default"].weight.double() for part in ("lora_A", "lora_B"))
        W, W_new = weights[f"{name}.weight"], after.state_dict()[f"{name}.weight"].double()
        error = (W + B @ A - W_new).abs()
        # W' is rounded once; A and B are, and their product has no more terms than a head has modes.
        allowed = U * W_new.abs() + (2 * U + U**2) * (B.abs() @ A.abs()) + 1e-14 * W.abs()
        off = max(off, float((error / allowed.clamp_min(1e-300)).max()))
        relative = max(relative, float(error.norm() / (W_new - W).norm()))
    apart, moved = logits(adapted, case) - edited, edited - plain
    largest = (float(each.abs().max()) for each in (apart, edited, moved))
    return Agreement(off, relative, *largest, tuple(layers))


def main(names: list[str]) -> None:
    """The table."""
    import tempfile

    print(
        "| family | channel | ‖W + BA − W'‖/‖ΔW‖ | of its bound | logits apart | allowed | edit moves them |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in names or CASES:
        for channel in CHANNELS:
            with tempfile.TemporaryDirectory() as folder:
                save_source(CASES[name], Path(folder) / "source")
                a = agreement(CASES[name], Path(folder) / "source", Path(folder), channel=channel)
            numbers = f"{a.relative:.1e} | {a.off:.2f} | {a.logits:.1e} | {a.bound:.1e} | {a.moved:.1e}"
            print(f"| {name} | {channel} | {numbers} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
