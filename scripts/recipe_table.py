"""Write the README's table of model families from configs/; `--check` only compares.

python scripts/recipe_table.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.words import attention, defaults, layout

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- recipes: make docs -->\n", "<!-- /recipes -->\n"


def table() -> str:
    """The table, a row per recipe."""
    columns = (
        "recipe", "models", "language models", "layout", "attention", "default repository", "default edit", "tested on",
    )  # fmt: skip
    rows = [columns, ("---",) * len(columns)]
    rows += [
        (
            f"`{recipe.name}`",
            recipe.title,
            ", ".join(recipe.config.class_defaults),
            layout(recipe),
            attention(recipe),
            recipe.default_repo,
            defaults(recipe),
            recipe.tested,
        )
        for recipe in shipped_recipes().values()
    ]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def main() -> int:
    """Rewrite or check the README; 1 when it is stale."""
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    fresh = head + BEGIN + table() + END + rest.split(END)[1]
    if "--check" in sys.argv[1:]:
        return int(fresh != text)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
