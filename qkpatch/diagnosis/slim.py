"""A checkpoint without what no recipe is about: a mixture of experts has a hundred thousand such tensors."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from qkpatch.checkpoint.source import Checkpoint

_DIGITS = re.compile(r"[0-9]+")
_MANY = 1000  # of one name but for its numbers; no model has as many layers
_NEAR_ATTENTION = re.compile(
    r"att|query|queries|key|norm|rot|sink|tau|kv|qk|ln(?:[._]|$)|(?:^|[._])w?_?[qk](?:[._]|$)|_[qk](?:[._]|$)",
    re.IGNORECASE,
)


def slim(checkpoint: Checkpoint) -> Checkpoint:
    """The same without tensors of which there are too many to be a layer's, and whose names tell of no attention.

    Many recipes are held against it, and each looks through all names.
    """
    patterns = {name: _DIGITS.sub("#", name) for name in checkpoint.tensors}
    counts = Counter(patterns.values())
    dropped = {
        pattern for pattern, count in counts.items() if count > _MANY and not _NEAR_ATTENTION.search(pattern)
    }
    if not dropped:
        return checkpoint
    headers = {
        shard: replace(
            header,
            tensors={name: ref for name, ref in header.tensors.items() if patterns[name] not in dropped},
        )
        for shard, header in checkpoint.headers.items()
    }
    return replace(checkpoint, headers=headers)
