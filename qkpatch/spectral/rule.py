"""What to do to every head, which settings, plan, maths and manifest share; and how large that is. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

_SLACK = 1e-9  # relative: what holds a share of the energy but for rounding holds it, on every machine


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
    """Scale the selected modes of a channel by ``alpha``: ``s_j -> alpha s_j``.

    With ``energy`` E each head takes ``r = min {k : Σ_{j≤k} s_j² ≥ E Σ_j s_j²}`` of the channel's modes, strongest
    first, at least ``min_modes`` and at most ``modes``. Controls take as many as the dominant selection would.
    """

    channel: Channel
    select: Select
    modes: int
    alpha: float
    energy: float | None = None
    min_modes: int | None = None  # under energy alone

    @property
    def paired_modes(self) -> int:
        """``modes``, rounded up to whole pairs in the antisymmetric channel, where values come in pairs."""
        return self._paired(self.modes)

    def _paired(self, modes: int) -> int:
        is_paired = self.channel is Channel.antisymmetric and self.select is not Select.subspace
        return modes + modes % 2 if is_paired else modes

    def count(self, values: Sequence[float]) -> int:
        """How many modes the dominant selection takes of a head of these ``values``, its rank aside."""
        if self.energy is None:
            return self.paired_modes
        held = list(accumulate(value * value for value in values))
        enough = self.energy * held[-1] * (1 - _SLACK)
        r = next(r for r, share in enumerate(held, 1) if share >= enough)
        return self._paired(min(max(r, self.min_modes or 1), self.modes))

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
    noise: float = 0.0  # ‖stored W_Q − edited W_Q‖², where rows are formed
