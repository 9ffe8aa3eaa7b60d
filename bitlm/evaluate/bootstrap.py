"""Percentile bootstrap of a metric over the rows of a data set.

Rows are drawn with replacement (Efron 1979; Koehn 2004 for corpus metrics). The draws depend on
seed and number of rows alone, so that two models measured with the same seed are drawn alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .result import Score, scored

RESAMPLES = 1000

Seed = int | Sequence[int]


def of_sums(statistics: np.ndarray, metric: Callable[[np.ndarray], np.ndarray],
            resamples: int = RESAMPLES, seed: Seed = 0) -> Score:
    """Return the score of a metric that depends on the rows through sums only.

    statistics: [n, k], k figures of each row, as the cell of a confusion matrix that it falls into
    or its n-gram counts. metric: sums float64 [..., k] -> values [...].
    """
    statistics = np.asarray(statistics, np.float64)
    sums = [statistics.sum(0)]
    for drawn in draws(len(statistics), resamples, seed):
        sums.append(np.bincount(drawn, minlength=len(statistics)) @ statistics)
    values = np.asarray(metric(np.stack(sums)), np.float64)
    return scored(float(values[0]), values[1:])


def of_mean(items: Sequence[float], resamples: int = RESAMPLES, seed: Seed = 0) -> Score:
    """Return the score of a mean over rows, items [n]."""
    return of_sums(np.asarray(items, np.float64)[:, None], lambda sums: sums[..., 0] / len(items),
                   resamples, seed)


def of_rows(metric: Callable[[np.ndarray], float], count: int, resamples: int = RESAMPLES,
            seed: Seed = 0) -> Score:
    """Return the score of any metric of `count` rows; metric: row numbers int64 [n] -> value."""
    samples = [metric(drawn) for drawn in draws(count, resamples, seed)]
    return scored(float(metric(np.arange(count))), np.asarray(samples, np.float64))


def draws(count: int, resamples: int, seed: Seed) -> Iterator[np.ndarray]:
    """Yield row numbers, int64 [count], drawn with replacement, `resamples` times."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(count, size=count)
