"""What a commit of an edited checkpoint consists of: decided from its manifest, shown, and carried out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qkpatch.canonical import exact
from qkpatch.checkpoint.hub import HubId
from qkpatch.checkpoint.publish import Base, Step, Target, check_target, copyable, publish
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.checkpoint.tree import source_file
from qkpatch.errors import CheckpointError, UsageError
from qkpatch.manifest import Manifest
from qkpatch.selection import format_ranges

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Publication:
    """One commit, still to be made."""

    target: Target
    base: Base | None
    steps: tuple[Step, ...]
    summary: str

    @property
    def sent_bytes(self) -> int:
        """Bytes that leave this machine, at most: what the Hub has already is not sent."""
        return sum(step.size for step in self.steps if not step.is_copy)

    def carry_out(self, out: Path) -> str:
        """Make the commit; returns its address. Raises as :func:`publish`."""
        return publish(self.target, out, self.base, self.steps, self.summary)


def parse_target(text: str, *, private: bool, create_pr: bool) -> Target:
    """``org/name``.

    Raises:
        UsageError: it is not of that form.
    """
    hub_id = HubId.parse(text)
    if hub_id is None or hub_id.revision is not None:
        raise UsageError(f"{text!r} is no name of a repository", where="--push", fix="write it like org/name")
    return Target(hub_id.repo, private, create_pr)


def plan_publication(manifest: Manifest, target: Target, card: bytes) -> Publication:
    """Copies of what the base repository has, and uploads of the rest; ``card`` is the model card.

    SHA256SUMS stays behind: the card in it is another.

    Raises:
        UsageError: the target is the base, or holds other weights.
        HubError: as :func:`copyable` and :func:`check_target`.
    """
    base = _base(manifest)
    if base is not None and base.repo.lower() == target.repo.lower():
        raise UsageError("that is the base model's own repository", where="--push", fix="choose another name")
    on_hub = {} if base is None else copyable(base)
    steps = [
        Step(file.name, file.size, file.action == "copied" and on_hub.get(file.name) == file.size)
        for file in manifest.files
        if file.name not in (CARD_NAME, SUMS_NAME)
    ]
    record = manifest.dumps().encode()
    steps += [Step(MANIFEST_NAME, len(record), False, record), Step(CARD_NAME, len(card), False, card)]
    check_target(target, [step.name for step in steps])
    return Publication(target, base, tuple(steps), _summary(manifest))


def check_whole(out: Path, manifest: Manifest) -> None:
    """Raise :class:`CheckpointError` where OUT is plainly not what its manifest lists."""
    for file in manifest.files:
        if source_file(out / file.name, file.name).size != file.size:
            raise CheckpointError(
                f"has not the {file.size} bytes that the manifest lists",
                where=file.name,
                fix=f"qkpatch verify {out} --source ...; apply again",
            )


def _base(manifest: Manifest) -> Base | None:
    source = manifest.source
    return Base(source["name"], source["commit"]) if source["kind"] == "hub" else None


def _summary(manifest: Manifest) -> str:
    edit = manifest.edit
    return (
        f"QK product steering of {manifest.source['name']}: layers {format_ranges(edit['layers'])}, "
        f"{edit['modes_edited']} {edit['select']} mode(s), alpha {exact(edit['alpha'])}, {edit['channel']} channel"
    )
