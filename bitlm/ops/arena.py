"""Memory for prepared weights: large chunks on huge pages, shared by small weights.

A weight is streamed once a token; on pages of 4 KiB the walks through the page table cost as much
as the memory itself.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
CHUNK = 16 * HUGE_PAGE
ALIGNMENT = 64


class Arena:
    """Hands out byte tensors; a chunk lives as long as one of its tensors does."""

    def __init__(self) -> None:
        self._chunk: weakref.ref[mmap.mmap] | None = None
        self._next = self._end = 0  # of the chunk's free memory
        self._unlock()
        if hasattr(os, "register_at_fork"):  # the thread that has the lock is not in the child
            os.register_at_fork(after_in_child=self._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def allocate(self, size: int) -> Tensor:
        """Return uint8 [size] of zeros that begins at a multiple of 64 bytes."""
        if size >= CHUNK // 2:
            memory, start = _map(size)
        else:
            with self._lock:
                memory = self._chunk() if self._chunk else None
                if memory is None or self._next + size > self._end:
                    memory, self._next = _map(CHUNK)
                    self._chunk, self._end = weakref.ref(memory), self._next + CHUNK
                start = self._next
                self._next += -(-size // ALIGNMENT) * ALIGNMENT
        # The tensor owns a reference to the mapping, which is unmapped with the last one.
        return torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=size)


def _map(size: int) -> tuple[mmap.mmap, int]:
    """Return a mapping of at least `size` bytes and where its first huge page begins."""
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        memory = mmap.mmap(-1, whole)
    else:
        # Private: shared memory has a policy of huge pages of its own.
        memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages
    address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return memory, -address % HUGE_PAGE

