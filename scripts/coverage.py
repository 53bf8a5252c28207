"""Which served architectures are edited, refused for a reason, or unknown: by their class names.

python -m scripts.coverage [--all]

Two lists: `scripts/served.json`, vLLM's multimodal generation models of autumn 2026 (`A|B` are names of one model),
and the image-text-to-text classes of the installed transformers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.refused import refused_kinds

SERVED = Path(__file__).with_name("served.json")


def lists() -> dict[str, list[tuple[str, ...]]]:
    """Each list's models, each by the names of its class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    served = [tuple(names.split("|")) for names in json.loads(SERVED.read_text("utf-8"))]
    return {
        "vLLM": served,
        "transformers": [(v,) if isinstance(v, str) else tuple(v) for v in NAMES.values()],
    }


def sorted_out(models: Iterable[tuple[str, ...]]) -> dict[str, list[str]]:
    """The models by what becomes of them: ``edited``, ``refused: MLA`` and so on, ``unknown``."""
    edited = {name for recipe in shipped_recipes().values() for name in recipe.architectures}
    refused = {name: kind.name for kind in refused_kinds() for name in kind.architectures}
    found: dict[str, list[str]] = {}
    for names in models:
        kind = next((f"refused: {refused[n]}" for n in names if n in refused), "unknown")
        found.setdefault("edited" if edited.intersection(names) else kind, []).append(names[0])
    return dict(sorted(found.items()))


def main() -> None:
    """Print the counts, and the names of what is not edited."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.coverage", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--all", action="store_true", help="name the edited ones too")
    everything = parser.parse_args().all
    for name, models in lists().items():
        print(f"{name}: {len(models)} models")
        for kind, classes in sorted_out(models).items():
            told = "" if kind == "edited" and not everything else f": {', '.join(classes)}"
            print(f"  {len(classes):3} {kind}{told}")


if __name__ == "__main__":
    main()
