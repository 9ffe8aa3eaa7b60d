"""What a model scored on a task: metrics with confidence intervals, facts, predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LEVEL = 0.95  # of the confidence intervals


@dataclass(frozen=True)
class Score:
    """A metric and its confidence interval.

    low, high: None where nothing was resampled. samples: float64 [resamples], the metric of the
    resampled rows; the same resample has the same rows for every model that was measured with the
    same seed.
    """

    value: float
    low: float | None = None
    high: float | None = None
    samples: np.ndarray | None = field(default=None, repr=False, compare=False)

    def minus(self, other: Score) -> Score:
        """Return the difference to another model's score, paired where both were resampled."""
        difference = self.value - other.value
        if self.samples is None or other.samples is None or len(self.samples) != len(other.samples):
            return Score(difference)
        return scored(difference, self.samples - other.samples)

    def to_dict(self) -> dict[str, float]:
        if self.low is None or self.high is None:
            return {"value": self.value}
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Result:
    """What a model scored on one task.

    scores: by metric. headline: the metric to quote when there is room for one. facts: JSON types,
    rows among them. predictions: one record a row, in the order of the rows. baselines: metrics of
    what needs no model, by its name.
    """

    task: str
    scores: dict[str, Score]
    headline: str
    facts: dict[str, Any]
    predictions: list[dict[str, Any]] = field(default_factory=list, repr=False)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the predictions as JSON types."""
        return {"task": self.task, **self.facts, "headline": self.headline,
                "metrics": {name: score.to_dict() for name, score in self.scores.items()},
                **({"baselines": self.baselines} if self.baselines else {})}


def scored(value: float, samples: np.ndarray) -> Score:
    """Return a score with the percentile interval of its samples, none of an empty array."""
    if not len(samples):
        return Score(value)
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Score(value, float(low), float(high), samples)


def mean(scores: Sequence[Score]) -> Score:
    """Return the mean of scores, with an interval where all of them were resampled alike."""
    value = sum(score.value for score in scores) / len(scores)
    samples = [score.samples for score in scores]
    if any(each is None for each in samples) or len({len(each) for each in samples}) > 1:
        return Score(value)
    return scored(value, np.mean(samples, axis=0))


def agreement(result: Result, other: Result) -> float | None:
    """Return the share of rows that two models predict alike; None where they predict no labels or
    texts."""
    pairs = [(one["prediction"], two["prediction"])
             for one, two in zip(result.predictions, other.predictions)
             if isinstance(one.get("prediction"), int | str)]
    return sum(one == two for one, two in pairs) / len(pairs) if pairs else None


def shown(metric: str, score: Score, sign: bool = False) -> str:
    """Return a score for people, with its interval: ROUGE, BLEU and chrF have two decimals."""
    digits = 2 if metric.startswith(("rouge", "bleu", "chrf")) else 4
    form = f"{'+' * sign}.{digits}f"
    if score.low is None or score.high is None:
        return f"{score.value:{form}}"
    return f"{score.value:{form}} [{score.low:{form}}, {score.high:{form}}]"
