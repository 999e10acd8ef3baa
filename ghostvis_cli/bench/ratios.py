"""Several engines of one interleaved run: how each compares with the first, load by load."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ghostvis_cli.bench.schema import Run, metric
from ghostvis_cli.bench.stats import median, paired_ratio

RATIOS = ("requests_per_s", "output_tokens_per_s", "image_tokens_per_s", "ttft_p50", "tpot_p50", "e2e_p50")


def ratios(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """`value` is the engine's figure over the first engine's, the median of repeats; the interval may be unknown.

    Repeats are paired: equal ones had the same rows, next to each other in time.
    """
    names = list(dict.fromkeys(run.engine for run in runs))
    loads = list(dict.fromkeys(run.load for run in runs))
    return [
        found
        for load in loads
        for name in names[1:]
        for figure in RATIOS
        if (found := _ratio([run for run in runs if run.load == load], names[0], name, figure))
    ]


def _ratio(runs: Sequence[Run], base: str, name: str, figure: str) -> dict[str, Any] | None:
    ours, theirs = _values(runs, base, figure), _values(runs, name, figure)
    pairs = [(ours[repeat], theirs[repeat]) for repeat in sorted(ours.keys() & theirs.keys())]
    values = [(a, b) for a, b in pairs if a and b and min(a, b) > 0]
    if not values or len(values) < len(pairs):
        return None
    interval = paired_ratio([a for a, _ in values], [b for _, b in values], 0.95)
    return {
        "load": runs[0].load.name,
        "engine": name,
        "base": base,
        "figure": figure,
        "value": median([b / a for a, b in values]),
        "low": interval.low if interval.known else None,
        "high": interval.high if interval.known else None,
        "repeats": len(values),
    }


def _values(runs: Sequence[Run], name: str, figure: str) -> dict[int, float | None]:
    return {run.repeat: run.figures.get(figure) for run in runs if run.engine == name}


def lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in found:
        between = "" if each["low"] is None else f" ({each['low']:.3g} to {each['high']:.3g}, 95 %)"
        kind = metric(each["figure"])
        wanted = {"higher": "higher is better", "lower": "lower is better"}.get(kind.better, "")
        yield (
            f"{each['engine']} is {each['value']:.3g}x {each['base']} in {each['figure']} at {each['load']}"
            f"{between}: {wanted}"
        )
