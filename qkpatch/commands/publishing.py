"""What ``apply --push`` and ``card --push`` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkpatch.errors import UsageError

if TYPE_CHECKING:
    from qkpatch.checkpoint.publish import Target
    from qkpatch.manifest import Manifest
    from qkpatch.plan import EditPlan
    from qkpatch.publication import Publication
    from qkpatch.results import Comparison


def push_target(push: str | None, *, private: bool, create_pr: bool) -> Target | None:
    """The repository of ``--push``, None without it; refuses flags that go with it alone."""
    if push is not None:
        from qkpatch.publication import parse_target

        return parse_target(push, private=private, create_pr=create_pr)
    if private or create_pr:
        raise UsageError("--private and --create-pr go with --push", fix="add --push org/name")
    return None


def publication_of(
    manifest: Manifest, target: Target, base_card: str | None, comparison: Comparison | None = None
) -> Publication:
    """The commit that publishes an edited checkpoint, with its card."""
    from qkpatch.card import model_card
    from qkpatch.publication import plan_publication

    text = model_card(manifest, target.repo.partition("/")[2], base_card, comparison)
    return plan_publication(manifest, target, text.encode())


def source_card(plan: EditPlan) -> str | None:
    """The base model's card."""
    from qkpatch.publication import CARD_NAME

    file = plan.model.checkpoint.files.get(CARD_NAME)
    return None if file is None else file.read().decode("utf-8", "replace")
