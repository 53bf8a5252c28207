"""What a commit of an edited checkpoint consists of: decided from its manifest, shown, and carried out."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, replace

from qkpatch.checkpoint.names import is_private
from qkpatch.checkpoint.present_files import PresentHere
from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME
from qkpatch.checkpoint.tree import is_plain_relative
from qkpatch.checkpoint.weights import is_index
from qkpatch.common.number_ranges import abbreviate
from qkpatch.common.text import Warned, warned
from qkpatch.errors import MismatchError, UsageError
from qkpatch.hub.commit import Base, PushRepository, Step, check_repository, copyable, publish
from qkpatch.hub.repository import HubId
from qkpatch.planning.manifest import FileRecord, Manifest, planned_manifest
from qkpatch.planning.plan import EditPlan, folder_warnings
from qkpatch.publishing.card import CARD_NAME, card_text, model_card, told
from qkpatch.publishing.lmms_eval import Comparison
from qkpatch.publishing.private_files import Insisted


@dataclass(frozen=True)
class Wish:
    """What the user asks to be published, and where."""

    repository: PushRepository
    insisted: Insisted
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Publication:
    """One commit, still to be made."""

    repository: PushRepository
    base: Base | None
    steps: tuple[Step, ...]
    summary: str
    warnings: tuple[str, ...]

    @property
    def sent_bytes(self) -> int:
        """Bytes that leave this machine, at most: what the Hub has already is not sent."""
        return sum(step.size for step in self.steps if not step.is_copy)

    def carry_out(self, present: PresentHere) -> str:
        """Make the commit; returns its address. Raises as :func:`publish`."""
        return publish(self.repository, present, self.base, self.steps, self.summary)


def parse_repository(text: str, *, private: bool, create_pr: bool) -> PushRepository:
    """``org/name``.

    Raises:
        UsageError: it is not of that form.
    """
    hub_id = HubId.parse(text)
    if hub_id is None or hub_id.revision is not None:
        raise UsageError(f"{text!r} is no name of a repository", where="--push", fix="write it like org/name")
    return PushRepository(hub_id.repo, private, create_pr)


def plan_publication(
    wish: Wish, manifest: Manifest, plan: EditPlan, present: PresentHere | None
) -> Publication:
    """Copies of what the base repository has, and uploads of the rest, with a model card.

    Copies are what has the SHA-256 that the Hub lists at the base's commit. SHA256SUMS stays behind: the card in it is
    another; so does what is withheld, with its records.

    Args:
        wish: what is asked for.
        manifest: what was done, or will be.
        plan: what it leads to on SOURCE.
        present: OUT, verified; None where it is still to be made, and copies are only foreseen.

    Raises:
        UsageError: the repository is the base, or holds other weights; the model cannot do without what is withheld.
        MismatchError: a file does not have the digest on record.
        HubError: as :func:`copyable` and :func:`check_repository`.
    """
    source, repository = manifest.source, wish.repository
    base = Base(source.name, source.commit) if source.kind == "hub" and source.commit else None
    if base is not None and base.repo.lower() == repository.name.lower():
        raise UsageError("that is the base model's own repository", where="--push", fix="choose another name")
    records = (manifest, planned_manifest(plan, ""))
    outside = {file.name for record in records for file in record.files if file.outside}
    withheld: dict[str, list[str]] = {}
    for file in manifest.files:
        if (flag := wish.insisted.withholds(file.name, outside)) is not None:
            withheld.setdefault(flag, []).append(file.name)
    names = {name for some in withheld.values() for name in some}
    _refuse_lame(withheld, plan)
    kept = [file for file in manifest.files if file.name not in {*names, SUMS_NAME}]
    folded = {file.name: set(file.name.casefold().split("/")) for file in kept}
    if odd := [name for name in folded if not is_plain_relative(name) or folded[name] & _NOT_ON_HUB]:
        fix = "rename it in SOURCE, or leave out what insists on it: --include-hidden"
        raise UsageError("no name for a file on the Hub", where=repr(odd[0]), fix=fix)
    on_hub = {} if base is None else copyable(base)
    steps = []
    for file in kept:
        if file.name not in (CARD_NAME, SUMS_NAME):
            foreseen = file.source_sha256 if file.action == "copied" else None
            digest = foreseen if present is None else _digest(file, present)
            is_copy = digest is not None and on_hub.get(file.name) == digest
            steps.append(Step(file.name, file.size, digest, is_copy))
    # What is private is not named either; verify knows that warnings of what lies beside the model may be missing.
    hidden = {*names, *filter(is_private, plan.model.checkpoint.left_out)}
    is_of_ours = manifest.tool.version == records[1].tool.version  # else the words are another version's
    beside = folder_warnings(plan.model.checkpoint) if is_of_ours else manifest.warnings
    telling = {one for one in beside if any(name in one for name in hidden)}
    warnings = tuple(one for one in manifest.warnings if one not in telling)
    record = replace(manifest, files=tuple(kept), warnings=warnings).dumps().encode()
    card = _card(wish, manifest, plan, is_withheld=CARD_NAME in names, is_checked=present is not None)
    for name, content in ((MANIFEST_NAME, record), (CARD_NAME, card)):
        steps.append(Step(name, len(content), hashlib.sha256(content).hexdigest(), False, content))
    check_repository(repository, [step.name for step in steps])
    summary = f"QK product steering of {manifest.source.name}: {told(manifest.edit)}"
    return Publication(repository, base, tuple(steps), summary, tuple(_warnings(withheld)))


def _refuse_lame(withheld: dict[str, list[str]], plan: EditPlan) -> None:
    """Raise :class:`UsageError` where the model cannot be loaded without what is withheld."""
    source, output = plan.model.checkpoint, plan.output
    needed = output.made_of({*source.headers, "config.json"})
    needed |= {name for name in output.files if is_index(name)}
    for flag, names in withheld.items():
        if lost := [name for name in names if name in needed]:
            insist = [flag] if flag == "--include-hidden" else [f"{flag} {shlex.quote(n)}" for n in lost]
            what = f"the model cannot do without {abbreviate(lost, 5)}, {_WHY[flag]}"
            fix = f"if the world may have that, insist: {' '.join(insist)}"
            raise UsageError(what, where="--push", fix=fix)


_NOT_ON_HUB = {".git", ".cache"}  # folders that huggingface_hub refuses, when all is done
_WHY = {"--include": "reached by links that lead out of SOURCE", "--include-hidden": "private by name"}


def _warnings(withheld: dict[str, list[str]]) -> list[Warned]:
    return [
        warned(f"{len(names)} file(s) are not published, {_WHY[flag]} ({flag} insists): {', '.join(names)}")
        for flag, names in withheld.items()
    ]


def _digest(file: FileRecord, present: PresentHere) -> str:
    """SHA-256 of a file of OUT, which has the recorded size and digest."""
    found = present.files.get(file.name)
    digest = None if found is None or found.size != file.size else present.sha256(file.name)
    if digest is None or file.sha256 not in (None, digest):
        what = "it is not the file that the manifest lists"
        raise MismatchError(what, where=file.name, fix="apply again, or verify OUT")
    return digest


def _card(wish: Wish, manifest: Manifest, plan: EditPlan, *, is_withheld: bool, is_checked: bool) -> bytes:
    """The model card over SOURCE's, whatever OUT has in its place."""
    file = None if is_withheld else plan.model.checkpoint.files.get(CARD_NAME)
    base_card = None if file is None else card_text(file.read())
    title = wish.repository.name.partition("/")[2]
    return model_card(manifest, title, base_card, wish.comparison, is_checked=is_checked).encode()
