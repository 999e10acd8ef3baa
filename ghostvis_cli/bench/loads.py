"""Load points from how they are typed: one of --concurrency or --request-rate, or a sweep over either."""

from typing import Literal, cast

from ghostvis_cli.bench.schema import Load
from ghostvis_cli.errors import UsageError

SWEEP_HINT = "--sweep concurrency=1,2,4,8"
MOST_IN_FLIGHT = 65_536
LOWEST_RATE, HIGHEST_RATE = 1e-6, 1e6  # a report keeps six digits


def loads(
    concurrency: int | None, request_rate: float | None, arrival: str, ramp_up_s: float, sweep: str | None
) -> tuple[Load, ...]:
    """Empty where nothing was chosen. With a rate, `concurrency` is the most in flight."""
    if arrival not in ("poisson", "constant"):
        raise UsageError("--arrival is poisson or constant")
    kind = cast(Literal["poisson", "constant"], arrival)
    if request_rate is not None and not LOWEST_RATE <= request_rate <= HIGHEST_RATE:
        raise UsageError("--request-rate is a number above 0", hint="--request-rate 20")
    if sweep is not None:
        name, values = _swept(sweep)
        if name == "concurrency" and (concurrency is not None or request_rate is not None):
            raise UsageError("--sweep concurrency has no place beside --concurrency or --request-rate")
        if name == "concurrency":
            return tuple(Load(concurrency=int(value), ramp_up_s=ramp_up_s) for value in values)
        if request_rate is not None:
            raise UsageError("--sweep request-rate has no place beside --request-rate")
        return tuple(Load(concurrency, value, kind, ramp_up_s) for value in values)
    if request_rate is not None:
        return (Load(concurrency, request_rate, kind, ramp_up_s),)
    return () if concurrency is None else (Load(concurrency=concurrency, ramp_up_s=ramp_up_s),)


def _swept(text: str) -> tuple[str, list[float]]:
    name, _, listed = text.partition("=")
    name = name.strip().replace("_", "-")
    try:
        values = [float(each) for each in listed.split(",")]
    except ValueError:
        values = []
    most = {"concurrency": MOST_IN_FLIGHT, "request-rate": HIGHEST_RATE}.get(name, 0)
    whole = name != "concurrency" or all(value == int(value) for value in values if abs(value) < 1e9)
    if not values or not whole or not all(LOWEST_RATE <= value <= most for value in values):
        raise UsageError(f"--sweep {text!r} is no list of load points", hint=SWEEP_HINT)
    return name, list(dict.fromkeys(values))  # a point typed twice would mix its repeats
