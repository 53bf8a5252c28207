"""Each shipped recipe on a tiny random model of its own transformers class, in both layouts that exist on disk."""

from __future__ import annotations

import re
from functools import cache

import families
import families_older
import families_recent
import oracle
import pytest
import remote_families
import remote_served
import torch
import transformers
from edited_families import CASES, edited, edited_head, read_all, saved, way
from kinds import first_of_each

REMOTE = (
    families.REMOTE
    | families_recent.REMOTE
    | families_older.REMOTE
    | remote_families.REMOTE
    | remote_served.REMOTE
)


@pytest.mark.parametrize("original", [True, False], ids=["Hub names", "module names"])
@pytest.mark.parametrize("name", first_of_each(CASES, way))
def test_the_language_tower_and_nothing_else_is_edited_and_the_model_loads(name: str, original: bool) -> None:
    case, recipe = CASES[name], recipe_of(name)
    if case.original is not None and case.original != original:
        pytest.skip("another recipe is for these names")
    model_class, made = getattr(transformers, case.model_class), edited(name, original)
    source, out = made.source, made.out
    assert len(list(source.glob("*.safetensors"))) > 1
    assert f"recipe {recipe}," in made.result.stdout

    before, after = read_all(source), read_all(out)
    assert list(before) == list(after)
    changed = [name for name in before if not families.same(before[name], after[name])]
    stems = [name.rsplit(".", 2)[0] for name in changed]
    parts = [re.split(r"\.(\d+)\.", name, maxsplit=1) for name in changed]
    assert [int(layer) for _, layer, _ in parts] == list(case.edited)
    assert len({(tree, module) for tree, _, module in parts}) == 1
    assert "visi" not in stems[0]
    assert "visual" not in stems[0]
    if case.has_vision:
        decoys = [
            name
            for name in before
            if any(q in name for q in ("q_proj", "qkv", ".wq.", ".query.", ".to_q.", "in_proj"))
            and case.decoy in name
        ]
        assert decoys, "the vision tower must hold a decoy"
        assert case.decoy not in stems[0]

    assert made.manifest["edit"]["skipped_layers"] == list(case.skipped)
    for layer in case.skipped:
        assert any(f".layers.{layer}." in name and "vis" not in name for name in before)

    for stem in stems:
        if case.kept is not None:
            assert torch.equal(case.kept(before, stem), case.kept(after, stem))
        (Q, keys), (Q_after, keys_after) = case.heads(before, stem), case.heads(after, stem)
        assert torch.equal(keys, keys_after)
        assert len(Q) % len(keys) == 0
        for h in range(len(Q)):
            expected = edited_head(Q[h].double().numpy(), keys[h * len(keys) // len(Q)].double().numpy())
            error = oracle.ulps(Q_after[h].double().numpy(), oracle.round_to(expected, "BF16"), "BF16")
            assert error <= 1, f"head {h} of {stem}"

    loaded, report = model_class.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        edited_logits = families.answer(loaded.float()(**case.inputs()))
    assert not torch.allclose(logits_of_source(name), edited_logits)


@cache
def logits_of_source(name: str) -> torch.Tensor:
    """Of either layout, as they hold the same weights."""
    case, source = CASES[name], next(iter(saved(name).values()))
    with torch.no_grad():
        model = getattr(transformers, case.model_class).from_pretrained(source).float()
        return families.answer(model(**case.inputs()))


def test_every_recipe_has_a_case() -> None:
    from qkpatch.recipes.catalogue import shipped_recipes

    by_class = {recipe_of(name) for name in CASES}
    assert by_class | REMOTE == set(shipped_recipes())
    for recipe in shipped_recipes().values():
        is_layout_only = recipe.name in REMOTE - by_class
        assert (recipe.tested == "documented layout") == is_layout_only, recipe.name


def recipe_of(name: str) -> str:
    """``internvl:qwen3`` is a further case of the recipe ``internvl``."""
    return name.partition(":")[0]
