"""The page of models: every recipe, and what is special about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qkpatch.recipes.catalogue import shipped_recipes
from qkpatch.recipes.descriptions import attention, defaults, layout, repository
from qkpatch.recipes.heads import RowLayout
from qkpatch.recipes.recipe import ANY, Recipe
from qkpatch.recipes.refused import refused_kinds
from scripts.markdown import joined, table

FEW = 3  # classes

TESTED = {
    "transformers class": "a tiny random model of its own class, patched, compared with a dense float64 computation, "
    "and loaded back",
    "documented layout": "weights built by hand, as the family's remote code documents them",
    "real weights": "a tiny random model, and the language weights of SmolLM2-135M besides",
}


def page(repo: Path) -> str:
    """Tables from configs/: the families by what they were tested on, and what is special about each."""
    recipes = list(shipped_recipes().values())
    (edit,) = {defaults(recipe) for recipe in recipes}  # one for all, so it is not a column
    families = [
        block
        for tested, meaning in TESTED.items()
        for block in (
            f"## Tested on: {tested}",
            f"That is {meaning}.",
            table(
                ("recipe", "models", "default repository"),
                ((f"`{r.name}`", r.title, repository(r)) for r in recipes if r.tested == tested),
            ),
        )
    ]
    return joined([
        "# Models",
        f"{len(recipes)} families, each a YAML file in [configs/](../configs/README.md). A recipe is chosen from "
        "`config.json` and the tensor names; it knows the Hub's names and those of newer or older transformers "
        "versions. "
        "`qkpatch recipes check SOURCE` says which one fits a checkpoint. Around a language model that one of them "
        "describes it says how to edit an unknown class; for others it drafts a recipe with open places: see "
        "[how to add a family](../configs/README.md).",
        f"The default edit is *{edit}*, in every family: ours, not the paper's. A recipe's name, as SOURCE, stands "
        "for its default repository on the Hub; it is none where none is known that the recipe reads. **No recipe has "
        "been tested on its full released weights.**",
        "Refused by name: pickled weights; queries or keys quantised otherwise than in FP8; layers without keys of "
        "their own; and the attention in the last table.",
        *families,
        "## Language models and attention",
        "*Language models* are the text `model_type`s of config.json that a recipe knows. *Rows* is how heads lie in "
        "the tensors, where queries and keys are not simply separate. *Special* is what else is out of the ordinary.",
        table(("recipe", "language models", "rows", "special"), map(_attention, recipes)),
        "## Refused",
        "Attention without one product of stored query and key weights per head, and models that store no language "
        "model. *Classes* are those that are always so; others are recognised by their tensors.",
        *(f"**{k.name}**: {'. '.join(filter(None, (k.reason, _classes(k.architectures))))}." for k in refused_kinds()),
        "## Classes",
        f"Those of recipes with more than {FEW}; `qkpatch recipes NAME` shows any recipe's.",
        *(f"`{r.name}`: {_classes(r.architectures)}." for r in recipes if len(r.architectures) > FEW),
    ])  # fmt: skip


def _classes(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _attention(recipe: Recipe) -> Sequence[str]:
    rows = "" if recipe.tensors.rows is RowLayout.separate else layout(recipe)
    models = ", ".join(recipe.config.class_defaults).replace(ANY, "any that its class has")
    return f"`{recipe.name}`", models, rows, attention(recipe)
