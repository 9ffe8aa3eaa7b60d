import numpy as np
import pytest

from bitlm.evaluate.bootstrap import draws, of_mean, of_rows, of_sums
from bitlm.evaluate.result import Score, mean, scored


def test_constant_data_has_no_width():
    score = of_mean([0.25] * 12, resamples=50)
    assert score.value == score.low == score.high == 0.25


def test_an_interval_is_that_of_its_resamples():
    items = np.random.default_rng(3).normal(size=40)
    score = of_mean(items, resamples=200, seed=5)
    means = [items[rows].mean() for rows in draws(40, 200, 5)]
    assert score.value == pytest.approx(items.mean())
    assert (score.low, score.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert score.samples == pytest.approx(np.array(means))


def test_the_interval_of_a_mean_is_near_the_normal_one():
    items = np.random.default_rng(0).normal(size=400)
    score = of_mean(items, resamples=2000)
    half = 1.96 * items.std() / 20
    assert score.high - score.value == pytest.approx(half, rel=0.1)
    assert score.value - score.low == pytest.approx(half, rel=0.1)


def test_sums_and_rows_draw_alike():
    items = np.random.default_rng(1).random((30, 2))

    def ratio(sums):
        return sums[..., 0] / sums[..., 1]

    sums = of_sums(items, ratio, 100, [7, 1])
    rows = of_rows(lambda drawn: ratio(items[drawn].sum(0)), 30, 100, [7, 1])
    assert sums.samples == pytest.approx(rows.samples)
    assert sums.value == pytest.approx(rows.value)


def test_the_seed_decides():
    items = np.random.default_rng(1).random(30)
    first, again, other = (of_mean(items, 100, seed) for seed in (0, 0, 1))
    assert (first.low, first.high) == (again.low, again.high)
    assert (first.low, first.high) != (other.low, other.high)
    assert first.value == other.value


def test_no_resamples_no_interval():
    score = of_mean([1.0, 2.0], resamples=0)
    assert score == Score(1.5) and score.to_dict() == {"value": 1.5}


def test_differences_are_paired():
    items = np.random.default_rng(2).random(50)
    one, two = of_mean(items + 0.1), of_mean(items)
    difference = one.minus(two)
    assert difference.value == pytest.approx(0.1)
    # The same rows are drawn for both, so what the rows share cancels.
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.1))
    assert one.high - one.low > 0.1
    assert one.minus(Score(0.5)).low is None


def test_means_of_scores():
    samples = np.array([0.0, 1.0, 2.0])
    both = mean([scored(1.0, samples), scored(3.0, samples + 2)])
    assert both.value == 2 and both.samples.tolist() == [1, 2, 3]
    assert mean([scored(1.0, samples), Score(2.0)]) == Score(1.5)
