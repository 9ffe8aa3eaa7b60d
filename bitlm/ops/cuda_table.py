"""Which CUDA kernel multiplies which shape, by the card: measured by `scripts/bench cuda --tune`.

cuda_table.json has the settings of each compute capability that was measured. For the others there
are the defaults below, which follow from counting instructions and bytes (README, "CUDA kernels").
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("cuda_table.json")
# A block stages a single token itself, in shared memory, while that fits beside the rest into the
# 48 KiB that every GPU gives: one launch instead of two, for work that all blocks repeat.
MOST_STAGING_BYTES = 40 * 1024
# The weight is made dense in pieces that stay in the L2 cache.
DENSE_PIECE_BYTES = 32 * 1024 * 1024
NEVER = 1 << 30  # tokens
# What a tile costs in a block of so many: the more, the less of x is read and of codes expanded.
WIDE_COSTS = {4: 1.0, 2: 1.05, 1: 1.15}


@dataclass(frozen=True)
class Settings:
    """What suits a card.

    block_tokens: tokens (1, 2, 4 or 8) that a block of a bit product takes of 1, of 2, of up to 4
    and of more tokens. many_tokens: from so many of 16 bits on (of each expert, on average), codes
    become floats in registers: less work by token than bits, more before the first one.
    wide_tokens: from so many on, the tensor cores of sm_90a multiply those; no other card has them.
    dense_tokens: from so many on, cuBLAS multiplies by a dense copy, piece by piece: making the
    copy is little beside it. dense_tokens_alone, dense_tokens_wide: the same where there is no
    kernel for many tokens, and where there is a wide one. many_tiles, wide_tiles: of 64 rows and
    128 tokens, that a block makes, 1 or 2, of wide ones also 4; 0: what suits the card. few_tokens:
    from so many of 1 and 2 bits on, a bit product takes 8 tokens at a time.
    """

    block_tokens: tuple[int, int, int, int] = (1, 2, 4, 8)
    many_tokens: int = 48
    dense_tokens: int = 1024
    dense_tokens_alone: int = 256
    many_tiles: int = 0
    few_tokens: int = 16
    wide_tokens: int = NEVER
    wide_tiles: int = 0
    dense_tokens_wide: int = 1024

    def block(self, tokens: int) -> int:
        """Return how many of `tokens` tokens a block of a bit product takes."""
        return self.block_tokens[0 if tokens == 1 else 1 if tokens == 2 else 2 + (tokens > 4)]

    def work(self, tokens: int, many: bool, wide: bool, dense: bool) -> str:
        """Return how a product of 16-bit inputs is made: "bits", "many", "wide" or "dense".

        many, wide, dense: whether there are kernels for it.
        """
        wide = wide and self.wide_tokens < NEVER
        limit = self.dense_tokens if many else self.dense_tokens_alone
        if dense and tokens >= (self.dense_tokens_wide if wide else limit):
            return "dense"
        if wide and tokens >= self.wide_tokens:
            return "wide"
        return "many" if many and tokens >= self.many_tokens else "bits"

    def tiles(self, rows: int, tokens: int, multiprocessors: int, experts: int = 1) -> int:
        """Return the tiles of a product of many tokens (of each expert): see many_tiles."""
        enough = experts * -(-rows // 128) * -(-tokens // 128) >= multiprocessors
        return self.many_tiles or 1 + enough

    def tiles_wide(self, rows: int, tokens: int, multiprocessors: int, experts: int = 1) -> int:
        """Return the tiles of a wide product: see wide_tiles."""
        def cost(tiles: int) -> float:
            high, wide = min(64 * tiles, 128), max(64 * tiles, 128)
            blocks = experts * -(-rows // high) * -(-tokens // wide)
            return -(-blocks // multiprocessors) * tiles * WIDE_COSTS[tiles]

        return self.wide_tiles or min(WIDE_COSTS, key=cost)


DEFAULT = Settings()
# What was not measured yet, of cards that have more than others.
DEFAULTS = {"9.0": Settings(wide_tokens=96)}


@cache
def settings(capability: tuple[int, int]) -> Settings:
    """Return what suits cards of a compute capability."""
    key = _key(capability)
    return read().get(key) or DEFAULTS.get(key, DEFAULT)


def read() -> dict[str, Settings]:
    """Return the table by compute capability, as "9.0"."""
    return {key: Settings(**values | {"block_tokens": tuple(values["block_tokens"])})
            for key, values in json.loads(TABLE.read_text("utf-8")).items()}


def write(capability: tuple[int, int], own: Settings) -> None:
    """Set what suits cards of a compute capability, in the table of this checkout."""
    table = read() | {_key(capability): own}
    text = json.dumps({key: asdict(table[key]) for key in sorted(table)}, indent=1)
    TABLE.write_text(text + "\n", "utf-8")
    settings.cache_clear()


def _key(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def staging_bytes(units: int, digits: int) -> int:
    """Return the shared memory of a staged token: words, sums and scale of each unit."""
    return units * (4 * (32 * digits + 4) + (32 if digits == 3 else 16) + 4)


def dense_rows(columns: int) -> int:
    """Return the rows of a dense piece, a multiple of what cuBLAS takes at a time."""
    return max(DENSE_PIECE_BYTES // (2 * columns) // 128, 1) * 128
