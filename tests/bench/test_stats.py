"""Statistics of a handful of repeats: exact where they say so, and as often wrong as they say."""

import math
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_cli.bench import stats

FLOATS = st.floats(-1e6, 1e6)
COMPARISONS = 2_000


def wrong(intervals: Iterable[stats.Interval], truth: float) -> int:
    """How many leave out the truth. One that is not known has promised nothing, so there may be none."""
    found = list(intervals)
    assert len(found) == COMPARISONS and all(interval.known for interval in found)
    return sum(interval.excludes(truth) for interval in found)


@given(st.lists(FLOATS, min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    numpy = pytest.importorskip("numpy")
    # The same interpolation in another order of operations: a few units in the last place of the largest value.
    assert stats.percentile(values, q) == pytest.approx(float(numpy.percentile(values, q)), abs=1e-9 * 1e6)


def test_chance_has_the_weights_that_counting_gives() -> None:
    """Of the 10 ways to choose 2 ranks of 5, and of the 16 choices of signs for 4 ranks."""
    assert stats._mann_whitney(2, 3) == (1, 1, 2, 2, 2, 1, 1)
    assert stats._signed_rank(4) == (1, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1)


def test_an_interval_ends_where_the_published_tables_say() -> None:
    """Mann-Whitney's critical value for 10 and 10 at 99 % is 16 (two-sided), Wilcoxon's for 10 pairs is 3."""
    found = stats.shift([0.0] * 10, [n / 100 for n in range(10)], 0.99)
    differences = sorted(n / 100 for n in range(10) for _ in range(10))
    assert (found.low, found.high) == (differences[16], differences[-17])
    means = sorted((x + y) / 2 for x in range(10) for y in range(x, 10))
    pairs = stats.paired_shift([float(n) for n in range(10)], 0.99)
    assert (pairs.low, pairs.high) == (means[3], means[-4])


def test_too_few_repeats_know_nothing_however_far_apart_they_are() -> None:
    few, enough = stats.repeats_needed() - 1, stats.repeats_needed()
    assert not stats.shift([0.0] * few, [1e9] * few).known
    assert stats.shift([0.0] * enough, [1e9] * enough).excludes(0)


def test_one_repeat_gone_wrong_does_not_hide_a_change() -> None:
    a = [1.00, 1.01, 0.99, 1.02, 0.98, 1.00, 1.01, 0.99, 1.00, 1.01, 0.99, 5.0]
    b = [value * 1.1 for value in a[:-1]] + [1.1]
    found = stats.ratio(a, b)
    assert found.excludes(1)
    assert found.estimate == pytest.approx(1.1, abs=0.01)  # the median of all quotients: within their spread


@pytest.mark.parametrize("repeats", [5, 8, 12])
def test_a_comparison_is_wrong_no_more_often_than_it_says(repeats: int) -> None:
    """Of 2,000 comparisons of equals at 95 %, 100 may be wrong; 130 is three standard errors more.

    Ranks come in steps, so they are wrong a little less often than allowed: with five repeats in 8 of 252 orders,
    63 times. 40 is three standard errors less, and what an interval needlessly wide would stay below.
    """
    random = Random(repeats)

    def sample() -> list[float]:
        return [random.lognormvariate(0, 0.3) for _ in range(repeats)]

    assert 40 <= wrong((stats.ratio(sample(), sample(), 0.95) for _ in range(COMPARISONS)), 1) <= 130


def test_paired_comparisons_hold_their_rate_where_pairs_drift_together() -> None:
    random = Random(1)

    def differences() -> list[float]:
        levels = [random.gauss(0, 5) for _ in range(10)]
        return [random.gauss(level, 1) - random.gauss(level, 1) for level in levels]

    assert 40 <= wrong((stats.paired_shift(differences(), 0.95) for _ in range(COMPARISONS)), 0) <= 130


def test_the_median_lies_in_its_interval_as_often_as_that_says() -> None:
    """The median of a skewed distribution, exp of a normal one, is 1. At most 5 % of 2,000, and three errors."""
    random = Random(2)

    def sample() -> list[float]:
        return [random.lognormvariate(0, 1) for _ in range(9)]

    assert 40 <= wrong((stats.median_interval(sample()) for _ in range(COMPARISONS)), 1) <= 130


@pytest.mark.parametrize(("spread", "found"), [(0.02, 1.0), (0.05, 0.8)])
def test_a_change_of_a_tenth_is_found_by_the_usual_number_of_repeats(spread: float, found: float) -> None:
    """At 99 %: always where repeats vary by 2 %, and in more than four of five comparisons where by 5 %."""
    random = Random(4)

    def sample(level: float) -> list[float]:
        return [level * random.lognormvariate(0, spread) for _ in range(stats.REPEATS)]

    changes = [stats.ratio(sample(1.0), sample(1.1)) for _ in range(200)]
    assert sum(change.low > 1 for change in changes) >= 200 * found
    assert stats.median([change.estimate for change in changes]) == pytest.approx(1.1, abs=0.01)


def test_the_bootstrap_gives_the_same_interval_each_time() -> None:
    values = [1.0, 2.0, 4.0, 3.0, 9.0, 2.5]
    assert stats.bootstrap_interval(values) == stats.bootstrap_interval(values)
    assert (
        stats.bootstrap_interval(values).low <= stats.median(values) <= stats.bootstrap_interval(values).high
    )


def test_large_samples_use_the_normal_curve_and_come_to_the_same() -> None:
    """101 against 101 values is just past the exact tables; 99 against 101 is just before."""
    random = Random(3)
    a, b = ([random.gauss(0, 1) for _ in range(101)] for _ in range(2))
    normal, exact = stats.shift(a, b), stats.shift(a[:99], b)
    # Two values of 101 fewer: the ends move by a fraction of the spread.
    assert normal.low == pytest.approx(exact.low, abs=0.1)
    assert normal.high == pytest.approx(exact.high, abs=0.1)


def test_a_single_value_has_no_deviation() -> None:
    assert stats.deviation([3.0]) == 0
    assert math.isinf(stats.median_interval([3.0]).high)
