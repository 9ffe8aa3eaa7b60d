"""Metrics of predictions against labels, each from sums over the rows, so that they bootstrap.

Accuracy, F1 and Matthews correlation follow from the confusion matrix, Pearson's correlation from
the moments, Spearman's is Pearson's of the ranks. What is undefined, because all predictions or all
labels are the same, is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import bootstrap
from .result import Score


def score(name: str, predicted: Sequence[float], labels: Sequence[float], classes: int = 2,
          resamples: int = bootstrap.RESAMPLES, seed: bootstrap.Seed = 0) -> Score:
    """Return a metric of predictions [n] against labels [n] with its confidence interval.

    name: accuracy, f1 (of label 1), matthews (two classes), pearson or spearman. classes: labels
    are 0 to classes - 1; unused by the correlations. resamples: 0 for no interval.
    """
    x, y = np.asarray(predicted), np.asarray(labels)
    if name == "pearson":
        return bootstrap.of_sums(_moments(x, y), _correlation, resamples, seed)
    if name == "spearman":  # the ranks are those within the rows drawn
        return bootstrap.of_rows(
            lambda rows: float(_correlation(_moments(ranks(x[rows]), ranks(y[rows])).sum(0))),
            len(y), resamples, seed)
    metric = OF_CELLS[name]
    cells = np.eye(classes * classes)[y * classes + x]
    return bootstrap.of_sums(
        cells, lambda sums: metric(sums.reshape(*sums.shape[:-1], classes, classes)), resamples,
        seed)


def accuracy(cells: np.ndarray) -> np.ndarray:
    """Return the share of right predictions; cells: [..., labels, predictions]."""
    return np.trace(cells, axis1=-2, axis2=-1) / cells.sum((-2, -1))


def f1(cells: np.ndarray) -> np.ndarray:
    """Return 2 TP / (2 TP + FP + FN) of label 1; cells: [..., labels, predictions]."""
    hits, wrong = 2 * cells[..., 1, 1], cells[..., 0, 1] + cells[..., 1, 0]
    return _ratio(hits, hits + wrong)


def matthews(cells: np.ndarray) -> np.ndarray:
    """Return the correlation of two classes, (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)
    (TN + FN)) (Matthews 1975); cells: [..., labels, predictions]."""
    tn, fp, fn, tp = (cells[..., label, guess] for label in (0, 1) for guess in (0, 1))
    return _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of values [n] from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


OF_CELLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": accuracy, "f1": f1, "matthews": matthews}


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return 1, x, y, xx, yy, xy of each row, [n, 6]."""
    # Around the means: sums of squares far from 0 would lose what the correlation is made of.
    x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1)


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of the summed moments [..., 6]."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread_x, spread_y = n * xx - x * x, n * yy - y * y
    # What rounding leaves of a constant's spread is no spread.
    flat = (spread_x <= 1e-12 * n * xx) | (spread_y <= 1e-12 * n * yy)
    return _ratio(n * xy - x * y, np.where(flat, 0, np.sqrt(np.abs(spread_x * spread_y))))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=b > 0)
