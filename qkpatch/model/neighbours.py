"""What stands beside what in a checkpoint's names: stacks of layers, token embeddings, and words for no language."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from qkpatch.checkpoint.header import TensorRef

_LONGEST = 1000  # characters: a longer name is no layer's
_NUMBER = re.compile(r"(?:(?<=\.)|^)(?:0|[1-9][0-9]{0,5})(?=\.)")
_EMBEDDING = re.compile(r"[^.]*(?:emb|wte)[^.]*(?:\.[^.0-9]+)?\.weight", re.IGNORECASE)
_TOKENS = re.compile(
    r"(?:^|\.)(?:(?:embeddings?|wte)\.)?(?:embed_(?:tokens|in)|wte|(?:word_|tok_|token_)?embed(?:ding)?s?)\.weight$"
)
_ATTENTION = re.compile(r"att|qkv|(?:^|[._])(?:q_|w?q\.|query|mixer)", re.IGNORECASE)
# A language model that is missed costs a --prefix; another's layers that are taken cost the model.
_OTHERS = re.compile(
    r"vision|visual|vit(?:[._0-9]|$)|audio|speech|(?<!lang_)(?<!language_)encoder|q_?former|resampler|perceiver|talker"
    r"|siglip|image|(?:^|[._])(?:clip|action|patch)",
    re.IGNORECASE,
)
_Home = tuple[TensorRef | None, str]  # a token embedding, and blocks beside it


@dataclass(frozen=True)
class Names:
    """The names of a checkpoint's tensors, read once for all recipes."""

    tensors: Mapping[str, TensorRef]
    _stacks: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)  # those of a module
    _seen: dict[frozenset[str], tuple[_Home, _Home]] = field(default_factory=dict)

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(name for name in self.tensors if len(name) <= _LONGEST)

    def under(self, start: str) -> list[str]:
        """The names that begin with ``start``."""
        names = self._sorted
        return names[bisect_left(names, start) : bisect_left(names, start + chr(0x10FFFF))]

    def stacks(self, module: str) -> dict[str, tuple[int, ...]]:
        """Layers that hold ``module``, by what their names begin with."""
        if module not in self._stacks:
            found: dict[str, set[int]] = {}
            for name in (name for name in self.tensors if f".{module}." in name and len(name) <= _LONGEST):
                stem = name.rpartition(f".{module}.")[0]
                numbers = list(_NUMBER.finditer(f"{stem}."))
                if numbers and not set(stem) & set("{}"):
                    begin, end = numbers[-1].span()
                    found.setdefault(f"{stem[:begin]}{{layer}}{stem[end:]}.", set()).add(int(stem[begin:end]))
            self._stacks[module] = {prefix: tuple(sorted(layers)) for prefix, layers in found.items()}
        return self._stacks[module]

    @cached_property
    def homes(self) -> dict[str, tuple[list[TensorRef], set[str]]]:
        """By what the names of token embeddings begin with: they, and the lists of blocks with attention beside."""
        found: dict[str, tuple[list[TensorRef], set[str]]] = {}
        for name in self._sorted:
            token = _TOKENS.search(name) if name.endswith(".weight") else None
            if token and len(self.tensors[name].shape) == 2:
                above = name[: token.start() + name[token.start() :].startswith(".")]
                found.setdefault(above, ([], set()))[0].append(self.tensors[name])
        for name in self._sorted:
            for number in _NUMBER.finditer(name) if found and _ATTENTION.search(name) else ():
                blocks = name[: number.start()]
                above = parent(blocks)
                if above in found and blocks:
                    found[above][1].add(blocks)
        return found

    def rival(self, blocks: str, size: int, whole: frozenset[str]) -> tuple[str, str]:
        """Why these are not the only blocks that know ``size`` tokens, and the others, which ``whole`` tells anyway."""
        own, beside = self.homes.get(parent(blocks), ([], set()))
        if beside - {blocks}:
            other = min(beside - {blocks}, key=_likeliest)
            return f"{own[0].name} stands beside {other}, too, which may be the language model", other
        (largest, large), (stray, strayed) = self._rivals(whole)
        if largest is not None and large != blocks and _rows(largest) > size:
            return f"they know {size} tokens, and {largest.name} has {_rows(largest)} rows", large
        if stray is not None and _rows(stray) >= size:
            return f"{stray.name} stands beside {strayed}, which may be the language model", strayed
        return "", ""

    def _rivals(self, whole: frozenset[str]) -> tuple[_Home, _Home]:
        """The largest token embedding that has blocks beside it, and the largest whose blocks are none of ``whole``."""
        if whole not in self._seen:
            tops = [(max(refs, key=_rows), lists) for refs, lists in self.homes.values() if lists]
            strays = [(ref, lists - whole) for ref, lists in tops if lists - whole]
            self._seen[whole] = _largest(tops), _largest(strays)
        return self._seen[whole]

    def embeddings(self, above: str) -> list[TensorRef]:
        """What looks like an embedding of anything directly there."""
        near = (name for name in self.under(above) if "emb" in name.lower() or "wte" in name.lower())
        return [self.tensors[name] for name in near if _EMBEDDING.fullmatch(name[len(above) :])]


def _rows(ref: TensorRef | None) -> int:
    return 0 if ref is None else ref.shape[0]


def _largest(homes: list[tuple[TensorRef, set[str]]]) -> _Home:
    ref, lists = max(homes, key=lambda home: _rows(home[0]), default=(None, {""}))
    return ref, min(lists, key=_likeliest)


def _likeliest(blocks: str) -> tuple[bool, str]:
    return says_other(blocks) is not None, blocks


def parent(blocks: str) -> str:
    """What the names of a list's own module begin with: ``a.b.layers.`` -> ``a.b.``."""
    head, dot, _ = blocks.rstrip(".").rpartition(".")
    return head + dot


def says_other(name: str) -> str | None:
    """The word in a name by which it is no language model's: ``model.vision_layers.`` -> ``vision``."""
    found = _OTHERS.search(name)
    return found[0].strip("._") if found else None
