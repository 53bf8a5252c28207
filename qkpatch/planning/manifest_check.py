"""What a manifest must be beyond its types, for others to work with it: an edit, names, and paths that stay inside."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.checkpoint.tree import is_plain_relative

if TYPE_CHECKING:
    from qkpatch.planning.manifest import Manifest

_COMMIT = re.compile("[0-9a-f]{40}")


def check_manifest(manifest: Manifest) -> None:
    """Refuse what ``verify`` could not work with.

    Raises:
        UsageError: its edit is none that can be asked for.
        ValueError: anything else.
    """
    manifest.request()
    source, model = manifest.source, manifest.model
    if min(model.num_attention_heads, model.num_key_value_heads, model.head_dim, model.hidden_size) < 1:
        raise ValueError("a size of the model is not at least 1")
    names, files = [edit.tensor for edit in manifest.edits], [file.name for file in manifest.files]
    shards = [(edit.shard, edit.key_shard, edit.scale_shard or edit.shard) for edit in manifest.edits]
    paths = [*files, *(shard for some in shards for shard in some)]
    # A backslash is a letter like others on this system; where it is not, publishing refuses it.
    if not all(is_plain_relative(path.replace("\\", "_")) for path in paths):
        raise ValueError("the name of a file is no plain path inside OUT")
    if len(set(names)) != len(names) or len({*files, MANIFEST_NAME}) != len(files) + 1:
        raise ValueError("a tensor or a file is recorded twice, or the manifest itself")
    if source.kind not in ("directory", "file", "hub"):
        raise ValueError("the source is of no known kind")
    if source.kind == "hub" and not _COMMIT.fullmatch(source.commit or ""):
        raise ValueError("the source is a repository, and its commit is none")
