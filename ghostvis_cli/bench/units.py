"""Figures as people read them: four digits at most, units that fit, "not reported" where there is no number."""

import math

from ghostvis_cli.bench.schema import LATENCIES, STATISTICS, metric

NOT_REPORTED = "not reported"
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def shown(name: str, value: float | None) -> str:
    """The value of the figure called `name`, such as "12.3 ms" for ttft_p95."""
    if value is None:
        return NOT_REPORTED
    unit = metric(name).unit
    if unit == "s":
        return seconds(value)
    if unit == "B":
        return _scaled(value, BYTES)
    if unit == "" and name.endswith(("_rate", "_share")):
        return f"{digits(100 * value)} %"
    return digits(value) + ("/s" if unit == "1/s" else f" {unit}" if unit else "")


def seconds(value: float) -> str:
    return _scaled(value, SECONDS)


def tick(value: float) -> str:
    """Seconds as an axis label: without trailing zeros."""
    number, _, unit = seconds(value).partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def digits(value: float) -> str:
    """A whole number whole; else at least three significant digits, thousands separated, no exponent."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return _significant(value)


def _significant(value: float) -> str:
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 6)}f}"


def percent(change: float) -> str:
    """A change as a signed percentage: 0.0523 -> "+5.2 %"."""
    if math.isinf(change):
        return "any"
    return f"{100 * change:+.1f} %" if abs(change) < 9.995 else f"{100 * change:+,.0f} %"


def title(name: str) -> str:
    """`ttft_p95` -> "time to first token, p95"."""
    base, _, statistic = name.rpartition("_")
    known = metric(name).title
    return f"{known}, {statistic}" if base in LATENCIES and statistic in STATISTICS else known


def _scaled(value: float, scale: tuple[tuple[float, str], ...]) -> str:
    size, unit = next((step for step in scale if abs(value) >= step[0]), scale[-1] if value else scale[0])
    return f"{_significant(value / size) if value else 0} {unit}"
