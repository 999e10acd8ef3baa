"""What a handful of repeats can say: percentiles, intervals, and whether two samples differ. Pure Python.

The unit is a repeat of the whole run, never a request: requests of one run share its warm caches, its queue and
its bad luck, so a thousand of them are no thousand independent measurements. A comparison ranks repeats (Mann-
Whitney, Wilcoxon) instead of trusting a bell curve: one repeat that a cron job fell into moves a rank, not the
verdict. Its intervals are exact for every sample size, which also says when there are too few repeats to tell.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement

# A report holds a dozen metrics that mostly move together. At 99 % each, a table of them raises a false alarm
# in fewer than one comparison of twenty; benchmarks/bench_verdicts.py counts.
CONFIDENCE = 0.99
# The default of runs: enough to find a change of 10 % where repeats vary by 2 % (bench_verdicts.py).
REPEATS = 12
MOST_REPEATS = 1_000  # that bench takes, and compare advises
EXACT_UP_TO = 10_000  # pairs of values; beyond, the normal curve is the same to four digits
DRAWS = 2_000


@dataclass(frozen=True)
class Interval:
    """An estimate, and the range that holds the truth in `confidence` of all cases. Infinite: nothing known."""

    estimate: float
    low: float
    high: float
    confidence: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def excludes(self, value: float) -> bool:
        return self.low > value or self.high < value

    def mapped(self, change: Callable[[float], float]) -> "Interval":
        """The interval of a rising function of the same quantity."""
        return Interval(change(self.estimate), change(self.low), change(self.high), self.confidence)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of unsorted values, linear between neighbours as numpy's default."""
    return percentile_of_ordered(sorted(values), q)


def percentile_of_ordered(ordered: Sequence[float], q: float) -> float:
    """As `percentile`, for values that are sorted already."""
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / max(len(values) - 1, 1))


# --- one sample


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = median,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A bootstrap interval of a statistic. The same values give the same interval.

    Too narrow for fewer than some eight values, where a 95 % interval covers about 85 %.
    """
    draw = random.Random(seed)
    outcomes = [statistic(draw.choices(values, k=len(values))) for _ in range(DRAWS)]
    tail = 50 * (1 - confidence)
    return Interval(
        statistic(values), percentile(outcomes, tail), percentile(outcomes, 100 - tail), confidence
    )


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median between two of the values themselves. Exact for any distribution; 6 values give 95 %."""
    weights = [math.comb(len(values), k) for k in range(len(values) + 1)]
    return _between(sorted(values), weights, median(values), confidence)


# --- two samples


def shift(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """How much higher b lies than a: the median difference (Hodges and Lehmann), Mann-Whitney's interval."""
    differences = sorted(y - x for x in a for y in b)
    if len(differences) > EXACT_UP_TO:
        return _normal(differences, len(a) * len(b) * (len(a) + len(b) + 1) / 12, confidence)
    return _between(differences, _mann_whitney(len(a), len(b)), median(differences), confidence)


def paired_shift(differences: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The centre of paired differences: the median of their pairwise means, Wilcoxon's signed-rank interval."""
    n = len(differences)
    means = sorted((x + y) / 2 for x, y in combinations_with_replacement(differences, 2))
    if len(means) > EXACT_UP_TO:
        return _normal(means, n * (n + 1) * (2 * n + 1) / 24, confidence)
    return _between(means, _signed_rank(n), median(means), confidence)


def ratio(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """b / a for positive values of separate repeats."""
    return shift(_logs(a), _logs(b), confidence).mapped(_exp)


def paired_ratio(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """b / a for positive values where a[i] and b[i] were measured next to each other."""
    differences = [y - x for x, y in zip(_logs(a), _logs(b), strict=True)]
    return paired_shift(differences, confidence).mapped(_exp)


def repeats_needed(confidence: float = CONFIDENCE) -> int:
    """The fewest repeats on both sides for which `shift` has a finite interval: 4 at 95 %, 5 at 99 %."""
    return next(n for n in range(1, 100) if 2 / math.comb(2 * n, n) <= 1 - confidence)


def _logs(values: Sequence[float]) -> list[float]:
    return [math.log(value) for value in values]


def _exp(value: float) -> float:
    return math.exp(value) if value < math.inf else math.inf


# --- how ranks fall by chance


def _between(
    ordered: Sequence[float], weights: Sequence[int], estimate: float, confidence: float
) -> Interval:
    """The k-th value from either end, where chance puts the truth outside in at most 1 - confidence of cases.

    weights[u]: in how many of the equally likely arrangements u of the ordered values lie below the truth.
    """
    allowed = (1 - confidence) / 2 * sum(weights)
    outside, k = 0, 0
    while k < len(ordered) // 2 and outside + weights[k] <= allowed:
        outside += weights[k]
        k += 1
    if not k:
        return Interval(estimate, -math.inf, math.inf, confidence)
    return Interval(estimate, ordered[k - 1], ordered[-k], confidence)


def _normal(ordered: Sequence[float], variance: float, confidence: float) -> Interval:
    from statistics import NormalDist

    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance)
    k = max(math.floor(len(ordered) / 2 - reach), 1)
    return Interval(median(ordered), ordered[k - 1], ordered[-k], confidence)


@lru_cache
def _mann_whitney(n: int, m: int) -> tuple[int, ...]:
    """Arrangements of n among m values by the number of pairs in which the former is lower: a Gaussian binomial."""
    weights = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):  # times 1 - x^(m + i)
            weights[u] -= weights[u - m - i]
        for u in range(i, n * m + 1):  # divided by 1 - x^i
            weights[u] += weights[u - i]
    return tuple(weights)


@lru_cache
def _signed_rank(n: int) -> tuple[int, ...]:
    """Choices of signs by the sum of the ranks 1 to n that are positive: the product of all 1 + x^i."""
    weights = [1] + [0] * (n * (n + 1) // 2)
    for i in range(1, n + 1):
        for u in range(len(weights) - 1, i - 1, -1):
            weights[u] += weights[u - i]
    return tuple(weights)
