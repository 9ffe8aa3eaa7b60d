"""How CUDA kernels are launched for which shapes; `scripts/bench cuda --tune` measures it anew.

Nothing here has been measured yet: the numbers follow from counting instructions and bytes
(README, "CUDA kernels").
"""

from __future__ import annotations

# A block stages a single token itself, in shared memory, while that fits without asking for more
# than every GPU gives: one launch instead of two, for work that all blocks repeat.
MOST_STAGING_BYTES = 48 * 1024


def staging_bytes(units: int, digits: int) -> int:
    """Return the shared memory of a staged token: words, sums and scale of each unit."""
    return units * (4 * (32 * digits + 4) + (32 if digits == 3 else 16) + 4)


def block_tokens(tokens: int) -> int:
    """Return how many tokens a block of a product takes: 1, 2, 4 or 8."""
    return 1 if tokens == 1 else 2 if tokens == 2 else 4 if tokens <= 4 else 8
