"""How CUDA kernels are launched for which shapes; `scripts/bench cuda --tune` measures it anew.

Nothing here has been measured yet: the numbers follow from counting instructions and bytes
(README, "CUDA kernels").
"""

from __future__ import annotations

# A block stages a single token itself, in shared memory, while that fits beside the rest into the
# 48 KiB that every GPU gives: one launch instead of two, for work that all blocks repeat.
MOST_STAGING_BYTES = 40 * 1024


def staging_bytes(units: int, digits: int) -> int:
    """Return the shared memory of a staged token: words, sums and scale of each unit."""
    return units * (4 * (32 * digits + 4) + (32 if digits == 3 else 16) + 4)


def block_tokens(tokens: int) -> int:
    """Return how many tokens a block of a product takes: 1, 2, 4 or 8."""
    return 1 if tokens == 1 else 2 if tokens == 2 else 4 if tokens <= 4 else 8


# From so many tokens of 16 bits on, the weight is made dense piece by piece and cuBLAS multiplies:
# its work grows by token, the making does not. A piece is small enough to stay in the L2 cache.
DENSE_TOKENS = 256
DENSE_PIECE_BYTES = 32 * 1024 * 1024


def dense_rows(columns: int) -> int:
    """Return the rows of a dense piece, a multiple of what cuBLAS takes at a time."""
    return max(DENSE_PIECE_BYTES // (2 * columns) // 128, 1) * 128
