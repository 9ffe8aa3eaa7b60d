"""Timing on a GPU: graphs of many calls between events; what the card is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Cycles for which the card is kept busy, so that the launch of a graph is over when it begins.
_HEAD_START = 1_000_000


class Graph:
    """A CUDA graph of some calls, captured after each has run once."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self._count = len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._kept = [call() for call in calls]
        self._graph.replay()

    def microseconds(self) -> float:
        """Return the time of one of the calls, over one replay of all of them."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / self._count


def copies_beyond_cache(size: int) -> int:
    """Return how many copies of `size` bytes a round must go over to read none from the cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(-(-3 * cache // size), 8)


def copy_bandwidth() -> float:
    """Return bytes a second of a large copy, read and written ones counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    graph = Graph([copy] * 4)
    times = sorted(graph.microseconds() for _ in range(11))
    return 2 * source.numel() / (times[5] * 1e-6)


def describe() -> dict[str, object]:
    """Return card and versions, without names of hosts."""
    card = torch.cuda.get_device_properties(0)
    return {"gpu": card.name, "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count, "l2_bytes": card.L2_cache_size,
            "memory_bytes": card.total_memory, "torch": torch.__version__,
            "cuda": torch.version.cuda}
