"""A CUDA device that is not there: tensors that say they are on it, and compute on the CPU.

As on a real one, an operation on tensors of the card and of the host fails, but for copies from one to the other and
numbers of no dimension. What a card computes, and how fast, this cannot tell.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("cuda", 0)
aten = torch.ops.aten
# Between devices, or from a tensor of either to a Python number.
MAY_MIX = {aten.copy_.default, aten._to_copy.default}


class OnCard(Tensor):
    """A tensor of the card; ``inner`` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        self = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=CARD
        )
        self.inner = inner
        return self

    def __repr__(self) -> str:
        return f"OnCard({self.inner!r})"

    # These would look for a driver.
    def tolist(self) -> Any:
        return self.inner.tolist()

    def nonzero(self) -> OnCard:
        return OnCard(self.inner.nonzero())

    def __float__(self) -> float:
        return float(self.inner)

    def __bool__(self) -> bool:
        return bool(self.inner)

    def __getitem__(self, index: Any) -> OnCard:
        return OnCard(self.inner[tree_map(_inner, index)])

    def __setitem__(self, index: Any, value: OnCard) -> None:
        self.inner[tree_map(_inner, index)] = value.inner  # AttributeError: not from the host

    def copy_(self, source: Tensor, non_blocking: bool = False) -> OnCard:
        self.inner.copy_(_inner(source))
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """While this holds, in one thread, tensors can be made on the card and sent to it."""

    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self.calls = calls  # what ran on the card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = run(func, args, kwargs or {})
        if any(isinstance(t, OnCard) for t in tree_flatten(result)[0]):
            self.calls[func.overloadpacket.__name__] += 1
        return result


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    is_on_card = any(isinstance(t, OnCard) for t in tensors)
    strangers = [t for t in tensors if not isinstance(t, OnCard) and t.dim()]
    if is_on_card and strangers and func not in MAY_MIX:
        raise RuntimeError(
            f"{func}: tensors on the card and on the host, {[tuple(t.shape) for t in strangers]}"
        )
    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        is_on_card = torch.device(target).type == "cuda"
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func is aten.copy_.default:
        return args[0]
    return tree_map(_on_card, result) if is_on_card else result


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnCard) else value


def _on_card(value: Any) -> Any:
    return OnCard(value) if isinstance(value, Tensor) else value
