"""Whether SOURCE is what OUT was made from, by name and commit, and by the digests of what was edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qkpatch.checkpoint.source import MANIFEST_NAME, Checkpoint
from qkpatch.checkpoint.tree import LocalFile
from qkpatch.compare.byte_by_byte import Mismatch, tensor_digest
from qkpatch.errors import QKPatchError
from qkpatch.model.locate import Source
from qkpatch.planning.manifest import Manifest


def origin_mismatches(manifest: Manifest, found: Source) -> Iterator[Mismatch]:
    """Where the manifest says that OUT was made of a repository, SOURCE is that one, where it is one at all."""
    said = manifest.source
    if said.kind != "hub" or found.kind != "hub":
        return
    here, there = (found.name.lower(), found.commit), (said.name.lower(), said.commit)
    if here != there:
        keys = [f"source.{key}" for key, a, b in zip(("name", "commit"), here, there, strict=True) if a != b]
        yield Mismatch(MANIFEST_NAME, f"{_both(manifest, found)} ({' and '.join(keys)})")


def another_source(
    manifest: Manifest,
    found: Source,
    checkpoint: Checkpoint,
    listed: Mapping[str, str],
    fault: QKPatchError | None,
) -> Mismatch | None:
    """One mismatch for all, where SOURCE is not what OUT was made from; None where it may be.

    Args:
        manifest: of OUT.
        found: SOURCE.
        checkpoint: what it holds.
        listed: SHA-256 of tensors of it that are known already.
        fault: why the recorded edit cannot be made on it, where it cannot.
    """
    why = None
    for edit in manifest.edits:
        ref, query = checkpoint.tensors.get(edit.tensor), edit.written[0]
        if ref is None or (ref.dtype, ref.shape) != (edit.dtype, edit.shape):
            why = why or f"{edit.tensor} is {'not' if ref is None else 'of another dtype or shape'} there"
            continue
        file = checkpoint.files[ref.shard]
        digest = tensor_digest(file, ref) if isinstance(file, LocalFile) else listed.get(ref.name)
        if None in (query.sha256_before, digest) or query.sha256_before == digest:
            return None
        why = (
            why
            or f"{edit.tensor} has SHA-256 {str(digest)[:12]}… there, and had {str(query.sha256_before)[:12]}…"
        )
    if why is None:
        return None
    cannot = "" if fault is None else f"; its edit cannot be made there: {fault.what}"
    return Mismatch(MANIFEST_NAME, f"{_both(manifest, found)}: {why}{cannot}")


def _both(manifest: Manifest, found: Source) -> str:
    said = manifest.source
    here = f"{found.name}@{found.commit}" if found.kind == "hub" else f"the {found.kind} {found.name!r}"
    return f"OUT was made from {said.address or f'the {said.kind} {said.name!r}'}, and this is {here}"
