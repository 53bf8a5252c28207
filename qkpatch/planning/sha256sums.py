"""``SHA256SUMS``: a digest of every file of OUT, as ``sha256sum -c`` reads it."""

from __future__ import annotations

import hashlib

from qkpatch.checkpoint.source import MANIFEST_NAME, SUMS_NAME, Checkpoint
from qkpatch.errors import UsageError
from qkpatch.planning.manifest import Manifest


def refuse_own_sums(checkpoint: Checkpoint) -> None:
    """Raise :class:`UsageError` where SOURCE has a file of that name, which OUT's would replace."""
    if SUMS_NAME in checkpoint.files:
        what = f"SOURCE has a {SUMS_NAME} of its own, which is carried over and stale in OUT"
        fix = f"move {SUMS_NAME} out of SOURCE, or choose --digest edited"
        raise UsageError(what, where="--digest files", fix=fix)


def sums_text(manifest: Manifest, record: bytes) -> str:
    """The lines for all files of ``manifest``, and for the manifest itself, whose bytes are ``record``."""
    digests = {file.name: str(file.sha256) for file in manifest.files}
    digests[MANIFEST_NAME] = hashlib.sha256(record).hexdigest()
    return "".join(_line(name, digests[name]) for name in sorted(digests))


def _line(name: str, digest: str) -> str:
    # coreutils marks a line by a backslash where the name needs escapes.
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"
