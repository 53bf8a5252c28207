"""What to do to every head, which settings, plan, maths and manifest share; and how large that is. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Channel(str, Enum):
    """Which part of ``M = W_Qᵀ W_K`` is decomposed."""

    full = "full"
    symmetric = "symmetric"
    antisymmetric = "antisymmetric"

    def max_modes(self, d_head: int, d_model: int) -> int:
        """Largest rank the channel can have: ``d_head``, or ``2 d_head`` for the two halves of M."""
        if self is Channel.full:
            return min(d_head, d_model)
        rank = min(2 * d_head, d_model)
        return rank - rank % 2 if self is Channel.antisymmetric else rank


class Select(str, Enum):
    """Which modes are edited; everything but ``dominant`` is a control."""

    dominant = "dominant"
    random = "random"
    bottom = "bottom"
    subspace = "subspace"
    shrink = "shrink"


@dataclass(frozen=True)
class EditRule:
    """Scale the selected modes of a channel by ``alpha``: ``s_j -> alpha s_j``."""

    channel: Channel
    select: Select
    modes: int
    alpha: float

    @property
    def paired_modes(self) -> int:
        """``modes``, rounded up to whole pairs in the antisymmetric channel, where values come in pairs."""
        if self.channel is Channel.antisymmetric and self.select is not Select.subspace:
            return self.modes + self.modes % 2
        return self.modes

    @property
    def takes_modes(self) -> bool:
        """Whether single modes are edited, and not a whole head or a random subspace."""
        return self.select in (Select.dominant, Select.random, Select.bottom)

    @property
    def is_noop(self) -> bool:
        """``alpha = 1`` is the declared identity."""
        return self.alpha == 1.0


class Sums(NamedTuple):
    """Squares of an edit, summed over heads, before anything is rounded; its figures are ratios of them."""

    moved: float  # ‖ΔW_Q‖²
    query: float  # ‖W_Q‖²
    removed: float  # ‖M‖² − ‖M'‖²
    product: float  # ‖M‖²
    reached: float = 0.0  # ‖ΔM P_K‖², of modes of half a matrix
    wanted: float = 0.0  # ‖ΔM‖², likewise
