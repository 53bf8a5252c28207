"""One head's product formed and decomposed as a dense matrix: what the factored way saves. A process of its own.

python scripts/bench/dense.py HIDDEN D_HEAD
"""

from __future__ import annotations

import sys
import time

import torch


def main(hidden: int, d_head: int) -> float:
    """Seconds of a float32 SVD of ``W_Qᵀ W_K`` (hidden, hidden)."""
    W_Q, W_K = torch.randn(2, d_head, hidden).mul(0.02)
    started = time.perf_counter()
    torch.linalg.svd(W_Q.mT @ W_K)
    return time.perf_counter() - started


if __name__ == "__main__":
    print(main(int(sys.argv[1]), int(sys.argv[2])))
