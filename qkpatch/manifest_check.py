"""What a manifest must be, whoever wrote it, for others to work with it: numbers, names, and paths that stay inside."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qkpatch.checkpoint.source import MANIFEST_NAME
from qkpatch.checkpoint.tree import is_plain_relative
from qkpatch.rows import RowLayout

if TYPE_CHECKING:
    from qkpatch.manifest import Manifest

_COMMIT = re.compile("[0-9a-f]{40}")


def check_manifest(manifest: Manifest) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what ``verify`` could not work with."""
    request = manifest.request()
    if not (isinstance(request.recipe, str) and isinstance(request.alpha, int | float)):
        raise TypeError("the recipe is not a name, or alpha not a number")
    if not isinstance(request.max_shard_size, int | None):
        raise TypeError("max_shard_size is not a whole number")
    if type(request.modes) is not int or type(request.seed) is not int:
        raise TypeError("modes or seed is not a whole number")
    sizes = [
        manifest.model[key]
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    ]
    heads = [head.head for edit in manifest.edits for head in edit.heads]
    RowLayout(manifest.model["rows"])
    if not all(type(n) is int for n in (*sizes, *heads)) or min(sizes) < 1:
        raise TypeError("a head or a size is not a whole number")
    if not all(
        isinstance(block, dict)
        for block in (manifest.edit, manifest.model, manifest.output, manifest.source, manifest.run)
    ):
        raise TypeError("a block is not an object")
    names, files = [edit.tensor for edit in manifest.edits], [file.name for file in manifest.files]
    shards = [(edit.shard, edit.key_shard, edit.scale_shard or edit.shard) for edit in manifest.edits]
    paths = [*files, *(shard for some in shards for shard in some)]
    if not all(isinstance(name, str) for name in (*names, *paths)):
        raise TypeError("a name is not a string")
    if not all(type(file.size) is int and type(file.outside) is bool for file in manifest.files):
        raise TypeError("a file's size is not a whole number, or where it is from is not said")
    # A backslash is a letter like others on this system; where it is not, publishing refuses it.
    if not all(is_plain_relative(path.replace("\\", "_")) for path in paths):
        raise ValueError("the name of a file is no plain path inside OUT")
    if len(set(names)) != len(names) or len({*files, MANIFEST_NAME}) != len(files) + 1:
        raise ValueError("a tensor or a file is recorded twice, or the manifest itself")
    kind, name, commit = (manifest.source[key] for key in ("kind", "name", "commit"))
    if kind not in ("directory", "file", "hub") or not isinstance(name, str):
        raise TypeError("the source is of no known kind, or has no name")
    if kind == "hub" and not _COMMIT.fullmatch(commit):
        raise ValueError("the source is a repository, and its commit is none")
