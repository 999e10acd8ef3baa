"""When requests are sent in an open loop: decided before the run, so that a slow server can't slow its clients."""

import math
from collections.abc import Iterator
from itertools import count
from random import Random

from ghostvis_cli.bench.schema import Load


def schedule(load: Load, random: Random) -> Iterator[float]:
    """Seconds after the start, without end. The first request is sent at once.

    poisson   gaps drawn from an exponential distribution: clients that know nothing of each other
    constant  equal gaps
    """
    assert load.request_rate is not None
    due = 0.0  # requests due by now
    for _ in count():
        yield _when(due, load.request_rate, load.ramp_up_s)
        due += 1.0 if load.arrival == "constant" else -math.log(1 - random.random())


def _when(due: float, rate: float, ramp_up_s: float) -> float:
    """The time by which so many are due, the rate rising in a straight line until `ramp_up_s`.

    due(t) = rate t^2 / (2 ramp) during the ramp, rate (t - ramp / 2) after it.
    """
    if due < rate * ramp_up_s / 2:
        return math.sqrt(2 * ramp_up_s * due / rate)
    return due / rate + ramp_up_s / 2
