import math

import numpy as np
import pytest

from bitlm.evaluate.metrics import ranks, score

LABELS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
GUESSES = [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]  # TP 4, FN 1, TN 3, FP 2


def value(name, predicted, labels, **options):
    return score(name, predicted, labels, resamples=0, **options).value


def test_counts_by_hand():
    assert value("accuracy", GUESSES, LABELS) == 7 / 10
    assert value("f1", GUESSES, LABELS) == 2 * 4 / (2 * 4 + 2 + 1)
    assert value("matthews", GUESSES, LABELS) == pytest.approx(
        (4 * 3 - 2 * 1) / math.sqrt((4 + 2) * (4 + 1) * (3 + 2) * (3 + 1)))


def test_many_classes():
    assert value("accuracy", [0, 1, 2, 2], [0, 1, 2, 1], classes=3) == 0.75


def test_what_is_undefined_is_zero():
    assert value("matthews", [1, 1, 1], [0, 1, 1]) == 0
    assert value("f1", [0, 0], [0, 0]) == 0
    for name in ("pearson", "spearman"):
        assert value(name, [0.1, 0.1, 0.1], [1.0, 2.0, 5.0]) == 0


def test_correlations_by_their_formulas():
    generator = np.random.default_rng(0)
    x = generator.normal(size=60) + 1000
    y = 2 * x + generator.normal(size=60)
    assert value("pearson", x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    # Without ties Spearman's is 1 - 6 sum d^2 / (n (n^2 - 1)).
    d = ranks(x) - ranks(y)
    assert value("spearman", x, y) == pytest.approx(1 - 6 * (d * d).sum() / (60 * 3599))
    assert value("spearman", [1, 2, 3], [1.0, 10.0, 1e9]) == pytest.approx(1)


def test_equal_values_share_their_ranks():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_all_are_those_of_the_usual_libraries():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(4)
    for _ in range(5):
        labels, guesses = generator.integers(2, size=(2, 40))
        assert value("accuracy", guesses, labels) == metrics.accuracy_score(labels, guesses)
        assert value("f1", guesses, labels) == pytest.approx(metrics.f1_score(labels, guesses))
        assert value("matthews", guesses, labels) == pytest.approx(
            metrics.matthews_corrcoef(labels, guesses))
        x, y = generator.normal(size=(2, 40)).round(1)
        assert value("pearson", x, y) == pytest.approx(stats.pearsonr(x, y)[0])
        assert value("spearman", x, y) == pytest.approx(stats.spearmanr(x, y)[0])


def test_intervals_hold_the_value_and_are_never_nan():
    for name in ("accuracy", "f1", "matthews", "pearson", "spearman"):
        found = score(name, GUESSES, LABELS, resamples=200)
        assert found.low <= found.value <= found.high
        assert np.isfinite(found.samples).all()
