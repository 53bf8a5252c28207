"""How large an edit is, known from small cores alone: nothing as long as ``d_model`` is formed for it.

With ``ρ_j = |P_K v_j|``, the part of ``v_j`` in the row space of W_K (1 in the full channel), an edit has

    ‖ΔW_Q‖² = (1 − α)² Σ s_j² ‖(W_K⁺)ᵀ v_j‖²            ‖M‖² − ‖M'‖² = Σ s_j² (2 (1 − α) − (1 − α)² ρ_j²)

since the ``u_j`` are orthonormal and ``M P_K = M``; in the full channel the latter is ``(1 − α²) Σ s_j²``. Of a
subspace G they are ``(1 − α)² ‖W_Q G‖²`` and ``(1 − α²) ‖(W_Q G)ᵀ W_K‖²``, of a shrink by c ``(1 − c)² ‖W_Q‖²`` and
``(1 − c²) ‖M‖²``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qkpatch.spectral.edit import Decomposed, haar_subspaces, select_modes, shrink_factor
from qkpatch.spectral.lazy import cached_property
from qkpatch.spectral.product import Spectrum
from qkpatch.spectral.rule import Channel, EditRule, Select, Sums


@dataclass(frozen=True)
class Foreseen:
    """The sizes of all edits of some heads in one channel."""

    of: Decomposed

    @cached_property
    def _heads(self) -> list[tuple[Spectrum, float, list[list[float]]]]:
        """Each one's spectrum and ``‖W_Q‖²``; by mode ``‖ΔW_Q‖²`` were it removed, ``s_j²`` and ``s_j² ρ_j²``."""
        spectra, modes = self.of.modes
        R, energy = self.of.product.query.R, modes.S.square()
        if self.of.channel is Channel.full:
            A, reached = R.mT @ modes.U_core, energy
        else:
            key = modes.product.key  # in a basis of both weights, as V_core is
            mapped = key.pinv_core @ modes.V_core
            A, reached = mapped * modes.S[:, None], energy * (key.R @ mapped).square().sum(-2)
        squares = torch.stack([A.square().sum(-2), energy, reached], dim=1)
        return list(zip(spectra, R.square().sum((-2, -1)).tolist(), squares.tolist(), strict=True))

    def sums(self, rule: EditRule, generators: Sequence[torch.Generator]) -> list[Sums]:
        """Of each head, edited as by :func:`edit_query`, which raises the same."""
        scale, found = 1 - rule.alpha, list[Sums]()
        drawn = self._drawn(rule, generators) if rule.select is Select.subspace else []
        for i, (spectrum, query, squares) in enumerate(self._heads):
            product, half = spectrum.frobenius**2, (0.0, 0.0)
            if drawn:
                moved, energy = drawn[i]
                found.append(Sums(scale**2 * moved, query, (1 - rule.alpha**2) * energy, product))
                continue
            at = select_modes(spectrum, rule, generators[i])
            moved, energy, reached = (sum(of_mode[j] for j in at) for of_mode in squares)
            size, removed = scale**2 * moved, 2 * scale * energy - scale**2 * reached
            if rule.select is Select.shrink:
                kept = shrink_factor(i, math.sqrt(size), math.sqrt(query))
                size, removed = (1 - kept) ** 2 * query, (1 - kept**2) * product
            elif rule.channel is not Channel.full:
                half = (scale**2 * reached, scale**2 * energy)
            found.append(Sums(size, query, removed, product, *half))
        return found

    def _drawn(self, rule: EditRule, generators: Sequence[torch.Generator]) -> list[list[float]]:
        """``‖W_Q G‖²`` and ``‖(W_Q G)ᵀ W_K‖²`` of each head."""
        wanted = [rule.count(spectrum.S.tolist()) for spectrum, _, _ in self._heads]
        W_Q_G = self.of.row_space[0].R.mT @ haar_subspaces(self.of, wanted, generators)[0]
        norms = [torch.linalg.matrix_norm(x).square() for x in (W_Q_G, self.of.product.key.R @ W_Q_G)]
        sizes: list[list[float]] = torch.stack(norms, dim=-1).tolist()
        return sizes
