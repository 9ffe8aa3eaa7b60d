"""What a run needs of memory, and keeping it that small while large models stream through."""

from __future__ import annotations

import ctypes
import re
import sys
from functools import lru_cache

from .calibration.replay import MEMORY_BUDGET
from .plan import Entry, Plan

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SMALL = 1 << 20


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def return_freed_memory() -> None:
    """Make glibc give freed blocks of 1 MiB and more back to the system from now on, and now.

    Without it a process keeps what its largest layer once needed. Does nothing elsewhere.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _SMALL)
        libc.mallopt(_M_TRIM_THRESHOLD, _SMALL)
        libc.malloc_trim(0)


def peak_memory(plan: Plan, calibration_tokens: int = 0) -> int:
    """Return about how many bytes of its own a run needs at most, the libraries included.

    Weights are mapped, not loaded: data-free encoding holds float32 copies of a part of one weight.
    Calibration holds the Hessians of one block, the dense copy of one block, the factor of the
    largest Hessian and the outputs of one block.
    """
    libraries = 300 << 20
    if not calibration_tokens:
        return libraries + (64 << 20)
    blocks: dict[str, list[Entry]] = {}
    for entry in plan.entries:
        head = re.match(r".*?\.\d+\.", entry.name)
        blocks.setdefault(head[0] if head else "", []).append(entry)
    widest = max(entry.target.columns for entry in plan.entries)
    largest = max(entry.target.rows * entry.target.columns for entry in plan.entries)
    block = max(sum(4 * e.target.numel for e in entries) for name, entries in blocks.items() if name
                or len(blocks) == 1)
    hessians = max(sum(4 * k * k * max(experts, 1) for k, experts in
                       {(e.target.columns, e.target.experts) for e in entries} for _ in range(2))
                   for entries in blocks.values())
    outputs = min(4 * calibration_tokens * widest, MEMORY_BUDGET)
    return libraries + block + hessians + 12 * widest * widest + 16 * largest + outputs
