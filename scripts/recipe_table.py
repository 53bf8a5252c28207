"""Write the README's table of model families from configs/; `--check` only compares.

python scripts/recipe_table.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from qkpatch.catalogue import shipped_recipes
from qkpatch.recipe import Recipe
from qkpatch.rows import RowLayout

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- recipes: make docs -->\n", "<!-- /recipes -->\n"


def attention(recipe: Recipe) -> str:
    """What is special about the family's queries and keys."""
    facts = []
    if recipe.tensors.rows is RowLayout.gated:
        facts.append("gated queries")
    elif recipe.tensors.rows.is_fused:
        facts.append(f"fused, `{recipe.tensors.rows.value}`")
    if recipe.tensors.norms is not None:
        facts.append("query-key norm")
    if not recipe.tensors.every_layer:
        facts.append("some layers only")
    return ", ".join(facts)


def table() -> str:
    """The table, a row per recipe."""
    rows = ["| recipe | models | language models | attention | default repository |", "|---|---|---|---|---|"]
    rows += [
        f"| `{recipe.name}` | {recipe.title} | {', '.join(recipe.config.class_defaults)} "
        f"| {attention(recipe)} | {recipe.default_repo} |"
        for recipe in shipped_recipes().values()
    ]
    return "\n".join(rows) + "\n"


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
