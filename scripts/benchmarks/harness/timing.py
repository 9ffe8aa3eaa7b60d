"""Timing in turns: every engine runs a little in each round, so a slow spell hits all alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol


class Engine(Protocol):
    """One way to do some work. `turn` does it for about `seconds`: microseconds a call."""

    name: str
    batch: int

    def turn(self, seconds: float) -> float: ...


class Calls:
    """An engine of Python calls that cycle over copies of a weight."""

    def __init__(self, name: str, batch: int, calls: Sequence[Callable[[], object]]) -> None:
        self.name, self.batch = name, batch
        self._calls = itertools.cycle(calls)
        self._block = 1

    def turn(self, seconds: float) -> float:
        """Two calls warm up; the clock is read about every millisecond."""
        self._run(2)
        calls, start = 0, time.perf_counter()
        while not calls or (passed := time.perf_counter() - start) < seconds:
            self._run(self._block)
            calls += self._block
        passed = time.perf_counter() - start
        self._block = max(1, int(1e-3 * calls / passed))
        return passed / calls * 1e6

    def _run(self, count: int) -> None:
        for call in itertools.islice(self._calls, count):
            call()


def take_turns(engines: Sequence[Engine], rounds: int, seconds: float) -> list[list[float]]:
    """Return the microseconds a call of each engine in each round, after a round to warm up."""
    for engine in engines:
        engine.turn(min(seconds, 0.02))
    turns = [[engine.turn(seconds) for engine in engines] for _ in range(rounds)]
    return [list(times) for times in zip(*turns)]


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """Return the median over the rounds of these / those: drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))
